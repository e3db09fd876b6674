"""Which states differ most from one another: the schedule that statistics choose (``timestep_schedule=drift``)."""

from collections.abc import Mapping

from calib.activations.record import StepRecord

import numpy as np
from numpy.typing import NDArray


def distances(records: Mapping[int, StepRecord]) -> NDArray[np.float64]:
    """How far the states are from one another, (states, states), 0 … 1.

    Of two states of one layer: the change of the central range r = p99 - p01, or that of the mean, whichever is more,
    relative to the larger r. Of two states: the largest over all layers (this project's own; after the density and
    variety weights of EDA-DM, arXiv 2401.04585).
    """
    total = np.zeros((len(records), len(records)))
    names = [name for name in next(iter(records.values())).seen if "/" not in name]
    for name in names:
        layers = [record.seen[name].statistics for record in records.values()]
        percentiles = np.array([layer.histogram.percentiles([1, 99]) for layer in layers])
        spread, mean = percentiles[:, 1] - percentiles[:, 0], np.array([layer.over_channels()[2] for layer in layers])
        larger = np.maximum(spread[:, None], spread)
        change = np.maximum(np.abs(spread[:, None] - spread), np.abs(mean[:, None] - mean))
        relative = np.divide(change, larger, out=np.zeros_like(change), where=larger > 0)
        total = np.fmax(total, np.minimum(relative, 1))  # a layer with nothing finite says nothing
    return total


def farthest_first(distance: NDArray[np.float64], count: int) -> list[int]:
    """``count`` rows of a distance matrix: the first, then ever the one farthest from those chosen; ascending."""
    chosen, nearest = [0], distance[0].copy()
    while len(chosen) < count:
        nearest[chosen] = -1
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, distance[chosen[-1]])
    return sorted(chosen)


def choose_steps(records: Mapping[int, StepRecord], count: int) -> tuple[int, ...]:
    """``count`` of the steps of ``records``, chosen greedily by :func:`distances`; ascending."""
    steps = list(records)
    return tuple(steps[i] for i in farthest_first(distances(records), count))
