"""Made-up sensitivities, and what plans made of them take and cost."""

import itertools
import math
from collections.abc import Mapping, Sequence

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import Plan
from calib.analysis.sensitivities import Sensitivities
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

SUMMARY = LayerSummary(-1.0, 1.0, 0.0, 0.5, {"p01": -0.9, "p99": 0.9}, 100)

#: The one option of a layer that is measured well.
GOOD = {(4, 64): 1e-3}

Found = Mapping[str, Mapping[tuple[int, int], float | Sequence[float]]]


def measured(
    weights: Found,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    steps: tuple[int, ...] = (0,),
    num_steps: int = 10,
    activations: Mapping[str, Mapping[int, float]] | None = None,
) -> Sensitivities:
    """Sensitivities with the same S at every step where one number is given; layers of 64 × 128 unless told."""

    def at_steps(s: float | Sequence[float]) -> NDArray[np.float64]:
        return np.broadcast_to(np.array(s, dtype=np.float64), (len(steps),)).copy()

    return Sensitivities(
        steps,
        num_steps,
        {name: {option: at_steps(s) for option, s in own.items()} for name, own in weights.items()},
        {name: {bits: at_steps(s) for bits, s in own.items()} for name, own in (activations or {}).items()},
        dict(shapes) if shapes is not None else dict.fromkeys(weights, (64, 128)),
    )


def layers_of(found: Sensitivities, *more: str) -> dict[str, LayerSummary]:
    return dict.fromkeys([*found.shapes, *more], SUMMARY)


def typical(names: Sequence[str] = ("a", "b", "c"), seed: int = 0) -> dict[str, dict[tuple[int, int], float]]:
    """S that falls by 4 a bit, and differs between layers."""
    rng = np.random.default_rng(seed)
    fragility = dict(zip(names, np.exp(rng.normal(-8, 2, len(names))), strict=True))
    return {
        name: {
            (bits, size): float(fragility[name] * 4.0 ** (2 - bits) * size**0.3 * np.exp(rng.normal(0, 0.1)))
            for bits, size in itertools.product(WEIGHT_BITS, GROUP_SIZES)
        }
        for name in names
    }


def bytes_of(shape: tuple[int, int], bits: int, group_size: int) -> int:
    """Integers in a row's bits, and for every group a scale and a bias of two bytes."""
    rows, columns = shape
    return rows * (columns * bits) // 8 + 2 * 2 * rows * columns // group_size


def taken(plan: Plan, found: Sensitivities) -> int:
    return sum(
        bytes_of(shape, plan.layers[name].weight_bits, plan.layers[name].group_size)
        for name, shape in found.shapes.items()
    )


def error_of(plan: Plan, found: Sensitivities) -> float:
    chosen = {name: (plan.layers[name].weight_bits, plan.layers[name].group_size) for name in found.shapes}
    return math.fsum(found.weights[name][option].mean() for name, option in chosen.items())


SHAPES = [(1536, 1536)] * 4 + [(6144, 1536), (1536, 6144), (9216, 1536)]


def realistic(
    shapes: Sequence[tuple[int, int]], seed: int, noise: float
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.int64]]]:
    """All 18 options of layers whose fragility spreads over orders of magnitude."""
    rng = np.random.default_rng(seed)
    options = list(itertools.product(WEIGHT_BITS, GROUP_SIZES))
    cost = [
        np.exp(rng.normal(-12, 2))
        * np.array([4.0 ** (2 - bits) * (size / 64) ** 0.4 * np.exp(rng.normal(0, noise)) for bits, size in options])
        for _ in shapes
    ]
    return cost, [np.array([bytes_of(shape, *option) for option in options]) for shape in shapes]


@st.composite
def small_models(draw: st.DrawFn) -> Sensitivities:
    """Up to four layers, each measured at a few of its options; S need not fall with bits."""
    weights, shapes = {}, {}
    steps = draw(st.sampled_from([(0,), (0, 3, 9)]))
    every_option = list(itertools.product(WEIGHT_BITS, GROUP_SIZES))
    for name in "abcd"[: draw(st.integers(1, 4))]:
        shapes[name] = draw(st.tuples(st.sampled_from([1, 8, 24]), st.sampled_from([96, 128, 192, 384])))
        options = draw(st.lists(st.sampled_from(every_option), min_size=1, max_size=5, unique=True))
        options = [*options, (draw(st.sampled_from(WEIGHT_BITS)), 32)]  # which divides every width here
        s = st.floats(0, 1, allow_subnormal=False).map(lambda x: x * 1e-7)
        weights[name] = {o: draw(st.lists(s, min_size=len(steps), max_size=len(steps))) for o in options}
    return measured(weights, shapes, steps)
