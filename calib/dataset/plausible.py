"""What latents of a flow model may look like, and what a seed's first state must be.

The latent at noise level sigma is sigma * noise + (1 - sigma) * data, both of about unit scale. Bounds are generous:
what they catch is damage (a flipped exponent, zeros, another tensor), never an unusual image.
"""

import math
from enum import StrEnum
from typing import Any

from calib.dataset.sampling import EMPTY_LATENT

import numpy as np
from numpy.typing import NDArray

#: Real latents stay below about 30, FLUX's after ``process_out``; a flipped exponent bit gives thousands.
LARGEST = 100.0
#: A real latent spreads by 0.1 or more, even that of a white picture: its channels differ.
SMALLEST_SPREAD = 1e-3
#: Older datasets may have scaled noise slightly otherwise; sampling error comes on top.
NOISE_TOLERANCE = 0.05
SAMPLING_SIGMAS = 6
#: The finished state and its ``process_out`` differ by a factor, a shift and the rounding to 16 bits.
SMALLEST_CORRELATION = 0.99


class Fault(StrEnum):
    """What can be wrong with the values of a latent."""

    NOT_FINITE = "not finite"
    IMPLAUSIBLE = "implausible"


def fault_of(x: NDArray[Any], sigma: float | None = None) -> tuple[Fault, str] | None:
    """What is wrong with the latent ``x`` of any shape, and in which way; None where nothing is.

    Args:
        sigma: the noise level, where ``x`` is the first state of a trajectory: noise and nothing else.
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


def is_first_state(x: NDArray[Any], seed: int, sigma: float) -> bool:
    """Whether ``x`` (height, width, channels) is the first state, at ``sigma``, of the image of ``seed``.

    The formula of calib.dataset.sampling in NumPy alone, as MLX arrays belong to the thread that made them; 1% leaves
    room for every stored type.
    """
    height, width, channels = x.shape
    noise = np.random.RandomState(seed).randn(channels, height, width).transpose(1, 2, 0)
    expected = sigma * noise + (1 - sigma) * EMPTY_LATENT
    return bool(np.allclose(x, expected, rtol=0.01, atol=0.01))


def is_affine_of(latent: NDArray[Any], state: NDArray[Any]) -> bool:
    """Whether ``latent`` is a factor and a shift away from ``state``, of the same size and neither constant."""
    correlation = np.corrcoef(latent.ravel().astype(np.float64), state.ravel().astype(np.float64))[0, 1]
    return bool(correlation > SMALLEST_CORRELATION)
