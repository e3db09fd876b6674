"""How much memory drawing takes, and what follows: the batch size, and whether text encoders may stay loaded.

Everything follows from shapes and the machine's total memory, never from what is free at the moment, so that the same
machine plans the same every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calib.base.device import on_cuda, on_gpu, on_metal
from calib.base.progress import readable_bytes
from calib.models.architecture import Architecture
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
from mlx import nn

#: A dataset has 10 images by default: a larger batch would mostly draw padding.
LARGEST_BATCH = 10

# Measured as mx.get_peak_memory() over the weights, in float32 on a CPU; in brackets what the formulas below give.
# A forward of SD3-medium, each row: 64 MB (71) at 256 px and 154 text tokens, 290 (293) at 512 px, 441 (469) at 512 px
# and 589 tokens; of the emoji model 1.8 (1.9). SD3's VAE decoder: 29.7 kB a pixel (30.7) at 64, 256 and 512 px; the
# emoji model's 18.5 (15.4). On an H200 SD3's decoder takes 1.05 GB (1.07) at 512 px, in float16. Metal: not measured.
#: Activations that live at once in a block, in units of (tokens, hidden size).
BLOCK_WIDTHS = 22
#: With CUDA MLX frees nothing before a stretch of the graph has run: 10.8 GB on an H200 for 8 images of 512 px.
BLOCK_WIDTHS_CUDA = 190
#: Likewise in the VAE decoder, in units of (pixels, channels at full size): MLX's convolution writes out each pixel's
#: neighbourhood on a CPU, in float32; on a GPU there are Winograd's two transforms beside input, padding and output.
DECODER_WIDTHS_CPU, DECODER_WIDTHS_GPU = 60, 16

#: Tokens in a forward beyond which a device draws hardly faster; more would only put more images at risk of an
#: interruption. An H200 gains up to about 16 images of SD3 at 512 px; two CPU cores, and by its arithmetic an Apple
#: GPU, are busy with less than one.
BUSY_TOKENS, BUSY_TOKENS_CUDA = 2_000, 40_000


@dataclass(frozen=True)
class Needs:
    """Bytes: of weights, of ``drawing`` one image beside others, and of ``decoding``, one image at a time.

    ``useful_batch`` is how many images side by side make the device busy.
    """

    transformer: int
    decoder: int
    text: int
    drawing: int
    decoding: int
    useful_batch: int = LARGEST_BATCH


#: Jobs that share the memory.
_jobs = 1


def divide_memory(jobs: int) -> None:
    """From now on plan with the share of one of so many ``jobs`` that run side by side."""
    global _jobs
    _jobs = jobs


def device_memory() -> int:
    """Bytes that weights and activations may use: of all, the share of one of the jobs that run side by side.

    On Metal what the system recommends, two thirds to three quarters of the memory. Elsewhere MLX's limit, a fixed
    share of the total: 80% of the main memory on a CPU, 95% of the card's with CUDA.
    """
    if on_metal():
        return int(mx.device_info()["max_recommended_working_set_size"]) // _jobs
    return int(mx.get_memory_limit()) // _jobs


def nbytes(module: nn.Module) -> int:
    """Bytes of a network's weights; shapes suffice, nothing is evaluated."""
    return sum(weight.nbytes for weight in weights(module).values())


def useful_batch(tokens: int, guidance: bool) -> int:
    """Images of so many ``tokens`` that make the device busy."""
    busy = BUSY_TOKENS_CUDA if on_cuda() else BUSY_TOKENS
    return max(1, min(busy // ((1 + guidance) * tokens), LARGEST_BATCH))


def drawing_bytes(architecture: Architecture, tokens: int, guidance: bool, size: int) -> int:
    """Bytes of one forward of the transformer for one image of ``tokens``; ``size`` is that of one value."""
    # GPUs run attention without writing the scores out.
    scores = 0 if on_gpu() else architecture.heads * tokens**2
    widths = BLOCK_WIDTHS_CUDA if on_cuda() else BLOCK_WIDTHS
    return int((1 + guidance) * size * (widths * architecture.width * tokens + scores))


def decoding_bytes(decoder: nn.Module, latent_size: Sequence[int]) -> int:
    """Bytes of decoding one latent (height, width) with a decoder that is built as DiffusionKit's VAE."""
    weight = decoder.conv_out.weight
    widths, size = (DECODER_WIDTHS_GPU, weight.dtype.size) if on_gpu() else (DECODER_WIDTHS_CPU, 4)
    positions = latent_size[0] * latent_size[1]
    convolutions = widths * weight.shape[-1] * positions * shrink_factor(decoder) ** 2
    attention = 2 * positions**2  # the scores of all positions, before and after the softmax
    return int(size * max(convolutions, attention))


def shrink_factor(decoder: nn.Module) -> int:
    """Pixels of an image's side to one of its latent's."""
    return int(2 ** sum("upsample" in block for block in decoder.up_blocks))


@dataclass(frozen=True)
class MemoryPlan:
    """What fits into ``memory`` bytes.

    Attributes:
        keep_text: the text encoders may stay loaded while images are drawn.
        batch_size: images to draw side by side.
        warning: what does not fit, and what to set; None where all does.
    """

    needs: Needs
    memory: int
    keep_text: bool
    batch_size: int
    warning: str | None

    @classmethod
    def of(cls, needs: Needs, memory: int, batch_size: int | None = None, smaller_text: str = "") -> "MemoryPlan":
        """Text encoders stay if one image can be drawn beside them; then the largest useful batch that fits.

        Args:
            batch_size: the one that was asked for, if any.
            smaller_text: what to set for smaller text encoders.
        """
        left = memory - needs.transformer - needs.decoder
        keep_text = needs.text + max((batch_size or 1) * needs.drawing, needs.decoding) <= left
        fitting = (left - needs.text * keep_text) // needs.drawing
        batch = batch_size or max(1, min(fitting, needs.useful_batch))
        problems = []
        if max(needs.drawing, needs.decoding) > left:
            problems.append("one image does not fit: choose a smaller sampler.image_size or model")
        elif batch > fitting:
            problems.append(f"choose sampler.batch_size={fitting}")
        if needs.text > left:
            problems.append(
                f"the text encoders do not fit beside the transformer{smaller_text and f': {smaller_text}'}"
            )
        plan = cls(needs, memory, keep_text, batch, None)
        warning = f"{plan.describe()}; it may swap or fail: {'; '.join(problems)}" if problems else None
        return replace(plan, warning=warning)

    @property
    def drawing(self) -> int:
        """Bytes beside the weights, at most."""
        return max(self.batch_size * self.needs.drawing, self.needs.decoding)

    @property
    def peak(self) -> int:
        """Bytes in use at once, at most."""
        text = self.needs.text
        beside = text + self.drawing if self.keep_text else max(text, self.drawing)
        return self.needs.transformer + self.needs.decoder + beside

    def describe(self) -> str:
        """One line."""
        unloaded = "" if self.keep_text else " (unloaded while drawing)"
        parts = (
            f"transformer {readable_bytes(self.needs.transformer)}",
            f"text encoders {readable_bytes(self.needs.text)}{unloaded}",
            f"drawing {readable_bytes(self.drawing)} at batch {self.batch_size}",
        )
        return f"memory: {readable_bytes(self.peak)} of {readable_bytes(self.memory)}: {', '.join(parts)}"


def plan_memory(
    model: DiffusionModel, guidance: bool, batch_size: int | None = None, memory: int | None = None
) -> MemoryPlan:
    """The plan for ``model`` on this device, or on one of ``memory`` bytes; for a ``batch_size``, if one is given."""
    size, architecture = model.latent_shape[:2], model.architecture
    tokens = architecture.tokens(size) + model.text_length
    needs = Needs(
        transformer=nbytes(model.transformer),
        decoder=nbytes(model.decoder),
        text=model.text_bytes,
        drawing=drawing_bytes(architecture, tokens, guidance, model.dtype.size),
        decoding=decoding_bytes(model.decoder, size) if model.decoding_bytes is None else model.decoding_bytes,
        useful_batch=useful_batch(tokens, guidance),
    )
    return MemoryPlan.of(needs, device_memory() if memory is None else memory, batch_size, model.smaller_text)
