"""mflux's VAEs as decoders of latents with the channels last."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from calib.base.device import on_gpu
from calib.models.mflux.precision import in_precision

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.vae.block_decoder import VAEBlockDecoder
from mflux.models.common.vae.vae_util import VAEUtil
from mlx import nn

#: What :meth:`Decoder.draw` holds at once, in units of (width of a picture, its channels at full size): of each row,
#: and of each row of a strip more. Measured in float32 on a CPU: 228, 505 and 1211 MB of 128, 256 and 512 px; on a GPU,
#: where a convolution unfolds nothing, it is an upper bound.
OF_A_ROW, OF_A_STRIPS_ROW = 3, 24


def drawing_bytes(image_size: Sequence[int], channels: int, dtype: mx.Dtype) -> int:
    """Bytes of activations of :meth:`Decoder.draw` for a picture of (height, width), ``channels`` wide at full size."""
    height, width = image_size
    rows: int = OF_A_ROW * height + OF_A_STRIPS_ROW * min(height, VAEBlockDecoder.STRIP_ROWS)
    size = int(dtype.size) if on_gpu() else 4
    return size * channels * width * rows


class Decoder(nn.Module):
    """The decoder of ``vae``, which has no encoder.

    Args:
        unpacked: makes its latents of those with the channels last.
        rounded: the type to which mflux rounds norms; None: the latents'.
    """

    def __init__(self, vae: nn.Module, unpacked: Callable[[mx.array], mx.array], rounded: mx.Dtype | None = None):
        super().__init__()
        self.vae, self._unpacked, self._rounded = vae, unpacked, rounded

    def __call__(self, latents: mx.array) -> mx.array:
        """Pictures of ``latents``, in one piece: a gradient can pass, which computes each block once more."""
        with _computed_again(self.vae):
            return self._decoded(latents, VAEBlockDecoder.LEGACY)

    def draw(self, latents: mx.array) -> mx.array:
        """The same as mflux draws them: layer by layer and in strips, evaluated as it goes, in less memory."""
        return self._decoded(latents, VAEBlockDecoder.LOW_MEMORY)

    def _decoded(self, latents: mx.array, mode: str) -> mx.array:
        self.vae.decode_mode = mode
        with in_precision(self._rounded or latents.dtype):
            pictures: mx.array = VAEUtil.decode(self.vae, self._unpacked(latents))
        return pictures.transpose(0, 2, 3, 1)


@contextmanager
def _computed_again(vae: nn.Module) -> Iterator[None]:
    """Have a gradient of what is built in the context keep of each block its input alone, not all that it computes."""
    lists = ("resnets", "upsamplers")
    blocks = [module for path, module in vae.named_modules() if set(lists) & set(path.split(".")[-2:-1])]
    own = {kind: kind.__call__ for kind in map(type, blocks)}

    def checkpointed(call: Callable[[nn.Module, mx.array], mx.array]) -> Callable[[nn.Module, mx.array], mx.array]:
        def run(block: nn.Module, x: mx.array) -> mx.array:
            precision = ModelConfig.precision  # a gradient computes when it may be another

            def compute(given: mx.array) -> mx.array:
                with in_precision(precision):
                    return call(block, given)

            found: mx.array = mx.checkpoint(compute)(x)
            return found

        return run

    try:
        for kind, call in own.items():  # Python looks for it in the class: an object's own would not be called
            kind.__call__ = checkpointed(call)  # type: ignore[method-assign]
        yield
    finally:
        for kind, call in own.items():
            kind.__call__ = call  # type: ignore[method-assign]


def channels_first(latents: mx.array) -> mx.array:
    """The same latents, (rows, channels, height, width)."""
    return latents.transpose(0, 3, 1, 2)


def unpacked(latents: mx.array) -> mx.array:
    """The VAE's latents, whose channels come first, of places that are 2 by 2 of its own."""
    rows, height, width, channels = latents.shape
    parts = latents.reshape(rows, height, width, channels // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return parts.reshape(rows, channels // 4, 2 * height, 2 * width)
