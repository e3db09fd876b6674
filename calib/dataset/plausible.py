"""Check that latents of a flow model are plausible, and that a first state is the noise of its seed.

The latent at noise level sigma is sigma * noise + (1 - sigma) * data, both of about unit scale. Bounds are generous:
they catch damage (a flipped exponent, zeros, another tensor), never an unusual image.
"""

import math
import threading
from enum import StrEnum
from typing import Any

from calib.dataset.manifest import CHANNELS_LAST, DEFAULT_NOISE

import numpy as np
from numpy.typing import NDArray

#: Value of DiffusionKit's empty latent; it enters the first state only where the first sigma is below 1.
EMPTY_LATENT = 0.0609
#: Largest plausible magnitude: real latents stay below about 30 (FLUX's after ``process_out``); a flipped exponent bit
#: gives thousands.
LARGEST = 100.0
#: Smallest plausible standard deviation: that of real latents is 0.1 or more, even of a white picture, as channels
#: differ.
SMALLEST_SPREAD = 1e-3
#: Relative tolerance of the noise level, as older datasets may have scaled noise differently; sampling error is added.
NOISE_TOLERANCE = 0.05
SAMPLING_SIGMAS = 6
#: The finished state and its ``process_out`` differ by a factor, a shift and the rounding to 16 bits.
SMALLEST_CORRELATION = 0.99
#: MLX's stream of each thread of ours: every stream has a thread of the system behind it.
_OWN = threading.local()


class Fault(StrEnum):
    """Faults of the values of a latent."""

    NOT_FINITE = "not finite"
    IMPLAUSIBLE = "implausible"


def latent_fault(x: NDArray[Any], sigma: float | None = None) -> tuple[Fault, str] | None:
    """The fault of the latent ``x``, of any shape, and a description; None where the values are plausible.

    Args:
        sigma: the noise level, where ``x`` is the first state of a trajectory, which is pure noise.
    """
    largest = max(-float(x.min(initial=0)), float(x.max(initial=0)))  # NaN, where one of the values is
    if not math.isfinite(largest):
        return Fault.NOT_FINITE, f"{x.size - int(np.isfinite(x).sum())} of {x.size} values are NaN or infinite"
    if largest > LARGEST:
        return Fault.IMPLAUSIBLE, f"values up to {largest:.3g}, latents have about unit scale"
    spread = float(x.std()) if x.size else 0.0
    if spread < SMALLEST_SPREAD:
        return Fault.IMPLAUSIBLE, f"constant: standard deviation {spread:.2g}"
    if sigma:
        tolerance = NOISE_TOLERANCE + SAMPLING_SIGMAS / math.sqrt(2 * x.size)
        if abs(spread / sigma - 1) > tolerance:
            return (
                Fault.IMPLAUSIBLE,
                f"standard deviation {spread:.3g} where noise of sigma {sigma:.3g} has {sigma:.3g}",
            )
    return None


def is_first_state(x: NDArray[Any], seed: int, sigma: float, drawn: str = DEFAULT_NOISE) -> bool:
    """Whether ``x`` (height, width, channels) is the first state, at ``sigma``, of the image of ``seed``.

    Computed as in :mod:`calib.dataset.sampling`, but in NumPy where noise is ``drawn`` by it, as MLX arrays belong to
    the thread that made them. The tolerance of 1% covers the rounding of every stored type.
    """
    height, width, channels = x.shape
    shape = (channels, height, width)
    if drawn == CHANNELS_LAST:
        noise = _by_mlx(seed, x.shape)
    elif drawn == DEFAULT_NOISE:
        noise = np.random.RandomState(seed).randn(*shape).transpose(1, 2, 0)
    else:
        noise = _by_mlx(seed, shape).transpose(1, 2, 0)
    expected = sigma * noise + (1 - sigma) * EMPTY_LATENT
    return bool(np.allclose(x, expected, rtol=0.01, atol=0.01))


def _by_mlx(seed: int, shape: tuple[int, ...]) -> NDArray[Any]:
    import mlx.core as mx  # as most datasets are checked without it

    if not hasattr(_OWN, "stream"):
        _OWN.stream = mx.new_stream(mx.cpu)
    return np.array(mx.random.normal(shape, key=mx.random.key(seed), stream=_OWN.stream))


def is_affine_of(latent: NDArray[Any], state: NDArray[Any]) -> bool:
    """Whether ``latent`` is a factor times ``state`` plus a shift; both have one size and neither is constant."""
    correlation = np.corrcoef(latent.ravel().astype(np.float64), state.ravel().astype(np.float64))[0, 1]
    return bool(correlation > SMALLEST_CORRELATION)
