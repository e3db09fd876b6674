"""Metrics of paired fidelity: compare pictures and outputs of a changed model with those of the full-precision one.

Everything is computed in float64. Pictures are (height, width, 3) in [0, 1].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calib.base.errors import CalibError
from calib.base.seeds import generator

import numpy as np
from numpy.typing import NDArray

#: The PSNR of rounding to 16 bits, 10·log10(12·65535²) dB. Higher values are averaged as this one, so that equal
#: pictures (infinite PSNR) have a finite mean. It is high enough to affect equal pictures only: drawing in another
#: batch size already differs by 1e-5 (100 dB).
MOST_PSNR = 10 * math.log10(12 * 65535**2)

#: Confidence level of intervals.
LEVEL = 0.95
RESAMPLES = 10_000
#: Number of prompts below which a 95% interval covers the mean of normal values in less than 89% of cases: the
#: percentile bootstrap treats σ as known, and underestimates it by the factor √(1 - 1/prompts).
FEW_PROMPTS = 8

WINDOW, WINDOW_SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03

#: Relative squared errors below this, the square of float32 rounding, count as none.
NO_ERROR = 2.0**-48


def psnr(reference: NDArray[Any], image: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two pictures, dB, with a peak of 1; inf where they are equal."""
    reference, image = _pair(reference, image)
    mse = float(np.mean((reference - image) ** 2))
    return -10 * math.log10(mse) if mse else math.inf


def ssim(reference: NDArray[Any], image: NDArray[Any]) -> float:
    """Structural similarity of two pictures, 1 where they are equal (Wang et al. 2004, IEEE TIP 13(4), eq. 13 to 17).

    As in the paper: 11×11 Gaussian window of σ 1.5 and sum 1, K1 = 0.01, K2 = 0.03, data range 1; variances and
    covariance are those of the weighted window, Σ w (x - μ_x)(y - μ_y), without the n/(n - 1) of a sample. Only windows
    within the picture count, which is not downsampled first, as in some implementations. The paper has grey pictures;
    this is the mean over channels. scikit-image's ``structural_similarity`` with gaussian_weights=True and
    use_sample_covariance=False gives the same.
    """
    x, y = _pair(reference, image)
    if min(x.shape[:2]) < WINDOW:
        raise ValueError(f"pictures of {x.shape[1]}×{x.shape[0]} are smaller than SSIM's window of {WINDOW}")
    # Each by itself, as that takes a dozen arrays of its size.
    return float(np.mean([_ssim_of_channel(x[..., channel], y[..., channel]) for channel in range(x.shape[2])]))


def _ssim_of_channel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * structure))


def _pair(reference: NDArray[Any], image: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if reference.shape != image.shape or reference.ndim != 3:
        raise ValueError(f"pictures of shapes {reference.shape} and {image.shape} cannot be compared")
    return reference.astype(np.float64), image.astype(np.float64)


def _windowed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean at every position of (height, width) whose window is within, (height - 10, width - 10)."""
    from scipy import ndimage  # slow to import, and every command would wait for it

    edge = WINDOW // 2
    weights = np.exp(-(np.arange(-edge, edge + 1) ** 2) / (2 * WINDOW_SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        x = ndimage.correlate1d(x, weights, axis=axis)
    return x[edge:-edge, edge:-edge]


def relative_error(v: NDArray[Any], v_q: NDArray[Any]) -> NDArray[np.float64]:
    """‖v - v_q‖² / ‖v‖² of every row, (rows,), for outputs ``v`` of a model and ``v_q`` of a changed one (rows, ...).

    Where v = 0 it is 0 if v_q = 0, else inf.
    """
    if v.shape != v_q.shape:
        raise ValueError(f"outputs of shapes {v.shape} and {v_q.shape} cannot be compared")
    rows = v.astype(np.float64).reshape(len(v), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.sum((rows - v_q.astype(np.float64).reshape(rows.shape)) ** 2, axis=1)
        return np.where(lost == 0, 0.0, lost / np.sum(rows**2, axis=1))


@dataclass(frozen=True)
class Interval:
    """A mean over prompts, and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: NDArray[Any], resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """Mean of ``values`` (prompts,), which must be finite, with its percentile-bootstrap interval over prompts.

    The interval of a single value is that value, as its spread is unknown.
    """
    return bootstrap_columns(values[:, None], resamples, seed, level)[0]


def bootstrap_columns(
    values: NDArray[Any], resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> list[Interval]:
    """:func:`bootstrap` of every column of ``values`` (prompts, columns), from the same resamples."""
    values = values.astype(np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("a bootstrap takes one value or more, all of them finite")
    means = values.mean(axis=0)
    resampled = _resampled_means(values, resamples, seed)
    # An ulp of rounding must not put the mean outside the interval.
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    low, high = np.minimum(low, means), np.maximum(high, means)
    return [Interval(float(m), float(l), float(h)) for m, l, h in zip(means, low, high, strict=True)]


def _resampled_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of the rows of ``values`` resampled with replacement, (resamples, columns)."""
    prompts = len(values)
    rng = generator("seed", seed)
    at_once = max(1, 2**22 // prompts)  # 32 MB of counts
    means = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        picks = rng.randint(prompts, size=(rows, prompts)) + prompts * np.arange(rows)[:, None]
        counts = np.bincount(picks.ravel(), minlength=rows * prompts).reshape(rows, prompts)
        means.append(counts @ values / prompts)
    return np.concatenate(means)


def bootstrap_difference(
    a: NDArray[Any], b: NDArray[Any], resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """:func:`bootstrap` of a - b, each (prompts,), paired by prompt, so that differences between prompts cancel."""
    if a.shape != b.shape:
        raise ValueError(f"values of {len(a)} and {len(b)} prompts cannot be paired")
    return bootstrap(a.astype(np.float64) - b.astype(np.float64), resamples, seed, level)


def first_and_last_fifth(error_by_step: NDArray[np.float64], steps: NDArray[np.int64]) -> tuple[float, float]:
    """Mean error over the first and over the last fifth of the steps (rounded down, at least one)."""
    ordered = error_by_step[np.argsort(steps)]
    fifth = max(1, len(ordered) // 5)
    return float(ordered[:fifth].mean()), float(ordered[-fifth:].mean())


def growth(error_by_step: NDArray[np.float64], steps: NDArray[np.int64]) -> float:
    """Ratio of the error over the last fifth of the steps to that over the first fifth.

    Both arguments are (steps,). A rank correlation would not distinguish a growth by 1% from one by a factor of a
    hundred. Errors below float32 rounding count as that, so that no error gives 1 and every result is finite.
    """
    first, last = first_and_last_fifth(error_by_step, steps)
    return max(last, NO_ERROR) / max(first, NO_ERROR)


@dataclass(frozen=True)
class Fidelity:
    """Comparison of a model with the full-precision one: same prompts, seeds and noise.

    Attributes:
        psnr: (prompts,) dB, inf where pictures are equal. Of several pictures of one prompt each has a value.
        ssim: (prompts,), 1 where pictures are equal.
        error: (prompts, steps), :func:`relative_error` of the outputs on the full-precision model's states.
        steps: (steps,) step indices, ascending.
        further: (prompts,) by name, of other measures of pairs.
    """

    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    error: NDArray[np.float64]
    steps: NDArray[np.int64]
    further: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.psnr), len(self.steps))
        if self.psnr.ndim != 1 or self.ssim.shape != self.psnr.shape or self.error.shape != shape or 0 in shape:
            raise ValueError(f"shapes {self.psnr.shape}, {self.ssim.shape}, {self.error.shape}, {self.steps.shape}")
        if any(values.shape != self.psnr.shape for values in self.further.values()):
            raise ValueError("further measures of another number of prompts")
        for prompt, place in np.argwhere(~np.isfinite(self.error)):
            raise CalibError(
                f"prompt {prompt}, step {self.steps[place]}: the relative output error is {self.error[prompt, place]}: "
                "the model's output is not finite there, or the full-precision one's is 0"
            )
        for prompt in np.flatnonzero(np.isnan(self.psnr) | ~np.isfinite(self.ssim)):
            raise CalibError(f"prompt {prompt}: the picture is not finite")

    def to_json(self) -> dict[str, Any]:
        """JSON-able document; null replaces the infinite PSNR of equal pictures."""
        psnr = [None if np.isinf(value) else value for value in self.psnr.tolist()]
        further = {"further": {name: own.tolist() for name, own in self.further.items()}} if self.further else {}
        own = {"psnr": psnr, "ssim": self.ssim.tolist(), "steps": self.steps.tolist(), "error": self.error.tolist()}
        return own | further

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Fidelity":
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError for a damaged document."""
        psnr = np.array([np.inf if value is None else value for value in document["psnr"]])
        further = {name: np.array(own, np.float64) for name, own in document.get("further", {}).items()}
        return cls(psnr, np.array(document["ssim"]), np.array(document["error"]), np.array(document["steps"]), further)

    @property
    def prompts(self) -> int:
        return len(self.psnr)

    def values(self) -> dict[str, NDArray[np.float64]]:
        """Values to average over prompts, (prompts,) finite numbers by metric."""
        pictures = {"psnr": np.minimum(self.psnr, MOST_PSNR), "ssim": self.ssim, **self.further}
        return pictures | {"output_error": self.error.mean(axis=1)}

    def intervals(self) -> dict[str, Interval]:
        """Mean and 95% interval by metric."""
        return {name: bootstrap(values) for name, values in self.values().items()}

    def summary(self, prefix: str = "") -> dict[str, float]:
        """Flat finite numbers for ``metrics.json``: ``psnr``, ``psnr_low``, …, each name after ``prefix``."""
        found: dict[str, float] = {}
        for name, interval in self.intervals().items():
            found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        found["output_error_growth"] = growth(self.error.mean(axis=0), self.steps)
        return {prefix + name: value for name, value in found.items()}
