"""Estimate how much ranges and percentiles of layers change with the number of images: a bootstrap over prompts.

Four values of a layer are formed from min, max, p01 and p99 of each image, pooled over the steps that the sampler
evaluates (docs/METHODS.md §2): the full range max - min; p01 and p99, each the mean over images; and the central range
p99 - p01. Each is computed again from many sets of N images drawn at random. The movement is the deviation of these
from the value of all images, relative to its width.

How to read these figures:

- Prompts are resampled, each with all its images, as images of one prompt are alike, and tokens of one image more so:
  resampling images or tokens would underestimate the movement.
- They are drawn with replacement. Without it N = n would show no movement at all, though n other prompts would give
  other statistics. The spread of a mean over N images is σ/√N (σ: between images), also at N = n, where it is the
  standard error of the value from all images. It is low by the factor √(1 - 1/prompts): 5% with 10 prompts.
- The full range is an extreme. N images never show more of it than all images: it is biased low and moves one way. At
  N = n the bootstrap of an extreme is not consistent, for N much below n it is (Bickel & Freedman 1981; Bickel, Götze,
  van Zwet 1997), and at no N does it show how far values extend beyond those observed. So its movement is the part of
  the observed range that N images miss. A resample at N = n has 63% of the prompts: a range that falls short there
  depends on few of them. The next image, of a new prompt, exceeds the range of n images with probability up to
  2/(n + 1).
- The figures are no correction: all images together give the best available estimate.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.activations.record import over_rows
from calib.analysis.layers import reported_layers
from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.layout import ACTIVATIONS, METADATA
from calib.base.progress import Progress
from calib.dataset.load import load_manifest

import numpy as np
from numpy.typing import NDArray

COUNTS = (10, 25, 50, 100)
#: Numbers of images at which the curve begins where a run has at most SMALL images.
SMALL_COUNTS, SMALL = (2, 5), 25
DRAWS = 2000
SEED = 0
#: Share of resamples, and of layers in the verdict, that figures cover.
COVERAGE = 0.95


class Quantity(StrEnum):
    """Estimated values of a layer; movements of ``range`` are relative to itself, all others to the central range."""

    RANGE = "range"
    CENTRAL = "central_range"
    P01 = "p01"
    P99 = "p99"


@dataclass(frozen=True)
class ImageRanges:
    """Ranges of every image at every layer, in the units of the activations.

    Attributes:
        images: image ids.
        prompts: (images,), equal numbers for images of one prompt.
        prompts_unknown: why every image counts as a separate prompt; empty where the prompts are known.
        steps: step indices that are pooled.
        steps_left_out: collected steps that the sampler never evaluates.
        layers: (images, 4) by layer name, in network order: min, max, and the means over steps of p01 and p99.
        same_input: further layers with the same input array, by layer name.
        not_finite: layers that are not in ``layers``, with the number of images without finite values at some step.
    """

    images: list[int]
    prompts: NDArray[np.int64]
    prompts_unknown: str
    steps: list[int]
    steps_left_out: list[int]
    layers: dict[str, NDArray[np.float64]]
    same_input: dict[str, list[str]]
    not_finite: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Movement:
    """Distribution of resamples about the value of all images, relative to its width (0.03: 3%).

    Attributes:
        bias: mean of the signed deviations.
        expected: mean of their magnitudes.
        low, high: the central 95% interval of the signed deviations.
        most: 95th percentile of the magnitudes.
    """

    bias: float
    expected: float
    low: float
    high: float
    most: float

    @classmethod
    def of(cls, deviations: NDArray[np.float64]) -> "Movement":
        low, high = np.quantile(deviations, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        size = np.abs(deviations)
        most = np.quantile(size, COVERAGE)
        return cls(*(float(value) for value in (deviations.mean(), size.mean(), low, high, most)))


@dataclass(frozen=True)
class LayerConvergence:
    """Values of one layer from all images, and their movements by number of images."""

    name: str
    same_input: list[str]
    values: dict[Quantity, float]
    movements: dict[int, dict[Quantity, Movement]]

    def most(self, quantity: Quantity) -> float:
        """The movement with as many images as the run has."""
        return self.movements[max(self.movements)][quantity].most


@dataclass(frozen=True)
class Convergence:
    """All layers of a run, in network order; ``counts`` are ascending numbers of images, the last all of them."""

    source: ImageRanges
    counts: list[int]
    draws: int
    seed: int
    layers: list[LayerConvergence]

    def worst(self, quantity: Quantity) -> list[LayerConvergence]:
        """Layers by descending movement with all images, then with fewer."""
        counts = self.counts[::-1]
        return sorted(self.layers, key=lambda layer: [-layer.movements[n][quantity].most for n in counts])

    def most_of_layers(self, quantity: Quantity) -> float:
        """95th percentile over the layers of their movement with all images."""
        moved = [layer.most(quantity) for layer in self.layers]
        return float(np.quantile(moved, COVERAGE, method="higher"))


def read_image_ranges(run: Path) -> ImageRanges:
    """Read the ranges of a run directory; prompts come from the dataset's manifest, if it still exists.

    Raises:
        CalibError: the run has no ``activations.h5``, or fewer than two images or prompts, or no finite layer.
    """
    if not run.is_dir():
        raise CalibError(f"{run}: no such directory")
    if not (run / ACTIVATIONS).exists():
        raise CalibError(f"{run}: no {ACTIVATIONS} in it; calib collect makes run directories with one")
    found: dict[str, NDArray[np.float64]] = {}
    same_input: dict[str, list[str]] = {}
    not_finite: dict[str, int] = {}
    with ActivationFile(run / ACTIVATIONS) as file:
        steps = file.evaluated_steps()
        if not steps:
            raise CalibError(f"{run}: collected at steps {file.steps} only, which the sampler never evaluates")
        first: dict[str, str] = {}
        for name in reported_layers(file):
            owner = first.setdefault(file.same_data(name), name)
            if owner != name:
                same_input[owner].append(name)
                continue
            same_input[name] = []
            ranges = file.image_ranges(name, steps).astype(np.float64)
            bad = ~np.isfinite(ranges).all(axis=(0, 2))
            if bad.any():
                not_finite[name] = int(bad.sum())
            else:
                found[name] = over_rows(ranges)
        images, left_out = file.images, [step for step in file.steps if step not in steps]
    if len(images) < 2:
        raise CalibError(f"{run}: holds {len(images)} image; how statistics converge takes 2 or more")
    if not found:
        raise CalibError(f"{run}: no layer has finite activations in every image; look at {METADATA}")
    prompts, unknown = image_prompts(run, images)
    if len(set(prompts)) < 2:
        raise CalibError(f"{run}: its {len(images)} images are all of one prompt; it takes 2 prompts or more")
    numbers = np.unique(prompts, return_inverse=True)[1]
    return ImageRanges(images, numbers, unknown, steps, left_out, found, same_input, not_finite)


def image_prompts(run: Path, images: Sequence[int]) -> tuple[list[str], str]:
    """The prompt of each image, and why prompts are unknown; then each image has a text of its own."""
    own = [f"image {image}" for image in images]
    try:
        metadata: Any = read_json(run / METADATA)
    except CalibError as error:
        return own, str(error)
    named = metadata.get("data_dir") if isinstance(metadata, dict) else None
    if not isinstance(named, str):
        return own, f"{run / METADATA} names no dataset"
    # A relative name is relative to where calib collect ran: here, or somewhere above the run directory.
    places = [Path(named), *(parent / named for parent in run.resolve().parents)]
    data_dir = next((place for place in places if os.path.isdir(place)), None)
    if data_dir is None:
        return own, f"the dataset {named} is not there"
    try:
        manifest = load_manifest(data_dir)
    except (CalibError, OSError) as error:  # OSError: a folder that may not be entered
        return own, str(error)
    same = manifest.fingerprint == metadata.get("fingerprint") and manifest.num_steps == metadata.get("num_steps")
    if not same or not set(images) <= set(manifest.images):
        return own, f"the dataset {data_dir} is not the one that was collected from"
    prompts = [manifest.images[image].prompt for image in images]
    if None in prompts:
        return own, f"the dataset {data_dir} does not say the prompts"
    return [str(prompt) for prompt in prompts], ""


def image_counts(images: int) -> list[int]:
    """Numbers of images to examine, ascending; the last is ``images``."""
    standard = (*SMALL_COUNTS, *COUNTS) if images <= SMALL else COUNTS
    return [*(count for count in standard if count < images), images]


def resample(prompts: NDArray[np.int64], count: int, draws: int = DRAWS, seed: int = SEED) -> NDArray[np.int64]:
    """Multiplicities of the images in ``draws`` random sets of ``count`` images, (draws, images).

    Prompts (numbered from 0, one for each image) are drawn with replacement, each with all its images, until a set is
    full; of the last prompt only as many images, at random, as still fit. The result depends on the arguments alone.
    """
    rng = np.random.default_rng([seed, count])
    sizes = np.bincount(prompts)
    picks = rng.integers(len(sizes), size=(draws, count))
    whole = np.cumsum(sizes[picks], axis=1) <= count
    of_prompts = np.zeros((draws, len(sizes)), np.int64)
    np.add.at(of_prompts, (np.nonzero(whole)[0], picks[whole]), 1)
    chosen = of_prompts[:, prompts]
    wanted = count - chosen.sum(axis=1)
    for row in np.flatnonzero(wanted):
        last = picks[row, whole[row].sum()]
        chosen[row, rng.choice(np.flatnonzero(prompts == last), wanted[row], replace=False)] += 1
    return chosen


def estimates(ranges: NDArray[np.float64], chosen: NDArray[np.int64]) -> dict[Quantity, NDArray[np.float64]]:
    """Every quantity estimated from each set of images, (draws,).

    Args:
        ranges: (images, 4): min, max, p01, p99 of each image.
        chosen: (draws, images): multiplicities of the images in each set.
    """
    low, high, p01, p99 = ranges.T
    means = chosen @ np.stack([p01, p99], axis=1) / chosen.sum(axis=1, keepdims=True)
    # The first image of a set, in the order of extremes, has the set's extreme: faster than gathering values.
    present = chosen > 0
    lowest, highest = np.argsort(low), np.argsort(-high)
    least = low[lowest][np.argmax(present[:, lowest], axis=1)]
    greatest = high[highest][np.argmax(present[:, highest], axis=1)]
    return {
        Quantity.RANGE: greatest - least,
        Quantity.CENTRAL: means[:, 1] - means[:, 0],
        Quantity.P01: means[:, 0],
        Quantity.P99: means[:, 1],
    }


def layer_values(ranges: NDArray[np.float64]) -> dict[Quantity, float]:
    """Every quantity of a layer estimated from all images; ``ranges`` is (images, 4)."""
    everyone = np.ones((1, len(ranges)), np.int64)
    return {quantity: float(values[0]) for quantity, values in estimates(ranges, everyone).items()}


def movements(ranges: NDArray[np.float64], chosen: NDArray[np.int64]) -> dict[Quantity, Movement]:
    """Movement of each quantity of one layer over sets of images; arguments as for :func:`estimates`."""
    values = layer_values(ranges)
    found = {}
    for quantity, resampled in estimates(ranges, chosen).items():
        # Where the central range is 0 the percentiles may still move; where the full range is 0 nothing can.
        central = values[Quantity.CENTRAL] if quantity is not Quantity.RANGE else 0.0
        width = central or values[Quantity.RANGE] or 1.0
        found[quantity] = Movement.of((resampled - values[quantity]) / width)
    return found


def convergence(
    source: ImageRanges, counts: Sequence[int] | None = None, draws: int = DRAWS, seed: int = SEED
) -> Convergence:
    """Movements of all layers by number of images; ``counts`` None: :func:`image_counts`."""
    counts = image_counts(len(source.images)) if counts is None else sorted(counts)
    moved: dict[str, dict[int, dict[Quantity, Movement]]] = {name: {} for name in source.layers}
    with Progress("convergence", len(counts) * len(moved), "layer", delay=2.0) as progress:
        for count in counts:
            # The same sets for all layers, as in a run with that number of images.
            chosen = resample(source.prompts, count, draws, seed)
            for name, ranges in source.layers.items():
                moved[name][count] = movements(ranges, chosen)
                progress.advance()
    layers = [
        LayerConvergence(name, source.same_input[name], layer_values(ranges), moved[name])
        for name, ranges in source.layers.items()
    ]
    return Convergence(source, list(counts), draws, seed, layers)
