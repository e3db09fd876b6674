"""Steps of inputs' grids that are learned: LSQ, Esser et al. 2020 (arXiv 1902.08153); and where inputs come to lie."""

from dataclasses import dataclass, replace

from calib.analysis.ranges import StepRanges
from calib.quantization.model import InputRule
from calib.quantization.reconstruction.rounded import by_row

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class InputSteps:
    """How an input is rounded before training, and by step of the sampler, (num_steps,), on which grid.

    Attributes:
        range_of: which of the rule's ranges a step has; each has a factor that is trained, 1 at the start.
        used: whether the input is rounded at that step.
        scale, low, high: the grid: whole multiples of ``scale``, from ``low`` to ``high`` of them.
    """

    rule: InputRule
    range_of: NDArray[np.intp]
    used: NDArray[np.bool_]
    scale: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, rule: InputRule) -> "InputSteps":
        grids = [rule.grid(step) for step in range(len(rule.bits))]
        ends = [(g.scale, -g.zero_point, 2**g.bits - 1 - g.zero_point) if g and g.scale else (0, 0, 0) for g in grids]
        scale, low, high = np.array(ends, np.float64).T
        range_of = np.searchsorted(rule.ranges.from_step, np.arange(len(ends)), "right") - 1
        return cls(rule, range_of, scale > 0, np.where(scale > 0, scale, 1), low, high)

    def factors(self) -> mx.array:
        """What is trained, (ranges,)."""
        return mx.ones(len(self.rule.ranges.from_step))

    def moved(self, x: mx.array) -> mx.array:
        """x / m, which is what the layer reads where nothing is rounded; lazy."""
        return x / mx.array(self.rule.divisors) if self.rule.divisors else x

    def rounded(self, x: mx.array, factors: mx.array, steps: NDArray[np.intp]) -> mx.array:
        """What the layer reads for rows of these steps: Q(x / m - z) + z, with the gradients of LSQ; lazy."""
        y, steps = self.moved(x), np.minimum(steps, len(self.used) - 1)
        z = mx.array(self.rule.shifts) if self.rule.shifts else mx.array(0.0)
        own = factors[mx.array(self.range_of[steps])].reshape(-1, *[1] * (x.ndim - 1))
        scale, low, high = (by_row(x, values[steps]) for values in (self.scale, self.low, self.high))
        return mx.where(by_row(x, self.used[steps]), stepped(y - z, own * scale, low, high) + z, y)

    def learned(self, factors: mx.array) -> InputRule:
        """The rule with these factors."""
        share, ranges = np.array(factors, np.float64), self.rule.ranges
        low, high = (tuple((share * values).tolist()) for values in (ranges.low, ranges.high))
        return replace(self.rule, ranges=StepRanges(ranges.from_step, low, high))


def stepped(x: mx.array, scale: mx.array, low: mx.array, high: mx.array) -> mx.array:
    """Round x to a whole multiple of ``scale``, of ``low`` to ``high`` of them; gradients are those of equation 3.

    The factor of section 2.2 for the gradient of ``scale`` is left out: Adam's updates do not depend on it.
    """
    q = mx.clip(x / scale, low, high)
    return (q + mx.stop_gradient(mx.round(q) - q)) * scale


class Extremes:
    """Least and largest value of each channel in each range of steps, (ranges, channels), and a channel's centre.

    Attributes:
        centre: (max + min) / 2 of each batch, each weighted by ``momentum``, from the first on.
    """

    def __init__(self, ranges: int, channels: int, momentum: float):
        self._low, self._high = np.full((ranges, channels), np.inf), np.full((ranges, channels), -np.inf)
        self._momentum = momentum
        self.centre: NDArray[np.float64] | None = None

    def see(self, x: mx.array, where: NDArray[np.intp]) -> None:
        """Add a batch, (rows, …, channels), each row of one range."""
        flat = x.reshape(len(where), -1, x.shape[-1]).astype(mx.float32)
        low, high = (np.array(ends, np.float64) for ends in (flat.min(axis=1), flat.max(axis=1)))
        np.minimum.at(self._low, where, low)
        np.maximum.at(self._high, where, high)
        middle = (low.min(axis=0) + high.max(axis=0)) / 2
        self.centre = middle if self.centre is None else self.centre + self._momentum * (middle - self.centre)

    def ranges(self, from_step: tuple[int, ...], m: NDArray[np.float64], z: NDArray[np.float64]) -> StepRanges:
        """Ranges of x / m - z; those of all steps where none was seen."""
        unseen = ~np.isfinite(self._low).all(axis=1)
        low, high = (self._low / m - z).min(axis=1), (self._high / m - z).max(axis=1)
        low[unseen], high[unseen] = low[~unseen].min(), high[~unseen].max()
        return StepRanges(from_step, tuple(low.tolist()), tuple(high.tolist()))
