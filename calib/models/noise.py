"""Noise levels of a rectified flow, and the scale of a model's latents.

DiffusionKit's samplers and latent formats have these members. A model of another kind uses the classes here, or has a
:class:`Flow` of its own.
"""

from typing import Protocol, runtime_checkable

import mlx.core as mx


class Sampler(Protocol):
    """Noise levels, sigma in [0, 1], and the transformer's timesteps, 1000 sigma."""

    @property
    def sigma_min(self) -> mx.array:
        """The lowest level of the schedule; 0 where the schedule ends at the finished latent."""

    @property
    def sigma_max(self) -> mx.array:
        """The highest level."""

    def timestep(self, sigma: mx.array) -> mx.array:
        """The timestep of a level before it is shifted."""

    def sigma(self, timestep: mx.array) -> mx.array:
        """The shifted level at a timestep."""

    def noise_scaling(self, sigma: mx.array, noise: mx.array, latent_image: mx.array) -> mx.array:
        """The state at ``sigma`` between ``noise`` and ``latent_image``."""

    def calculate_denoised(self, sigma: mx.array, model_output: mx.array, model_input: mx.array) -> mx.array:
        """The denoised latent by the transformer's output at ``sigma``."""


@runtime_checkable
class Flow(Protocol):
    """A sampler that is not of DiffusionKit's kind: it says itself where it begins and how it goes on.

    A trajectory is still one of noise levels sigma, from 1 to 0, along which x' = x + (sigma' - sigma) v.
    """

    @property
    def noise_kind(self) -> str:
        """How :meth:`noise` is drawn, one of :data:`calib.dataset.manifest.NOISES`; recorded in datasets."""

    def noise(self, seed: int, latent_shape: tuple[int, int, int]) -> mx.array:
        """State 0 of an image of ``seed``, (height, width, channels) in float32."""

    def levels(self, num_steps: int) -> mx.array:
        """Levels of states 0 … num_steps, (num_steps + 1,) in float32, falling to 0."""

    def timesteps(self, levels: mx.array) -> mx.array:
        """What the transformer takes for each of ``levels``, in float32."""

    def step(self, x: mx.array, v: mx.array, level: mx.array, following: mx.array) -> mx.array:
        """The state at ``following`` after ``x`` at ``level``, where the transformer's output is ``v``; in float32."""


class LatentFormat(Protocol):
    """Conversion between the transformer's latents and the decoder's."""

    def process_out(self, latent: mx.array) -> mx.array:
        """Convert the transformer's ``latent`` to the decoder's scale."""


class RectifiedFlow:
    """The levels of SD3: evenly spaced timesteps, shifted (arXiv 2403.03206, equation 23)."""

    def __init__(self, shift: float = 1.0):
        self.shift = shift
        self.sigma_min, self.sigma_max = self.sigma(mx.array(1.0)), self.sigma(mx.array(1000.0))

    def timestep(self, sigma: mx.array) -> mx.array:
        return sigma * 1000

    def sigma(self, timestep: mx.array) -> mx.array:
        level = timestep / 1000
        return self.shift * level / (1 + (self.shift - 1) * level)

    def noise_scaling(self, sigma: mx.array, noise: mx.array, latent_image: mx.array) -> mx.array:
        return sigma * noise + (1 - sigma) * latent_image

    def calculate_denoised(self, sigma: mx.array, model_output: mx.array, model_input: mx.array) -> mx.array:
        return model_input - model_output * sigma


class UnscaledLatents:
    """Latents of one scale for the transformer and the decoder."""

    def process_out(self, latent: mx.array) -> mx.array:
        return latent
