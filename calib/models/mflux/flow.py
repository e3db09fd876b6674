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
        create_noise: mflux's, by seed, height and width; its array has the axes channels, 1, height and width.
        dtype: the type of the states, to which mflux rounds them.
    """

    noise_kind = "mlx"

    def __init__(
        self,
        config: ModelConfig,
        scheduler: str,
        create_noise: Callable[[int, int, int], mx.array],
        image_size: Sequence[int],
        dtype: mx.Dtype,
    ):
        self._config, self._scheduler, self._create_noise = config, scheduler, create_noise
        self._height, self._width = image_size
        self._dtype = dtype

    def noise(self, seed: int, latent_shape: tuple[int, int, int]) -> mx.array:
        with in_precision(self._dtype):
            noise = self._create_noise(seed, self._height, self._width)
        return noise[:, 0].transpose(1, 2, 0).astype(mx.float32)

    def levels(self, num_steps: int) -> mx.array:
        size = {"height": self._height, "width": self._width}
        config = Config(self._config, num_steps, **size, guidance=0.0, scheduler=self._scheduler)
        sigmas: mx.array = config.scheduler.sigmas
        return sigmas

    def timesteps(self, levels: mx.array) -> mx.array:
        return mx.ones_like(levels) - levels

    def step(self, x: mx.array, v: mx.array, level: mx.array, following: mx.array) -> mx.array:
        dtype = self._dtype
        after = x.astype(dtype) + v.astype(dtype) * (following - level).astype(dtype)
        return after.astype(mx.float32)
