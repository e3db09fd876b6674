"""Compare two folders of pictures of the same names: streamed, a batch in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from calib.base.device import cores
from calib.base.errors import CalibError, ConfigError
from calib.base.progress import Progress
from calib.evaluation.agreement import FORM, read_prompts
from calib.evaluation.measures import (
    DEFAULT,
    MEASURES,
    Chosen,
    Sources,
    check_names,
    check_sources,
    choose,
    ordering,
    worst_first,
)
from calib.evaluation.metrics import MOST_PSNR, WINDOW, Interval, bootstrap_columns
from calib.evaluation.pictures import Picture, matched, pictures_in, read_picture
from calib.evaluation.sets import SetDistance

import numpy as np
from numpy.typing import NDArray

#: Of measures that need no network.
NOTHING = Sources(Path())
#: Pictures, or pairs of them, that are looked at at once.
BATCH = 16


@dataclass(frozen=True)
class FolderComparison:
    """What two folders' pictures have in common: pairs in the order of their names.

    Attributes:
        values: (pairs,) by measure; the PSNR of equal pictures is inf.
        grey: pictures of one channel, in either folder.
        cut: prompts of which a CLIP reads the beginning alone.
    """

    folders: tuple[Path, Path]
    pairs: Mapping[str, tuple[Path, Path]]
    values: Mapping[str, NDArray[np.float64]]
    sets: Mapping[str, SetDistance]
    sizes: Mapping[tuple[int, int], int]
    grey: int
    cut: int = 0

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Mean and 95% interval over pairs, by measure of pairs."""
        if not self.values:
            return {}
        columns = np.stack([np.minimum(own, MOST_PSNR) for own in self.values.values()], axis=1)
        return dict(zip(self.values, bootstrap_columns(columns), strict=True))

    @property
    def worst_by(self) -> str | None:
        """The measure by which pairs are ordered; None where there is none of pairs."""
        return ordering(self.values)

    @property
    def order(self) -> list[int]:
        """Places of the pairs, worst first by :attr:`worst_by`; of none, in the order of their names."""
        if self.worst_by is None:
            return list(range(len(self.pairs)))
        return worst_first(self.values[self.worst_by], self.worst_by)


def compare_folders(
    a: Path, b: Path, names: Sequence[str] = DEFAULT, sources: Sources = NOTHING, prompts: Path | None = None
) -> FolderComparison:
    """Compare pictures of the same name in the folders ``a`` and ``b`` by the measures ``names``.

    Args:
        prompts: a file with the prompt of each picture, for a measure that reads them.

    Raises:
        CalibError: names do not match, sizes differ, a picture cannot be compared or lacks its prompt.
    """
    pairs = matched(a, b)
    check_names("--metrics", names, len(pairs))
    check_sources(names, sources)
    texts = _texts(prompts, names, list(pairs))
    chosen = choose(names, sources)
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in chosen.pairs}
    a_vectors, b_vectors = list[dict[str, NDArray[np.float32]]](), list[dict[str, NDArray[np.float32]]]()
    sizes: dict[tuple[int, int], int] = {}
    grey = 0
    with Progress("compare pictures", len(pairs), "pair", delay=2) as progress, ThreadPoolExecutor(cores()) as pool:
        for shown in _batches(list(pairs)):
            batch = [pairs[name] for name in shown]
            read = list(pool.map(_read_pair, batch))
            if "ssim" in names:
                _check_window(batch, read)
            for one, other in read:
                grey += one.grey + other.grey
                height, width, _ = one.pixels.shape
                sizes[width, height] = sizes.get((width, height), 0) + 1
            said = [texts[name] for name in shown if texts]
            for name, own in chosen.of_pairs([(a.pixels, b.pixels) for a, b in read], said, pool.map).items():
                values[name].append(own)
            a_vectors.append(chosen.vectors([one.pixels for one, _ in read]))
            b_vectors.append(chosen.vectors([other.pixels for _, other in read]))
            progress.advance(len(batch))
    return FolderComparison(
        (a, b),
        pairs,
        {name: np.concatenate(own) for name, own in values.items()},
        chosen.of_sets(chosen.joined(a_vectors), chosen.joined(b_vectors), paired=True),
        sizes,
        grey,
        chosen.truncated(list(texts.values())),
    )


def _texts(prompts: Path | None, names: Sequence[str], pictures: Sequence[str]) -> dict[str, str]:
    """Prompts by picture; none where no measure of ``names`` reads them."""
    reading = [name for name in names if MEASURES[name].of_texts]
    if prompts is None and reading:
        raise ConfigError(f"--metrics={reading[0]}: reads the prompts; name their file, --prompts FILE: {FORM}")
    if prompts is not None and not reading:
        raise ConfigError.bad_value("--prompts", prompts, "only clip_score reads it; add that to --metrics")
    return {} if prompts is None else read_prompts(prompts, pictures)


def vectors_of(folder: Path, chosen: Chosen) -> dict[str, NDArray[np.float32]]:
    """Vectors of all pictures in ``folder``, for each measure of sets; of sizes of any kind."""
    paths, found = list(pictures_in(folder).values()), list[dict[str, NDArray[np.float32]]]()
    with Progress("read the reference", len(paths), "picture", delay=2) as progress:
        for start in range(0, len(paths), BATCH):
            read = [read_picture(path) for path in paths[start : start + BATCH]]
            found.append(chosen.vectors([picture.pixels for picture in read]))
            progress.advance(len(read))
    return chosen.joined(found)


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), BATCH):
        yield names[start : start + BATCH]


def _read_pair(paths: tuple[Path, Path]) -> tuple[Picture, Picture]:
    one, other = (read_picture(path) for path in paths)
    sizes = [f"{p.pixels.shape[1]}×{p.pixels.shape[0]}" for p in (one, other)]
    if sizes[0] != sizes[1]:
        raise CalibError(f"{paths[0]} and {paths[1]}: of {sizes[0]} and {sizes[1]} pixels; only equal sizes compare")
    return one, other


def _check_window(paths: Sequence[tuple[Path, Path]], read: Sequence[tuple[Picture, Picture]]) -> None:
    for (path, _), (one, _) in zip(paths, read, strict=True):
        height, width, _ = one.pixels.shape
        if min(height, width) < WINDOW:
            size = f"{width}×{height} pixels"
            raise CalibError(f"{path}: of {size}; SSIM needs {WINDOW} or more either way; leave it out: --metrics psnr")
