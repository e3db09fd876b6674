"""GPTQ beside the oracle of test_quantizers: odd inputs of one layer, and whole transformers block after block."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from calib.activations.taps import TapPoint
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.models.packed import Packed
from calib.quantization import columns as gptq_columns
from calib.quantization import cuda_columns, gptq, output_side, rtn, strips
from calib.quantization.curvature import Curvature, curvature_of
from calib.quantization.quantizer import Quantized, QuantizerInput

import cuda_emulator
import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import Emulator
from helpers import float64
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantizing import DTYPES, Array, Case, Modulated, States, integers_of, same, tiny_states, values_of, work_on

# One layer


def random_layer(columns: int, seed: int = 0, rows: int = 7) -> tuple[NDArray[np.float32], Array]:
    """A weight (rows, columns), and the H of correlated inputs of uneven width."""
    random = np.random.RandomState(seed)
    x = random.randn(3 * columns, columns) @ random.randn(columns, columns) + 3 * random.randn(3 * columns, columns)
    x *= np.exp(random.randn(columns))
    return 0.1 * random.randn(rows, columns).astype(np.float32), 2 / len(x) * x.T @ x


def solved(
    weight: NDArray[np.float32], hessian: Array, damping: float = 0.01, act_order: bool = False, **grid: Any
) -> Packed:
    given = {"bits": 4, "group_size": 32, "dtype": mx.float16} | grid
    curvature = curvature_of(mx.array(hessian.astype(np.float32)), damping, act_order)
    (packed,) = gptq.gptq_layers([mx.array(weight)], [Packed.nearest(mx.array(weight), **given)], curvature)
    return packed


def loss(weight: NDArray[np.float32], packed: Packed, hessian: Array) -> float:
    difference = weight - np.array(packed.dequantize())
    return float(np.sum((difference @ hessian) * difference))


both_orders = pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])


@both_orders
@pytest.mark.parametrize("columns", [32, 160, 256, 384])
def test_gptq_loses_much_less(columns: int, act_order: bool) -> None:
    """Than rounding to nearest, whatever blocks of columns there are."""
    weight, hessian = random_layer(columns)
    nearest = Packed.nearest(mx.array(weight), 4, 32, mx.float16)
    losses = [loss(weight, p, hessian) for p in (solved(weight, hessian, act_order=act_order), nearest)]
    assert losses[0] < 0.7 * losses[1]


def test_layers_with_the_same_inputs_at_once() -> None:
    """Of any bits, they come out as each does alone."""
    weight, hessian = random_layer(160, rows=9)
    curvature = curvature_of(mx.array(hessian.astype(np.float32)), 0.1, act_order=True)
    parts, every = (weight[:4], weight[4:5], weight[5:]), (3, 8, 4)
    grids = [Packed.nearest(mx.array(part), bits, 32, mx.float16) for part, bits in zip(parts, every, strict=True)]
    together = gptq.gptq_layers([mx.array(part) for part in parts], grids, curvature)
    for part, grid, found in zip(parts, grids, together, strict=True):
        (alone,) = gptq.gptq_layers([mx.array(part)], [grid], curvature)
        assert same(found, alone)
    difference = np.random.RandomState(0).randn(6, 160).astype(np.float32)
    relative = hessian / hessian.diagonal().mean()
    np.testing.assert_allclose(
        np.array(curvature.loss(mx.array(difference))), np.sum((difference @ relative) * difference, axis=1), rtol=1e-4
    )


@both_orders
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "factors rounded"])
@pytest.mark.parametrize("damping", [1.0, 1e-3], ids=["float32", "float64"])
@pytest.mark.parametrize(("strip", "columns"), [(512, 192), (64, 192), (64, 224)])
def test_the_factor(
    strip: int, columns: int, damping: float, exact: bool, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U (H + λI) Uᵀ = I, however many strips there are, and where a device would round the factors of products."""
    monkeypatch.setattr(strips, "STRIP", strip)
    monkeypatch.setattr(strips, "rounds_factors", lambda: not exact)
    x = np.random.RandomState(columns).randn(2 * columns, columns).astype(np.float32)
    x *= np.exp(np.random.RandomState(1).randn(columns)).astype(np.float32)
    given = strips.plus_squares(strips.zeros(columns), mx.array(x), mx.array(x))
    assert sum(part.nbytes for part in given) == strips.nbytes(columns)
    hessian = strips.whole(given)
    wide = x.T.astype(np.float64) @ x
    np.testing.assert_allclose(np.array(hessian), wide, rtol=1e-4, atol=1e-5 * wide.max())
    curvature = curvature_of(hessian, damping, act_order)
    factor = float64(curvature.rows(0, columns))
    damped = wide / wide.diagonal().mean() + damping * np.eye(columns)
    identity = factor @ damped[np.ix_(curvature.order, curvature.order)] @ factor.T
    np.testing.assert_allclose(identity, np.eye(columns), atol=1e-4)
    assert not np.tril(factor, -1).any()
    for first, last in ((0, 64), (64, columns), (60, 70), (100, columns - 1)):
        assert np.array_equal(float64(curvature.rows(first, last)), factor[first:last, first:])


@pytest.mark.parametrize("on_cuda", [False, True], ids=["mlx", "scipy"])
@pytest.mark.parametrize("place", [0, 40, 99, 199])
def test_what_float32_cannot_factorise(place: int, on_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root that is not positive is noticed in any strip, and then λ is increased in float64."""
    monkeypatch.setattr(strips, "STRIP", 64)
    monkeypatch.setattr(strips, "on_cuda", lambda: on_cuda)
    diagonal = np.ones(200, np.float32)
    for value in (0.0, -1e-3, np.nan):
        diagonal[place] = value
        assert not strips.inverse_factor([mx.diag(mx.array(diagonal))[a:b, :b] for a, b in strips.bounds(200)])
    diagonal[place] = -0.5
    factor = float64(curvature_of(mx.diag(mx.array(diagonal)), 0.1, act_order=False).rows(0, 200))
    assert np.isfinite(factor).all() and (factor.diagonal() > 0).all()


def test_blocks_are_factorised_alike_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """By SciPy there, by MLX elsewhere."""
    x = mx.random.normal((96, 64), key=mx.random.key(0))
    block = x.T @ x + mx.eye(64)
    for on_cuda in (False, True):
        monkeypatch.setattr(strips, "on_cuda", lambda on_cuda=on_cuda: on_cuda)
        found = float64(strips._inverse_of_block(block))
        np.testing.assert_allclose(found, np.linalg.inv(np.linalg.cholesky(float64(block))), atol=1e-6)


def test_numbers_in_two_parts() -> None:
    """The first has TF32's 11 significant bits, and what is left out of products is 10⁻⁶ of them."""
    x = mx.random.normal((64, 64), key=mx.random.key(0)) * 10.0 ** mx.arange(-30, 34)
    high, rest = strips.split(x)
    assert not (high.view(mx.uint32) & 0x1FFF).any().item()
    assert mx.array_equal(high + rest, x)
    assert mx.all(mx.abs(rest) <= 2**-10 * mx.abs(x)).item()


@pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no g++ to compile the CUDA source for the CPU with")
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (33, 64), (96, 5)])
def test_the_cuda_kernel(rows: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for the CPU, it rounds as plain operations do, where a scale is zero too."""
    random = np.random.RandomState(rows)
    own = np.triu(0.1 * random.randn(columns, columns), 1) + np.diag(1 + random.rand(columns))
    scales = 0.3 * (random.rand(2, rows) > 0.2)
    values = (random.randn(columns, rows), own, scales, -0.1 * random.rand(2, rows), 15.0 * np.ones(rows))
    *arrays, most = (mx.array(x.astype(np.float32)) for x in values)
    monkeypatch.setattr(mx.fast, "cuda_kernel", Emulator(tmp_path))
    cuda_columns._kernel.cache_clear()
    groups = random.randint(0, 2, columns)
    found = cuda_columns.round_block(*arrays, groups, most)
    cuda_columns._kernel.cache_clear()
    expected = gptq_columns.round_block(*arrays, groups, most)
    assert mx.array_equal(found[0], expected[0])
    np.testing.assert_allclose(np.array(found[1]), np.array(expected[1]), rtol=1e-4, atol=1e-4)


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
    assert np.all(wrong <= wrong_nearest + 1e-4 * np.abs(scales))
    inside = (integers_of(packed) > 0) & (integers_of(packed) < 2**bits - 1)
    assert np.all(wrong[inside] <= 0.5001 * np.abs(scales[inside]))
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
    factor = np.array(curvature_of(mx.array(hessian.astype(np.float32)), 0.01, act_order=False).rows(0, 160))
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


def both_sides(seed: int) -> tuple[NDArray[np.float32], Curvature, Curvature, Array]:
    """A weight, curvatures of correlated inputs and outputs, and B + λI in float64."""
    weight, of_inputs = random_layer(64, seed, rows=48)
    _, of_outputs = random_layer(48, seed + 1)
    inputs = curvature_of(mx.array(of_inputs.astype(np.float32)), 1.0, act_order=True)
    outputs = curvature_of(mx.array(of_outputs.astype(np.float32)), output_side.DAMPING, act_order=True)
    relative = of_outputs / of_outputs.diagonal().mean() + output_side.DAMPING * np.eye(48)
    return weight, inputs, outputs, relative


def by_gptq(inputs: Curvature, bits: int = 3) -> Callable[[mx.array], Packed]:
    return lambda rows: gptq.gptq_layers([rows], [Packed.nearest(rows, bits, 32, mx.float16)], inputs)[0]


def test_rows_in_turn() -> None:
    """Each group of rows is rounded where B leaves the least of the errors before: w - B_rr⁻¹ B_r1 ΔW₁."""
    weight, inputs, outputs, b = both_sides(3)
    found = output_side.rounded_in_turn(mx.array(weight), outputs, by_gptq(inputs))
    wrong, rounded = np.zeros(weight.shape), np.zeros(weight.shape)
    groups = np.array_split(outputs.order, output_side.GROUPS)
    for i, group in enumerate(groups):
        target = weight[group].astype(np.float64)
        if i:
            before, rest = np.concatenate(groups[:i]), np.concatenate(groups[i:])
            target -= np.linalg.solve(b[np.ix_(rest, rest)], b[np.ix_(rest, before)] @ wrong[before])[: len(group)]
        rounded[group] = float64(by_gptq(inputs)(mx.array(target.astype(np.float32))).dequantize())
        wrong[group] = rounded[group] - weight[group]
    # A weight midway between two numbers may go either way.
    assert np.mean(np.abs(float64(found.dequantize()) - rounded) < 1e-3 * np.abs(weight).max()) > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_turn_lose_less(seed: int) -> None:
    weight, inputs, outputs, b = both_sides(seed)
    losses = []
    w = mx.array(weight)
    for packed in (output_side.rounded_in_turn(w, outputs, by_gptq(inputs)), by_gptq(inputs)(w)):
        difference = packed.dequantize() - mx.array(weight)
        wide = float64(difference)
        losses.append(np.sum((wide @ float64(inputs.hessian)) * (b @ wide)))
        assert output_side.loss_of(difference, inputs, outputs).item() == pytest.approx(losses[-1], rel=1e-3)
    assert losses[0] < 0.9 * losses[1]


def fed(x: Array, bits: int = 4, group_size: int = 64) -> QuantizerInput:
    """A layer of 128 columns which is given ``x`` (vectors, columns)."""
    case = Case(bits, group_size, mx.float16)
    case.x, case.architecture = x, Modulated(9, 128)
    return replace(
        case.work(),
        replay=lambda _, record, pending, __: (
            record("linear", mx.array(x, mx.float32)[:, None], [0] * len(x)),
            mx.eval(pending()),
        ),
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
        for made in (gptq.quantize(work, damping, act_order, search=False), rtn.quantize(work, search=False))
    ]
    assert losses[0] <= losses[1] * (1 + 1e-4)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_inputs_that_tell_nothing(value: float) -> None:
    work = fed(np.full((4, 128), value))
    made = gptq.quantize(work, search=False)
    assert same(made.layers["linear"], rtn.quantize(work, search=False).layers["linear"])
    assert made.notes == ["gptq: 0 of 1 layers lose less than by rounding to nearest"]


# Whole transformers


@pytest.fixture(scope="module")
def sd3() -> States:
    return tiny_states("sd3")


#: For each replay its taps, and the weights replaced in it.
Replays: TypeAlias = list[tuple[list[TapPoint], dict[str, Packed]]]


def watched(work: QuantizerInput, **parameters: Any) -> tuple[Quantized, Replays]:
    """What GPTQ makes, and how."""
    replays: Replays = []

    def replay(points: Sequence[TapPoint], record: Any, pending: Any, replaced: Mapping[str, Packed]) -> None:
        replays.append((list(points), dict(replaced)))
        work.replay(points, record, pending, replaced)

    return gptq.quantize(replace(work, replay=replay), **parameters), replays


@pytest.fixture(scope="module", params=["sd3", "flux", pytest.param("serial", marks=pytest.mark.slow)])
def whole(request: pytest.FixtureRequest) -> tuple[States, Quantized, Replays]:
    """A transformer at 4 bits."""
    states = tiny_states(request.param)
    return states, *watched(work_on(states))


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
        assert all(same(packed, made.layers[name]) for name, packed in replaced.items())
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
    assert output_error(states, made) < 0.8 * output_error(states, rtn.quantize(work))
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
