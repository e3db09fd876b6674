"""The parts of a plan that vary with the denoising step: bits of phases, ranges. ``timestep_config.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calib.analysis.plan import LayerPlan, Plan, weights_hash
from calib.analysis.ranges import StepRanges, check_steps, ranges_from_json, ranges_to_json
from calib.analysis.rules import recorded_rule
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import CalibError, lacks_or_garbles, suggest
from calib.base.files import read_edited_json, short_hash

import numpy as np
from numpy.typing import NDArray

#: Keys about the origin of the statistics.
ORIGIN = ("model", "fingerprint", "statistics", "statistics_checksum")

KEYS = (
    *("num_steps", "timesteps", *ORIGIN, "plan", "ranges", "phases", "activation_bits", "activation_ranges"),
    *("drift", "predicted", "importance"),
)
PHASE_KEYS = ("steps", "activation_bits", "weight_bits")


@dataclass(frozen=True)
class StepPlan:
    """The parts of a plan that vary with the denoising step; empty where the statistics have no steps.

    Attributes:
        timesteps: timesteps of steps 0 … n - 1.
        phases: first and last step of each phase.
        activation_bits: by phase and layer, where they differ from the plan's.
        step_bits: activation bits at every step by layer, (num_steps,), where they follow a budget and not the phase.
        weight_bits: by phase and layer, where layers have copies of their weights.
        ranges: activation ranges by layer.
        origin: origin of the statistics, where known: model, fingerprint, path, and the file's checksum.
        plan: :func:`calib.analysis.plan.plan_hash` of the plan that this belongs to; empty where unknown.
        rule: name and parameters of the function that made the ranges, see :mod:`calib.analysis.rules`.
        predicted: PSNRs that were predicted for the plan and for its weights alone, and hashes of what they are for.
        drift: :func:`calib.analysis.observed.range_drift` of each layer's observed ranges, 0 … 1.
        importance: by layer, how much an error of its output at each step reaches the picture, (num_steps,), relative
            to the step where it does most; where the plan was made by gradients of the picture.
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
    predicted: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    step_bits: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def with_predictions(self, plan: Plan, known: Mapping[str, Any]) -> "StepPlan":
        """Add what was predicted for ``plan``, with what it holds for, and what else is ``known`` of errors."""
        found = {key.removeprefix("predicted_"): psnr for key, psnr in plan.predicted().items()}
        if not found and not known:
            return self
        hashes = {"plan": weights_hash(plan.layers), "applied": applied_hash(plan.layers, self)}
        return replace(self, predicted={**known, **found, **hashes})

    def predictions(self, plan: Mapping[str, LayerPlan]) -> dict[str, float]:
        """What was predicted for ``plan``, by the keys of ``metrics.json``; empty where that was for other weights.

        With other bits or ranges of inputs the prediction for the weights alone is left.
        """
        found = self.predicted
        if "psnr" not in found or found.get("plan") != weights_hash(plan):
            return {}
        weights = float(found.get("weights_psnr", found["psnr"]))
        whole = found["psnr"] if found.get("applied") == applied_hash(plan, self) else weights
        return {"predicted_psnr": float(whole), "predicted_weights_psnr": weights}

    def bits_by_step(self, name: str, default: int) -> tuple[int, ...]:
        """Activation bits of a layer at every step; ``default`` outside the collected phases."""
        if name in self.step_bits:
            return self.step_bits[name]
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
            **({"activation_bits": _bits_to_json(self.step_bits)} if self.step_bits else {}),
            "activation_ranges": ranges_to_json(self.ranges),
            "drift": self.drift,
            **({"predicted": self.predicted} if self.predicted else {}),
            **(
                {"importance": {name: share.tolist() for name, share in self.importance.items()}}
                if self.importance
                else {}
            ),
        }


def applied_hash(plan: Mapping[str, LayerPlan], steps: StepPlan) -> str:
    """Hash of everything in a plan that a quantized model follows from: bits, groups, clips, ranges."""
    layers = {
        name: [layer.weight_bits, layer.group_size, layer.activation_bits, list(layer.clip_percentile)]
        for name, layer in plan.items()
    }
    document = steps.to_json()
    optional = {"activation_bits": steps.step_bits, "importance": steps.importance}
    used = ("timesteps", "phases", "activation_ranges", *(key for key, held in optional.items() if held))
    return short_hash([layers, *(document[key] for key in used)], digits=16)


def read_steps(path: Path) -> StepPlan:
    """Read a ``timestep_config.json``; an empty :class:`StepPlan` where there is none.

    Raises:
        CalibError: the file is damaged.
    """
    if not path.exists():
        return StepPlan()
    document = read_edited_json(path)
    try:
        _check_keys(path, "", document, KEYS)
        origin = {key: str(document[key]) for key in ORIGIN if key in document}
        if document["num_steps"] is None:
            return StepPlan(origin=origin)
        timesteps = tuple(float(t) for t in document["timesteps"])
        if not timesteps or not np.isfinite(timesteps).all():
            raise ValueError("timesteps that are no finite numbers")
        phases = document["phases"]
        for phase, own in phases.items():
            _check_keys(path, f"phase {phase!r} ", own, PHASE_KEYS)
        activations = range(2, 17)
        by_step = _bits_from_json(document.get("activation_bits", {}), len(timesteps), activations)
        for phase, own in phases.items():
            if both := [name for name in own["activation_bits"] if name in by_step]:
                raise ValueError(f"activation_bits of {both[0]} both by step and in phase {phase!r}")
        return StepPlan(
            timesteps,
            {phase: _bounds(own["steps"], len(timesteps)) for phase, own in phases.items()},
            {phase: _bits(own["activation_bits"], activations) for phase, own in phases.items()},
            {phase: _bits(own["weight_bits"], WEIGHT_BITS) for phase, own in phases.items() if "weight_bits" in own},
            ranges_from_json(document["activation_ranges"], path, len(timesteps)),
            origin,
            str(document.get("plan", "")),
            recorded_rule(document.get("ranges", {})),
            {name: float(drift) for name, drift in document.get("drift", {}).items()},
            dict(document.get("predicted", {})),
            {name: _shares(share, len(timesteps)) for name, share in document.get("importance", {}).items()},
            by_step,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise lacks_or_garbles(path, error, "run calib analyze again") from None


def _bits_to_json(bits: Mapping[str, Sequence[int]]) -> dict[str, dict[str, list[int]]]:
    found = {}
    for name, own in bits.items():
        starts = [step for step, b in enumerate(own) if step == 0 or b != own[step - 1]]
        found[name] = {"from_step": starts, "bits": [own[step] for step in starts]}
    return found


def _bits_from_json(document: Mapping[str, Any], num_steps: int, allowed: Sequence[int]) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, entry in document.items():
        starts, bits = entry["from_step"], entry["bits"]
        check_steps(starts, num_steps)
        if len(starts) != len(bits):
            raise ValueError(f"{len(starts)} steps with {len(bits)} bits of {name}")
        _bits({f"{name} from step {s}": b for s, b in zip(starts, bits, strict=True)}, allowed)
        ends = [*starts[1:], num_steps]
        found[name] = tuple(b for s, e, b in zip(starts, ends, bits, strict=True) for _ in range(s, e))
    return found


def _check_keys(path: Path, where: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := [key for key in entry if key not in known]:
        raise CalibError(f"{path}: {where}has {unknown[0]}, which is no key of it.{suggest(unknown[0], known)}")


def _bounds(document: Any, num_steps: int) -> tuple[int, int]:
    first, last = (int(step) for step in document)
    # In a trajectory of one or two steps some phases are empty: their last step precedes their first.
    if not (0 <= first <= num_steps and first - 1 <= last < num_steps):
        raise ValueError(f"a phase from step {first} to {last}, of {num_steps} steps")
    return first, last


def _shares(document: Any, num_steps: int) -> NDArray[np.float64]:
    shares = np.array(document, np.float64)
    if shares.shape != (num_steps,) or not (np.isfinite(shares) & (shares >= 0)).all():
        raise ValueError(f"an importance that is not {num_steps} finite numbers, none negative")
    return shares


def _bits(document: Mapping[str, Any], allowed: Sequence[int]) -> dict[str, int]:
    for name, bits in document.items():
        if type(bits) is not int or bits not in allowed:
            raise ValueError(f"{bits} bits of {name}")
    return dict(document)
