"""What mflux itself draws with a small model: the oracle of calib's own way."""

from pathlib import Path
from unittest.mock import patch

from calib.models.mflux.precision import in_precision

import mlx.core as mx
import numpy as np
from mflux.utils.apple_silicon import AppleSiliconUtil
from tiny_mflux import Tiny


class Watcher:
    """What mflux's callbacks show: the latents of every step."""

    def __init__(self) -> None:
        self.latents: list[mx.array] = []

    def call_before_loop(self, latents: mx.array, **more: object) -> None:
        self.latents = [latents]

    def call_in_loop(self, t: int, latents: mx.array, **more: object) -> None:
        self.latents.append(latents)


class Mfluxs:
    """mflux's own model of the same files, drawing by ``generate_image``."""

    def __init__(self, tiny: Tiny, files: Path, dtype: mx.Dtype):
        self._tiny, self._dtype, self._watcher = tiny, dtype, Watcher()
        with in_precision(dtype):
            self.model = tiny.mfluxs(files)
        self.model.callbacks.register(self._watcher)

    def draw(
        self, text: str, seed: int, steps: int, size: tuple[int, int], **more: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States (steps + 1, height, width, channels), the picture before it is cut to [0, 1], and the 8-bit one."""
        height, width = size
        # As on an M1: elsewhere mflux has its forward compiled, which takes a CPU ten seconds.
        with in_precision(self._dtype), patch.object(AppleSiliconUtil, "is_m1_or_m2", return_value=True):
            image = self.model.generate_image(seed, text, steps, height, width, **more)
            decoded = self._tiny.decoded(self.model, self._watcher.latents[-1], size)
        states = [self._tiny.unpacked(x, size).astype(mx.float32) for x in self._watcher.latents]
        picture = np.array(decoded.astype(mx.float32))[0].transpose(1, 2, 0)
        return np.stack([np.array(x) for x in states]), picture, np.array(image.image)
