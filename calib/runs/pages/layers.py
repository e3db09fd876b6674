"""What a run's page shows of its layers: bits by place, ranges over the steps, chosen histograms."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.activations.statistics import Statistics
from calib.runs.pages.charts import Dot, Shape

import numpy as np
from numpy.typing import NDArray

#: Panels of histograms, and lines in each.
CHOSEN, LINES = 6, 5
BINS = 80
BLOCK = re.compile(r"^(mm_block|unified_block)_(\d+)\.(.+)$")


@dataclass(frozen=True)
class BitTable:
    """Bits of layers that blocks repeat: a row for each kind of layer, a column for each block."""

    title: str
    blocks: list[str]
    rows: list[tuple[str, list[dict[str, Any] | None]]]


def bit_tables(plan: Mapping[str, Mapping[str, Any]]) -> list[BitTable]:
    """The plan's layers by place; what is in no block last."""
    tables = []
    for family, title in (("mm_block", "Multimodal blocks"), ("unified_block", "Unified blocks")):
        there = {m.groups(): entry for name, entry in plan.items() if (m := BLOCK.match(name)) and m.group(1) == family}
        if not there:
            continue
        blocks = sorted({int(number) for _, number, _ in there})
        kinds = list(dict.fromkeys(kind for _, _, kind in there))
        rows = [
            (kind, [_bits(there.get((family, str(b), kind)), f"{family}_{b}.{kind}") for b in blocks]) for kind in kinds
        ]
        tables.append(BitTable(title, [str(b) for b in blocks], rows))
    others = {name: entry for name, entry in plan.items() if not BLOCK.match(name)}
    if others:
        tables.append(BitTable("Outside the blocks", [""], [(n, [_bits(e, n)]) for n, e in others.items()]))
    return tables


def _bits(entry: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    if entry is None:
        return None
    w, a = entry["suggested_weight_bits"], entry["suggested_activation_bits"]
    reason = " ".join(str(entry.get(key, "")) for key in ("reason", "figure")).strip()
    tip = f"{name}: weights {w} bits in groups of {entry.get('group_size', 64)}, inputs {a} bits. {reason}"
    return {"w": w, "a": a, "tip": tip, "sensitive": bool(entry.get("sensitive"))}


@dataclass(frozen=True)
class Ranges:
    """Width of each layer's range at each step, (layers, steps); layers that read one array once."""

    layers: list[str]
    steps: list[int]
    widths: NDArray[np.float64]
    statistics: Mapping[str, Mapping[int, Statistics]]

    @property
    def drift(self) -> NDArray[np.float64]:
        """Width relative to the layer's widest, 0 … 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found: NDArray[np.float64] = self.widths / np.fmax.reduce(self.widths, axis=1, keepdims=True)
        return found


def read_ranges(path: Path) -> Ranges:
    """Ranges of ``activations.h5``, at the steps that the sampler feeds to the model (all, where it feeds none)."""
    with ActivationFile(path) as file:
        steps = list(file.evaluated_steps()) or list(file.steps)
        groups: dict[str, list[str]] = {}
        for layer in file.layers:
            groups.setdefault(file.same_data(layer), []).append(layer)
        statistics = {names[0]: file.by_step(names[0]) for names in groups.values()}
    named = {names[0]: names[0] + (f" (+{len(names) - 1})" if len(names) > 1 else "") for names in groups.values()}
    widths = np.array([[_width(by_step[step]) for step in steps] for by_step in statistics.values()])
    return Ranges(list(named.values()), steps, widths, dict(zip(named.values(), statistics.values(), strict=True)))


def _width(found: Statistics) -> float:
    width = float(found.maximum.max()) - float(found.minimum.min())
    return width if np.isfinite(width) else float("nan")


def chosen_layers(ranges: Ranges, plan: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The layers that tell most, each with why: two sensitive ones, two that drift most, the rest of the widest range.

    Where one is named for two reasons the next takes its place.
    """
    drift = 1 - np.fmin.reduce(ranges.drift, axis=1)
    by_drift = [ranges.layers[i] for i in np.argsort(-np.nan_to_num(drift))]
    by_width = [ranges.layers[i] for i in np.argsort(-np.nan_to_num(np.fmax.reduce(ranges.widths, axis=1)))]
    entries = {layer: plan.get(_own(layer), {}) for layer in ranges.layers}
    fragile = sorted(
        (layer for layer in ranges.layers if entries[layer].get("sensitive") or entries[layer].get("sensitivity")),
        key=lambda layer: (not entries[layer].get("sensitive"), -(entries[layer].get("sensitivity") or 0)),
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


def _own(layer: str) -> str:
    return layer.partition(" (+")[0]


def shape_of(ranges: Ranges, layer: str, why: str, clip: tuple[float, float] | None, most: int = LINES) -> Shape | None:
    """Histograms of ``layer`` at up to ``most`` steps; None where it saw no finite value."""
    places = np.unique(np.linspace(0, len(ranges.steps) - 1, most).round().astype(int))
    found = {ranges.steps[i]: ranges.statistics[layer][ranges.steps[i]].histogram for i in places}
    found = {step: histogram for step, histogram in found.items() if histogram.total}
    if not found:
        return None
    low = min(float(histogram.values()[0]) for histogram in found.values())
    high = max(float(histogram.values()[-1]) for histogram in found.values())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    shares = {
        step: np.histogram(histogram.values(), edges, weights=histogram.counts.astype(np.float64))[0] / histogram.total
        for step, histogram in found.items()
    }
    return Shape(_own(layer), why, edges, shares, clip)


def clip_of(steps: Mapping[str, Any], layer: str) -> tuple[float, float] | None:
    """The outermost of a layer's ranges in ``timestep_config.json``."""
    entry = (steps.get("activation_ranges") or {}).get(_own(layer))
    return (min(entry["low"]), max(entry["high"])) if entry and entry["low"] else None


def sensitivity_dots(plan: Mapping[str, Mapping[str, Any]]) -> tuple[list[Dot], dict[int, str]]:
    """A dot for each layer whose sensitivity was measured: bytes against S; a series for each bit-width."""
    measured = {n: e for n, e in plan.items() if e.get("sensitivity") and e.get("bytes")}
    widths: Sequence[int] = sorted({entry["suggested_weight_bits"] for entry in measured.values()})
    series = {bits: number for number, bits in enumerate(widths)}
    dots = [
        Dot(
            label=name,
            x=entry["bytes"] / 1000,
            y=entry["sensitivity"],
            series=series[entry["suggested_weight_bits"]],
            tip=f"{name}: S = {entry['sensitivity']:.2e}, {entry['bytes'] / 1000:.1f} kB at "
            f"{entry['suggested_weight_bits']} bits in groups of {entry.get('group_size', 64)}",
        )
        for name, entry in measured.items()
    ]
    return dots, {number: f"{bits} bits" for bits, number in series.items()}
