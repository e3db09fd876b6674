"""What watches a transformer's forwards: the interface, and what an observer has seen in the end."""

from dataclasses import dataclass
from typing import Protocol

from calib.activations.statistics import Statistics

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass
class Seen:
    """What went by at one tap.

    Attributes:
        dtype: of the activations.
        ranges: min, max, 1st and 99th percentile of each row of the batches, in their order, (rows, 4). Minimum and
            maximum are exact, the percentiles those of some thousand values of a row.
    """

    dtype: str
    statistics: Statistics
    ranges: NDArray[np.float64]

    def merge(self, later: "Seen") -> "Seen":
        """Both, the other's rows after these."""
        ranges = np.concatenate([self.ranges, later.ranges])
        return Seen(self.dtype, self.statistics.merge(later.statistics), ranges)


class Observer(Protocol):
    """Gathers statistics of any number of forwards, on the device as far as it can."""

    @property
    def sound(self) -> bool:
        """After :meth:`results`: False where NaN, infinity or overflow was met; then the results are void."""

    def begin(self, phase: int) -> None:
        """A forward begins, or a part of one: of some of its rows. ``phase`` (0 … 65,535) moves the sampled rows."""

    def see(self, name: str, x: mx.array, before: int = 0, whole: int | None = None) -> None:
        """Take notice of ``x`` (rows, …, channels) at tap ``name``; lazy.

        Of a part: its batch has ``whole`` rows, ``before`` of which come before those of ``x``.
        """

    def tie(self, x: mx.array) -> mx.array:
        """``x`` itself, computed only after what was noticed so far: so activations live no longer than they must."""

    def end_forward(self) -> list[list[mx.array]]:
        """The forward's graph is built: what is to be computed with it, in the order in which it can be."""

    def settle(self) -> None:
        """The forward is being computed: time to see to what earlier ones left."""

    def fetch(self) -> None:
        """The last forward is computed, nothing else is yet: bring to the host what would wait for what comes next."""

    def results(self) -> dict[str, Seen]:
        """What was seen at each tap, over all forwards."""
