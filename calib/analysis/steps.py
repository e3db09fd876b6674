"""The parts of a plan that vary with the denoising step: bits of phases, ranges. ``timestep_config.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.analysis.plan import LayerPlan, weights_hash
from calib.analysis.ranges import StepRanges, ranges_from_json, ranges_to_json
from calib.analysis.rules import recorded_rule
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import CalibError, lacks_or_garbles, suggest
from calib.base.files import read_edited_json, short_hash

import numpy as np
from numpy.typing import NDArray

#: Keys about the origin of the statistics.
ORIGIN = ("model", "fingerprint", "statistics", "statistics_checksum")

KEYS = (
    "num_steps",
    "timesteps",
    *ORIGIN,
    "plan",
    "ranges",
    "phases",
    "activation_ranges",
    "drift",
    "predicted",
    "importance",
)
PHASE_KEYS = ("steps", "activation_bits", "weight_bits")


@dataclass(frozen=True)
class StepPlan:
    """The parts of a plan that vary with the denoising step; empty where the statistics have no steps.

    Attributes:
        timesteps: timesteps of steps 0 … n - 1.
        phases: first and last step of each phase.
        activation_bits: by phase and layer, where they differ from the plan's.
        weight_bits: by phase and layer, where layers have copies of their weights.
        ranges: activation ranges by layer.
        origin: origin of the statistics, where known: model, fingerprint, path, and the file's checksum.
        plan: :func:`calib.analysis.plan.plan_hash` of the plan that this belongs to; empty where unknown.
        rule: name and parameters of the function that made the ranges, see :mod:`calib.analysis.rules`.
        predicted: PSNR of pictures that was predicted for the weights of the plan, and their hash, where it was.
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

    def psnr_of(self, plan: Mapping[str, LayerPlan]) -> float | None:
        """The PSNR that was predicted for ``plan``; None where that was for other weights, or was not."""
        psnr = self.predicted.get("psnr")
        return float(psnr) if psnr is not None and self.predicted.get("plan") == weights_hash(plan) else None

    def bits_by_step(self, name: str, default: int) -> tuple[int, ...]:
        """Activation bits of a layer at every step; ``default`` outside the collected phases."""
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
    used = ("timesteps", "phases", "activation_ranges", *(["importance"] if steps.importance else []))
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
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise lacks_or_garbles(path, error, "run calib analyze again") from None


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
