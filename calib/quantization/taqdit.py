"""Quantizer ``taqdit``: roundings of weights and steps of inputs trained together, block by block.

TaQ-DiT, Liu et al. 2024 (arXiv 2411.14172), section III: joint reconstruction, momentum shifting, and migration by
reconstruction, with the losses of its released code. Weights are rounded as in AdaRound, inputs as in LSQ, with QDrop
(arXiv 2203.05740). The paper reconstructs attention and MLP one after the other; here it is a block (docs/METHODS.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from calib.analysis.plan import UNQUANTIZED
from calib.base.errors import CalibError, ConfigError
from calib.base.layout import ACTIVATIONS
from calib.models.grids import searched
from calib.quantization.fit import column_weights
from calib.quantization.model import InputRule
from calib.quantization.quantizer import Quantized, QuantizerInput
from calib.quantization.reconstruction.adaround import Roundings, decided, rounding, undecided
from calib.quantization.reconstruction.lsq import Extremes, InputSteps
from calib.quantization.reconstruction.reconstruct import Draw, Parameters, See, Training, reconstruct
from calib.quantization.reconstruction.rounded import Rounded, linear

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

#: Share of a channel's centre that each batch brings in.
MOMENTUM = 0.05
#: Regressions of the searched grids.
ROUNDS = 4
#: The kind of inputs that are shifted and migrated.
KIND = "post-gelu"
#: The groups of parameters.
ROUNDING, STEPS = "rounding", "steps"


class Granularity(StrEnum):
    """What has a grid of its own: a group of the plan's, or an output channel."""

    GROUP = "group"
    CHANNEL = "channel"


@dataclass(frozen=True)
class Parts:
    """The method's parts; see :func:`quantize`."""

    granularity: Granularity
    rate: float
    step_rate: float
    penalty: float
    joint: bool
    qdrop: float
    shift: bool
    migrate: float

    def check(self) -> None:
        """Raise where a value is out of range."""
        for key, holds, allowed in (
            ("rate", self.rate > 0, "must be more than 0"),
            ("step_rate", self.step_rate > 0, "must be more than 0"),
            ("penalty", self.penalty >= 0, "must be 0 or more"),
            ("migrate", 0 <= self.migrate <= 0.5, "must be 0 (none) to 0.5"),
        ):
            if not holds or not math.isfinite(getattr(self, key)):
                raise ConfigError.bad_value(f"quantizer.{key}", getattr(self, key), allowed)


@dataclass
class Values:
    """Of one iteration: h and weights by layer, factors of inputs' steps by tap, and what was read so far by tap."""

    h: dict[str, mx.array]
    weights: dict[str, mx.array]
    factors: dict[str, mx.array]
    read: dict[str, tuple[mx.array, mx.array]]


def quantize(
    work: QuantizerInput,
    granularity: Granularity = Granularity.GROUP,
    iterations: int = 200,
    batch_size: int = 16,
    rate: float = 0.05,
    step_rate: float = 0.002,
    penalty: float = 100.0,
    joint: bool = True,
    qdrop: float = 0.5,
    shift: bool = False,
    migrate: float = 0.0,
    held_out: float = 0.2,
    seed: int = 0,
    memory_gb: float = 2.0,
) -> Quantized:
    """Quantize weights and inputs; a block whose error on held-out images no iterate lowers is rounded to nearest.

    Where the plan leaves all inputs at 16 bits the roundings alone are trained, and a note says so.

    Args:
        granularity: what has a grid of its own.
        rate: Adam's, of roundings; ``step_rate`` that of the inputs' steps, relative to themselves.
        penalty: the weight of AdaRound's regulariser where the block's error before training is 1.
        joint: train both together; else the roundings with inputs as they are, then the steps.
        shift: centre each channel of inputs that follow a GELU before they are rounded.
        migrate: share of these channels, the widest, that are divided, and their weights multiplied.

    Raises:
        ConfigError: a value is out of range, or the model does not run in parts.
        CalibError: statistics are missing, or too few images to hold some out.
    """
    training = Training(iterations, batch_size, qdrop, held_out, seed, memory_gb)
    training.check()
    own = Parts(granularity, rate, step_rate, penalty, joint, qdrop, shift, migrate)
    own.check()
    method = TaQDiT(work, own)
    found = reconstruct(work, method, training, {"method": "taqdit", **asdict(own)})
    rules = found.inputs
    notes = [*method.notes, *found.notes, *([_summary(found)] if found.errors else [])]
    return Quantized(
        {name: found.layers[name] for name in work.layers},
        ranges={name: rule.ranges for name, rule in rules.items()},
        notes=notes,
        divisors={name: rule.divisors for name, rule in rules.items() if rule.divisors},
        shifts={name: rule.shifts for name, rule in rules.items() if rule.shifts},
    )


class TaQDiT:
    """The :class:`~calib.quantization.reconstruction.reconstruct.Method`; it holds the grids of one part at a time."""

    def __init__(self, work: QuantizerInput, own: Parts):
        self._work, self._own = work, own
        self._rules = {name: rule for name in work.plan if (rule := _rule(work, name)) is not None}
        self.notes: list[str] = []
        if work.layers and not self._rules:
            self.notes.append("taqdit: the plan leaves all inputs at 16 bits: roundings of weights alone are trained")
        self._divisors = self._migration() if own.migrate else {}
        rates = {ROUNDING: own.rate, STEPS: own.step_rate}
        self.phases: Sequence[Mapping[str, float]] = [rates] if own.joint else [{key: rates[key]} for key in rates]

    def _migration(self) -> dict[str, NDArray[np.float64]]:
        """The divisors m of the channels of inputs that follow a GELU, where some are more than 1.

        A channel is an outlier if its range is more than so many times the median of its layer; how many follows from
        the share of all channels that are to be outliers. m = max(1, round(s_c / s_0)), with s_0 that of all others.
        """
        widths = {}
        for name in filter(self._follows_gelu, self._rules):  # of the whole plan, as copies for phases have the same m
            extremes = self._work.channel_range(name)
            if extremes is None:
                raise _lacking(name)
            low, high = extremes.low, extremes.high
            width = high - low if self._own.shift else np.maximum(high, 0) - np.minimum(low, 0)
            if (width > 0).any():
                widths[name] = width / np.median(width[width > 0])
        if not widths:
            return {}
        threshold = float(np.quantile(np.concatenate(list(widths.values())), 1 - self._own.migrate))
        found, shares = {}, []
        for name, width in widths.items():
            outlier = width > threshold
            shares.append(100 * float(outlier.mean()))
            if (others := width[~outlier].max(initial=0)) > 0:
                found[name] = np.where(outlier, np.maximum(1, np.round(width / others)), 1.0)
        self.notes.append(
            f"taqdit: channels after a GELU are outliers from {threshold:.3g} times their layer's median range on, "
            f"{min(shares):.3g} to {max(shares):.3g}% of a layer's; {sum(int((m > 1).sum()) for m in found.values())} "
            "of all are migrated"
        )
        return {name: m for name, m in found.items() if (m > 1).any()}

    def _follows_gelu(self, name: str) -> bool:
        return self._work.architecture.kind(name) == KIND

    def begin(self, names: Sequence[str], observe: Callable[[See], None]) -> Parameters:
        """Search the grids of weights, shift and migrate inputs; roundings begin at the nearest, steps as planned."""
        inputs = {name: InputSteps.of(self._rules[name]) for name in names if name in self._rules}
        inputs |= self._moved(inputs, observe)
        self._inputs = {name: own for name, own in inputs.items() if own.used.any()}  # not where it is always zero
        self._taps = {name: self._first_alike(name) for name in self._inputs}
        self._grids: dict[str, Roundings] = {}
        own: Parameters = {ROUNDING: {}, STEPS: {tap: self._inputs[tap].factors() for tap in self._taps.values()}}
        for name in names:
            if name in self._work.layers:
                plan, weight = self._work.plan[name], self._work.layers[name].weight.astype(mx.float32)
                columns = column_weights(self._work, name)
                if name in self._divisors:
                    m = mx.array(self._divisors[name].astype(np.float32))
                    weight, columns = weight * m, columns / (m * m)
                given = (plan.weight_bits, plan.group_size, self._work.dtype, columns, ROUNDS)
                start = searched(weight, *given, whole_rows=self._own.granularity is Granularity.CHANNEL)
                self._grids[name], own[ROUNDING][name] = Roundings.of(weight, start)
        return own

    def _first_alike(self, name: str) -> str:
        """The first layer of the part that reads the same, rounded alike."""
        shared = self._work.architecture.shared_input
        alike = (n for n, own in self._inputs.items() if own.rule == self._inputs[name].rule)
        return next(n for n in alike if shared(n) == shared(name))

    def _moved(self, inputs: Mapping[str, InputSteps], observe: Callable[[See], None]) -> dict[str, InputSteps]:
        """Inputs that follow a GELU, shifted and divided; their ranges are of what is observed."""
        layers, own = self._work.layers, self._own
        moved = [
            name
            for name in inputs
            if name in layers and self._follows_gelu(name) and (own.shift or name in self._divisors)
        ]
        extremes = {
            name: Extremes(len(inputs[name].rule.ranges.from_step), layers[name].weight.shape[1], MOMENTUM)
            for name in moved
        }

        def see(name: str, x: mx.array, steps: NDArray[np.intp]) -> None:
            if name in extremes:
                extremes[name].see(x, inputs[name].range_of[np.minimum(steps, len(inputs[name].used) - 1)])

        if moved:
            observe(see)
        found = {}
        for name in moved:
            rule, seen = inputs[name].rule, extremes[name]
            m = self._divisors.get(name, np.ones(layers[name].weight.shape[1]))
            z = seen.centre / m if own.shift and seen.centre is not None else np.zeros(len(m))
            ranges = seen.ranges(rule.ranges.from_step, m, z)
            divisors = tuple(m.tolist()) if name in self._divisors else ()
            shifts = tuple(z.tolist()) if own.shift else ()
            found[name] = InputSteps.of(InputRule(ranges, rule.bits, divisors, shifts))
        return found

    def values(self, own: Parameters, draw: Draw) -> Values:
        """Roundings and weights of these parameters, and factors of inputs' steps."""
        soft = rounding if ROUNDING in draw.trained else decided
        h = {name: soft(v) for name, v in own[ROUNDING].items()}
        weights = {name: self._grids[name].weight(values) for name, values in h.items()}
        return Values(h, weights, own[STEPS] if STEPS in draw.trained else {}, {})

    def run(self, values: Values, draw: Draw, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """A layer with rounded input, but for what is dropped, and weights on their way to be rounded."""
        if name in self._inputs:
            x = self._read(values, draw, name, x) if values.factors else self._inputs[name].moved(x)
        y: mx.array = linear(layer, values.weights[name], x) if name in values.weights else layer(x)
        return y

    def _read(self, values: Values, draw: Draw, name: str, x: mx.array) -> mx.array:
        """What a layer reads, computed once for layers that read it alike."""
        tap, own = self._taps[name], self._inputs[name]
        if tap not in values.read or values.read[tap][0] is not x:
            y = own.rounded(x, values.factors[tap], draw.steps)
            if self._own.qdrop:
                y = mx.where(draw.chosen(self._own.qdrop, y), own.moved(x), y)
            values.read[tap] = (x, y)
        return values.read[tap][1]

    def penalty(self, values: Values, draw: Draw) -> mx.array:
        """AdaRound's regulariser, a mean over all roundings."""
        if ROUNDING not in draw.trained:
            return mx.array(0.0)
        total = sum((undecided(h, draw.progress).sum() for h in values.h.values()), mx.array(0.0))
        return total * (self._own.penalty / sum(h.size for h in values.h.values()))

    def finish(self, own: Parameters) -> Rounded:
        """Roundings to the nearer integer, ranges stretched as their steps."""
        layers = {name: self._grids[name].packed(v) for name, v in own[ROUNDING].items()}
        mx.eval([[p.weight, p.scales, p.biases] for p in layers.values()])
        rules = {name: steps.learned(own[STEPS][self._taps[name]]) for name, steps in self._inputs.items()}
        return Rounded(layers, rules)


def _rule(work: QuantizerInput, name: str) -> InputRule | None:
    """How the plan quantizes a layer's input; None where it does not, or where the name is a block's."""
    bits = work.input_bits(name) or (work.plan[name].activation_bits,)
    if name not in work.architecture.layers() or all(b >= UNQUANTIZED for b in bits):
        return None
    ranges = work.ranges(name, None, None)
    if ranges is None:
        raise _lacking(name)
    return InputRule(ranges, bits)


def _lacking(name: str) -> CalibError:
    return CalibError(f"quantizer=taqdit needs {ACTIVATIONS}: no statistics of {name}; calib collect makes them")


def _summary(found: Rounded) -> str:
    ratios = [least / start if start > 0 else 1.0 for start, least in found.errors.values()]
    spread = f"{np.median(ratios):.2g} at the median ({min(ratios):.2g} to {max(ratios):.2g})"
    return f"taqdit: errors of {len(ratios)} blocks on held-out images, 1 where rounded to nearest: {spread}"
