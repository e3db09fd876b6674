"""The Euler sampler of rectified flow, as a generator of states.

Sigma is the noise level in [0, 1], timestep is 1000 sigma. State i is the one before the i-th model call; state
``num_steps`` is the finished latent. Results equal those of DiffusionKit's ``sample_euler`` (Algorithm 2 of Karras
et al. 2022, arXiv 2206.00364, without churn), with explicit arguments in place of global random state. A model with a
:class:`~calib.models.noise.Flow` has noise, levels, timesteps and steps of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from calib.base.device import on_gpu
from calib.dataset.plausible import EMPTY_LATENT
from calib.models.noise import Flow, Sampler

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class State:
    """One state of a trajectory: ``x`` (batch, height, width, channels) before model call ``step_index``."""

    step_index: int
    sigma: float
    timestep: float
    x: mx.array


def noise_levels(sampler: Sampler | Flow, num_steps: int) -> mx.array:
    """Sigmas of the states, (num_steps + 1,) float32, from the sampler's largest to 0.

    Timesteps are evenly spaced, then shifted; 0 is appended unless the sampler's levels end there, as FLUX's do.
    """
    if isinstance(sampler, Flow):
        return sampler.levels(num_steps)
    start, end = sampler.timestep(sampler.sigma_max).item(), sampler.timestep(sampler.sigma_min).item()
    if end == 0:
        return mx.stack([sampler.sigma(t) for t in mx.linspace(start, end, num_steps + 1)])
    sigmas = [sampler.sigma(t) for t in mx.linspace(start, end, num_steps)]
    return mx.stack([*sigmas, mx.array(0.0)])


def as_floats(values: mx.array) -> list[float]:
    """A one-dimensional array as Python floats."""
    return cast(list[float], values.astype(mx.float32).tolist())


def initial_noise(seed: int, latent_shape: tuple[int, int, int]) -> mx.array:
    """Standard normal noise (height, width, channels) as DiffusionKit draws it for ``seed``, without global state."""
    height, width, channels = latent_shape
    noise_chw = np.random.RandomState(seed).randn(channels, height, width)
    return mx.array(noise_chw.astype(np.float32)).transpose(1, 2, 0)


def initial_state(noise: mx.array, sampler: Sampler, sigmas: mx.array) -> mx.array:
    """State 0: noise scaled by the first sigma, added to DiffusionKit's empty latent."""
    empty = mx.full(noise.shape, EMPTY_LATENT)
    x: mx.array = sampler.noise_scaling(sigmas[0], noise, empty)
    return x


def euler(
    after: Callable[[int, mx.array], mx.array], x: mx.array, levels: Sequence[float], times: Sequence[float]
) -> Iterator[State]:
    """Yield states 0 … num_steps from ``x`` (batch, height, width, channels) on, evaluated one by one.

    Args:
        after: the state after state i, which it is given; lazy.
        levels, times: noise level and timestep of each state.
    """
    last = len(levels) - 1
    ready: mx.array | None = None
    for i in range(last):
        yield State(i, levels[i], times[i], x)
        x = after(i, x) if ready is None else ready
        mx.async_eval(x)
        # A GPU computes this step meanwhile; not two at once, which would need the memory of two.
        ready = after(i + 1, x) if on_gpu() and i + 1 < last else None
        mx.eval(x)
    yield State(last, levels[-1], times[-1], x)
