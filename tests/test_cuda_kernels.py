"""The CUDA kernels, compiled for the CPU: what they see is what plain MLX operations see, and what NumPy says.

On a machine with an NVIDIA GPU ``calib doctor --selftest`` checks them as they run there.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from calib.activations import cuda_launch, observer_cuda
from calib.activations.observer import Observer
from calib.activations.observer_cuda import CudaObserver
from calib.activations.observer_mlx import MlxObserver
from calib.cli import selftest_collection

import cuda_emulator
import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import Emulator
from helpers import MLX_DTYPES, check_statistics, float64
from watching import watch

pytestmark = [
    pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no g++ to compile the CUDA sources for the CPU with"),
    pytest.mark.skipif(mx.cuda.is_available(), reason="the kernels run on a GPU here: calib doctor --selftest"),
]

PHASES = (12_345, 65_535, 0)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def forget_kernels() -> None:
    for value in vars(cuda_launch).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture(autouse=True)
def emulator(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    emulator = Emulator(compiled)
    monkeypatch.setattr(mx.fast, "cuda_kernel", emulator)
    forget_kernels()
    yield emulator
    forget_kernels()


def array(random: np.random.RandomState, *shape: int, mean: float = 0.0, spread: float = 1.0) -> mx.array:
    return mx.array((mean + spread * random.randn(*shape)).astype(np.float32))


def activations(rows: int, seed: int) -> dict[str, mx.array]:
    """Of every shape and layout that a transformer's taps have, and some that none has."""
    random = np.random.RandomState(seed)
    longer, heads = array(random, rows, 50, 1, 96, mean=3, spread=0.1), array(random, rows, 6, 10, 8)
    return {
        "stream": array(random, rows, 40, 1, 64),
        "three axes": array(random, rows, 9, 32),
        "long": array(random, rows, 130, 24, mean=-30, spread=0.1),
        "wide": array(random, rows, 5, 1, 520),
        "odd channels": array(random, rows, 7, 1, 13, mean=1),
        "one channel": array(random, rows, 33, 1),
        "one token": array(random, rows, 1, 1, 24),
        "no token axis": array(random, rows, 72),
        "slice of tokens": longer[:, 7:30],
        "unaligned slice": longer[:, :30, :, 3:43],
        "every other token": longer[:, ::2],
        "turned": heads.transpose(0, 2, 1, 3),
        "one row of many": mx.broadcast_to(longer[:1], longer.shape),
    }


def in_type(forward: Mapping[str, mx.array], dtype: str) -> dict[str, mx.array]:
    """The activations in another type, laid out as they were."""
    found = {name: x.astype(MLX_DTYPES[dtype]) for name, x in forward.items()}
    longer = mx.concatenate([found["slice of tokens"]] * 2, axis=1)
    return found | {
        "slice of tokens": longer[:, 5:35],
        "unaligned slice": longer[:, :30, :, 3:43],
        "every other token": longer[:, ::2],
        "turned": mx.contiguous(found["turned"].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
        "one row of many": mx.broadcast_to(longer[:1], longer.shape),
    }


def check_alike(found: Observer, plain: Observer, forwards: Sequence[Mapping[str, mx.array]], every_row: bool) -> None:
    """Both saw the same of ``forwards``, and that is what float64 NumPy says."""
    ours, theirs = watch(found, forwards, PHASES), watch(plain, forwards, PHASES)
    assert found.sound and plain.sound
    assert list(ours) == list(theirs) == list(forwards[0])
    for name in forwards[0]:
        one, other = ours[name].statistics, theirs[name].statistics
        assert ours[name].dtype == theirs[name].dtype
        for field in ("minimum", "maximum", "count"):
            assert np.array_equal(getattr(one, field), getattr(other, field)), f"{name}: {field}"
        assert np.array_equal(one.histogram.keys, other.histogram.keys), name
        assert np.array_equal(one.histogram.counts, other.histogram.counts), name
        assert one.histogram.counts.dtype == np.uint64
        np.testing.assert_array_equal(ours[name].ranges[:, :2], theirs[name].ranges[:, :2])
        np.testing.assert_allclose(ours[name].ranges[:, 2:], theirs[name].ranges[:, 2:], rtol=1e-6)
        x = np.concatenate([float64(forward[name]).reshape(-1, forward[name].shape[-1]) for forward in forwards])
        if every_row:
            check_statistics(one, x, ours[name].dtype)
        rms, spread = np.sqrt(np.mean(x**2, axis=0)), x.std(axis=0)
        assert np.all(np.abs(one.mean - x.mean(axis=0)) <= 1e-6 * rms), name
        assert np.all(np.abs(one.std - spread) <= 1e-5 * spread + 1e-7 * rms), name


@pytest.mark.parametrize("dtype", list(MLX_DTYPES))
def test_every_value_is_seen(dtype: str) -> None:
    forwards = [in_type(activations(rows, seed), dtype) for seed, rows in enumerate((3, 3, 1))]
    check_alike(CudaObserver(1), MlxObserver(1), forwards, every_row=True)


@pytest.mark.parametrize("stride", [7, 1000])
def test_the_same_rows_are_sampled(stride: int) -> None:
    forwards = [in_type(activations(rows, seed), "bfloat16") for seed, rows in enumerate((2, 2, 1))]
    check_alike(CudaObserver(stride), MlxObserver(stride), forwards, every_row=False)


def test_more_taps_than_a_launch_takes(emulator: Emulator) -> None:
    """Every change of type begins a launch, and so does a full one."""
    random = np.random.RandomState(0)
    dtypes = [*["float16"] * (cuda_launch.TAPS + 3), "float32", "float32", "float16", "bfloat16"]
    forwards = [
        {f"{i}": array(random, rows, 4 + i % 3, 8 + i).astype(MLX_DTYPES[dtype]) for i, dtype in enumerate(dtypes)}
        for rows in (2, 2)
    ]
    check_alike(CudaObserver(1), MlxObserver(1), forwards, every_row=True)
    assert emulator.launches == 2 * (5 * 2 + 2), "two kernels over each of five groups, two over all"


def test_counters_are_emptied_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.RandomState(0)
    forwards = [{"x": array(random, 2, 30, 16), "y": array(random, 2, 1, 8)} for _ in range(4)]
    monkeypatch.setattr(observer_cuda, "MOST_COUNTS", 2 * 960)
    emptied = 0
    empty = CudaObserver._empty_counters

    def counted(observer: CudaObserver) -> None:
        nonlocal emptied
        emptied += 1
        empty(observer)

    monkeypatch.setattr(CudaObserver, "_empty_counters", counted)
    check_alike(CudaObserver(1), MlxObserver(1), forwards, every_row=True)
    assert emptied >= 2, "in between, and in the end"


@pytest.mark.parametrize("most", [256, 32])
def test_tokens_may_be_shared_out_in_any_way(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(cuda_launch, "MOST_TOKENS", most)
    random = np.random.RandomState(0)
    forwards = [{"x": array(random, rows, 700, 40, mean=100, spread=0.1)} for rows in (2, 1)]
    check_alike(CudaObserver(1), MlxObserver(1), forwards, every_row=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_value_that_cannot_be_summed(bad: float) -> None:
    values = np.random.RandomState(0).randn(3, 2, 45, 20).astype(np.float32)
    values[1, 1, 44, 19] = bad
    observer = CudaObserver(1)
    watch(observer, [{"good": mx.ones((2, 4, 8)), "x": mx.array(x)} for x in values])
    assert not observer.sound


def test_all_patterns_of_a_type_are_counted() -> None:
    for dtype in ("float16", "bfloat16"):
        bits = np.tile(np.arange(1 << 16, dtype=np.uint32).astype(np.uint16), 2)
        x = mx.array(bits.reshape(2, -1, 32)).view(MLX_DTYPES[dtype])
        found = watch(CudaObserver(1), [{"x": x}])["x"].statistics.histogram
        assert found.counts.tolist() == [2] * len(found.keys)
        assert len(found.keys) == (1 << 16) - 2 * (1 << {"float16": 10, "bfloat16": 7}[dtype]), "all that are finite"


def test_activations_are_passed_on() -> None:
    observer, x = CudaObserver(1), array(np.random.RandomState(0), 2, 5, 8)
    observer.begin(0)
    for i in range(cuda_launch.TAPS + 1):
        observer.see(f"{i}", x)
        assert np.array_equal(np.array(observer.tie(x)), np.array(x))


@pytest.mark.slow
def test_the_self_test_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def observer(stride: int, finite_only: bool = False) -> Observer:
        return MlxObserver(stride, finite_only) if finite_only else CudaObserver(stride)

    monkeypatch.setattr(selftest_collection, "new_observer", observer)
    assert [check for check in selftest_collection.check_collection() if not check.passed] == []
    forget_kernels()
    kernels = cuda_launch.kernels
    monkeypatch.setattr(kernels, "MERGE", kernels.MERGE.replace("2.0 * shift * sum", "1.9 * shift * sum"))
    assert {check.name.rpartition(": ")[2] for check in selftest_collection.check_collection() if not check.passed} == {
        "std"
    }
