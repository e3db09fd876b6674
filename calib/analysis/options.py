"""The options of each layer: bits in each phase and a group size, with their bytes and errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from calib.analysis.sensitivities import Sensitivities, option_bytes
from calib.base.errors import CalibError
from calib.dataset.timesteps import phase_bounds

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Options:
    """The options of one layer, along the first axis of each array.

    Attributes:
        bits: (options, phases); one column where all steps share the weights.
        cost: S, each phase weighted by its share of the sampler's steps, (options,).
        nbytes: bytes of all copies, (options,).
        weights: number of weights of the layer.
    """

    bits: NDArray[np.int64]
    group_size: NDArray[np.int64]
    cost: NDArray[np.float64]
    nbytes: NDArray[np.int64]
    weights: int

    def cost_at(self, average: float) -> float:
        """The least cost within ``average`` bits per weight, or that of the smallest option where none fits."""
        within = 8 * self.nbytes <= average * self.weights
        return float(self.cost[within].min() if within.any() else self.cost[self.nbytes.argmin()])


def phase_shares(sensitivities: Sensitivities, per_phase: bool) -> dict[str, NDArray[np.float64]]:
    """The weight of S at each measured step by phase, (steps,); the sum over all phases and steps is 1.

    A phase is weighted by its share of the sampler's steps, and the steps measured in it equally.

    Raises:
        CalibError: no step of some phase was measured.
    """
    steps, n = np.array(sensitivities.steps), sensitivities.num_steps
    if not per_phase:
        return {"all": np.full(len(steps), 1 / len(steps))}
    shares = {}
    for phase, (first, last) in phase_bounds(n).items():
        last = min(last, n - 1)  # the model never sees state n
        inside = (first <= steps) & (steps <= last)
        if first <= last and not inside.any():
            raise CalibError(
                f"analysis.per_phase: no sensitivity was measured in the {phase} phase;"
                f" measure at one or more of the steps {first} to {last}"
            )
        if first <= last:
            shares[phase] = inside * ((last - first + 1) / n / inside.sum())
    return shares


def options_by_layer(
    measured: Mapping[str, Mapping[tuple[int, int], NDArray[np.float64]]],
    sensitivities: Sensitivities,
    shares: NDArray[np.float64],
) -> dict[str, Options]:
    """Options by layer: for each group size all combinations of bits of the phases; ``shares`` is (phases, steps)."""
    return {name: _options_of(sensitivities.shapes[name], found, shares) for name, found in measured.items()}


def _options_of(
    shape: tuple[int, int], measured: Mapping[tuple[int, int], NDArray[np.float64]], shares: NDArray[np.float64]
) -> Options:
    phases = np.arange(len(shares))
    parts = []
    for group_size in sorted({size for _, size in measured}):
        bits = sorted(b for b, size in measured if size == group_size)
        cost = np.stack([measured[b, group_size] for b in bits]) @ shares.T
        nbytes = np.array([option_bytes(shape, b, group_size) for b in bits])
        given = np.indices([len(bits)] * len(shares)).reshape(len(shares), -1).T  # (options, phases): indices into bits
        copies = (given[:, :, None] == np.arange(len(bits))).any(axis=1)  # (options, bits)
        sizes = np.full(len(given), group_size)
        parts.append((np.array(bits)[given], sizes, cost[given, phases].sum(axis=1), copies @ nbytes))
    bits_of, group_size_of, cost_of, nbytes_of = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Options(bits_of, group_size_of, cost_of, nbytes_of, math.prod(shape))


def weights_of(options: Mapping[str, Options]) -> int:
    """Total number of weights of all layers."""
    return sum(o.weights for o in options.values())
