"""The interface of observers of a transformer's forward passes, and the statistics that they return."""

from dataclasses import dataclass
from typing import Protocol

from calib.activations.statistics import Statistics

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass
class TapResult:
    """Statistics of the activations at one tap.

    Attributes:
        dtype: type of the activations.
        ranges: min, max, 1st and 99th percentile of each row of the batches, in their order, (rows, 4). Minimum and
            maximum are exact; the percentiles are those of about a thousand values of a row.
    """

    dtype: str
    statistics: Statistics
    ranges: NDArray[np.float64]

    def merge(self, later: "TapResult") -> "TapResult":
        """Merge with the result of later forward passes, whose rows come after these."""
        ranges = np.concatenate([self.ranges, later.ranges])
        return TapResult(self.dtype, self.statistics.merge(later.statistics), ranges)


class Observer(Protocol):
    """Accumulates statistics over any number of forward passes, on the device as far as possible.

    For each forward pass: :meth:`begin` for each part of its batch, :meth:`see` and :meth:`tie` at every tap while the
    graph is built, :meth:`end_forward`, evaluation by the caller, and meanwhile :meth:`settle`.
    """

    @property
    def sound(self) -> bool:
        """Whether :meth:`results` is valid, known after :meth:`fetch`: False after NaN, infinity or overflow."""

    def begin(self, phase: int) -> None:
        """Begin a forward pass or a part of its rows; ``phase`` (0 … 65,535) shifts the rows sampled for histograms."""

    def see(self, name: str, x: mx.array, before: int = 0, whole: int | None = None) -> None:
        """Add the activation ``x`` (rows, …, channels) at tap ``name``; lazy.

        Args:
            before: number of rows of the batch before those of ``x``.
            whole: number of rows of the batch; None: those of ``x``.
        """

    def tie(self, x: mx.array) -> mx.array:
        """``x`` with a dependency on the statistics so far, so that activations are freed once they are summarised."""

    def end_forward(self) -> list[list[mx.array]]:
        """Arrays to evaluate with the forward pass whose graph is complete, in the order in which they can be."""

    def settle(self) -> None:
        """Process results of earlier forward passes on the host; called while a forward pass is computed."""

    def fetch(self) -> None:
        """Copy results to the host; called after the last forward pass, while another may be computed."""

    def results(self) -> dict[str, TapResult]:
        """Statistics of each tap over all forward passes; after :meth:`fetch` in any thread."""
