"""What of a plan varies with the step: phases with their bits, ranges. The content of ``timestep_config.json``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.activations.store import METADATA
from calib.analysis.drift import drift, observe
from calib.analysis.plan import WEIGHT_BITS, LayerPlan, Plan
from calib.analysis.range_files import from_json, to_json
from calib.analysis.ranges import Observed, RangeRule, StepRanges
from calib.errors import CalibError
from calib.files import read_json, short_hash
from calib.timesteps import phase_bounds

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """What varies with the step; empty where statistics say nothing of steps.

    Attributes:
        timesteps: of steps 0 … n - 1.
        phases: first and last step of each.
        activation_bits: by phase and layer, where they differ from phase to phase.
        weight_bits: by phase and layer, where weights have copies.
        ranges: of activations, by layer.
        origin: where the statistics come from, where known: model, fingerprint, path.
        plan: hash of the plan that this belongs to, see :func:`plan_hash`; empty where that is not known.
        rule: the function that made the ranges, and its parameters, as an option of the config group names them.
        drift: how far what each layer was seen to span moves over the steps, 0 … 1, see :func:`drift.drift`.
    """

    timesteps: tuple[float, ...] = ()
    phases: dict[str, tuple[int, int]] = field(default_factory=dict)
    activation_bits: dict[str, dict[str, int]] = field(default_factory=dict)
    weight_bits: dict[str, dict[str, int]] = field(default_factory=dict)
    ranges: dict[str, StepRanges] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    plan: str = ""
    rule: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)

    def bits_by_step(self, name: str, default: int) -> tuple[int, ...]:
        """Activation bits of a layer at every step; ``default`` outside the phases that were collected."""
        bits = [default] * len(self.timesteps)
        for phase, (first, last) in self.phases.items():
            own = self.activation_bits.get(phase, {}).get(name, default)
            bits[first : last + 1] = [own] * len(bits[first : last + 1])
        return tuple(bits)

    def to_json(self) -> dict[str, Any]:
        phases: dict[str, dict[str, Any]] = {}
        for phase, bounds in self.phases.items():
            phases[phase] = {"steps": list(bounds), "activation_bits": self.activation_bits.get(phase, {})}
            if phase in self.weight_bits:
                phases[phase]["weight_bits"] = self.weight_bits[phase]
        return {
            "num_steps": len(self.timesteps) or None,
            "timesteps": list(self.timesteps),
            **self.origin,
            "plan": self.plan,
            "ranges": self.rule,
            "phases": phases,
            "activation_ranges": to_json(self.ranges),
            "drift": self.drift,
        }


def plan_hash(layers: Mapping[str, LayerPlan]) -> str:
    """Hash of what of a plan decides about activations: layers, their bits, their clipping."""
    return short_hash([[name, plan.activation_bits, list(plan.clip_percentile)] for name, plan in layers.items()])


def rule_document(rule: Callable[..., Any]) -> dict[str, Any]:
    """A function with its parameters bound, as an option of a config group names it."""
    function, parameters = getattr(rule, "func", rule), getattr(rule, "keywords", {})
    return {"_target_": f"{function.__module__}.{function.__qualname__}", **parameters}


def observed_ranges(plan: Plan, activations: Path) -> dict[str, Observed]:
    """What each planned layer's input spans at each collected step, after the plan's clipping."""
    with ActivationFile(activations) as file:
        return {name: observe(file, name, layer.clip_percentile) for name, layer in plan.layers.items()}


def plan_steps(
    plan: Plan,
    observed: Mapping[str, Observed],
    activations: Path,
    rule: RangeRule,
    phase_bits: Mapping[str, Mapping[str, int]] | None = None,
) -> StepPlan:
    """The part of ``plan`` that varies with the step.

    Args:
        activations: the ``activations.h5`` that ``observed`` was read from.
        rule: how ranges vary.
        phase_bits: activation bits by phase and layer; None where they are the same at all steps.
    """
    with ActivationFile(activations) as file:
        levels, attributes = file.levels(), dict(file.attributes)
    last = levels.num_steps - 1
    return StepPlan(
        timesteps=tuple(_timesteps(activations.parent, levels.timesteps, levels.num_steps)),
        phases={name: (first, min(end, last)) for name, (first, end) in phase_bounds(levels.num_steps).items()},
        activation_bits={
            phase: {name: b for name, b in bits.items() if b != plan.layers[name].activation_bits}
            for phase, bits in (phase_bits or {}).items()
        },
        weight_bits=plan.phase_weight_bits,
        ranges={name: rule(seen) for name, seen in observed.items()},
        origin={
            "model": str(attributes.get("model")),
            "fingerprint": str(attributes.get("fingerprint")),
            "statistics": str(activations),
        },
        plan=plan_hash(plan.layers),
        rule=rule_document(rule),
        drift={name: drift(seen) for name, seen in observed.items()},
    )


def _timesteps(run: Path, known: Mapping[int, float], num_steps: int) -> list[float]:
    """Timesteps of steps 0 … n - 1: as recorded, else between those that were collected, linear in the step."""
    document = read_json(run / METADATA) if (run / METADATA).exists() else None
    recorded = document.get("timesteps") if isinstance(document, dict) else None
    if isinstance(recorded, list) and len(recorded) > num_steps:
        return [float(t) for t in recorded[:num_steps]]
    steps = sorted(known)
    between: list[float] = np.interp(np.arange(num_steps), steps, [known[s] for s in steps]).tolist()
    return between


def read_steps(path: Path) -> StepPlan:
    """A ``timestep_config.json``; nothing varies where there is none.

    Raises:
        CalibError: it is damaged.
    """
    if not path.exists():
        return StepPlan()
    document = read_json(path)
    try:
        if document["num_steps"] is None:
            return StepPlan()
        timesteps = tuple(float(t) for t in document["timesteps"])
        if not timesteps or not np.isfinite(timesteps).all():
            raise ValueError("timesteps that are no finite numbers")
        phases = document["phases"]
        activations = range(2, 17)
        return StepPlan(
            timesteps,
            {phase: _bounds(own["steps"], len(timesteps)) for phase, own in phases.items()},
            {phase: _bits(own["activation_bits"], activations) for phase, own in phases.items()},
            {phase: _bits(own["weight_bits"], WEIGHT_BITS) for phase, own in phases.items() if "weight_bits" in own},
            from_json(document["activation_ranges"], path, len(timesteps)),
            {key: str(document[key]) for key in ("model", "fingerprint", "statistics") if key in document},
            str(document.get("plan", "")),
            dict(document.get("ranges", {})),
            {name: float(drift) for name, drift in document.get("drift", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CalibError(f"{path}: lacks or garbles {error}; run calib analyze again") from None


def _bounds(document: Any, num_steps: int) -> tuple[int, int]:
    first, last = (int(step) for step in document)
    # Of one or two steps some phases have none: their last step is the one before their first.
    if not (0 <= first <= num_steps and first - 1 <= last < num_steps):
        raise ValueError(f"a phase from step {first} to {last}, of {num_steps} steps")
    return first, last


def _bits(document: Mapping[str, Any], allowed: Sequence[int]) -> dict[str, int]:
    for name, bits in document.items():
        if type(bits) is not int or bits not in allowed:
            raise ValueError(f"{bits} bits of {name}")
    return dict(document)
