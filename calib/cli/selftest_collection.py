"""Self-test of collection: statistics of this device's observers, compared with NumPy's in float64."""

from collections.abc import Iterator, Mapping, Sequence

from calib.activations.bits import DTYPES
from calib.activations.histogram import BINS, Histogram
from calib.activations.observer import Observer, TapResult
from calib.activations.observer_mlx import first_sampled
from calib.activations.replay import new_observer
from calib.activations.statistics import PERCENTILES
from calib.activations.taps import TapPoint, tapped
from calib.cli.selftest_check import Check, differing, normal
from calib.cli.selftest_model import CFG_WEIGHT, PROMPTS, SEEDS
from calib.dataset.sampling import initial_noise
from calib.models import emoji

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

TAP = "mm_block_1.image.mlp.fc2"
#: Phases of the observed forward passes, which shift the sampled tokens, and the sampling stride.
PHASES, SAMPLING_STRIDE = (12_345, 54_321, 40_000), 7


def observe_forwards(observer: Observer, forwards: Sequence[Mapping[str, mx.array]]) -> dict[str, TapResult]:
    """Statistics by ``observer`` of the activations of several ``forwards``, each given by tap."""
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


def compare_statistics(
    label: str, seen: TapResult, parts: Sequence[NDArray[np.float64]], exact: bool
) -> Iterator[Check]:
    """Compare statistics with the float64 values of each forward pass (rows, tokens, channels).

    ``exact``: every value has its own bin in the histogram, as for 16-bit types.
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
    # float32 is read at the midpoint of bins of the top 16 bits, 16-bit floats are exact
    yield Check(f"{label}: percentiles", float(error.max()), 1e-6 if exact else 2**-8)


def check_collection() -> Iterator[Check]:
    """Check this device's observer on random activations of every type, in several forward passes, the last shorter.

    Three taps per type: one with a mean that is large relative to the spread, where plain sums of squares fail, and
    with a number of channels that is no multiple of 8; one that is a slice along the tokens of a longer array; and one
    without tokens.
    """
    forwards: list[dict[str, mx.array]] = []
    for number, rows in enumerate((4, 4, 2)):
        large = mx.array(30 + 0.1 * normal(rows, 300, 1, 60, seed=number))
        longer = mx.array(normal(rows, 90, 1, 128, seed=10 + number))
        single = mx.array(normal(rows, 1, 1, 72, seed=20 + number))
        forwards.append({})
        for dtype, name in DTYPES.items():
            sliced = longer.astype(dtype)[:, 13:75]
            forwards[-1] |= {name: large.astype(dtype), f"{name} slice": sliced, f"{name} row": single.astype(dtype)}
    observer = new_observer(1)
    seen, sampled = observe_forwards(observer, forwards), observe_forwards(new_observer(SAMPLING_STRIDE), forwards)
    yield Check("collection: finite values are taken for such", float(not observer.sound), 0)
    for name in forwards[0]:
        arrays = [activations[name] for activations in forwards]
        yield from compare_statistics(
            f"collection, {name}", seen[name], [on_host(x) for x in arrays], "float32" not in name
        )
        expected, found = counted_by_numpy(arrays), sampled[name].statistics.histogram
        same = np.array_equal(found.keys, expected.keys) and np.array_equal(found.counts, expected.counts)
        yield Check(f"collection, {name}: sampled histogram", float(not same), 0)
    yield from check_non_finite()


def counted_by_numpy(arrays: Sequence[mx.array]) -> Histogram:
    """Histogram of every SAMPLING_STRIDE-th token of ``arrays``, one per forward pass; of all rows with one token."""
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
    """Check that the fast observer detects NaN and infinity, and that the other leaves them out and counts them."""
    spoiled = normal(2, 250, 8)
    spoiled[0, 3, 1], spoiled[1, 4, 2], spoiled[1, 5, 2] = np.nan, np.inf, -np.inf
    for dtype, name in DTYPES.items():
        x = mx.array(spoiled).astype(dtype)
        fast, careful = new_observer(1), new_observer(1, finite_only=True)
        observe_forwards(fast, [{"x": x}])
        yield Check(f"collection, {name}: NaN and inf are noticed", float(fast.sound), 0)
        found = observe_forwards(careful, [{"x": x}])["x"].statistics
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
    """Compare the statistics of one layer's input in two forward passes of the shipped model with its values."""
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
    seen = observe_forwards(new_observer(1), [{TAP: activation} for activation in passed])[TAP]
    yield from compare_statistics(
        f"collection, {TAP}", seen, [on_host(activation) for activation in passed], exact=False
    )
