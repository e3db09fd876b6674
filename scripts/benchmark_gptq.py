"""Time of quantizer=gptq by parts, of layers of Z-Image's shapes with random weights and states.

    python scripts/benchmark_gptq.py                                             # on a GPU: under two minutes
    python scripts/benchmark_gptq.py --heads 4 --columns 512 1408 --size 64 --states 2       # the same, in small

First factorisations alone, by the number of columns: on this device in float32, and as before on the host in float64.
The error is that of U (H + λI) Uᵀ = I, times random vectors, relative. Then ``gptq`` as it is, on a transformer of few
blocks: every part waits for the device, and a second run of the same is the one that counts. The last column multiplies
by the number of blocks, what precedes and follows them too.
"""

import calib  # isort: skip  (it sees to it that a fast BLAS is loaded before MLX)

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from calib.activations.batches import Batch, StoredStates
from calib.analysis.plan import LayerPlan
from calib.base.device import device_name
from calib.models import emoji
from calib.models.architecture import Conditioning
from calib.models.mflux.zimage import FAMILY
from calib.models.model import DiffusionModel
from calib.quantization import curvature, gptq, strips
from calib.quantization.quantizer import QuantizerInput
from calib.quantization.replays import Replays

import mlx.core as mx
import numpy as np
from mlx import nn
from standin_mflux import ZIMAGE

assert calib.__version__

BLOCKS, TEXT = 34, 32
#: What is timed, and where ``gptq`` calls it; the time of a part within another counts for the inner one.
PARTS = {
    "replays, and Hessians summed": (gptq, "gather_hessians"),
    "Hessians put together": (strips, "whole"),
    "factorisation: products": (strips, "inverse_factor"),
    "factorisation: the rest": (gptq, "curvature_of"),
    "grids searched": (gptq, "searched"),
    "columns": (gptq, "gptq_layers"),
}


def synchronized(result: Any) -> Any:
    """``result``, once the device has nothing to do."""
    mx.synchronize()
    return result


def hessian(columns: int) -> mx.array:
    """Of correlated inputs of uneven widths, fewer than there are columns."""
    mx.random.seed(columns)
    x = (mx.random.normal((columns // 2, columns)) + 0.5) * mx.exp(mx.random.normal((columns,)))
    found = strips.whole(strips.plus_squares(strips.zeros(columns), x, x))
    return found / mx.diag(found).mean()


def error_of(inverse: Sequence[mx.array], full: mx.array, damping: float) -> float:
    """Of R⁻¹ (H + λI) R⁻ᵀ = I on some vectors, in float64."""
    wide, columns = np.array(full).astype(np.float64), len(full)
    v = np.random.RandomState(0).randn(columns, 4)
    own = [np.array(strip).astype(np.float64) for strip in inverse]
    turned = np.zeros_like(v)
    for strip, (first, last) in zip(own, strips.bounds(columns), strict=True):
        turned[:last] += strip.T @ v[first:last]
    turned = wide @ turned + damping * turned
    found = np.concatenate([strip @ turned[: strip.shape[1]] for strip in own])
    return float(np.linalg.norm(found - v) / np.linalg.norm(v))


def factorisations(columns: Sequence[int], damping: float, times: int) -> None:
    print(f"| columns | factorisation, λ = {damping} | s | error |\n|---|---|---|---|")
    for n in columns:
        full, order = hessian(n), np.arange(n)
        mx.eval(full)
        ways: dict[str, Callable[[], list[mx.array] | None]] = {
            "float32": lambda full=full, order=order: curvature._in_float32(full, order, damping),
            "float64, on the host": lambda full=full, order=order: curvature._in_float64(full, order, damping),
        }
        plain, rounds = "float32, factors as the device rounds them", strips.rounds_factors()
        if rounds:
            ways[plain] = ways["float32"]
        for name, way in ways.items():
            for _ in range(1 if "host" in name else times):
                with mock.patch.object(strips, "rounds_factors", lambda on=rounds and name != plain: on):
                    start = time.perf_counter()
                    inverse = synchronized(way())
                    seconds = time.perf_counter() - start
                error = "not positive definite" if inverse is None else f"{error_of(inverse, full, damping):.1e}"
                print(f"| {n} | {name} | {seconds:.2f} | {error} |", flush=True)
        start = time.perf_counter()
        for first, last in strips.bounds(n):
            lower = mx.linalg.cholesky(full[first:last, first:last] + damping * mx.eye(last - first), stream=mx.cpu)
            mx.eval(mx.linalg.tri_inv(lower, stream=mx.cpu))
        print(f"| {n} | of it: diagonal blocks, on the host | {time.perf_counter() - start:.2f} | |", flush=True)


class RandomStates:
    """Random states with random texts, in batches, in place of a dataset's."""

    manifest = SimpleNamespace(cfg_weight=0.0)

    def __init__(self, size: int, states: int, batch: int, width: int):
        self._shape, self._count, self._width = (batch, size // 8, size // 8, 16), -(-states // batch), width

    def batches(self, model: DiffusionModel, size: int, mixed: bool) -> list[Callable[[], Batch]]:
        return [partial(self._batch, seed) for seed in range(self._count)]

    def _batch(self, seed: int) -> Batch:
        rows, keys = self._shape[0], mx.random.split(mx.random.key(seed))
        x = mx.random.normal(self._shape, key=keys[0]).astype(mx.bfloat16)
        text = mx.random.normal((rows, TEXT, self._width), key=keys[1]).astype(mx.bfloat16)
        mx.eval(x, text)
        return Batch(tuple(range(rows)), (0,) * rows, x, Conditioning(text), mx.array([0.5]))


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds by part, while the context lasts."""
    seconds: dict[str, float] = defaultdict(float)
    inner = [0.0]

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            mx.synchronize()
            inner.append(0.0)
            start = time.perf_counter()
            result = synchronized(function(*arguments, **keywords))
            whole = time.perf_counter() - start
            seconds[name] += whole - inner.pop()
            inner[-1] += whole
            return result

        return run

    with ExitStack() as stack:
        for name, (module, function) in PARTS.items():
            own = wrapped(name, getattr(module, function))
            stack.enter_context(mock.patch.object(module, function, own))
        yield seconds


def whole(heads: int, layers: int, size: int, states: int, batch: int, damping: float) -> None:
    about = {name: ZIMAGE.transformer[name] for name in FAMILY.sizes.values()}
    width = about["cap_feat_dim"]
    own = FAMILY.architecture(
        {**about, "n_layers": layers, "n_refiner_layers": 1, "n_heads": heads, "dim": 128 * heads}
    )
    own.module.set_dtype(mx.bfloat16)
    mx.eval(own.module.parameters())
    linear = {name: layer for name, layer in own.layers().items() if isinstance(layer, nn.Linear)}
    linear = {name: layer for name, layer in linear.items() if layer.weight.shape[1] % 64 == 0}
    plan = {name: LayerPlan(4, 16) for name in linear}
    model = replace(emoji.load(), architecture=own, latent_shape=(size // 8, size // 8, 16), dtype=mx.bfloat16)
    random = cast(StoredStates, RandomStates(size, states, batch, width))  # all of it that replays use
    for _ in range(2):
        replays = Replays(model, lambda: random)
        work = QuantizerInput(own, linear, plan, mx.bfloat16, replays, replays.batches, lambda _: None, lambda *_: None)
        mx.reset_peak_memory()
        with timed() as seconds:
            start = time.perf_counter()
            gptq.quantize(work, damping)
            total = time.perf_counter() - start
    blocks = len(own.blocks())
    seconds["losses, and the rest"] = total - sum(seconds.values())
    print(f"\n| {len(linear)} layers in {blocks} blocks, {states} states of {size} px | s | of {BLOCKS} blocks, s |")
    print("|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value * BLOCKS / blocks:.0f} |")
    print(f"| all, peak memory {mx.get_peak_memory() / 1e9:.2f} GB | {total:.2f} | {total * BLOCKS / blocks:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="*", default=[3840, 10240], help="of the factorisations alone")
    parser.add_argument("--damping", type=float, default=1.0)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--heads", type=int, default=30, help="of 128 channels")
    parser.add_argument("--layers", type=int, default=1, help="blocks beside two refiners; 0: factorisations alone")
    parser.add_argument("--size", type=int, default=512, help="of a picture, pixels")
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--strip", type=int, default=strips.STRIP, help="rows of a strip, a multiple of 128")
    given = parser.parse_args()
    strips.STRIP = given.strip
    print(f"{device_name()}; rounds the factors of products: {strips.rounds_factors()}\n")
    factorisations(given.columns, given.damping, given.times)
    if given.layers:
        whole(given.heads, given.layers, given.size, given.states, min(given.batch, given.states), given.damping)


if __name__ == "__main__":
    main()
