"""Choose the states whose statistics differ most from one another (``timestep_schedule=drift``)."""

from collections.abc import Mapping

from calib.activations.record import StepRecord

import numpy as np
from numpy.typing import NDArray


def distances(records: Mapping[int, StepRecord]) -> NDArray[np.float64]:
    """Distances between the states, (states, states), 0 … 1.

    The distance of two states is the largest over all layers of the change of the central range r = p99 - p01 or of the
    mean, whichever is larger, relative to the larger r (this project's own; after the density and variety weights of
    EDA-DM, arXiv 2401.04585).
    """
    # One record at a time, as a mapping may read each from the disk.
    features = np.array([_features(record) for record in records.values()])
    total = np.zeros((len(features), len(features)))
    for spread, mean in features.transpose(1, 2, 0):
        larger = np.maximum(spread[:, None], spread)
        change = np.maximum(np.abs(spread[:, None] - spread), np.abs(mean[:, None] - mean))
        relative = np.divide(change, larger, out=np.zeros_like(change), where=larger > 0)
        total = np.fmax(total, np.minimum(relative, 1))  # a layer without finite values is ignored
    return total


def _features(record: StepRecord) -> list[tuple[float, float]]:
    """Central range and mean of each layer."""
    found = []
    for name, seen in record.seen.items():
        if "/" not in name:
            low, high = seen.statistics.histogram.percentiles([1, 99])
            found.append((float(high - low), seen.statistics.over_channels()[2]))
    return found


def farthest_first(distance: NDArray[np.float64], count: int) -> list[int]:
    """``count`` rows of a distance matrix: the first, then repeatedly the one farthest from those chosen; ascending."""
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
