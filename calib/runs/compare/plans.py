"""Two runs' plans beside each other, layer by layer."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from calib.analysis.plan import LayerPlan
from calib.analysis.plan_file import read_layers
from calib.analysis.steps import StepPlan, read_steps
from calib.base.encoding import aligned
from calib.base.errors import ConfigError
from calib.base.layout import PLAN, STEPS
from calib.base.progress import counted
from calib.runs.record import RunRecord


@dataclass(frozen=True)
class LayerChoice:
    """The entries of a plan for one layer that are compared.

    Attributes:
        weight_phases, activation_phases: bits by phase (early, mid, late), where they differ from those for all.
        activation_steps: activation bits at every step, where they follow it.
        clip: percentiles at which the range of its inputs is cut.
        low, high: of that range over all steps; None where the plan has no ranges.
        drift: 1 - narrowest / widest range that was seen at a step, 0 … 1; None where the plan has none.
    """

    weight_bits: int
    group_size: int
    activation_bits: int
    weight_phases: Mapping[str, int] = field(default_factory=dict)
    activation_phases: Mapping[str, int] = field(default_factory=dict)
    activation_steps: tuple[int, ...] = ()
    clip: tuple[float, float] = (0.0, 100.0)
    low: float | None = None
    high: float | None = None
    drift: float | None = None

    def differs(self, other: "LayerChoice") -> bool:
        """Whether any entry differs by more than rounding."""
        own, its = asdict(self), asdict(other)
        return any(not _alike(own[name], its[name]) for name in own)


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, float) or not isinstance(other, float):
        return bool(one == other)
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))


def read_choices(run: Path) -> dict[str, LayerChoice]:
    """The plan in the run directory ``run``, with what of it varies with the step."""
    if not (run / PLAN).exists():
        raise ConfigError(f"{run}: no {PLAN} there; calib analyze writes one")
    layers, steps = read_layers(run / PLAN), read_steps(run / STEPS)
    return {name: _choice(name, layer, steps) for name, layer in layers.items()}


def _choice(name: str, layer: LayerPlan, steps: StepPlan) -> LayerChoice:
    ranges = steps.ranges.get(name)
    return LayerChoice(
        weight_bits=layer.weight_bits,
        group_size=layer.group_size,
        activation_bits=layer.activation_bits,
        weight_phases=_phases(steps.weight_bits, name, layer.weight_bits),
        activation_phases=_phases(steps.activation_bits, name, layer.activation_bits),
        activation_steps=steps.step_bits.get(name, ()),
        clip=layer.clip_percentile,
        low=None if ranges is None else min(ranges.low),
        high=None if ranges is None else max(ranges.high),
        drift=steps.drift.get(name),
    )


def _phases(bits: Mapping[str, Mapping[str, int]], name: str, for_all: int) -> dict[str, int]:
    """Bits of a layer in the phases where they differ from those for all."""
    return {phase: own[name] for phase, own in bits.items() if own.get(name, for_all) != for_all}


@dataclass(frozen=True)
class PlanDifference:
    """Layers of two plans, those that differ or all, and the number of those that agree."""

    names: tuple[str, str]
    layers: Mapping[str, tuple[LayerChoice, LayerChoice]]
    agreeing: int


def compare_plans(runs: Sequence[RunRecord], every: bool = False) -> PlanDifference:
    """Layers in which the plans of two runs differ; all layers if ``every``.

    Raises:
        ConfigError: ``runs`` are not two, one has no plan, or the plans are of different layers.
    """
    if len(runs) != 2:
        raise ConfigError(f"--layers: compares two runs; named: {counted(len(runs), 'run')}")
    one, other = (read_choices(run.path) for run in runs)
    if set(one) != set(other):
        lacking = sorted(set(one) ^ set(other))
        raise ConfigError(
            f"--layers: the plans are of different layers, of two models or other taps: {lacking[0]} "
            f"and {len(lacking) - 1} more are in one of them only"
        )
    pairs = {name: (one[name], other[name]) for name in one}
    differing = {name: pair for name, pair in pairs.items() if pair[0].differs(pair[1])}
    shown = pairs if every else differing
    return PlanDifference((runs[0].name, runs[1].name), shown, len(pairs) - len(differing))


COLUMNS = {
    "weight_bits": "W bits",
    "group_size": "group",
    "activation_bits": "A bits",
    "clip": "clip",
    "low": "low",
    "high": "high",
    "drift": "drift",
}
#: Bits that vary with the phase, or the step, share a column with those for all.
_PHASES = {"weight_bits": "weight_phases", "activation_bits": "activation_phases"}
_BY_STEP = {"activation_bits": "activation_steps"}


def _text(choice: LayerChoice, name: str, digits: int = 3) -> str:
    value = getattr(choice, name)
    if value is None:
        return "–"
    if name == "clip":
        return "none" if value == (0, 100) else f"{value[0]:g}–{value[1]:g}%"
    phases = getattr(choice, _PHASES[name]) if name in _PHASES else {}
    apart = f" ({', '.join(f'{phase} {bits}' for phase, bits in phases.items())})" if phases else ""
    if name == "activation_bits" and len(set(choice.activation_steps)) > 1:
        apart = f" ({min(choice.activation_steps)}–{max(choice.activation_steps)} by step)"
    return f"{value:.{digits - 3}%}" if name == "drift" else f"{value:.{digits}g}{apart}"


def _cell(name: str, pair: tuple[LayerChoice, LayerChoice]) -> str:
    keys = [name, *(where[name] for where in (_PHASES, _BY_STEP) if name in where)]
    if all(_alike(*(getattr(choice, key) for choice in pair)) for key in keys):
        return _text(pair[0], name)
    for digits in range(3, 8):  # as many as show a difference
        one, other = (_text(choice, name, digits) for choice in pair)
        if one != other:
            break
    return f"{one} → {other}"


def _rows(found: PlanDifference) -> list[list[str]]:
    rows = [["layer", *COLUMNS.values()]]
    return rows + [[layer, *(_cell(name, pair) for name in COLUMNS)] for layer, pair in found.layers.items()]


def _verdict(found: PlanDifference) -> list[str]:
    differ = sum(one.differs(other) for one, other in found.layers.values())
    return [
        f"{found.names[0]} → {found.names[1]}: {counted(differ, 'layer')} differ, {found.agreeing} agree",
        "drift: how much narrower a layer's range is at its narrowest step than at its widest",
    ]


def plans_text(found: PlanDifference) -> str:
    """A table for the terminal."""
    lines = aligned(_rows(found))
    return "\n".join([*(lines if found.layers else []), *([""] if found.layers else []), *_verdict(found)]) + "\n"


def plans_markdown(found: PlanDifference) -> str:
    """A table in Markdown."""
    head, *rows = _rows(found)
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([*lines, "", *_verdict(found)]) + "\n"


def plans_csv(found: PlanDifference) -> str:
    """Raw numbers as CSV, those of both runs beside each other."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(LayerChoice)]
    writer.writerow(["layer", *(f"{name}_{side}" for name in names for side in ("a", "b"))])
    for layer, pair in found.layers.items():
        values = [getattr(choice, name) for name in names for choice in pair]
        writer.writerow([layer, *map(_raw, values)])
    return out.getvalue()


def _raw(value: Any) -> Any:
    """A value in CSV: 1-99 for a pair, early=4 for bits by phase."""
    if isinstance(value, Mapping):
        return " ".join(f"{phase}={bits}" for phase, bits in value.items())
    if isinstance(value, tuple):
        return "-".join(f"{part:g}" for part in value)
    return "" if value is None else value


def plans_json(found: PlanDifference) -> str:
    """One JSON document."""
    layers = {layer: {"a": asdict(one), "b": asdict(other)} for layer, (one, other) in found.layers.items()}
    document = {"a": found.names[0], "b": found.names[1], "agreeing": found.agreeing, "layers": layers}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
