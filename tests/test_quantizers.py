"""Quantizers: GPTQ against the paper's equations, smoothing that changes nothing but widths, ranges of their own."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from calib.activations.taps import TapPoint, TapSelection, linear_layers, tap_points, tapped
from calib.analysis.plan import GROUP_SIZES, WEIGHT_BITS, LayerPlan
from calib.analysis.ranges import StepRanges
from calib.base.errors import CalibError
from calib.cli.help import CONF
from calib.dataset.sampling import initial_noise
from helpers import velocity
from calib.models.mmdit.names import module_path
from calib.models.model import DiffusionModel, weights
from calib.quantization import gptq, percentile, rtn, smooth
from calib.quantization.packed import Packed
from calib.quantization.quantizer import ChannelRange, Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx.mmdit import MMDiT
from helpers import check_config_error
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn
from numpy.typing import NDArray
from omegaconf import OmegaConf
from tiny_flux import flux_config
from watching import keep

Array = NDArray[np.float64]

#: Sizes a layer of the emoji model has, and ones that make ragged blocks of columns.
COLUMNS = (32, 160, 256, 384)
ONE = "mm_block_1.image.attn.o_proj"


@dataclass(frozen=True)
class States:
    """Arguments of a forward of ``transformer``, some of them."""

    transformer: MMDiT
    arguments: Sequence[tuple[mx.array, ...]]

    def outputs(self, transformer: MMDiT | None = None) -> list[NDArray[np.float32]]:
        return [np.array(velocity(transformer or self.transformer, *state)) for state in self.arguments]

    def inputs(self, transformer: MMDiT | None = None) -> list[dict[str, NDArray[np.float32]]]:
        """What each tap sees in each forward."""
        found = []
        own = transformer or self.transformer
        for state in self.arguments:
            seen: dict[str, mx.array] = {}
            with tapped(own, tap_points(own, TapSelection()), keep(seen)):
                velocity(own, *state)
            found.append({name: np.array(x) for name, x in seen.items()})
        return found

    def replay(
        self,
        points: Sequence[TapPoint],
        record: Any,
        pending: Callable[[], Sequence[mx.array]],
        replaced: Mapping[str, mx.array],
    ) -> None:
        layers = self.architecture.layers()
        own = {name: layers[name].weight for name in replaced}
        try:
            for name, weight in replaced.items():
                layers[name].weight = weight
            with tapped(self.architecture, points, record):
                for state in self.arguments:
                    velocity(self.transformer, *state)
                    mx.eval(pending())
        finally:
            for name, weight in own.items():
                layers[name].weight = weight


@dataclass
class Asked:
    """The statistics' side of :class:`QuantizerInput`: answers of :class:`States`, and what was asked."""

    states: States
    ranges_of: dict[str, tuple[tuple[float, float] | None, Array | None]] = field(default_factory=dict)

    @cached_property
    def extremes(self) -> dict[str, ChannelRange]:
        found = {}
        inputs = self.states.inputs()
        for point in tap_points(self.states.architecture, TapSelection()):
            seen = [x[point.name].reshape(-1, x[point.name].shape[-1]).astype(np.float64) for x in inputs]
            low, high = np.concatenate(seen).min(axis=0), np.concatenate(seen).max(axis=0)
            found.update(dict.fromkeys(point.names, ChannelRange(low, high)))
        return found

    def channel_range(self, name: str) -> ChannelRange:
        return self.extremes[name]

    def ranges(self, name: str, clip: tuple[float, float] | None, divisors: Array | None) -> StepRanges | None:
        self.ranges_of[name] = (clip, divisors)
        return StepRanges((0,), (-float(len(name)),), (1.0,))


def work_on(states: States, bits: int = 4, group_size: int = 64, asked: Asked | None = None) -> QuantizerInput:
    """Every linear layer whose width fits, with one plan for all."""
    layers = {
        name: layer
        for name, layer in states.architecture.layers().items()
        if isinstance(layer, nn.Linear) and layer.weight.shape[1] % group_size == 0
    }
    plan = dict.fromkeys(states.architecture.layers(), LayerPlan(bits, 8, group_size=group_size))
    asked = asked or Asked(states)
    return QuantizerInput(
        states.transformer, layers, plan, mx.float16, states.replay, asked.channel_range, asked.ranges
    )


def arguments(seed: int, shapes: Sequence[Sequence[int]], timesteps: Sequence[float]) -> list[tuple[mx.array, ...]]:
    """Random states, token embeddings and pooled embeddings of these shapes."""
    random = np.random.RandomState(seed)
    found = []
    for timestep in map(mx.array, timesteps):
        mx.eval(timestep)
        found.append((*(mx.array(random.randn(*shape).astype(np.float32)) for shape in shapes), timestep))
    return found


@pytest.fixture(scope="module")
def emoji(model: DiffusionModel) -> States:
    """Noise as the emoji model sees it, with the text of four prompts."""
    text = model.encode(["red apple", "octopus", "rocket", "sunflower"], 3.0)
    states = []
    for timestep in (1000.0, 600.0, 200.0):
        noise = mx.stack([initial_noise(int(timestep) + i, model.latent_shape) for i in range(8)])
        states.append((noise, text.tokens, text.pooled, mx.array(timestep)))
    mx.eval(states)
    return States(model.transformer, states)


@pytest.fixture(scope="module", params=[True, False], ids=["parallel", "serial"])
def flux(request: pytest.FixtureRequest) -> States:
    """FLUX's structure, small; as it is, and with unified blocks whose MLP follows the attention."""
    transformer = MMDiT(flux_config(parallel=request.param, text=64, pooled=32))
    random = np.random.RandomState(0)
    for path, weight in weights(transformer).items():
        # Some channels much wider than others, as there are in large models.
        scale = 0.1 * np.exp(random.randn(weight.shape[0], *[1] * (weight.ndim - 1)))
        value = mx.array((scale * random.randn(*weight.shape)).astype(np.float32))
        transformer.load_weights([(path, value if "norm" not in path else mx.ones_like(value))], strict=False)
    shapes = ((8, 6, 16), (5, 64), (32,))
    # DiffusionKit modulates one row by a kernel, more rows by products.
    batches = [arguments(rows, [(rows, *shape) for shape in shapes], (750.0, 250.0)) for rows in (1, 2)]
    return States(transformer, [state for batch in batches for state in batch])


def integers_of(packed: Packed) -> NDArray[np.int64]:
    """q, (rows, columns)."""
    one = Packed(
        packed.weight, mx.ones_like(packed.scales), mx.zeros_like(packed.biases), packed.bits, packed.group_size
    )
    return np.array(one.dequantize()).astype(np.int64)


def values_of(packed: Packed) -> Array:
    """scale · q + bias of the stored numbers, in float64."""
    scales, biases = (
        np.repeat(np.array(x.astype(mx.float32)).astype(np.float64), packed.group_size, axis=1)
        for x in (packed.scales, packed.biases)
    )
    return scales * integers_of(packed) + biases


def same(one: Packed, two: Packed) -> bool:
    pairs = ((one.weight, two.weight), (one.scales, two.scales), (one.biases, two.biases))
    return (one.bits, one.group_size) == (two.bits, two.group_size) and all(mx.array_equal(*pair) for pair in pairs)


def random_layer(columns: int, seed: int = 0, rows: int = 7) -> tuple[NDArray[np.float32], Array]:
    """A weight (rows, columns), and the H of correlated inputs of uneven width."""
    random = np.random.RandomState(seed)
    x = random.randn(3 * columns, columns) @ random.randn(columns, columns) + 3 * random.randn(3 * columns, columns)
    x *= np.exp(random.randn(columns))
    return 0.1 * random.randn(rows, columns).astype(np.float32), 2 / len(x) * x.T @ x


def by_the_paper(
    weight: NDArray[np.float32],
    hessian: Array,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    damping: float,
    act_order: bool,
) -> tuple[NDArray[np.int64], Array]:
    """GPTQ before its last two steps: equations 2 and 3, H⁻¹ itself, of the columns that are left, column by column.

    Returns the integers and the weights they stand for, (rows, columns).
    """
    columns = len(hessian)
    left = weight.astype(np.float64)
    inverse = np.linalg.inv(hessian + damping * hessian.diagonal().mean() * np.eye(columns))
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else np.arange(columns)
    integers, values = np.zeros(weight.shape, np.int64), np.zeros(weight.shape)
    grids: dict[int, tuple[Array, Array]] = {}

    def grid(group: int) -> tuple[Array, Array]:
        part = left[:, group * group_size : (group + 1) * group_size].astype(np.float32)
        _, *stored = mx.quantize(mx.array(part).astype(dtype), group_size=group_size, bits=bits)
        scale, bias = (np.array(x.astype(mx.float32)).astype(np.float64)[:, 0] for x in stored)
        return scale, bias

    if act_order:
        grids = {group: grid(group) for group in range(columns // group_size)}
    for q in order:
        if q // group_size not in grids:
            grids[q // group_size] = grid(q // group_size)
        scale, bias = grids[q // group_size]
        integers[:, q] = np.clip(np.round((left[:, q] - bias) / scale), 0, 2**bits - 1)
        values[:, q] = scale * integers[:, q] + bias
        left = left - np.outer((left[:, q] - values[:, q]) / inverse[q, q], inverse[q])
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return integers, values


def solved(
    weight: NDArray[np.float32], hessian: Array, damping: float = 0.01, act_order: bool = False, **grid: Any
) -> Packed:
    curvature = gptq.prepare(mx.array(hessian.astype(np.float32)), damping, act_order)
    return gptq.gptq_layer(weight, curvature, **({"bits": 4, "group_size": 32, "dtype": mx.float16} | grid))


# Packed weights


@given(
    bits=st.sampled_from(WEIGHT_BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([mx.float16, mx.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_integers_are_packed_as_mlx_packs_them(bits: int, group_size: int, groups: int, dtype: Any, seed: int) -> None:
    random = np.random.RandomState(seed)
    nearest = Packed.nearest(mx.array(random.randn(5, groups * group_size)), bits, group_size, dtype)
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


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_a_layer_is_that_of_the_papers_equations(bits: int, group_size: int, act_order: bool) -> None:
    """For every way MLX packs, over several blocks of columns, one of them short."""
    columns = 256 + group_size
    weight, hessian = random_layer(columns, seed=bits)
    hessian = hessian.astype(np.float32).astype(np.float64)
    for dtype in (mx.float16, mx.bfloat16):
        grid = (bits, group_size, dtype)
        packed = gptq.gptq_layer(weight, gptq.prepare(mx.array(hessian), 0.01, act_order), *grid)
        integers, values = by_the_paper(weight, hessian, *grid, 0.01, act_order)
        assert np.array_equal(integers_of(packed), integers)
        np.testing.assert_allclose(values_of(packed), values, rtol=1e-12, atol=1e-12)
        assert packed.scales.dtype == packed.biases.dtype == dtype


@pytest.mark.parametrize("act_order", [False, True])
def test_it_loses_much_less_than_rounding_to_nearest(act_order: bool) -> None:
    for columns in COLUMNS:
        weight, hessian = random_layer(columns)
        nearest = Packed.nearest(mx.array(weight), 4, 32, mx.float16)
        losses = [
            gptq.weighted_error(weight - np.array(p.dequantize()), hessian)
            for p in (solved(weight, hessian, act_order=act_order), nearest)
        ]
        assert losses[0] < 0.7 * losses[1]


def test_the_weighted_error_is_what_the_outputs_differ_by() -> None:
    random = np.random.RandomState(0)
    x, difference = random.randn(50, 32), random.randn(6, 32)
    expected = np.sum((x @ difference.T) ** 2) * 2 / 50
    assert gptq.weighted_error(difference, 2 / 50 * x.T @ x) == pytest.approx(expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_uncorrelated_inputs_leave_rounding_to_nearest(bits: int, act_order: bool) -> None:
    """The grids are the same, and every weight is at the nearest of its values as they are stored."""
    weight, _ = random_layer(192)
    for dtype in (mx.float16, mx.bfloat16):
        packed = solved(weight, np.eye(192), act_order=act_order, bits=bits, dtype=dtype)
        nearest = Packed.nearest(mx.array(weight), bits, 32, dtype)
        assert mx.array_equal(packed.scales, nearest.scales)
        assert mx.array_equal(packed.biases, nearest.biases)
        scales = np.repeat(np.array(packed.scales.astype(mx.float32)), 32, axis=1)
        wrong, wrong_nearest = (np.abs(weight - values_of(p)) for p in (packed, nearest))
        assert np.all(wrong <= wrong_nearest + 1e-9)
        inside = (integers_of(packed) > 0) & (integers_of(packed) < 2**bits - 1)
        assert np.all(wrong[inside] <= np.abs(scales[inside]) / 2 + 1e-9)
        # mx.quantize rounds by scales that it then stores to 16 bits: at 8 bits bfloat16's are too coarse for that.
        if bits <= 4:
            assert np.mean(integers_of(packed) == integers_of(nearest)) > 0.98


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_are_always_zero_take_no_part(act_order: bool) -> None:
    weight, hessian = random_layer(160)
    dead = np.arange(160) % 5 == 2
    hessian[dead] = hessian[:, dead] = 0
    packed = solved(weight, hessian, act_order=act_order)
    scales = np.repeat(np.array(packed.scales.astype(mx.float32)), 32, axis=1)
    inside = dead & (integers_of(packed) > 0) & (integers_of(packed) < 15)
    assert np.all(np.abs(weight - values_of(packed))[inside] <= 0.5001 * np.abs(scales[inside])), "rounded all the same"
    factor = gptq.prepare(mx.array(hessian), 0.01, act_order=False).factor
    assert not np.any((factor - np.diag(factor.diagonal()))[dead]), "and their errors reach no other column"


@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.01])
def test_an_h_that_has_no_inverse_is_damped_until_it_has(damping: float) -> None:
    random = np.random.RandomState(0)
    weight, _ = random_layer(64)
    for x in (random.randn(3, 64), np.ones((1, 64)), 1e-15 * random.randn(3, 64), np.zeros((1, 64))):
        packed = solved(weight, x.T @ x, damping=damping)
        wrong = np.abs(weight - np.array(packed.dequantize()))
        assert np.isfinite(wrong).all()
        assert wrong.max() < 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_groups_of_equal_weights_and_of_zeros(dtype: Any) -> None:
    """MLX gives them scales that are negative, tiny, or nothing at all in 16 bits."""
    _, hessian = random_layer(128)
    weight = np.zeros((4, 128), np.float32)
    weight[1], weight[2], weight[3] = 0.25, -0.25, 1e-9
    weight[3, 64:] = 1e-7
    for act_order in (False, True):
        for bits in WEIGHT_BITS:
            packed = solved(weight, hessian, act_order=act_order, bits=bits, dtype=dtype)
            np.testing.assert_allclose(np.array(packed.dequantize()), weight, atol=2e-3)


# GPTQ: a model


def fed(emoji: States, x: mx.array, bits: int = 4, **plan: Any) -> QuantizerInput:
    """One layer of the model to be quantized, which is given ``x`` (vectors, channels) as its input."""

    def replay(points: Sequence[TapPoint], record: Any, pending: Any, replaced: Any) -> None:
        assert [point.name for point in points] == [ONE]
        for part in mx.split(x, 2) if len(x) % 2 == 0 else [x]:
            record(ONE, part.reshape(1, -1, 1, x.shape[-1]))
            mx.eval(pending())

    whole = work_on(emoji, bits, **plan)
    return replace(whole, layers={ONE: whole.layers[ONE]}, replay=replay)


@given(
    bits=st.sampled_from(WEIGHT_BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    vectors=st.integers(1, 400),
    spread=st.floats(0, 4),
    shift=st.floats(0, 100),
    damping=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    act_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_layer_loses_more_than_by_rounding_to_nearest(
    emoji: States,
    bits: int,
    group_size: int,
    vectors: int,
    spread: float,
    shift: float,
    damping: float,
    act_order: bool,
    seed: int,
) -> None:
    """Whatever its inputs: few, nearly dependent, of widths orders of magnitude apart."""
    random = np.random.RandomState(seed)
    x = (random.randn(vectors, 256) @ random.randn(256, 256) / 16 + shift) * np.exp(spread * random.randn(256))
    work = fed(emoji, mx.array(x.astype(np.float32)), bits, group_size=group_size)
    weight = np.array(work.layers[ONE].weight).astype(np.float64)
    losses = [
        np.sum((x.astype(np.float32) @ (weight - np.array(made.layers[ONE].dequantize())).T) ** 2)
        for made in (gptq.quantize(work, damping, act_order), rtn.quantize(work))
    ]
    assert losses[0] <= losses[1] * (1 + 1e-4)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_inputs_that_tell_nothing_leave_rounding_to_nearest(emoji: States, value: float) -> None:
    work = fed(emoji, mx.full((4, 256), value))
    made = gptq.quantize(work)
    assert same(made.layers[ONE], rtn.quantize(work).layers[ONE])
    assert made.notes == ["gptq: 0 of 1 layers lose less than by rounding to nearest"]


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
def whole(emoji: States) -> tuple[Quantized, Replays]:
    """The emoji model at 4 bits."""
    return watched(work_on(emoji))


def test_each_block_reads_what_the_quantized_ones_before_it_give(
    emoji: States, whole: tuple[Quantized, Replays]
) -> None:
    work, (made, replays) = work_on(emoji), whole
    assert list(made.layers) == list(work.layers)
    assert len(work.layers) == 60
    stages = [[name for point in points for name in point.names] for points, _ in replays]
    assert all("embedder" in name for name in stages[0])
    assert all(name.endswith(".adaln") for name in stages[1])
    assert len(stages[1]) == 9
    for i in range(4):
        assert {name.split(".")[0] for name in stages[2 + i]} == {f"mm_block_{i}"}
    assert stages[6:] == [["final_layer.linear"]]
    before: set[str] = set()
    for names, (_, replaced) in zip(stages, replays, strict=True):
        assert set(replaced) == before
        for name, weight in replaced.items():
            assert mx.array_equal(weight, made.layers[name].dequantize())
        before |= set(names) & set(work.layers)


def test_memory_splits_blocks(emoji: States, whole: tuple[Quantized, Replays]) -> None:
    work, (made, replays) = work_on(emoji), whole
    split, many = watched(work, memory_gb=3 * 4 * 256**2 / 1e9)
    assert list(split.layers) == list(made.layers)
    sizes = [sum(4 * work.layers[point.name].weight.shape[1] ** 2 for point in points) for points, _ in many]
    assert max(sizes) == 4 * 1024**2, "one that alone takes more is gathered alone"
    assert all(size <= 3 * 4 * 256**2 or len(points) == 1 for size, (points, _) in zip(sizes, many, strict=True))
    assert len(many) > len(replays)
    assert [name for points, _ in many for p in points for name in p.names] == [
        name for points, _ in replays for p in points for name in p.names
    ]


def output_error(states: States, made: Quantized) -> float:
    """Mean of ‖v − v_q‖² / ‖v‖² over the states."""
    layers = states.architecture.layers()
    plain, own = states.outputs(), {name: layers[name].weight for name in made.layers}
    try:
        for name, packed in made.layers.items():
            layers[name].weight = packed.dequantize()
        quantized = states.outputs()
    finally:
        for name, weight in own.items():
            layers[name].weight = weight
    pairs = zip(quantized, plain, strict=True)
    return float(np.mean([np.sum((q - v) ** 2, dtype=float) / np.sum(v**2, dtype=float) for q, v in pairs]))


def test_the_models_output_is_nearer_than_with_rounding_to_nearest(
    emoji: States, whole: tuple[Quantized, Replays]
) -> None:
    work, (made, _) = work_on(emoji), whole
    assert output_error(emoji, made) < 0.6 * output_error(emoji, rtn.quantize(work))
    assert made.notes[0].startswith("gptq: 60 of 60 layers lose less than by rounding to nearest, at the median 0.")
    assert not made.weights
    assert not made.ranges


def test_layers_that_the_work_leaves_out_stay(emoji: States) -> None:
    """Other layers may share a tap with them, or lie in between."""
    whole = work_on(emoji)
    names = ["mm_block_0.text.attn.k_proj", "mm_block_2.image.adaln", "final_layer.linear"]
    made, replays = watched(replace(whole, layers={name: whole.layers[name] for name in names}))
    assert list(made.layers) == names
    taps = ["mm_block_0.image.adaln", "mm_block_0.text.attn.q_proj", "final_layer.linear"]
    assert [[point.name for point in points] for points, _ in replays] == [[tap] for tap in taps]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"damping": -0.1}, ("quantizer.damping=-0.1", "0 or more")),
        ({"memory_gb": 0.0}, ("quantizer.memory_gb=0.0", "more than 0")),
    ],
)
def test_impossible_parameters_of_gptq(emoji: States, parameters: Any, words: Sequence[str]) -> None:
    check_config_error(lambda: gptq.quantize(work_on(emoji), **parameters), words)


# Smoothing


def smoothed_copy(states: States, made: Quantized) -> MMDiT:
    """A transformer with the weights that ``made`` changed, nothing rounded."""
    copy = MMDiT(states.transformer.config)
    copy.load_weights(list((weights(states.transformer) | made.weights).items()), strict=False)
    return copy


def check_smoothing(states: States, alpha: float) -> dict[str, Array]:
    """Smoothing alone: the model's output stays, and what the layers read is divided as told; returns the divisors."""
    asked = Asked(states)
    # Planned, and none that MLX could quantize: all that changes is left at full precision.
    made = smooth.quantize(replace(work_on(states, asked=asked), layers={}), alpha)
    assert not made.layers
    copy = smoothed_copy(states, made)
    for plain, found in zip(states.outputs(), states.outputs(copy), strict=True):
        np.testing.assert_allclose(found, plain, rtol=0, atol=2e-5 * np.abs(plain).max())
    divisors = {name: s for name, (_, s) in asked.ranges_of.items() if s is not None}
    assert set(made.ranges) == set(divisors)
    for before, after in zip(states.inputs(), states.inputs(copy), strict=True):
        for name, x in before.items():
            expected = x / divisors.get(name, 1.0)
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=3e-5 * np.abs(expected).max(), err_msg=name)
    return divisors


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_smoothed_model_gives_the_same_output(emoji: States, alpha: float) -> None:
    divisors = check_smoothing(emoji, alpha)
    modulated = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "final_layer.linear")
    assert set(divisors) == {name for name in emoji.architecture.layers() if name.endswith(modulated)}
    assert all(s.std() > 0.01 * s.mean() for s in divisors.values())


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_smoothed_flux_gives_the_same_output(flux: States, alpha: float) -> None:
    divisors = check_smoothing(flux, alpha)
    parallel = flux.transformer.config.parallel_mlp_for_unified_blocks
    for i in range(2):
        attention, mlp = divisors[f"unified_block_{i}.attn.q_proj"], divisors[f"unified_block_{i}.mlp.fc1"]
        assert np.array_equal(attention, mlp) is parallel
    assert np.array_equal(divisors["mm_block_1.image.attn.o_proj"], divisors["mm_block_1.text.attn.o_proj"])


def test_divisors_are_those_of_the_paper(emoji: States) -> None:
    asked, alpha = Asked(emoji), 0.3
    smooth.quantize(work_on(emoji, asked=asked), alpha)
    layers = emoji.architecture.layers()
    groups = [
        [f"mm_block_3.text.attn.{which}_proj" for which in "qkv"],
        ["mm_block_3.image.attn.o_proj"],
        [f"mm_block_0.{stream}.attn.o_proj" for stream in ("image", "text")],
        ["mm_block_2.text.mlp.fc1"],
        ["final_layer.linear"],
    ]
    for names in groups:
        spans = [asked.channel_range(name) for name in names]
        x = np.max([np.maximum(-span.low, span.high) for span in spans], axis=0)
        w = np.max([np.abs(np.array(layers[name].weight)).max(axis=0) for name in names], axis=0)
        for name in names:
            _, s = asked.ranges_of[name]
            assert s is not None
            np.testing.assert_allclose(s, x**alpha / w ** (1 - alpha), rtol=1e-6)


def test_smoothed_weights_are_rounded_and_what_else_changes_is_given_back(emoji: States) -> None:
    work = work_on(emoji, bits=8)
    bare = smooth.quantize(replace(work, layers={}))
    made = smooth.quantize(work)
    assert list(made.layers) == list(work.layers)
    for name, packed in made.layers.items():
        weight = bare.weights.get(f"{module_path(name)}.weight", work.layers[name].weight)
        assert same(packed, Packed.nearest(weight, 8, 64, mx.float16)), name
    assert set(made.weights) == {path for path in bare.weights if path.endswith(".bias")}
    assert all(path.endswith(("v_proj.bias", "adaLN_modulation.layers.1.bias")) for path in made.weights)
    copy = smoothed_copy(emoji, made)
    for name, packed in made.layers.items():
        linear_layers(copy)[name].weight = packed.dequantize()
    for plain, found in zip(emoji.outputs(), emoji.outputs(copy), strict=True):
        assert np.sum((found - plain) ** 2) < 1e-3 * np.sum(plain**2)


def test_a_plan_of_some_layers_smooths_what_they_read_alone(emoji: States) -> None:
    whole = work_on(emoji)
    name = "mm_block_1.text.mlp.fc1"
    some = replace(whole, plan={name: whole.plan[name]}, layers={name: whole.layers[name]})
    made = smooth.quantize(some)
    adaln = module_path("mm_block_1.text.adaln")
    assert set(made.weights) == {f"{adaln}.weight", f"{adaln}.bias"}
    assert list(made.layers) == list(made.ranges) == [name]


def test_copies_of_some_layers_fit_the_others(emoji: States) -> None:
    """With the same plan, a layer comes out the same whichever others are asked for beside it."""
    work = work_on(emoji)
    whole = smooth.quantize(work)
    for name in ("mm_block_0.image.adaln", "mm_block_2.text.attn.v_proj", "mm_block_1.image.attn.o_proj"):
        alone = smooth.quantize(replace(work, layers={name: work.layers[name]}))
        assert same(alone.layers[name], whole.layers[name])


def test_channels_that_are_zero_are_left_as_they_are(emoji: States) -> None:
    asked = Asked(emoji)
    seen = asked.channel_range("final_layer.linear")
    low, high = seen.low.copy(), seen.high.copy()
    low[:3], high[:3] = 0, 0
    low[3:5], high[3:5] = np.inf, -np.inf  # no finite value was seen
    low[5], high[5] = -1e-30, 1e-30
    work = replace(work_on(emoji, asked=asked), channel_range=lambda name: ChannelRange(low, high))
    plan = {"final_layer.linear": work.plan["final_layer.linear"]}
    made = smooth.quantize(replace(work, plan=plan, layers={}))
    _, s = asked.ranges_of["final_layer.linear"]
    assert s is not None
    assert np.all(s[:6] == 1)
    assert np.all(np.isfinite(s) & (s > 0))
    assert all(bool(mx.isfinite(weight).all()) for weight in made.weights.values())


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_is_a_share(emoji: States, alpha: float) -> None:
    check_config_error(lambda: smooth.quantize(work_on(emoji), alpha), (f"quantizer.alpha={alpha}", "must be 0 to 1"))


@pytest.mark.parametrize(
    ("quantizer", "lacking"), [(smooth, "channel_range"), (smooth, "ranges"), (percentile, "ranges")]
)
def test_without_statistics_there_is_one_clear_line(emoji: States, quantizer: Any, lacking: str) -> None:
    work = replace(work_on(emoji), **{lacking: lambda *_: None})
    with pytest.raises(CalibError) as error:
        quantizer.quantize(work)
    assert "needs activations.h5" in str(error.value)
    assert "calib collect" in str(error.value)
    assert "\n" not in str(error.value)


# Percentiles


def test_percentiles_of_its_own_for_every_layer(emoji: States) -> None:
    asked = Asked(emoji)
    work = work_on(emoji, asked=asked)
    block = replace(work, plan=work.plan | {"mm_block_1": LayerPlan(4, 8)})
    made = percentile.quantize(block, 1.0, 98.0)
    assert asked.ranges_of == dict.fromkeys(emoji.architecture.layers(), ((1.0, 98.0), None))
    assert made.ranges == {name: StepRanges((0,), (-len(name),), (1.0,)) for name in asked.ranges_of}
    plain = rtn.quantize(work)
    assert list(made.layers) == list(plain.layers)
    assert all(same(made.layers[name], plain.layers[name]) for name in made.layers)
    assert not made.weights
    percentile.quantize(work)
    assert asked.ranges_of[ONE] == ((0.1, 99.9), None)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-1.0, 99.0, ("quantizer.low=-1.0", "0 or more")),
        (1.0, 100.5, ("quantizer.high=100.5", "100 or less")),
        (50.0, 50.0, ("quantizer.low=50.0", "less than quantizer.high")),
    ],
)
def test_impossible_percentiles(emoji: States, low: float, high: float, words: Sequence[str]) -> None:
    check_config_error(lambda: percentile.quantize(work_on(emoji), low, high), words)


# Options


@pytest.mark.parametrize("option", ["rtn", "percentile", "gptq", "smooth"])
def test_an_option_names_every_parameter_with_its_default(option: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(CONF / "quantizer" / f"{option}.yaml"))
    assert isinstance(node, dict)
    bound = bind_target("quantizer", node, given=("work",))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(bound.func).parameters.items()
        if name != "work"
    }
    assert bound.keywords == defaults
