"""The table of measures of pictures: what each needs, how it is computed.

A measure of pairs gives a value for each pair of pictures; a measure of sets one value for two sets, from vectors that
an extractor makes of every picture. To add a measure is to add an entry, here and to :mod:`calib.evaluation.titles`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from calib.base.errors import ConfigError, suggest
from calib.evaluation.features.inception import InceptionFeatures, fid, kid, precision, recall
from calib.evaluation.metrics import psnr, ssim
from calib.evaluation.sets import FEWEST, SetDistance, frechet_distance, gaussian, kernel_distance
from calib.evaluation.titles import TITLES

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from calib.evaluation.features.clip_features import ClipFeatures
    from calib.evaluation.features.extract import EfficientNetFeatures

#: A picture, (height, width, 3): of floats in [0, 1], and of eight bits.
Picture = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]
#: Those of an evaluation that names none, besides the error of the model's output.
DEFAULT = ("psnr", "ssim")


class Extractor(Protocol):
    """What makes vectors of pictures; ``content`` is a hash of all that they depend on besides."""

    @property
    def content(self) -> str: ...

    def vectors(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """A vector for each of ``pictures``, (pictures, features)."""


@dataclass(frozen=True)
class Sources:
    """Where extractors find what they need.

    Attributes:
        cache_dir: the folder of caches.
        clip: the CLIP that the user names by ``clip_key``.
        inception: a file of Inception's weights, by ``inception_key``; None: torch-fidelity downloads them.
    """

    cache_dir: Path
    clip: str | None = None
    inception: Path | None = None
    clip_key: str = "evaluation.clip"
    inception_key: str = "evaluation.inception"


@dataclass(frozen=True)
class Measure:
    """How a measure is computed; how it is shown is in :data:`~calib.evaluation.titles.TITLES`.

    Attributes:
        extractor: opens what it needs; raises a ConfigError where a package or a CLIP is missing, or a file is
            something else.
        pair: the value of two pictures, for one that needs no extractor.
        seen: values of pairs by its extractor, for one of pairs, with the prompt of each where it is ``of_texts``.
        change: the measure, which comes with it, of what became of its value in a pair; by that pairs are ordered.
        sets: the distance of two sets, of vectors, for one of sets; whether these are paired; and a name for a bar.
        fewest: pictures that one of sets is of at least.
    """

    extractor: Callable[[Sources], Extractor] | None = None
    pair: Callable[[Picture, Picture], float] | None = None
    seen: Callable[[Any, Sequence[tuple[Pixels, Pixels]], Sequence[str]], NDArray[np.float64]] | None = None
    of_texts: bool = False
    change: str | None = None
    sets: Callable[[NDArray[Any], NDArray[Any], bool, str], SetDistance] | None = None
    fewest: int = FEWEST


def efficientnet(sources: Sources) -> "EfficientNetFeatures":
    """EfficientNet-Lite0's features."""
    from calib.evaluation.features.extract import EfficientNetFeatures  # MLX, which other measures do without

    return EfficientNetFeatures(sources.cache_dir)


def clip(sources: Sources) -> "ClipFeatures":
    """Features of the CLIP that the user names."""
    if sources.clip is None:
        measures = ", ".join(name for name, own in MEASURES.items() if own.extractor is clip)
        named = f"its folder or its repository on the hub, {sources.clip_key}=openai/clip-vit-large-patch14"
        raise ConfigError(f"{measures} are by a CLIP of your choice: name {named}")
    from calib.evaluation.features.clip_features import ClipFeatures

    return ClipFeatures(sources.clip, sources.clip_key, sources.cache_dir)


def inception(sources: Sources) -> Extractor:
    """Inception's features, by torch-fidelity."""
    return InceptionFeatures(sources.cache_dir, sources.inception, sources.inception_key)


def _change(features: "ClipFeatures", pairs: Sequence[tuple[Pixels, Pixels]], texts: Sequence[str]) -> Any:
    before, after = (features.scores([pair[side] for pair in pairs], texts) for side in (0, 1))
    return after - before


MEASURES: Mapping[str, Measure] = {
    "psnr": Measure(pair=psnr),
    "ssim": Measure(pair=ssim),
    "lpips_effnet": Measure(efficientnet, seen=lambda features, pairs, texts: features.distances(pairs)),
    "kid_effnet": Measure(efficientnet, sets=kernel_distance),
    "fd_effnet": Measure(efficientnet, sets=frechet_distance),
    "fid": Measure(inception, sets=fid),
    "kid": Measure(inception, sets=kid),
    "precision": Measure(inception, sets=precision, fewest=8),
    "recall": Measure(inception, sets=recall, fewest=8),
    "clip_similarity": Measure(clip, seen=lambda features, pairs, texts: features.similarities(pairs)),
    "clip_score": Measure(
        clip,
        seen=lambda features, pairs, texts: features.scores([after for _, after in pairs], texts),
        of_texts=True,
        change="clip_score_change",
    ),
    "clip_score_change": Measure(clip, seen=_change, of_texts=True),
    "cmmd": Measure(clip, sets=partial(kernel_distance, kernel=gaussian)),
}


@dataclass(frozen=True)
class Chosen:
    """The measures of an evaluation by name, each with its extractor, where it needs one."""

    pairs: Mapping[str, Extractor | None]
    sets: Mapping[str, Extractor]

    def of_pairs(
        self,
        pairs: Sequence[tuple[Picture | Pixels, Picture | Pixels]],
        texts: Sequence[str] = (),
        each: Callable[..., Iterable[float]] = map,
    ) -> dict[str, NDArray[np.float64]]:
        """Values of each measure of pairs, (pairs,), whose prompts are ``texts``.

        ``each`` maps those without an extractor, perhaps side by side.
        """
        found = {}
        for name, extractor in self.pairs.items():
            pair, seen = MEASURES[name].pair, MEASURES[name].seen
            if pair is not None:
                found[name] = np.array(list(each(partial(_of_floats, pair), *zip(*pairs, strict=True))))
            elif seen is not None:
                found[name] = seen(extractor, [(eight_bits(a), eight_bits(b)) for a, b in pairs], texts)
        return found

    @property
    def made_by(self) -> list[Any]:
        """Names of the measures of pairs, each with what its values depend on besides pictures and prompts."""
        return sorted([name, own.content] if own else [name] for name, own in self.pairs.items())

    @property
    def clips(self) -> list[str]:
        """The content of the CLIP that measures are by; none without."""
        every: dict[str, Any] = {**self.pairs, **self.sets}
        return list({own.content for name, own in every.items() if MEASURES[name].extractor is clip})

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of ``texts`` are longer than what is read of them, where a measure reads them."""
        readers: list[Any] = [own for name, own in self.pairs.items() if MEASURES[name].of_texts]
        return readers[0].truncated(texts) if readers else 0

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


class Gathered:
    """Vectors of pictures as these come, for the measures of sets among ``chosen``: the pictures need not be kept."""

    def __init__(self, chosen: Chosen):
        self._chosen, self._blocks = chosen, list[dict[str, NDArray[np.float32]]]()

    def add(self, drawn: Sequence[Picture] | NDArray[np.floating[Any]]) -> None:
        """Look at further pictures, each as it is stored."""
        if self._chosen.sets:
            self._blocks.append(self._chosen.vectors([eight_bits(picture) for picture in drawn]))

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        """Those of all pictures by measure."""
        return self._chosen.joined(self._blocks)


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


def check_sources(names: Sequence[str], sources: Sources) -> None:
    """Raise where a CLIP or a file of weights is named that none of the measures ``names`` reads."""
    named = {clip: (sources.clip_key, sources.clip), inception: (sources.inception_key, sources.inception)}
    for extractor, (key, value) in named.items():
        readers = [name for name, measure in MEASURES.items() if measure.extractor is extractor]
        if value is not None and not set(readers) & set(names):
            allowed = f"no measure that is asked for reads it; it is for {', '.join(readers)}"
            raise ConfigError.bad_value(key, value, allowed)


def choose(names: Sequence[str], sources: Sources) -> Chosen:
    """The measures of these names, and those that come with them; opens what they need.

    Raises:
        CalibError: a package, a CLIP or a file of weights that one needs is missing or damaged.
    """
    every = list(dict.fromkeys(each for given in names for each in (given, MEASURES[given].change) if each is not None))
    needed = {name: MEASURES[name].extractor for name in every}
    opened = {extractor: extractor(sources) for extractor in needed.values() if extractor is not None}
    sets = {name: opened[e] for name, e in needed.items() if e is not None and MEASURES[name].sets is not None}
    return Chosen({name: e and opened[e] for name, e in needed.items() if name not in sets}, sets)


def ordering(names: Iterable[str]) -> str | None:
    """The measure by which pairs are ordered: the first of pairs among ``names``, or its change; None without one."""
    first = next((name for name in names if MEASURES[name].sets is None), None)
    return first and (MEASURES[first].change or first)


def worst_first(values: NDArray[np.float64], name: str) -> list[int]:
    """Places of values of the measure ``name``, the worst first."""
    return [int(place) for place in np.argsort(values if TITLES[name].higher else -values, kind="stable")]


def _of_floats(pair: Callable[[Picture, Picture], float], a: Picture | Pixels, b: Picture | Pixels) -> float:
    """``pair`` of pictures that become floats here, two at a time, as a batch of large ones would not fit."""
    return pair(_floats(a), _floats(b))


def _floats(picture: Picture | Pixels) -> Picture:
    return picture / 255 if picture.dtype == np.uint8 else picture.astype(np.float64, copy=False)


def eight_bits(picture: Picture | Pixels) -> Pixels:
    """A picture as it is stored and shown."""
    stored = picture if picture.dtype == np.uint8 else np.rint(255 * np.clip(picture, 0, 1))
    return stored.astype(np.uint8, copy=False)
