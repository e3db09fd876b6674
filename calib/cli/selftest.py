"""Does this device compute what calib relies on? The checks behind ``calib doctor --selftest``.

Three kinds: the shipped model draws two pictures and is compared with stored values; the MLX operations that
collection and quantization rest on are compared with NumPy; collected statistics are compared with float64 ones.

Devices round differently (TF32 products on NVIDIA, other orders of summation), so bounds on floating-point work are
far above rounding and far below what a wrong result gives. Integer work, extremes and counts must be exact: bound 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.activations.bits import DTYPES, count_bits, top_bits
from calib.activations.histogram import BINS, Histogram, ordered_keys
from calib.activations.observer import Observer, Seen
from calib.activations.observer_mlx import first_sampled
from calib.activations.replay import new_observer
from calib.activations.statistics import PERCENTILES
from calib.activations.taps import TapPoint, tapped
from calib.analysis.grid import Grid
from calib.dataset.generate import trajectory
from calib.dataset.sampling import initial_noise
from calib.dataset.settings import SamplerSettings
from calib.models import emoji
from calib.models.model import DiffusionModel
from calib.quantization.packed import Packed

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Stored results of :func:`draw_reference`, made by scripts/make_selftest.py.
REFERENCE = emoji.FOLDER / "selftest.npz"

PROMPTS, SEEDS = ("red apple", "octopus"), (0, 1)
NUM_STEPS, CFG_WEIGHT = 8, 3.0
TAP = "mm_block_1.image.mlp.fc2"
#: Of the forwards that an observer watches here: which tokens are sampled, and every how many.
PHASES, SAMPLING_STRIDE = (12_345, 54_321, 40_000), 7


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
        ("quantized products", check_quantized_products),
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


def disorder(x: mx.array, values: NDArray[Any]) -> float:
    """How many neighbours are out of order when finite ``values`` are sorted by the keys of ``x``."""
    finite = np.isfinite(values)
    keys = ordered_keys(np.array(top_bits(x)))
    ordered = values[finite].astype(np.float64)[np.argsort(keys[finite], kind="stable")]
    return float(np.sum(np.diff(ordered) < 0))


def check_keys() -> Iterator[Check]:
    """The integer keys of histograms are in the order of the values."""
    bits = every_pattern()
    half, brain = mx.array(bits).view(mx.float16), mx.array(bits).view(mx.bfloat16)
    yield Check("order keys of every float16", disorder(half, bits.view(np.float16)), 0)
    yield Check("order keys of every bfloat16", disorder(brain, bfloat16_values(bits)), 0)
    yield Check(
        "order keys are all different", float(BINS - len(np.unique(ordered_keys(np.array(top_bits(brain)))))), 0
    )
    x = random(1 << 16)
    coarse = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    yield Check("order keys of float32", disorder(mx.array(x), coarse), 0)


def check_scatter() -> Iterator[Check]:
    """Counting by scatter-add, which many threads do at once."""
    # Few distinct values, so that threads collide on the same counter.
    index = np.random.RandomState(0).randint(0, 7, 1 << 20).astype(np.uint32)
    counts = mx.zeros((8,), dtype=mx.uint32).at[mx.array(index)].add(mx.array(1, dtype=mx.uint32))
    yield Check("uint32 scatter add, 7 bins", differing(np.array(counts), np.bincount(index, minlength=8)), 0)
    half = random(1 << 20).astype(np.float16)
    counts = count_bits(top_bits(mx.array(half)))
    expected = np.bincount(half.view(np.uint16), minlength=BINS)
    yield Check("uint32 scatter add, 65536 bins", differing(np.array(counts), expected), 0)


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


def check_quantized_products() -> Iterator[Check]:
    """Products with packed weights and 16-bit scales, and the rounding of activations."""
    x, w = random(96, 256), random(192, 256, seed=1)
    for bits in (2, 3, 4, 5, 6, 8):
        worst, failed = 0.0, ""
        for group_size in (32, 64, 128):
            packed = Packed.nearest(mx.array(w), bits, group_size, mx.float16)
            parts = (packed.weight, packed.scales, packed.biases)
            product = mx.quantized_matmul(mx.array(x), *parts, transpose=True, group_size=group_size, bits=bits)
            expected = x.astype(np.float64) @ np.array(packed.dequantize()).astype(np.float64).T
            try:
                worst = max(worst, relative(np.array(product.astype(mx.float32)), expected))
            except RuntimeError as error:  # other widths may run
                worst, failed = (
                    float("inf"),
                    f"groups of {group_size}: {error}; evaluation.dequantize=true does without",
                )
        yield Check(f"product with {bits}-bit weights, groups of 32, 64, 128", worst, 5e-3, failed)
    wide = x.astype(np.float64)
    for bits in (4, 6, 8):
        grid = Grid.over(-2.0, 3.0, bits)
        difference = np.abs(np.array(grid.apply_mx(mx.array(x))) - grid.apply(wide)) / grid.step
        # a value on the edge between two steps may fall to either side
        yield Check(f"activations at {bits} bits (rms, steps)", float(np.sqrt(np.mean(difference**2))), 5e-2)


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


def watch(observer: Observer, forwards: Sequence[Mapping[str, mx.array]]) -> dict[str, Seen]:
    """What ``observer`` says of the activations of several ``forwards``, each by tap."""
    for number, activations in enumerate(forwards):
        observer.begin(PHASES[number % len(PHASES)])
        for name, x in activations.items():
            observer.see(name, x)
            x = observer.tie(x)
        mx.eval(observer.end_forward(), x)
        observer.settle()
    return observer.results()


def on_host(x: mx.array) -> NDArray[np.float64]:
    """The values of ``x`` (rows, …, channels) as (rows, tokens, channels)."""
    values = np.array(x.astype(mx.float32)).astype(np.float64)
    return values.reshape(len(values), -1, values.shape[-1])


def compare(label: str, seen: Seen, parts: Sequence[NDArray[np.float64]], exact: bool) -> Iterator[Check]:
    """What was seen against the float64 values of each forward (rows, tokens, channels).

    ``exact``: the histogram has every value's own bin, as those of 16-bit types do.
    """
    statistics = seen.statistics
    values = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    spread = values.std(axis=0)
    wrong = differing(statistics.minimum, values.min(axis=0)) + differing(statistics.maximum, values.max(axis=0))
    rows = np.array([[row.min(), row.max()] for part in parts for row in part])
    wrong += differing(statistics.count, len(values)) + differing(seen.ranges[:, :2], rows)
    yield Check(f"{label}: min, max, count", wrong, 0)
    yield Check(f"{label}: mean (of std)", float(np.max(np.abs(statistics.mean - values.mean(axis=0)) / spread)), 1e-4)
    yield Check(f"{label}: std", float(np.max(np.abs(statistics.std / spread - 1))), 1e-4)
    expected = np.percentile(values, list(PERCENTILES.values()))
    error = np.abs(list(statistics.percentiles().values()) - expected) / (np.abs(expected) + 1e-3 * spread.mean())
    # float32 is read at the middle of bins of the top 16 bits, 16-bit floats are exact
    yield Check(f"{label}: percentiles", float(error.max()), 1e-6 if exact else 2**-8)


def check_collection() -> Iterator[Check]:
    """What observes activations on this device: made-up ones of every type, in several forwards, the last a short one.

    Per type three taps: one whose mean is large against the spread, where plain sums of squares fail, and whose
    channels eight do not divide; one that is a slice along the tokens of a longer array; and one without tokens.
    """
    forwards: list[dict[str, mx.array]] = []
    for number, rows in enumerate((4, 4, 2)):
        large = mx.array(30 + 0.1 * random(rows, 300, 1, 60, seed=number))
        longer = mx.array(random(rows, 90, 1, 128, seed=10 + number))
        single = mx.array(random(rows, 1, 1, 72, seed=20 + number))
        forwards.append({})
        for dtype, name in DTYPES.items():
            sliced = longer.astype(dtype)[:, 13:75]
            forwards[-1] |= {name: large.astype(dtype), f"{name} slice": sliced, f"{name} row": single.astype(dtype)}
    observer = new_observer(1)
    seen, sampled = watch(observer, forwards), watch(new_observer(SAMPLING_STRIDE), forwards)
    yield Check("collection: finite values are taken for such", float(not observer.sound), 0)
    for name in forwards[0]:
        arrays = [activations[name] for activations in forwards]
        yield from compare(f"collection, {name}", seen[name], [on_host(x) for x in arrays], "float32" not in name)
        expected, found = counted_by_numpy(arrays), sampled[name].statistics.histogram
        same = np.array_equal(found.keys, expected.keys) and np.array_equal(found.counts, expected.counts)
        yield Check(f"collection, {name}: sampled histogram", float(not same), 0)
    yield from check_non_finite()


def counted_by_numpy(arrays: Sequence[mx.array]) -> Histogram:
    """The histogram of every SAMPLING_STRIDE-th token of each forward's ``arrays``, or of all where there is one."""
    counts = np.zeros(BINS, np.int64)
    for number, x in enumerate(arrays):
        wide = x.dtype == mx.float32
        bits = np.array(x).view(np.uint32) >> 16 if wide else np.array(x.view(mx.uint16))
        tokens = bits.reshape(-1, bits.shape[-1])
        if len(tokens) > len(x):
            tokens = tokens[first_sampled(len(tokens), SAMPLING_STRIDE, PHASES[number]) :: SAMPLING_STRIDE]
        counts += np.bincount(tokens.ravel(), minlength=BINS)
    return Histogram.from_counts(counts, DTYPES[arrays[0].dtype])


def check_non_finite() -> Iterator[Check]:
    """NaN and infinities are noticed by the fast observer, and left out and counted by the careful one."""
    spoiled = random(2, 250, 8)
    spoiled[0, 3, 1], spoiled[1, 4, 2], spoiled[1, 5, 2] = np.nan, np.inf, -np.inf
    for dtype, name in DTYPES.items():
        x = mx.array(spoiled).astype(dtype)
        fast, careful = new_observer(1), new_observer(1, finite_only=True)
        watch(fast, [{"x": x}])
        yield Check(f"collection, {name}: NaN and inf are noticed", float(fast.sound), 0)
        found = watch(careful, [{"x": x}])["x"].statistics
        values = on_host(x).reshape(-1, 8)
        values[~np.isfinite(values)] = np.nan
        counts = [found.nan, found.inf, *found.count.tolist(), found.histogram.total]
        wrong = differing(counts, [1, 2, 500, 499, 498, *[500] * 5, 3997])
        wrong += differing(found.minimum, np.nanmin(values, axis=0))
        wrong += differing(found.maximum, np.nanmax(values, axis=0))
        yield Check(f"collection, {name}: NaN and inf counted apart", wrong, 0)
        error = np.maximum(abs(found.mean - np.nanmean(values, axis=0)), abs(found.std - np.nanstd(values, axis=0)))
        yield Check(f"collection, {name}: mean and std without them", float(error.max()), 1e-4)


def check_real_activations() -> Iterator[Check]:
    """One layer's input in two forwards of the shipped model: what is collected, against what went by."""
    model = emoji.load()
    passed: list[mx.array] = []

    def record(name: str, activation: mx.array) -> mx.array:
        passed.append(activation)
        return activation

    text = model.encode(PROMPTS, CFG_WEIGHT)
    x = mx.stack([initial_noise(seed, model.latent_shape) for seed in SEEDS])
    with tapped(model.architecture, [TapPoint(TAP, "post-gelu")], record):
        for timestep in (500.0, 100.0):
            mx.eval(model.denoise(x, mx.array(timestep), mx.array(timestep / 1000), text, CFG_WEIGHT))
    seen = watch(new_observer(1), [{TAP: activation} for activation in passed])[TAP]
    yield from compare(f"collection, {TAP}", seen, [on_host(activation) for activation in passed], exact=False)
