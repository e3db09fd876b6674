"""Ranges of rotated inputs: their extremes in a replay, cut where that rounds a sample of them with less error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calib.activations.taps import TapSelection, tap_points
from calib.analysis.grid import Grid
from calib.analysis.plan import UNQUANTIZED
from calib.analysis.ranges import StepRanges
from calib.models.packed import Packed
from calib.models.rotation import rotated
from calib.quantization.quantizer import QuantizerInput

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Shares of the extremes that are tried.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
#: Numbers of each row that are looked at: at channels evenly spaced, each of any token.
SAMPLED = 256


@dataclass
class _Seen:
    """Of one input at one step: its extremes, and a sample."""

    low: float = 0.0
    high: float = 0.0
    sample: list[NDArray[np.float64]] = field(default_factory=list)

    def range_for(self, bits: int) -> tuple[float, float]:
        """The share of the extremes that rounds the sample best."""
        sample = np.concatenate(self.sample)
        if bits >= UNQUANTIZED or not self.high > self.low:
            return self.low, self.high

        def error(share: float) -> float:
            grid = Grid.over(share * self.low, share * self.high, bits)
            return float(np.square(grid.apply(sample) - sample).mean())

        best = min(SHARES, key=error)
        return best * self.low, best * self.high


def rotated_ranges(
    work: QuantizerInput, blocks: Mapping[str, int], replaced: Mapping[str, Packed]
) -> dict[str, StepRanges]:
    """Ranges of the inputs of layers whose plan rounds them, rotated in the blocks given by layer name.

    Inputs are those of the model with ``replaced`` weights.
    """
    bits = {name: work.input_bits(name) or (work.plan[name].activation_bits,) for name in blocks}
    taps = tap_points(work.architecture, TapSelection())
    readers = {tap.name: [n for n in tap.names if n in blocks and min(bits[n]) < UNQUANTIZED] for tap in taps}
    points = [tap for tap in taps if readers[tap.name]]
    if not points:
        return {}
    seen: dict[str, dict[int, _Seen]] = {tap.name: {} for tap in points}
    found: list[tuple[str, Sequence[int], mx.array, mx.array, mx.array]] = []

    def record(name: str, activation: mx.array, steps: Sequence[int]) -> mx.array:
        block = blocks[readers[name][0]]
        x = rotated(activation.astype(mx.float32), block).reshape(len(steps), -1, activation.shape[-1])
        some = x.reshape(len(steps), -1)[:, mx.array(_places(*x.shape[1:]))]
        x = x.reshape(len(steps), -1)
        found.append((name, list(steps), x.min(axis=1), x.max(axis=1), some))
        return activation

    def pending() -> list[mx.array]:
        return [array for _, _, *arrays in found for array in arrays]

    work.replay(points, record, pending, replaced)
    for name, steps, lows, highs, samples in found:
        for step, low, high, sample in zip(steps, *map(np.array, (lows, highs, samples)), strict=True):
            own = seen[name].setdefault(step, _Seen())
            own.low, own.high = min(own.low, float(low)), max(own.high, float(high))
            own.sample.append(sample.astype(np.float64))
    names = [(tap.name, n) for tap in points for n in readers[tap.name]]
    return {n: _ranges(seen[tap], bits[n], _is_static(work, n)) for tap, n in names}


def _places(tokens: int, channels: int) -> NDArray[np.intp]:
    """Places in a row of (tokens, channels), flat."""
    chosen = np.arange(SAMPLED) * max(channels, SAMPLED) // SAMPLED % channels
    return np.random.RandomState(0).randint(tokens, size=SAMPLED) * channels + chosen


def _is_static(work: QuantizerInput, name: str) -> bool:
    """Whether the rule for ranges gives a layer's input one for all steps."""
    planned = work.ranges(name, None, None)
    return planned is not None and len(planned.from_step) == 1


def _ranges(seen: Mapping[int, _Seen], bits: Sequence[int], static: bool) -> StepRanges:
    """From each step that was replayed to the next the hull of both; the hull of all where ``static``."""
    steps = sorted(seen)
    found = [seen[step].range_for(bits[min(step, len(bits) - 1)]) for step in steps]
    hulls = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(found, [*found[1:], found[-1]], strict=True)]
    low, high = map(tuple, zip(*hulls, strict=True))
    if static:
        return StepRanges((0,), (min(low),), (max(high),))
    return StepRanges((0, *steps[1:]), low, high)
