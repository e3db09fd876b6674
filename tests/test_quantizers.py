"""Quantizers: each against a slow oracle in float64 NumPy; GPTQ and smoothing on whole transformers."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import CalibError
from calib.base.values import bind_target
from calib.models.architecture import Architecture, Conditioning, Producer, Site
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import weights
from calib.models.packed import Packed
from calib.quantization import gptq, percentile, rtn, smooth
from calib.quantization.quantizer import ChannelRange, Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx.mmdit import MMDiT
from helpers import CHECKOUT, check_config_error, float64
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn
from numpy.typing import NDArray
from omegaconf import OmegaConf
from tiny_models import STRUCTURES, tiny_transformer
from watching import keep

Array: TypeAlias = NDArray[np.float64]

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}

#: What oracle and quantizer may differ by, in parts of the largest weight of a group: two units of the last of the 16
#: bits in which scales and biases are kept. Where float32 sees a tie the next place, or scale, is as good: in so few.
ROUNDING = {mx.float16: 2**-10, mx.bfloat16: 2**-7}
TIES = 0.04


# Oracles


def rounded_to(dtype: mx.Dtype, x: Array) -> Array:
    return float64(mx.array(x.astype(np.float32)).astype(dtype))


def affine_grid(weight: Array, bits: int, group_size: int, dtype: mx.Dtype) -> tuple[Array, Array]:
    """MLX's rule, (rows, groups), before rounding to 16 bits: zero and the end farther from it are points of a grid."""
    w, most = rounded_to(dtype, weight).reshape(len(weight), -1, group_size), 2**bits - 1
    low, high = w.min(axis=2), w.max(axis=2)
    below = np.abs(low) > np.abs(high)
    step, edge = np.maximum((high - low) / most, 1e-7) * np.where(below, 1, -1), np.where(below, low, high)
    place = np.round(edge / step)
    return np.where(place != 0, edge / np.where(place != 0, place, 1), step), np.where(place != 0, edge, 0)


def places(weight: Array, scale: Array, bias: Array, bits: int) -> Array:
    """The nearest points of a grid; the first where 16 bits hold nothing so small as its scale."""
    usable = np.where(scale != 0, scale, 1)
    return np.clip(np.round(np.where(scale != 0, (weight - bias) / usable, 0)), 0, 2**bits - 1)


def nearest(weight: Array, bits: int, group_size: int, dtype: mx.Dtype) -> Array:
    """MLX's rounding to nearest, scale and bias rounded to 16 bits afterwards."""
    scale, bias = (np.repeat(x, group_size, axis=1) for x in affine_grid(weight, bits, group_size, dtype))
    found = places(rounded_to(dtype, weight), scale, bias, bits)
    return rounded_to(dtype, scale) * found + rounded_to(dtype, bias)


def by_the_paper(
    weight: Array, hessian: Array, bits: int, group_size: int, dtype: mx.Dtype, damping: float, act_order: bool
) -> Array:
    """GPTQ before its last two steps: equations 2 and 3, H⁻¹ itself, of the columns that are left, column by column."""
    left, values = weight.copy(), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian + damping * hessian.diagonal().mean() * np.eye(len(hessian)))
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else np.arange(len(hessian))
    scale, bias = stored = [rounded_to(dtype, x) for x in affine_grid(weight, bits, group_size, dtype)]
    for q in order:
        group, first = divmod(q, group_size)
        if first == 0 and not act_order:  # on the weights as they are by now
            for own, x in zip(stored, affine_grid(left[:, q : q + group_size], bits, group_size, dtype), strict=True):
                own[:, [group]] = rounded_to(dtype, x)
        values[:, q] = scale[:, group] * places(left[:, q], scale[:, group], bias[:, group], bits) + bias[:, group]
        left = left - np.outer((left[:, q] - values[:, q]) / inverse[q, q], inverse[q])
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return values


# A transformer that is no more than its quantizers see


class Modulated:
    """x (1 + scale) + shift, both of an embedding, before a linear layer: an architecture with one place to smooth."""

    def __init__(self, rows: int, columns: int, seed: int = 0):
        random = np.random.RandomState(seed)
        weight = 0.1 * random.randn(rows, columns)
        # Groups of equal weights, of zeros, and of next to nothing: MLX gives them scales that are negative or tiny.
        weight[:5] = np.array([0, 0.25, -0.25, 1e-9, 1e-7])[:, None]
        self.module = nn.Module()
        self.module.modulation, self.module.linear = nn.Linear(32, 2 * columns), nn.Linear(columns, rows)
        self.module.modulation.weight = mx.array(0.1 * random.randn(2 * columns, 32), mx.float32)
        self.module.modulation.bias = mx.array(0.1 * random.randn(2 * columns), mx.float32)
        self.module.linear.weight = mx.array(weight, mx.float32)

    def layers(self) -> dict[str, nn.Module]:
        return {"modulation": self.module.modulation, "linear": self.module.linear}

    def path(self, name: str) -> str:
        return name

    def blocks(self) -> list[str]:
        return []

    def block_of(self, name: str) -> int | None:
        return 0 if name == "linear" else None

    def shared_input(self, name: str) -> str:
        return name

    def kind(self, name: str) -> str:
        return "modulated" if name == "linear" else "embedding"

    def sites(self) -> list[Site]:
        shift, scale = Producer("modulation", 0, 2), Producer("modulation", 1, 2, offset=1.0)
        return [Site(("linear",), (shift, scale))]


@dataclass
class Case:
    """A layer of every grid to be rounded, and what goes into it: whole numbers, whose products float32 sums exactly.

    Attributes:
        clips: the percentiles that were asked for.
        divisors: what each input channel was said to be divided by.
    """

    bits: int
    group_size: int
    dtype: mx.Dtype
    clips: list[tuple[float, float] | None] = field(default_factory=list)
    divisors: list[Array | None] = field(default_factory=list)

    @cached_property
    def architecture(self) -> Modulated:
        return Modulated(rows=12, columns=128 + self.group_size, seed=self.bits)  # more than GPTQ's block of columns

    @cached_property
    def x(self) -> Array:
        """512 correlated inputs of uneven width, one channel always zero."""
        random, columns = np.random.RandomState(self.bits), 128 + self.group_size
        base = random.randint(-4, 5, (512, columns))
        x = (base + np.roll(base, 1, axis=1) - 2 * np.roll(base, 7, axis=1)) * random.randint(1, 5, columns)
        x[:, 5] = 0
        return x.astype(np.float64)

    @property
    def weight(self) -> Array:
        return float64(self.architecture.module.linear.weight)

    def work(self) -> QuantizerInput:
        def replay(points: Sequence[TapPoint], record: Any, pending: Any, replaced: Mapping[str, mx.array]) -> None:
            assert ([point.name for point in points], replaced) == (["linear"], {})
            for part in np.split(self.x, 4):
                record("linear", mx.array(part.reshape(2, -1, 1, part.shape[1]), mx.float32))
                mx.eval(pending())

        def ranges(name: str, clip: tuple[float, float] | None, divisors: Array | None) -> StepRanges:
            self.clips.append(clip)
            self.divisors.append(divisors)
            return StepRanges((0,), (-1.0,), (1.0,))

        return QuantizerInput(
            architecture=self.architecture,
            layers={"linear": self.architecture.module.linear},
            plan={"linear": LayerPlan(self.bits, 8, group_size=self.group_size)},
            dtype=self.dtype,
            replay=replay,
            batches=lambda: iter(()),
            channel_range=lambda _: ChannelRange(self.x.min(axis=0), self.x.max(axis=0)),
            ranges=ranges,
        )

    def nearest(self, weight: Array | None = None) -> Array:
        return nearest(self.weight if weight is None else weight, self.bits, self.group_size, self.dtype)

    def check(self, made: Quantized, expected: Array) -> None:
        """``made`` has the ``expected`` weights, but for a few that lie some places apart."""
        (packed,) = made.layers.values()
        assert (packed.bits, packed.group_size) == (self.bits, self.group_size)
        assert packed.scales.dtype == packed.biases.dtype == self.dtype
        scale = np.repeat(np.abs(float64(packed.scales)), self.group_size, axis=1)
        largest = np.abs(expected).reshape(len(expected), -1, self.group_size).max(axis=2)
        rounding = ROUNDING[self.dtype] * np.repeat(largest, self.group_size, axis=1)
        wrong = np.abs(values_of(packed) - expected)
        assert np.mean(wrong <= rounding) >= 1 - TIES
        assert np.all(wrong <= rounding + 4 * scale)


def check_rtn(case: Case) -> None:
    made = rtn.quantize(case.work())
    case.check(made, case.nearest())
    assert (made.weights, made.ranges, made.notes) == ({}, {}, [])


def check_percentile(case: Case) -> None:
    made = percentile.quantize(case.work(), 1.0, 98.0)
    case.check(made, case.nearest())
    assert case.clips == [(1.0, 98.0)]
    assert (set(made.ranges), made.weights) == ({"linear"}, {})


def check_gptq(case: Case, act_order: bool) -> None:
    made = gptq.quantize(case.work(), damping=0.01, act_order=act_order)
    hessian = 2 / len(case.x) * case.x.T @ case.x
    paper = by_the_paper(case.weight, hessian, case.bits, case.group_size, case.dtype, 0.01, act_order)
    losses = [np.sum((case.x @ (case.weight - w).T) ** 2) for w in (paper, case.nearest())]
    assert losses[0] < losses[1], "which would be taken otherwise"
    case.check(made, paper)


def check_smooth(case: Case, alpha: float) -> None:
    made = smooth.quantize(case.work(), alpha)
    widest, own = np.abs(case.x).max(axis=0), np.abs(case.weight).max(axis=0)
    s = np.where(widest > 0, widest**alpha / own ** (1 - alpha), 1)
    case.check(made, case.nearest(case.weight * s))
    assert case.divisors[0] == pytest.approx(s)
    # Shift and scale are divided; the 1 that the scale is added to is no parameter.
    weight, bias = (float64(case.architecture.module.modulation[part]) for part in ("weight", "bias"))
    shift, scale = np.split(bias, 2)
    found = {path: float64(value) for path, value in made.weights.items()}
    assert set(found) == {"modulation.weight", "modulation.bias"}
    np.testing.assert_allclose(found["modulation.weight"], weight / np.tile(s, 2)[:, None], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["modulation.bias"], [*shift / s, *(1 + scale) / s - 1], rtol=1e-6, atol=1e-6)


CHECKS: dict[str, Callable[[Case], None]] = {
    "rtn": check_rtn,
    "percentile": check_percentile,
    "gptq": partial(check_gptq, act_order=False),
    "gptq in act order": partial(check_gptq, act_order=True),
    "smooth": partial(check_smooth, alpha=0.3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("quantizer", CHECKS)
def test_oracle(quantizer: str, bits: int, group_size: int, dtype: str) -> None:
    CHECKS[quantizer](Case(bits, group_size, DTYPES[dtype]))


# Packed weights


def integers_of(packed: Packed) -> NDArray[np.int64]:
    """q, (rows, columns)."""
    ones, zeros = mx.ones_like(packed.scales), mx.zeros_like(packed.biases)
    return np.array(replace(packed, scales=ones, biases=zeros).dequantize()).astype(np.int64)


def values_of(packed: Packed) -> Array:
    """scale · q + bias of the stored numbers, in float64."""
    scales, biases = (np.repeat(float64(x), packed.group_size, axis=1) for x in (packed.scales, packed.biases))
    return scales * integers_of(packed) + biases


def same(one: Packed, two: Packed) -> bool:
    pairs = ((one.weight, two.weight), (one.scales, two.scales), (one.biases, two.biases))
    return (one.bits, one.group_size) == (two.bits, two.group_size) and all(mx.array_equal(*pair) for pair in pairs)


@given(
    bits=st.sampled_from(WEIGHT_BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**16),
)
def test_packing(bits: int, group_size: int, groups: int, dtype: str, seed: int) -> None:
    """Integers lie as MLX packs them, and come back."""
    random = np.random.RandomState(seed)
    nearest = Packed.nearest(mx.array(random.randn(5, groups * group_size)), bits, group_size, DTYPES[dtype])
    packed = Packed.of_integers(integers_of(nearest).astype(np.uint8), nearest.scales, nearest.biases, bits, group_size)
    assert same(packed, nearest)
    integers = random.randint(0, 2**bits, (5, groups * group_size)).astype(np.uint8)
    packed = Packed.of_integers(integers, nearest.scales, nearest.biases, bits, group_size)
    assert packed.weight.shape == nearest.weight.shape
    assert packed.nbytes == nearest.nbytes
    assert np.array_equal(integers_of(packed), integers)
    expected = values_of(packed)
    np.testing.assert_allclose(np.array(packed.dequantize()), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


# GPTQ: one layer


def random_layer(columns: int, seed: int = 0, rows: int = 7) -> tuple[NDArray[np.float32], Array]:
    """A weight (rows, columns), and the H of correlated inputs of uneven width."""
    random = np.random.RandomState(seed)
    x = random.randn(3 * columns, columns) @ random.randn(columns, columns) + 3 * random.randn(3 * columns, columns)
    x *= np.exp(random.randn(columns))
    return 0.1 * random.randn(rows, columns).astype(np.float32), 2 / len(x) * x.T @ x


def solved(
    weight: NDArray[np.float32], hessian: Array, damping: float = 0.01, act_order: bool = False, **grid: Any
) -> Packed:
    curvature = gptq.prepare(mx.array(hessian.astype(np.float32)), damping, act_order)
    return gptq.gptq_layer(weight, curvature, **({"bits": 4, "group_size": 32, "dtype": mx.float16} | grid))


both_orders = pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])


@both_orders
@pytest.mark.parametrize("columns", [32, 160, 256, 384])
def test_gptq_loses_much_less(columns: int, act_order: bool) -> None:
    """Than rounding to nearest, whatever blocks of columns there are."""
    weight, hessian = random_layer(columns)
    nearest = Packed.nearest(mx.array(weight), 4, 32, mx.float16)
    losses = [
        gptq.weighted_error(weight - np.array(p.dequantize()), hessian)
        for p in (solved(weight, hessian, act_order=act_order), nearest)
    ]
    assert losses[0] < 0.7 * losses[1]


def test_weighted_error() -> None:
    random = np.random.RandomState(0)
    x, difference = random.randn(50, 32), random.randn(6, 32)
    expected = np.sum((x @ difference.T) ** 2) * 2 / 50
    assert gptq.weighted_error(difference, 2 / 50 * x.T @ x) == pytest.approx(expected)


@both_orders
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_uncorrelated_inputs(bits: int, dtype: str, act_order: bool) -> None:
    """The grids are the same, and every weight is at the nearest of its values as they are stored."""
    weight, _ = random_layer(192)
    packed = solved(weight, np.eye(192), act_order=act_order, bits=bits, dtype=DTYPES[dtype])
    nearest = Packed.nearest(mx.array(weight), bits, 32, DTYPES[dtype])
    assert mx.array_equal(packed.scales, nearest.scales)
    assert mx.array_equal(packed.biases, nearest.biases)
    scales = np.repeat(float64(packed.scales), 32, axis=1)
    wrong, wrong_nearest = (np.abs(weight - values_of(p)) for p in (packed, nearest))
    assert np.all(wrong <= wrong_nearest + 1e-9)
    inside = (integers_of(packed) > 0) & (integers_of(packed) < 2**bits - 1)
    assert np.all(wrong[inside] <= np.abs(scales[inside]) / 2 + 1e-9)
    # mx.quantize rounds by scales that it then stores to 16 bits: at 8 bits bfloat16's are too coarse for that.
    if bits <= 4:
        assert np.mean(integers_of(packed) == integers_of(nearest)) > 0.98


@both_orders
def test_dead_inputs_take_no_part(act_order: bool) -> None:
    weight, hessian = random_layer(160)
    dead = np.arange(160) % 5 == 2
    hessian[dead] = hessian[:, dead] = 0
    packed = solved(weight, hessian, act_order=act_order)
    scales = np.repeat(float64(packed.scales), 32, axis=1)
    inside = dead & (integers_of(packed) > 0) & (integers_of(packed) < 15)
    assert np.all(np.abs(weight - values_of(packed))[inside] <= 0.5001 * np.abs(scales[inside])), "rounded all the same"
    factor = gptq.prepare(mx.array(hessian), 0.01, act_order=False).factor
    assert not np.any((factor - np.diag(factor.diagonal()))[dead]), "and their errors reach no other column"


@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.01])
def test_a_singular_hessian_is_damped(damping: float) -> None:
    random = np.random.RandomState(0)
    weight, _ = random_layer(64)
    for x in (random.randn(3, 64), np.ones((1, 64)), 1e-15 * random.randn(3, 64), np.zeros((1, 64))):
        packed = solved(weight, x.T @ x, damping=damping)
        wrong = np.abs(weight - np.array(packed.dequantize()))
        assert np.isfinite(wrong).all()
        assert wrong.max() < 1


def fed(x: Array, bits: int = 4, group_size: int = 64) -> QuantizerInput:
    """A layer of 128 columns which is given ``x`` (vectors, columns)."""
    case = Case(bits, group_size, mx.float16)
    case.x, case.architecture = x, Modulated(9, 128)
    return replace(
        case.work(),
        replay=lambda _, record, pending, __: (record("linear", mx.array(x, mx.float32)[:, None]), mx.eval(pending())),
    )


@given(
    bits=st.sampled_from(WEIGHT_BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    vectors=st.integers(1, 200),
    spread=st.floats(0, 4),
    shift=st.floats(0, 100),
    damping=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    act_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gptq_never_loses_more(
    bits: int, group_size: int, vectors: int, spread: float, shift: float, damping: float, act_order: bool, seed: int
) -> None:
    """Than rounding to nearest, whatever the inputs: few, nearly dependent, of widths orders of magnitude apart."""
    random = np.random.RandomState(seed)
    x = (random.randn(vectors, 128) @ random.randn(128, 128) / 16 + shift) * np.exp(spread * random.randn(128))
    work = fed(x, bits, group_size)
    weight = float64(work.layers["linear"].weight)
    losses = [
        np.sum((x.astype(np.float32) @ (weight - float64(made.layers["linear"].dequantize())).T) ** 2)
        for made in (gptq.quantize(work, damping, act_order), rtn.quantize(work))
    ]
    assert losses[0] <= losses[1] * (1 + 1e-4)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_inputs_that_tell_nothing(value: float) -> None:
    work = fed(np.full((4, 128), value))
    made = gptq.quantize(work)
    assert same(made.layers["linear"], rtn.quantize(work).layers["linear"])
    assert made.notes == ["gptq: 0 of 1 layers lose less than by rounding to nearest"]


# Whole transformers


@dataclass(frozen=True)
class States:
    """A transformer, and arguments of some forwards of it."""

    architecture: Architecture
    arguments: Sequence[tuple[mx.array, Conditioning, mx.array]]

    def outputs(self, architecture: Architecture | None = None) -> list[NDArray[np.float32]]:
        own = architecture or self.architecture
        return [np.array(own.velocity(*state)) for state in self.arguments]

    def inputs(self, architecture: Architecture | None = None) -> list[dict[str, NDArray[np.float32]]]:
        """What each tap sees in each forward."""
        found, own = [], architecture or self.architecture
        for state in self.arguments:
            seen: dict[str, mx.array] = {}
            with tapped(own, tap_points(own, TapSelection()), keep(seen)):
                own.velocity(*state)
            found.append({name: np.array(x) for name, x in seen.items()})
        return found

    def replay(
        self,
        points: Sequence[TapPoint],
        record: Any,
        pending: Callable[[], Sequence[mx.array]],
        replaced: Mapping[str, mx.array],
    ) -> None:
        with self.given(replaced), tapped(self.architecture, points, record):
            for state in self.arguments:
                self.architecture.velocity(*state)
                mx.eval(pending())

    @contextmanager
    def given(self, replaced: Mapping[str, mx.array]) -> Iterator[None]:
        """Within the context layers have other weights."""
        layers = self.architecture.layers()
        own = {name: layers[name].weight for name in replaced}
        try:
            for name, weight in replaced.items():
                layers[name].weight = weight
            yield
        finally:
            for name, weight in own.items():
                layers[name].weight = weight

    @cached_property
    def extremes(self) -> dict[str, ChannelRange]:
        """What statistics would say of every layer's channels."""
        found, inputs = {}, self.inputs()
        for point in tap_points(self.architecture, TapSelection()):
            seen = [x[point.name].reshape(-1, x[point.name].shape[-1]).astype(np.float64) for x in inputs]
            low, high = np.concatenate(seen).min(axis=0), np.concatenate(seen).max(axis=0)
            found.update(dict.fromkeys(point.names, ChannelRange(low, high)))
        return found


@dataclass
class Asked:
    """Answers of the statistics, and what they were asked: clipping and divisors by layer."""

    states: States
    asked: dict[str, tuple[tuple[float, float] | None, Array | None]] = field(default_factory=dict)

    def ranges(self, name: str, clip: tuple[float, float] | None, divisors: Array | None) -> StepRanges:
        self.asked[name] = (clip, divisors)
        return StepRanges((0,), (-float(len(name)),), (1.0,))

    @property
    def divisors(self) -> dict[str, Array]:
        return {name: s for name, (_, s) in self.asked.items() if s is not None}


def work_on(states: States, bits: int = 4, group_size: int = 64, asked: Asked | None = None) -> QuantizerInput:
    """Every linear layer whose width fits, with one plan for all."""
    layers = states.architecture.layers()
    fitting = {n: l for n, l in layers.items() if isinstance(l, nn.Linear) and l.weight.shape[1] % group_size == 0}
    return QuantizerInput(
        architecture=states.architecture,
        layers=fitting,
        plan=dict.fromkeys(layers, LayerPlan(bits, 8, group_size=group_size)),
        dtype=mx.float16,
        replay=states.replay,
        batches=lambda: iter(()),
        channel_range=states.extremes.__getitem__,
        ranges=(asked or Asked(states)).ranges,
    )


def tiny_states(structure: str) -> States:
    """Noise and random text, in batches of one row and of two: DiffusionKit modulates one by a kernel, more not."""
    random = np.random.RandomState(0)
    states = []
    for rows in (1, 2):
        for timestep in (750.0, 250.0):
            shapes = ((rows, 8, 6, 16), (rows, 5, 64), (rows, 32))
            x, tokens, pooled = (mx.array(random.randn(*shape).astype(np.float32)) for shape in shapes)
            states.append((x, Conditioning(tokens, pooled), mx.array(timestep)))
    mx.eval([timestep for *_, timestep in states])
    transformer = tiny_transformer(structure, spread=1.0, text=64, pooled=32)
    return States(MMDiTArchitecture(transformer), states)


@pytest.fixture(scope="module")
def sd3() -> States:
    return tiny_states("sd3")


@pytest.fixture(scope="module", params=STRUCTURES)
def any_states(request: pytest.FixtureRequest) -> States:
    return tiny_states(request.param)


#: For each replay its taps, and the weights replaced in it.
Replays: TypeAlias = list[tuple[list[TapPoint], dict[str, mx.array]]]


def watched(work: QuantizerInput, **parameters: Any) -> tuple[Quantized, Replays]:
    """What GPTQ makes, and how."""
    replays: Replays = []

    def replay(points: Sequence[TapPoint], record: Any, pending: Any, replaced: Mapping[str, mx.array]) -> None:
        replays.append((list(points), dict(replaced)))
        work.replay(points, record, pending, replaced)

    return gptq.quantize(replace(work, replay=replay), **parameters), replays


@pytest.fixture(scope="module")
def whole(any_states: States) -> tuple[States, Quantized, Replays]:
    """A transformer at 4 bits."""
    return any_states, *watched(work_on(any_states))


def test_blocks_read_what_quantized_ones_give(whole: tuple[States, Quantized, Replays]) -> None:
    states, made, replays = whole
    layers, architecture = work_on(states).layers, states.architecture
    assert list(made.layers) == list(layers)
    stages = [[name for point in points for name in point.names] for points, _ in replays]
    assert all("embedder" in name for name in stages[0])
    assert all(name.endswith(".adaln") for name in stages[1])
    assert set(stages[1]) == {name for name in layers if name.endswith(".adaln")}
    for block, names in zip(architecture.blocks(), stages[2:], strict=False):
        assert {name.split(".")[0] for name in names} == {block}
    assert stages[2 + len(architecture.blocks()) :] == [["final_layer.linear"]]
    before: set[str] = set()
    for names, (_, replaced) in zip(stages, replays, strict=True):
        assert set(replaced) == before
        for name, weight in replaced.items():
            assert mx.array_equal(weight, made.layers[name].dequantize())
        before |= set(names) & set(layers)


def test_memory_splits_blocks(sd3: States) -> None:
    work, memory = work_on(sd3), 3 * 4 * 64**2
    made, replays = watched(work)
    split, many = watched(work, memory_gb=memory / 1e9)
    assert list(split.layers) == list(made.layers)
    sizes = [sum(4 * work.layers[point.name].weight.shape[1] ** 2 for point in points) for points, _ in many]
    assert max(sizes) == 4 * 256**2, "one that alone takes more is gathered alone"
    assert all(size <= memory or len(points) == 1 for size, (points, _) in zip(sizes, many, strict=True))
    assert len(many) > len(replays)
    assert [name for points, _ in many for p in points for name in p.names] == [
        name for points, _ in replays for p in points for name in p.names
    ]


def output_error(states: States, made: Quantized) -> float:
    """Mean of ‖v − v_q‖² / ‖v‖² over the states."""
    plain = states.outputs()
    with states.given({name: packed.dequantize() for name, packed in made.layers.items()}):
        pairs = list(zip(states.outputs(), plain, strict=True))
    return float(np.mean([np.sum((q - v) ** 2, dtype=float) / np.sum(v**2, dtype=float) for q, v in pairs]))


def test_gptq_outputs_are_nearer(whole: tuple[States, Quantized, Replays]) -> None:
    states, made, _ = whole
    work = work_on(states)
    assert output_error(states, made) < 0.6 * output_error(states, rtn.quantize(work))
    count = len(work.layers)
    assert made.notes[0].startswith(f"gptq: {count} of {count} layers lose less than by rounding to nearest")
    assert not made.weights
    assert not made.ranges


def test_layers_left_out_stay(sd3: States) -> None:
    """Other layers may share a tap with them, or lie in between."""
    whole = work_on(sd3)
    names = ["mm_block_0.text.attn.k_proj", "mm_block_2.image.adaln", "final_layer.linear"]
    made, replays = watched(replace(whole, layers={name: whole.layers[name] for name in names}))
    assert list(made.layers) == names
    taps = ["mm_block_0.image.adaln", "mm_block_0.text.attn.q_proj", "final_layer.linear"]
    assert [[point.name for point in points] for points, _ in replays] == [[tap] for tap in taps]


# Smoothing whole transformers


def smoothed_copy(states: States, made: Quantized) -> MMDiTArchitecture:
    """A transformer with the weights that ``made`` changed, nothing rounded."""
    copy = MMDiT(states.architecture.module.config)
    copy.load_weights(list((weights(states.architecture.module) | made.weights).items()), strict=False)
    return MMDiTArchitecture(copy)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_keeps_outputs(any_states: States, alpha: float) -> None:
    """And what the layers read is divided as is told."""
    states = any_states
    asked = Asked(states)
    # Planned, and none that MLX could quantize: all that changes is left at full precision.
    made = smooth.quantize(replace(work_on(states, asked=asked), layers={}), alpha)
    assert not made.layers
    copy, divisors = smoothed_copy(states, made), asked.divisors
    for plain, found in zip(states.outputs(), states.outputs(copy), strict=True):
        np.testing.assert_allclose(found, plain, rtol=0, atol=2e-5 * np.abs(plain).max())
    assert set(made.ranges) == set(divisors)
    for before, after in zip(states.inputs(), states.inputs(copy), strict=True):
        for name, x in before.items():
            expected = x / divisors.get(name, 1.0)
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=3e-5 * np.abs(expected).max(), err_msg=name)
    modulated = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "final_layer.linear")
    assert set(divisors) == {name for name in states.architecture.layers() if name.endswith(modulated)}
    assert all(s.std() > 0.01 * s.mean() for s in divisors.values())
    assert np.array_equal(divisors["mm_block_0.image.attn.o_proj"], divisors["mm_block_0.text.attn.o_proj"])
    for i in range(states.architecture.depth[1]):
        attention, mlp = divisors[f"unified_block_{i}.attn.q_proj"], divisors[f"unified_block_{i}.mlp.fc1"]
        parallel = states.architecture.shared_input(f"unified_block_{i}.mlp.fc1").endswith("q_proj")
        assert np.array_equal(attention, mlp) is parallel


def test_smoothing_after_a_layer_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 64, mx.float16)
    case.architecture.module.modulation = nn.Linear(32, 192, bias=False)
    monkeypatch.setattr(case.architecture, "sites", lambda: [Site(("linear",), (Producer("modulation"),))])
    made = smooth.quantize(case.work())
    weight = float64(case.architecture.module.modulation.weight)
    assert set(made.weights) == {"modulation.weight"}
    divided = float64(made.weights["modulation.weight"]) * case.divisors[0][:, None]
    np.testing.assert_allclose(divided, weight, rtol=1e-6, atol=1e-9)


def test_divisors_are_the_papers(sd3: States) -> None:
    """Over all layers that read the same channels."""
    asked, alpha = Asked(sd3), 0.3
    smooth.quantize(work_on(sd3, asked=asked), alpha)
    layers = sd3.architecture.layers()
    groups = [
        [f"mm_block_2.text.attn.{which}_proj" for which in "qkv"],
        ["mm_block_2.image.attn.o_proj"],
        [f"mm_block_0.{stream}.attn.o_proj" for stream in ("image", "text")],
        ["mm_block_1.text.mlp.fc1"],
        ["final_layer.linear"],
    ]
    for names in groups:
        spans = [sd3.extremes[name] for name in names]
        x = np.max([np.maximum(-span.low, span.high) for span in spans], axis=0)
        w = np.max([np.abs(np.array(layers[name].weight)).max(axis=0) for name in names], axis=0)
        for name in names:
            np.testing.assert_allclose(asked.divisors[name], x**alpha / w ** (1 - alpha), rtol=1e-6)


def test_smoothed_weights_are_rounded(sd3: States) -> None:
    """What else changes is given back at full precision."""
    work = work_on(sd3, bits=8)
    bare = smooth.quantize(replace(work, layers={}))
    made = smooth.quantize(work)
    assert list(made.layers) == list(work.layers)
    for name, packed in made.layers.items():
        weight = bare.weights.get(f"{sd3.architecture.path(name)}.weight", work.layers[name].weight)
        assert same(packed, Packed.nearest(weight, 8, 64, mx.float16)), name
    assert set(made.weights) == {path for path in bare.weights if path.endswith(".bias")}
    assert all(path.endswith(("v_proj.bias", "adaLN_modulation.layers.1.bias")) for path in made.weights)
    copy = smoothed_copy(sd3, made)
    rounded = States(copy, sd3.arguments)
    with rounded.given({name: packed.dequantize() for name, packed in made.layers.items()}):
        for plain, found in zip(sd3.outputs(), rounded.outputs(), strict=True):
            assert np.sum((found - plain) ** 2) < 5e-3 * np.sum(plain**2)


def test_smoothing_some_layers(sd3: States) -> None:
    whole = work_on(sd3)
    name = "mm_block_1.text.mlp.fc1"
    made = smooth.quantize(replace(whole, plan={name: whole.plan[name]}, layers={name: whole.layers[name]}))
    adaln = sd3.architecture.path("mm_block_1.text.adaln")
    assert set(made.weights) == {f"{adaln}.weight", f"{adaln}.bias"}
    assert list(made.layers) == list(made.ranges) == [name]


def test_smoothing_layers_alone(sd3: States) -> None:
    """With the same plan, whichever others are asked for beside them: copies for phases fit the rest."""
    work = work_on(sd3)
    whole = smooth.quantize(work)
    for name in ("mm_block_0.image.adaln", "mm_block_2.text.attn.v_proj", "mm_block_1.image.attn.o_proj"):
        alone = smooth.quantize(replace(work, layers={name: work.layers[name]}))
        assert same(alone.layers[name], whole.layers[name])


def test_zero_channels_are_not_smoothed(sd3: States) -> None:
    asked, seen = Asked(sd3), sd3.extremes["final_layer.linear"]
    low, high = seen.low.copy(), seen.high.copy()
    low[:3], high[:3] = 0, 0
    low[3:5], high[3:5] = np.inf, -np.inf  # no finite value was seen
    low[5], high[5] = -1e-30, 1e-30
    work = replace(work_on(sd3, asked=asked), channel_range=lambda _: ChannelRange(low, high))
    plan = {"final_layer.linear": work.plan["final_layer.linear"]}
    made = smooth.quantize(replace(work, plan=plan, layers={}))
    s = asked.divisors["final_layer.linear"]
    assert np.all(s[:6] == 1)
    assert np.all(np.isfinite(s) & (s > 0))
    assert all(bool(mx.isfinite(weight).all()) for weight in made.weights.values())


# Percentiles, and what is refused


def test_percentiles_of_planned_layers(sd3: States) -> None:
    """Blocks of the plan have no input of their own; a convolution has, though its weights stay."""
    asked = Asked(sd3)
    work = work_on(sd3, asked=asked)
    made = percentile.quantize(replace(work, plan=work.plan | {"mm_block_1": LayerPlan(4, 8)}), 1.0, 98.0)
    assert asked.asked == dict.fromkeys(sd3.architecture.layers(), ((1.0, 98.0), None))
    assert made.ranges == {name: StepRanges((0,), (-len(name),), (1.0,)) for name in asked.asked}
    assert list(made.layers) == list(work.layers)
    percentile.quantize(work)
    assert asked.asked["x_embedder"] == ((0.1, 99.9), None)


@pytest.mark.parametrize(
    ("quantizer", "parameters", "words"),
    [
        (gptq, {"damping": -0.1}, ("quantizer.damping=-0.1", "0 or more")),
        (gptq, {"memory_gb": 0.0}, ("quantizer.memory_gb=0.0", "more than 0")),
        (smooth, {"alpha": -0.1}, ("quantizer.alpha=-0.1", "must be 0 to 1")),
        (smooth, {"alpha": 1.5}, ("quantizer.alpha=1.5", "must be 0 to 1")),
        (percentile, {"low": -1.0}, ("quantizer.low=-1.0", "0 or more")),
        (percentile, {"high": 100.5}, ("quantizer.high=100.5", "100 or less")),
        (percentile, {"low": 50.0, "high": 50.0}, ("quantizer.low=50.0", "less than quantizer.high")),
    ],
)
def test_impossible_parameters(quantizer: Any, parameters: Any, words: Sequence[str]) -> None:
    """Found before anything is loaded."""
    nothing = QuantizerInput.without_layers(MMDiTArchitecture(tiny_transformer("sd3")), mx.float16)
    check_config_error(lambda: quantizer.quantize(nothing, **parameters), words)


@pytest.mark.parametrize(
    ("quantizer", "lacking"), [(smooth, "channel_range"), (smooth, "ranges"), (percentile, "ranges")]
)
def test_missing_statistics(sd3: States, quantizer: Any, lacking: str) -> None:
    work = replace(work_on(sd3), **{lacking: lambda *_: None})
    with pytest.raises(CalibError) as error:
        quantizer.quantize(work)
    assert "needs activations.h5" in str(error.value)
    assert "calib collect" in str(error.value)
    assert "\n" not in str(error.value)


def test_smooth_needs_places() -> None:
    """An architecture need not say where a factor can be moved."""

    class Bare:
        def layers(self) -> dict[str, nn.Module]:
            return {}

    nothing = QuantizerInput.without_layers(Bare(), mx.float16)
    check_config_error(lambda: smooth.quantize(nothing), ("quantizer=smooth", "choose another"))


@pytest.mark.parametrize("option", ["rtn", "percentile", "gptq", "smooth"])
def test_options_name_every_default(option: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(CHECKOUT / "conf" / "quantizer" / f"{option}.yaml"))
    assert isinstance(node, dict)
    bound = bind_target("quantizer", node, given=("work",))
    parameters = inspect.signature(bound.func).parameters
    assert bound.keywords == {name: p.default for name, p in parameters.items() if name != "work"}
