"""The table of measures of pictures: what each is called, how it reads, what it needs, how it is computed.

A measure of pairs gives a value for each pair of pictures; a measure of sets one value for two sets, from vectors that
an extractor makes of every picture. To add a measure is to add an entry, here and where tables show it
(:mod:`calib.runs.compare.columns`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from calib.base.errors import ConfigError, suggest
from calib.evaluation.features.inception import InceptionFeatures, fid, kid, precision, recall
from calib.evaluation.metrics import psnr, ssim
from calib.evaluation.sets import FEWEST, SetDistance, frechet_distance, kernel_distance

import numpy as np
from numpy.typing import NDArray

#: A picture, (height, width, 3): of floats in [0, 1], and of eight bits.
Picture = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]
#: Those of an evaluation that names none, besides the error of the model's output.
DEFAULT = ("psnr", "ssim")


@dataclass(frozen=True)
class Places:
    """Where extractors find what they need: the folder of caches; a file of Inception's weights, None: downloaded."""

    cache_dir: Path = Path()
    inception: Path | None = None


class Extractor(Protocol):
    """What makes vectors of pictures, or compares pairs of them by what it sees in either."""

    def vectors(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """A vector for each of ``pictures``, (pictures, features)."""

    def distances(self, pairs: Sequence[tuple[Pixels, Pixels]]) -> NDArray[np.float64]:
        """A distance for each of ``pairs``."""


@dataclass(frozen=True)
class Measure:
    """How a measure is shown: its title, how to read it, the format of its numbers, whether higher ones are better.

    Attributes:
        extractor: opens what it needs; raises a ConfigError where a package is missing, or a file is something else.
        pair: the value of two pictures, for one that needs no extractor.
        sets: the distance of two sets, of vectors, for one of sets; whether these are paired; and a name for a bar.
        fewest: pictures that one of sets is of at least.
    """

    title: str
    how: str
    form: str
    higher: bool
    extractor: Callable[[Places], Extractor] | None = None
    pair: Callable[[Picture, Picture], float] | None = None
    sets: Callable[[NDArray[Any], NDArray[Any], bool, str], SetDistance] | None = None
    fewest: int = FEWEST


def efficientnet(places: Places) -> Extractor:
    """EfficientNet-Lite0's features."""
    from calib.evaluation.features.extract import EfficientNetFeatures  # MLX, which other measures do without

    return EfficientNetFeatures(places.cache_dir)


def inception(places: Places) -> Extractor:
    """Inception's features, by torch-fidelity."""
    return InceptionFeatures(places.cache_dir, places.inception)


MEASURES: Mapping[str, Measure] = {
    "psnr": Measure("PSNR", "dB, higher is closer", "{:.2f}", True, pair=psnr),
    "ssim": Measure("SSIM", "1: equal", "{:.4f}", True, pair=ssim),
    "lpips_effnet": Measure("perceptual distance", "EfficientNet, 0: equal", "{:.4f}", False, efficientnet),
    "kid_effnet": Measure("KID (EfficientNet)", "lower is closer", "{:.4g}", False, efficientnet, sets=kernel_distance),
    "fd_effnet": Measure(
        "Fréchet distance (EfficientNet)", "lower is closer", "{:.4g}", False, efficientnet, sets=frechet_distance
    ),
    "fid": Measure("FID", "lower is closer", "{:.4g}", False, inception, sets=fid),
    "kid": Measure("KID", "lower is closer", "{:.4g}", False, inception, sets=kid),
    "precision": Measure(
        "precision", "1: all within the reference", "{:.4f}", True, inception, sets=precision, fewest=8
    ),
    "recall": Measure("recall", "1: all of the reference", "{:.4f}", True, inception, sets=recall, fewest=8),
}


@dataclass(frozen=True)
class Chosen:
    """The measures of an evaluation by name, each with its extractor, where it needs one."""

    pairs: Mapping[str, Extractor | None]
    sets: Mapping[str, Extractor]

    def of_pairs(
        self, pairs: Sequence[tuple[Picture, Picture]], each: Callable[..., Iterable[float]] = map
    ) -> dict[str, NDArray[np.float64]]:
        """Values of each measure of pairs, (pairs,); ``each`` maps those without an extractor, perhaps side by side."""
        found = {}
        for name, extractor in self.pairs.items():
            pair = MEASURES[name].pair
            if pair is not None:
                found[name] = np.array(list(each(pair, *zip(*pairs, strict=True))))
            elif extractor is not None:
                found[name] = extractor.distances([(eight_bits(a), eight_bits(b)) for a, b in pairs])
        return found

    def vectors(self, pictures: Sequence[Pixels]) -> dict[str, NDArray[np.float32]]:
        """Vectors of ``pictures`` for each measure of sets; those of one extractor are the same array."""
        made = {extractor: extractor.vectors(pictures) for extractor in set(self.sets.values())}
        return {name: made[extractor] for name, extractor in self.sets.items()}

    def joined(self, batches: Sequence[Mapping[str, NDArray[np.float32]]]) -> dict[str, NDArray[np.float32]]:
        """Vectors of all ``batches`` for each measure of sets; those of one extractor are the same array."""
        one_of = {extractor: name for name, extractor in self.sets.items()}
        whole = {extractor: np.concatenate([own[name] for own in batches]) for extractor, name in one_of.items()}
        return {name: whole[extractor] for name, extractor in self.sets.items()}

    def of_sets(
        self, x: Mapping[str, NDArray[Any]], y: Mapping[str, NDArray[Any]], paired: bool
    ) -> dict[str, SetDistance]:
        """The distance of each measure of sets, of vectors by measure."""
        found = {}
        for name in self.sets:
            sets = MEASURES[name].sets
            assert sets is not None
            found[name] = sets(x[name], y[name], paired, name)
        return found


#: No measures, where PSNR and SSIM are computed anyhow.
NONE = Chosen({}, {})


def check_names(key: str, names: Sequence[str], pictures: int | None = None) -> None:
    """Raise for an unknown name of a measure, or one twice, or of sets where ``pictures`` are too few for it."""
    for number, name in enumerate(names):
        if name not in MEASURES:
            raise ConfigError(f"{key}={name}: no such measure.{suggest(name, MEASURES)}")
        if name in names[:number]:
            raise ConfigError(f"{key}: {name} is named twice")
        fewest = MEASURES[name].fewest
        if MEASURES[name].sets is not None and pictures is not None and pictures < fewest:
            raise ConfigError(f"{key}={name}: is of {fewest} pictures or more, and there are {pictures}")


def check_inception(key: str, weights: Path | None, names: Sequence[str]) -> None:
    """Raise where ``weights`` of Inception are named by ``key``, and no measure is by them."""
    by_it = [name for name, measure in MEASURES.items() if measure.extractor is inception]
    if weights is not None and not set(by_it) & set(names):
        allowed = f"it is what {', '.join(by_it)} are by; name one, or leave it out"
        raise ConfigError(f"{key}={weights}: {allowed}")


def choose(names: Sequence[str], places: Places) -> Chosen:
    """The measures of these names; raises a ConfigError where a package that one needs is missing."""
    needed = {name: MEASURES[name].extractor for name in names}
    opened = {extractor: extractor(places) for extractor in needed.values() if extractor is not None}
    sets = {name: opened[e] for name, e in needed.items() if e is not None and MEASURES[name].sets is not None}
    return Chosen({name: e and opened[e] for name, e in needed.items() if name not in sets}, sets)


def eight_bits(picture: Picture) -> Pixels:
    """A picture as it is stored and shown."""
    found: Pixels = np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
    return found
