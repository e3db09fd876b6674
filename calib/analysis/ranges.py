"""Ranges of activations that vary with the denoising step, for quantizing them during sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Observed:
    """What a layer's input was seen to span at the steps that were collected and that the sampler feeds to the model.

    Attributes:
        steps: step indices, ascending, (k,); all below ``num_steps``.
        low, high: the range at each, after the plan's clipping, (k,).
        p99: 99th percentile at each, (k,).
        sigmas: noise level of every step 0 … num_steps - 1 of the trajectory, (num_steps,), falling from about 1.
    """

    steps: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p99: NDArray[np.float64]
    sigmas: NDArray[np.float64]

    @property
    def num_steps(self) -> int:
        return len(self.sigmas)


@dataclass(frozen=True)
class StepRanges:
    """A range for every step, constant in between: from step ``from_step[i]`` on it is [low[i], high[i]]."""

    from_step: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, step: int) -> tuple[float, float]:
        """The range at a step."""
        place = max(i for i, first in enumerate(self.from_step) if first <= max(step, 0))
        return self.low[place], self.high[place]


#: A rule, its parameters bound: what an option of the config group ``ranges`` has to supply.
RangeRule: TypeAlias = Callable[[Observed], StepRanges]
