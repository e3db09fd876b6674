"""Ranges of layers at each denoising step, read from ``activations.h5``, and the step plan that follows from them."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from calib.activations.reader import ActivationFile
from calib.activations.statistics import Statistics
from calib.analysis.plan import NO_CLIP, UNQUANTIZED, Plan, plan_hash
from calib.analysis.ranges import Observed, RangeRule, StepRanges
from calib.analysis.rules import checked_rule
from calib.analysis.steps import StepPlan
from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.layout import METADATA
from calib.base.targets import described
from calib.dataset.timesteps import phase_bounds

import numpy as np
from numpy.typing import NDArray

#: Ratio of the widest to the narrowest range over the steps above which a layer is reported.
REPORTED_DRIFT = 1.5


def observe(
    file: ActivationFile, name: str, clip: tuple[float, float], divisors: NDArray[np.float64] | None = None
) -> Observed:
    """Ranges of the input of layer ``name`` at each collected step that the sampler feeds to the model.

    The range is the exact minimum and maximum, or the percentiles ``clip`` of a step's histogram where ``clip`` is not
    (0, 100). With ``divisors``, (channels,), all positive, each input channel is divided by its own (SmoothQuant, arXiv
    2211.10438); then the range is exact and ``clip`` does not apply, as a histogram pools the channels, and the 99th
    percentile is placed in proportion to its position in the undivided range.

    Noise levels of steps that were not collected are interpolated linearly in the step index, from 1 at step 0 to 0 at
    the finished latent.

    Raises:
        CalibError: there is no such layer, or none of its values is finite at any of these steps.
    """
    by_step = _evaluated(file, name)
    found = {step: _range(statistics, clip, divisors) for step, statistics in by_step.items()}
    finite = {step: values for step, values in found.items() if np.isfinite(values).all()}
    if not finite:
        raise _nothing(file, name)
    low, high, p99 = np.array(list(finite.values())).T
    return Observed(np.array(list(finite), np.int64), low, high, p99, _sigmas(file))


def channel_extremes(file: ActivationFile, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Minimum and maximum of each channel of a layer over the same steps, (channels,) each.

    They are +infinity and -infinity for a channel without finite values, as in the file.

    Raises:
        CalibError: there is no such layer, or none of its values is finite at any of these steps.
    """
    by_step = _evaluated(file, name)
    if not any(statistics.count.any() for statistics in by_step.values()):
        raise _nothing(file, name)
    low = np.min([statistics.minimum for statistics in by_step.values()], axis=0)
    high = np.max([statistics.maximum for statistics in by_step.values()], axis=0)
    return low.astype(np.float64), high.astype(np.float64)


def channel_powers(
    file: ActivationFile, name: str, importance: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Mean square of each channel of a layer over the same steps, (channels,); 0 for one without finite values.

    Args:
        importance: how much each step counts, (num_steps,).

    Raises:
        CalibError: there is no such layer, or none of its values is finite at any of these steps.
    """
    found = _evaluated(file, name)
    by_step = list(found.values())
    counts = np.array([statistics.count for statistics in by_step], np.float64)
    if not counts.any():
        raise _nothing(file, name)
    if importance is not None and (shares := importance[list(found)]).any():
        counts *= (shares / shares.max())[:, None]
    powers = np.nan_to_num([statistics.mean**2 + statistics.std**2 for statistics in by_step])
    power: NDArray[np.float64] = (counts * powers).sum(axis=0) / np.maximum(counts.sum(axis=0), 1e-300)
    return power


def _evaluated(file: ActivationFile, name: str) -> dict[int, Statistics]:
    by_step = file.by_step(name)
    return {step: by_step[step] for step in file.evaluated_steps()}


def _nothing(file: ActivationFile, name: str) -> CalibError:
    wanted = "no finite values at a step that the sampler feeds to the model"
    return CalibError(f"{file.path}: layer {name!r} has {wanted}; collect it at other steps")


def _range(
    statistics: Statistics, clip: tuple[float, float], divisors: NDArray[np.float64] | None
) -> tuple[float, float, float]:
    """Low, high and 99th percentile; not finite where there are no finite values."""
    least, most = float(statistics.minimum.min()), float(statistics.maximum.max())
    low, high, p99 = statistics.histogram.percentiles([*clip, 99]).clip(least, most)
    if divisors is not None:
        low, high = (statistics.minimum / divisors).min(), (statistics.maximum / divisors).max()
        p99 = np.interp(p99, [least, most], [low, high])
    elif clip == NO_CLIP:
        low, high = least, most
    return float(low), float(high), float(p99)


def _sigmas(file: ActivationFile) -> NDArray[np.float64]:
    """Noise level of every step at which the model is evaluated, (num_steps,)."""
    levels = file.levels()
    known = sorted(({0: 1.0, levels.num_steps: 0.0} | dict(levels.sigmas)).items())
    steps, sigmas = zip(*known, strict=True)
    every: NDArray[np.float64] = np.interp(np.arange(levels.num_steps), steps, sigmas)
    return every


def range_drift(observed: Observed) -> float:
    """Drift of the width of the range over the steps: 1 - narrowest / widest, 0 … 1; 0 where all widths are 0."""
    widths = observed.high - observed.low
    widest = float(widths.max())
    return 1 - float(widths.min()) / widest if widest > 0 else 0.0


def drift_text(layers: Mapping[str, Observed], most: int = 10) -> str:
    """A table for people: at most ``most`` layers of largest drift, and the number of layers above the threshold."""
    drifts = {name: range_drift(observed) for name, observed in layers.items()}
    reported = sorted(
        (name for name in drifts if drifts[name] > 1 - 1 / REPORTED_DRIFT), key=lambda name: -drifts[name]
    )
    lines = ["  Drift over the steps (width at its widest : at its narrowest):"]
    lines += [f"    - {name} ({_note(layers[name])})" for name in reported[:most]]
    lines.append(f"    {len(reported)} of {len(layers)} layers above ×{REPORTED_DRIFT}" if reported else "    - none")
    return "\n".join(lines) + "\n"


def _note(observed: Observed) -> str:
    widths = observed.high - observed.low
    widest, narrowest = int(widths.argmax()), int(widths.argmin())
    times = f"{widths[widest] / widths[narrowest]:.1f}" if widths[narrowest] > 0 else "∞"
    return f"×{times}, widest at step {observed.steps[widest]}, narrowest at step {observed.steps[narrowest]}"


def observed_ranges(plan: Plan, activations: Path) -> dict[str, Observed]:
    """Ranges of each planned layer's input at each collected step, after the plan's clipping."""
    with ActivationFile(activations) as file:
        return {name: observe(file, name, layer.clip_percentile) for name, layer in plan.layers.items()}


def ranges_by(rule: RangeRule, activations: Path) -> dict[str, StepRanges]:
    """Ranges by ``rule`` of every layer's input, without clipping."""
    with ActivationFile(activations) as file:
        inputs = {name: file.same_data(name) for name in file.layers if file.kind(name) != "block"}
        made = {name: checked_rule(rule)(observe(file, name, NO_CLIP)) for name in set(inputs.values())}
    return {name: made[first] for name, first in inputs.items()}


def average_activation_bits(activations: Path, bits: Mapping[str, Sequence[int]]) -> float:
    """Bits of a number that a layer reads, over all inputs and steps; ``bits`` at each step by layer.

    An input counts by its size, and once however many layers read it. 16 where no input was collected.
    """
    with ActivationFile(activations) as file:
        sharing: dict[str, list[str]] = {}
        for name in bits:
            if name in file.layers and file.kind(name) != "block":
                sharing.setdefault(file.same_data(name), []).append(name)
        counts = {first: file.count(first) for first in sharing}
    # Each layer's mean, as a fraction, so that a budget that is met is not missed by rounding.
    total = sum(
        counts[first] * Fraction(sum(bits[name]), len(bits[name])) / len(names)
        for first, names in sharing.items()
        for name in names
    )
    read = sum(counts.values())
    return float(total / read) if read else float(UNQUANTIZED)


def plan_steps(
    plan: Plan,
    observed: Mapping[str, Observed],
    activations: Path,
    rule: RangeRule,
    phase_bits: Mapping[str, Mapping[str, int]] | None = None,
) -> StepPlan:
    """The part of ``plan`` that varies with the denoising step.

    Args:
        activations: the ``activations.h5`` that ``observed`` was read from.
        rule: makes the ranges of all steps from the observed ones.
        phase_bits: activation bits by phase and layer; None where they are the same at all steps.
    """
    with ActivationFile(activations) as file:
        levels, attributes = file.levels(), dict(file.attributes)
    last = levels.num_steps - 1
    if odd := [name for name, bits in plan.step_activation_bits.items() if len(bits) != levels.num_steps]:
        what = f"{odd[0]} at {len(plan.step_activation_bits[odd[0]])} steps, of {levels.num_steps}"
        raise CalibError(f"the plan has activation bits of {what} in {activations}")
    return StepPlan(
        timesteps=tuple(_timesteps(activations.parent, levels.timesteps, levels.num_steps)),
        phases={name: (first, min(end, last)) for name, (first, end) in phase_bounds(levels.num_steps).items()},
        activation_bits={
            phase: {name: b for name, b in bits.items() if b != plan.layers[name].activation_bits}
            for phase, bits in (phase_bits or {}).items()
        },
        step_bits=plan.step_activation_bits,
        weight_bits=plan.phase_weight_bits,
        ranges={name: checked_rule(rule)(seen) for name, seen in observed.items()},
        origin={
            "model": str(attributes.get("model")),
            "fingerprint": str(attributes.get("fingerprint")),
            "statistics": str(activations),
        },
        plan=plan_hash(plan.layers),
        rule=described(rule),
        drift={name: range_drift(seen) for name, seen in observed.items()},
    )


def _timesteps(run: Path, known: Mapping[int, float], num_steps: int) -> list[float]:
    """Timesteps of steps 0 … n - 1: as recorded, else interpolated linearly in the step between the collected ones."""
    document = read_json(run / METADATA) if (run / METADATA).exists() else None
    recorded = document.get("timesteps") if isinstance(document, dict) else None
    if isinstance(recorded, list) and len(recorded) > num_steps:
        return [float(t) for t in recorded[:num_steps]]
    steps = sorted(known)
    between: list[float] = np.interp(np.arange(num_steps), steps, [known[s] for s in steps]).tolist()
    return between
