"""Does this device compute what calib relies on? The checks behind ``calib doctor --selftest``.

Three kinds: the shipped model draws two pictures and is compared with stored values; the MLX operations that
collection and quantization rest on are compared with NumPy; collected statistics are compared with float64 ones.

Devices round differently (TF32 products on NVIDIA, other orders of summation), so bounds on floating-point work are
far above rounding and far below what a wrong result gives. Integer work, extremes and counts must be exact: bound 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.activations.histogram import DTYPES, count_keys, ordered_keys
from calib.activations.statistics import PERCENTILES, Statistics, summarize
from calib.activations.taps import TapPoint, tapped
from calib.dataset.generate import trajectory
from calib.dataset.settings import SamplerSettings
from calib.models import emoji
from calib.models.model import DiffusionModel
from calib.sampling import initial_noise

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Stored results of :func:`draw_reference`, made by scripts/make_selftest.py.
REFERENCE = emoji.FOLDER / "selftest.npz"

PROMPTS, SEEDS = ("red apple", "octopus"), (0, 1)
NUM_STEPS, CFG_WEIGHT = 8, 3.0
TAP = "mm_block_1.image.mlp.fc2"


@dataclass(frozen=True)
class Check:
    """One result: ``error`` must not exceed ``bound``; ``note`` says what went wrong where there is no number."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN


def run() -> list[Check]:
    """All checks, in order. One that raises is reported as failed, and the others go on."""
    groups: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("sampling", check_sampling),
        ("16-bit views", check_views),
        ("order keys", check_keys),
        ("scatter add", check_scatter),
        ("reductions", check_reductions),
        ("quantize", check_quantize),
        ("products", check_products),
        ("collection", check_collection),
        ("collection, real activations", check_real_activations),
    )
    results: list[Check] = []
    for name, group in groups:
        try:
            results.extend(group())
        except Exception as error:  # the report must say which operation the device lacks
            results.append(Check(name, float("inf"), 0.0, f"{type(error).__name__}: {error}".splitlines()[0]))
    return results


def relative(measured: Any, expected: Any) -> float:
    """Largest absolute difference over the rms of ``expected``."""
    a, b = np.asarray(measured, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(a - b)) / np.sqrt(np.mean(b**2)))


def differing(measured: Any, expected: Any) -> float:
    """How many elements differ, NaNs at the same place counting as equal."""
    return float(np.sum(~np.isclose(measured, expected, rtol=0, atol=0, equal_nan=True)))


def draw_reference(model: DiffusionModel) -> dict[str, NDArray[np.float32]]:
    """A selection of values of two drawn pictures: final latents, and pixels in [0, 1].

    The strides share no factor with the arrays' widths, so that every channel and place is represented.
    """
    settings = SamplerSettings(num_steps=NUM_STEPS, cfg_weight=CFG_WEIGHT)
    *_, final = trajectory(model, PROMPTS, SEEDS, settings)
    latents, pixels = np.array(final.x), np.array(model.decode(final.x))
    return {"latents": latents.reshape(-1)[::17], "pixels": pixels.reshape(-1)[::53]}


def check_sampling() -> Iterator[Check]:
    """The whole model: text encoder, transformer, sampler and decoder, against the stored values.

    On a CPU, computing all of the transformer in float16 (as coarse as TF32) gives an error of 0.01 in the latents;
    bfloat16 gives 0.08, weights rounded to 8 bits 0.05.
    """
    model = emoji.load()
    with np.load(REFERENCE) as stored:
        same = str(stored["fingerprint"]) == model.fingerprint
        yield Check("model: fingerprint of the weights", float(not same), 0.0, "" if same else "other weights")
        drawn = draw_reference(model)
        label = f"sampling: {len(PROMPTS)} pictures, {NUM_STEPS} steps, CFG {CFG_WEIGHT:g}"
        yield Check(f"{label}, latents", relative(drawn["latents"], stored["latents"]), 2e-2)
        yield Check(f"{label}, pixels", relative(drawn["pixels"], stored["pixels"]), 2e-2)


def every_pattern() -> NDArray[np.uint16]:
    """All 16-bit patterns, (65536,)."""
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def bfloat16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """What bfloat16 ``bits`` stand for; NumPy has no such type."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Standard normal values."""
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def check_views() -> Iterator[Check]:
    """Bit patterns of floats, and the rounding that makes 16-bit ones."""
    x = random(64, 128)
    x += np.copysign(np.float32(0.01), x)  # denormals are not at issue here
    yield Check("view float32 as uint16", differing(np.array(mx.array(x).view(mx.uint16)), x.view(np.uint16)), 0)
    half = x.astype(np.float16).view(np.uint16)
    yield Check(
        "round to float16, view as uint16", differing(np.array(mx.array(x).astype(mx.float16).view(mx.uint16)), half), 0
    )
    wide = x.view(np.uint32)
    brain = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    yield Check(
        "round to bfloat16, view as uint16",
        differing(np.array(mx.array(x).astype(mx.bfloat16).view(mx.uint16)), brain),
        0,
    )


def disorder(keys: mx.array, values: NDArray[Any]) -> float:
    """How many neighbours are out of order when finite ``values`` are sorted by ``keys``."""
    finite = np.isfinite(values)
    ordered = values[finite].astype(np.float64)[np.argsort(np.array(keys)[finite], kind="stable")]
    return float(np.sum(np.diff(ordered) < 0))


def check_keys() -> Iterator[Check]:
    """The integer keys of histograms are in the order of the values."""
    bits = every_pattern()
    keys = ordered_keys(mx.array(bits).view(mx.float16))
    yield Check("order keys of every float16", disorder(keys, bits.view(np.float16)), 0)
    keys = ordered_keys(mx.array(bits).view(mx.bfloat16))
    yield Check("order keys of every bfloat16", disorder(keys, bfloat16_values(bits)), 0)
    yield Check("order keys are all different", float((1 << 16) - len(np.unique(np.array(keys)))), 0)
    x = random(1 << 16)
    coarse = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    yield Check("order keys of float32", disorder(ordered_keys(mx.array(x)), coarse), 0)


def check_scatter() -> Iterator[Check]:
    """Counting by scatter-add, which many threads do at once."""
    # Few distinct values, so that threads collide on the same counter.
    index = np.random.RandomState(0).randint(0, 7, 1 << 20).astype(np.uint32)
    counts = mx.zeros((8,), dtype=mx.uint32).at[mx.array(index)].add(mx.array(1, dtype=mx.uint32))
    yield Check("uint32 scatter add, 7 bins", differing(np.array(counts), np.bincount(index, minlength=8)), 0)
    half = random(1 << 20).astype(np.float16)
    bits = half.view(np.uint16).astype(np.uint32)
    keys = np.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)
    counts = count_keys(mx.array(half))
    yield Check("uint32 scatter add, 65536 bins", differing(np.array(counts), np.bincount(keys, minlength=1 << 16)), 0)


def check_reductions() -> Iterator[Check]:
    """Per-channel extremes and sums."""
    x = random(5000, 96) + 3
    y = mx.array(x)
    yield Check("min over rows", differing(np.array(mx.min(y, axis=0)), x.min(axis=0)), 0)
    yield Check("max over rows", differing(np.array(mx.max(y, axis=0)), x.max(axis=0)), 0)
    yield Check("sum over rows", relative(np.array(mx.sum(y, axis=0)), x.astype(np.float64).sum(axis=0)), 1e-4)


def rounded(w: NDArray[np.float32], bits: int, group_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """MLX's affine quantization of ``w``, undone again, and the step at each value, in NumPy.

    The method of mlx/backend/cpu/quantized.cpp: the end of a group's range that is farther from zero, and zero itself,
    are kept exact.
    """
    levels = 2**bits - 1
    groups = w.reshape(-1, group_size)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / levels, np.float32(1e-7)) * np.where(below, 1, -1).astype(np.float32)
    edge = np.where(below, low, high)
    zero = np.rint(edge / scale)
    exact = zero != 0
    scale = np.where(exact, edge / np.where(exact, zero, 1), scale)
    bias = np.where(exact, edge, 0)
    q = np.clip(np.rint((groups - bias) / scale), 0, levels)
    steps = np.broadcast_to(np.abs(scale), groups.shape)
    return (q * scale + bias).reshape(w.shape).astype(np.float32), steps.reshape(w.shape).astype(np.float32)


def check_quantize() -> Iterator[Check]:
    """Rounding weights and restoring them, at every bit-width and group size that plans use."""
    w = random(128, 512)
    for bits in (2, 3, 4, 5, 6, 8):
        worst = 0.0
        for group_size in (32, 64, 128):
            packed = mx.quantize(mx.array(w), group_size=group_size, bits=bits)
            restored = np.array(mx.dequantize(*packed, group_size=group_size, bits=bits))
            expected, steps = rounded(w, bits, group_size)
            # rms in units of the step: a value on the edge between two steps may fall to either side
            worst = max(worst, float(np.sqrt(np.mean(((restored - expected) / steps) ** 2))))
        yield Check(f"quantize {bits} bits, groups of 32, 64, 128 (steps)", worst, 5e-2)


def check_products() -> Iterator[Check]:
    """Matrix product, layer norm and attention; NVIDIA devices round the factors of products to TF32."""
    a, b = random(192, 256), random(256, 320, seed=1)
    product = np.array(mx.array(a) @ mx.array(b))
    yield Check("matrix product", relative(product, a.astype(np.float64) @ b), 5e-3)
    x = random(64, 256) + 1
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(axis=1, keepdims=True)) / np.sqrt(wide.var(axis=1, keepdims=True) + 1e-6)
    yield Check("layer norm", relative(np.array(mx.fast.layer_norm(mx.array(x), None, None, 1e-6)), expected), 1e-4)
    q, k, v = (random(2, 4, 80, 64, seed=i) for i in range(3))
    logits = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / 8
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ v.astype(np.float64)
    output = mx.fast.scaled_dot_product_attention(mx.array(q), mx.array(k), mx.array(v), scale=1 / 8)
    yield Check("scaled dot product attention", relative(np.array(output), expected), 1e-2)


def gather(x: mx.array, parts: int) -> Statistics:
    """Statistics of all rows of ``x`` (rows, channels), computed in ``parts`` and merged."""
    summaries = [summarize(part) for part in mx.split(x, parts)]
    mx.eval(summaries)
    first, *others = [Statistics.from_summary(summary, x.dtype) for summary in summaries]
    for other in others:
        first = first.merge(other)
    return first


def compare(label: str, statistics: Statistics, values: NDArray[np.float64], dtype: mx.Dtype) -> Iterator[Check]:
    """Statistics against the float64 ``values`` (rows, channels) that they are of."""
    spread = values.std(axis=0)
    exact = differing(statistics.minimum, values.min(axis=0)) + differing(statistics.maximum, values.max(axis=0))
    yield Check(f"{label}: min, max, count", exact + differing(statistics.count, len(values)), 0)
    yield Check(f"{label}: mean (of std)", float(np.max(np.abs(statistics.mean - values.mean(axis=0)) / spread)), 1e-3)
    yield Check(f"{label}: std", float(np.max(np.abs(statistics.std / spread - 1))), 1e-3)
    expected = np.percentile(values, list(PERCENTILES.values()))
    error = np.abs(list(statistics.percentiles().values()) - expected) / (np.abs(expected) + 1e-3 * spread.mean())
    # float32 is read at the middle of bins of the top 16 bits, 16-bit floats are exact
    yield Check(f"{label}: percentiles", float(error.max()), 2**-8 if dtype == mx.float32 else 1e-6)


def check_collection() -> Iterator[Check]:
    """Statistics of random data in every activation type, computed in parts and merged."""
    # A mean that is large against the spread is where plain sums of squares fail.
    data = mx.array(3 + 0.1 * random(6000, 64))
    for dtype, name in DTYPES.items():
        x = data.astype(dtype)
        values = np.array(x.astype(mx.float32)).astype(np.float64)
        yield from compare(f"collection, {name}", gather(x, 3), values, dtype)
    spoiled = random(500, 8)
    spoiled[3, 1], spoiled[4, 2], spoiled[5, 2] = np.nan, np.inf, -np.inf
    summary = summarize(mx.array(spoiled), finite_only=True)
    statistics = Statistics.from_summary(summary, mx.float32)
    counts = [statistics.nan, statistics.inf, *statistics.count.tolist(), statistics.histogram.total]
    yield Check("collection: NaN and inf counted apart", differing(counts, [1, 2, 500, 499, 498, *[500] * 5, 3997]), 0)


def check_real_activations() -> Iterator[Check]:
    """One layer's input in one forward of the shipped model: what is collected, against what went by."""
    model = emoji.load()
    seen: list[mx.array] = []
    text = model.encode(PROMPTS, CFG_WEIGHT)
    x = mx.stack([initial_noise(seed, model.latent_shape) for seed in SEEDS])
    with tapped(model.transformer, [TapPoint(TAP, "post-gelu")], lambda _, activation: seen.append(activation)):
        mx.eval(model.denoise(x, mx.array(500.0), mx.array(0.5), text, CFG_WEIGHT))
    rows = seen[0].reshape(-1, seen[0].shape[-1])
    yield from compare(f"collection, {TAP}", gather(rows, 2), np.array(rows).astype(np.float64), rows.dtype)
