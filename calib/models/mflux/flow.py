"""mflux's noise, noise levels and step."""

from collections.abc import Callable, Sequence

from calib.models.mflux.precision import in_precision

import mlx.core as mx
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig


class MfluxFlow:
    """The sampler of one of mflux's models at one size of pictures (:class:`calib.models.noise.Flow`).

    Args:
        config: mflux's of the model; says whether, and how far, levels are shifted by size.
        scheduler: the name of mflux's scheduler.
        noise: mflux's, by seed, height and width, as an array (height, width, channels) of a latent.
        noise_kind: how that is drawn.
        times: what the transformer takes for levels.
        dtype: the type of the states, to which mflux rounds them.
    """

    def __init__(
        self,
        config: ModelConfig,
        scheduler: str,
        noise: Callable[[int, int, int], mx.array],
        noise_kind: str,
        times: Callable[[mx.array], mx.array],
        image_size: Sequence[int],
        dtype: mx.Dtype,
    ):
        self._config, self._scheduler = config, scheduler
        self._noise, self.noise_kind, self._times = noise, noise_kind, times
        self._height, self._width = image_size
        self._dtype = dtype

    def noise(self, seed: int, latent_shape: tuple[int, int, int]) -> mx.array:
        with in_precision(self._dtype):
            return self._noise(seed, self._height, self._width).astype(mx.float32)

    def levels(self, num_steps: int) -> mx.array:
        size = {"height": self._height, "width": self._width}
        config = Config(self._config, num_steps, **size, guidance=0.0, scheduler=self._scheduler)
        sigmas: mx.array = config.scheduler.sigmas
        return sigmas

    def timesteps(self, levels: mx.array) -> mx.array:
        return self._times(levels)

    def step(self, x: mx.array, v: mx.array, level: mx.array, following: mx.array) -> mx.array:
        dtype = self._dtype
        after = x.astype(dtype) + v.astype(dtype) * (following - level).astype(dtype)
        return after.astype(mx.float32)
