"""Prepares what a run's page shows of its layers: bits by place, ranges over the steps, chosen histograms."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calib.activations.reader import ActivationFile
from calib.activations.statistics import Statistics
from calib.analysis.plan import LayerPlan
from calib.analysis.steps import StepPlan
from calib.runs.pages.charts import Shape

import numpy as np
from numpy.typing import NDArray

#: Panels of histograms, and lines in each.
CHOSEN, LINES = 6, 5
BINS = 80
#: The number of a block in a layer's name: digits before a dot. (Those of ``mlp.fc2`` are before none.)
_NUMBER = re.compile(r"(\d+)\.")
#: The word that may stand before that number; short names do without it.
_BLOCK = r"(?:^|[._])(?:blocks?|layers?)[._]"
_BEFORE_NUMBER, _AT_END = re.compile(rf"{_BLOCK}(?=\d+\.)"), re.compile(rf"{_BLOCK}$")
#: Words of names that headings write out.
_WRITTEN_OUT = {"mm": "multimodal"}


@dataclass(frozen=True)
class BitTable:
    """Bits of layers that blocks repeat: a row for each kind of layer, a column for each block."""

    title: str
    blocks: list[str]
    rows: Sequence[tuple[str, Sequence[Mapping[str, Any] | None]]]


def blocks_of(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Return by layer name the family of blocks, the block's number in it, and the layer's name in the block.

    A family is what stands before a number that varies, ``h.``, or before any number if its last word is block or
    layer, ``mm_block_``. Of several such numbers in a name the first is the block's. Names without one are left out.
    """
    places = {name: [(name[: m.start()], m[1], name[m.end() :]) for m in _NUMBER.finditer(name)] for name in names}
    numbers: dict[str, set[str]] = {}
    for family, number, _ in itertools.chain.from_iterable(places.values()):
        numbers.setdefault(family, set()).add(number)
    families = {family for family, own in numbers.items() if len(own) > 1 or _AT_END.search(family)}
    within = {name: [place for place in own if place[0] in families] for name, own in places.items()}
    return {name: own[0] for name, own in within.items() if own}


def bit_tables(plan: Mapping[str, LayerPlan]) -> list[BitTable]:
    """Return a table for each family of blocks, and last one for the layers in no block."""
    places = blocks_of(plan)
    tables = []
    for family in dict.fromkeys(family for family, _, _ in places.values()):
        names = {(number, kind): name for name, (own, number, kind) in places.items() if own == family}
        blocks = sorted({number for number, _ in names}, key=int)
        rows = [
            (kind, [_bits(names[b, kind], plan[names[b, kind]]) if (b, kind) in names else None for b in blocks])
            for kind in dict.fromkeys(kind for _, kind in names)
        ]
        tables.append(BitTable(_title(family), blocks, rows))
    others = [(name, [_bits(name, layer)]) for name, layer in plan.items() if name not in places]
    return [*tables, BitTable("Outside the blocks", [""], others)] if others else tables


def _title(family: str) -> str:
    """Return a family's name as a heading: ``mm_block_`` is 'Multimodal blocks', ``blocks.`` 'Blocks'."""
    words = [_WRITTEN_OUT.get(word, word) for word in re.split(r"[._]+", family) if word]
    title = " ".join(words) or "block"
    return f"{title[0].upper()}{title[1:]}{'s' if title.endswith(('block', 'layer')) else ''}"


def short_names(names: Sequence[str]) -> list[str]:
    """Return names for figures, ``mm_block_3.mlp.fc1`` as 'mm 3.mlp.fc1'; in full if two would be one."""
    short = [_BEFORE_NUMBER.sub(" ", name).strip() for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)


def _bits(name: str, layer: LayerPlan) -> dict[str, Any]:
    w, a = layer.weight_bits, layer.activation_bits
    reason = " ".join(filter(None, (layer.reason, layer.figure)))
    tip = f"{name}: weights {w} bits in groups of {layer.group_size}, inputs {a} bits. {reason}"
    return {"w": w, "a": a, "tip": tip, "sensitive": layer.sensitive}


@dataclass(frozen=True)
class Ranges:
    """Width of each layer's range at each step, (layers, steps); layers that read the same array are one row."""

    layers: list[str]
    steps: list[int]
    widths: NDArray[np.float64]

    @property
    def drift(self) -> NDArray[np.float64]:
        """Width relative to the layer's widest, 0 … 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            relative: NDArray[np.float64] = self.widths / np.fmax.reduce(self.widths, axis=1, keepdims=True)
        return relative


def ranges_of(file: ActivationFile) -> Ranges:
    """Return the ranges at the steps that the sampler feeds to the model; at all steps if it feeds none."""
    steps = list(file.evaluated_steps()) or list(file.steps)
    places = [file.steps.index(step) for step in steps]
    sharing: dict[str, list[str]] = {}
    for layer in file.layers:
        sharing.setdefault(file.same_data(layer), []).append(layer)
    rows = [names[0] + (f" (+{len(names) - 1})" if len(names) > 1 else "") for names in sharing.values()]
    extremes = np.array([file.extremes(names[0])[places] for names in sharing.values()])
    with np.errstate(invalid="ignore"):
        widths = extremes[..., 1] - extremes[..., 0]
    return Ranges(rows, steps, np.where(np.isfinite(widths), widths, np.nan))


def bits_by_step(steps: StepPlan) -> Ranges:
    """Return the bits of each layer's input at each step as "widths"; of layers that read the same array, one row."""
    sharing: dict[tuple[object, ...], list[str]] = {}
    for name, bits in steps.step_bits.items():
        sharing.setdefault((bits, steps.ranges.get(name)), []).append(name)
    rows = [names[0] + (f" (+{len(names) - 1})" if len(names) > 1 else "") for names in sharing.values()]
    return Ranges(rows, list(range(len(steps.timesteps))), np.array([bits for bits, _ in sharing], np.float64))


def chosen_layers(ranges: Ranges, plan: Mapping[str, LayerPlan]) -> list[tuple[str, str]]:
    """Return layers worth a histogram, each with why: two sensitive ones, two that drift most, the widest ranges.

    The next of a kind takes the place of a layer that was chosen for another reason already.
    """
    drift = 1 - np.fmin.reduce(ranges.drift, axis=1)
    by_drift = [ranges.layers[i] for i in np.argsort(-np.nan_to_num(drift))]
    by_width = [ranges.layers[i] for i in np.argsort(-np.nan_to_num(np.fmax.reduce(ranges.widths, axis=1)))]
    planned = {layer: plan[own_name(layer)] for layer in ranges.layers if own_name(layer) in plan}
    fragile = sorted(
        (layer for layer, own in planned.items() if own.sensitive or own.sensitivity),
        key=lambda layer: (not planned[layer].sensitive, -(planned[layer].sensitivity or 0)),
    )
    chosen: dict[str, str] = {}
    for layers, why, most in (
        (fragile, "sensitive", CHOSEN // 3),
        (by_drift, "drifts most", CHOSEN // 3),
        (by_width, "widest range", CHOSEN),
    ):
        room = min(most, CHOSEN - len(chosen))
        chosen |= dict.fromkeys([layer for layer in layers if layer not in chosen][:room], why)
    return list(chosen.items())


def own_name(layer: str) -> str:
    """Return the name of the first of the layers that a row stands for."""
    return layer.partition(" (+")[0]


def shape_of(
    statistics: Mapping[int, Statistics],
    steps: Sequence[int],
    layer: str,
    why: str,
    clip: tuple[float, float] | None,
    most: int = LINES,
) -> Shape | None:
    """Return histograms of ``layer`` at up to ``most`` of ``steps``; None if it saw no finite value."""
    places = np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))
    histograms = {steps[i]: statistics[steps[i]].histogram for i in places}
    histograms = {step: histogram for step, histogram in histograms.items() if histogram.total}
    if not histograms:
        return None
    low = min(float(histogram.values()[0]) for histogram in histograms.values())
    high = max(float(histogram.values()[-1]) for histogram in histograms.values())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    shares = {
        step: np.histogram(histogram.values(), edges, weights=histogram.counts.astype(np.float64))[0] / histogram.total
        for step, histogram in histograms.items()
    }
    return Shape(layer, why, edges, shares, clip)


def clip_of(steps: StepPlan, layer: str) -> tuple[float, float] | None:
    """Return the outermost of the ranges that the plan gives a layer's input; None if it gives none."""
    ranges = steps.ranges.get(layer)
    return (min(ranges.low), max(ranges.high)) if ranges and ranges.low else None
