"""Estimate the memory that sampling takes, and choose the batch size and whether text encoders stay loaded.

The estimate depends on shapes and the machine's total memory, not on the memory free at the moment, so that the same
machine always makes the same plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calib.base import limits
from calib.base.device import on_cuda, on_gpu, on_metal
from calib.base.progress import note, readable_bytes
from calib.models.architecture import Architecture
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.models.parallel import parts_of

import mlx.core as mx
from mlx import nn

#: A dataset has 10 images by default: a larger batch would mostly draw padding.
LARGEST_BATCH = 10

# Measured as mx.get_peak_memory() beyond the weights, in float32 on a CPU; in brackets the estimates of the formulas
# below. With MLX's own GELU a forward pass of SD3-medium, per row: 64 MB (71) at 256 px and 154 text tokens, 290 (293)
# at 512 px, 441 (469) at 512 px and 589 tokens; of the emoji model 1.8 (1.9). SD3's VAE decoder: 29.7 kB a pixel (30.7)
# at 64, 256 and 512 px; the emoji model's 18.5 (15.4). On an H200 SD3's decoder takes 1.05 GB (1.07) at 512 px, in
# float16. Metal: not measured.
#: Activations that are alive at once in a block, in units of (tokens, hidden size).
BLOCK_WIDTHS = 22
#: On a CPU with calib.models.gelu: 2.7 MB (2.3) a row of the emoji model, 32 (39) of SD3-medium at 128 px.
BLOCK_WIDTHS_CPU = 26
#: With CUDA MLX frees nothing until a part of the graph has run: 10.8 GB on an H200 for 8 images of 512 px.
BLOCK_WIDTHS_CUDA = 190
#: The same in the VAE decoder, in units of (pixels, channels at full size): MLX's convolution unfolds each pixel's
#: neighbourhood on a CPU, in float32; on a GPU it holds Winograd's two transforms besides input, padding and output.
DECODER_WIDTHS_CPU, DECODER_WIDTHS_GPU = 60, 16

#: Tokens per forward pass beyond which throughput hardly grows; larger batches would only lose more images to an
#: interruption. An H200 gains up to about 16 images of SD3 at 512 px; two CPU cores, and by its FLOP/s an Apple GPU,
#: are saturated by less than one.
BUSY_TOKENS, BUSY_TOKENS_CUDA = 2_000, 40_000


@dataclass(frozen=True)
class Needs:
    """Memory in bytes: of the weights, of ``drawing`` per image of a batch, and of ``decoding`` one image.

    ``useful_batch`` is the number of images per batch that saturates the device, ``decoders`` that of images decoded
    side by side. Of the transformer ``idle`` bytes stay while texts are encoded; None: all.
    """

    transformer: int
    decoder: int
    text: int
    drawing: int
    decoding: int
    useful_batch: int = LARGEST_BATCH
    decoders: int = 1
    idle: int | None = None

    @property
    def encoding(self) -> int:
        """Bytes in use while texts are encoded."""
        return self.text + self.decoder + (self.transformer if self.idle is None else self.idle)


#: What is done with a transformer that does not fit.
STREAMS = "its {:.1f} GB are read anew in each forward, block by block"
#: Share of the memory that the system lets a process have which is planned with.
SHARE = 0.8
#: Bits of a quantized weight, with some to spare: of a streamed model all are in memory when they are made, or drawn
#: with.
PACKED_BITS = 5
#: Number of jobs that share the memory.
_jobs = 1


def divide_memory(jobs: int) -> None:
    """Make all further plans for one of ``jobs`` processes that share the memory equally."""
    global _jobs
    _jobs = jobs


def device_memory() -> int:
    """Bytes that weights and activations of this job may use: the device's, divided by the number of parallel jobs.

    On Metal the working set that the system recommends, two thirds to three quarters of the memory. Elsewhere MLX's
    limit, a fixed share of the total: 80% of the main memory on a CPU, 95% of the card's with CUDA; and 80% of what the
    system limits the process to. A control group, which limits main memory alone, counts on a CPU.
    """
    if on_metal():
        return int(mx.device_info()["max_recommended_working_set_size"]) // _jobs
    limit = limits.of_process() if on_gpu() else min(limits.of_process(), limits.of_control_groups())
    return int(min(mx.get_memory_limit(), SHARE * limit)) // _jobs


def nbytes(module: nn.Module) -> int:
    """Bytes of a network's weights, from their shapes; nothing is evaluated."""
    return sum(weight.nbytes for weight in weights(module).values())


def preflight(name: str, transformer: nn.Module, dtype: ModelDtype, stream: bool | None = None) -> None:
    """Note what will be slow or too large, by the shapes of ``transformer``, before anything is downloaded or read."""
    if dtype is not ModelDtype.FLOAT32 and mx.default_device().type == mx.DeviceType.cpu:
        note(f"model.dtype={dtype}: 16-bit products are some 40 times slower on a CPU; use model.dtype=float32")
    size, memory = sum(weight.size for weight in weights(transformer).values()) * dtype.mlx.size, device_memory()
    if size > memory:
        needed = f"{size / 1e9:.1f} of {memory / 1e9:.1f} GB"
        then = "it may swap or fail" if stream is False else STREAMS.format(size / 1e9)
        note(f"memory: the transformer of {name} alone takes {needed}; {then}")


def useful_batch(tokens: int, guidance: bool) -> int:
    """Number of images, of ``tokens`` tokens each, that saturates the device."""
    busy = BUSY_TOKENS_CUDA if on_cuda() else BUSY_TOKENS
    return max(1, min(busy // ((1 + guidance) * tokens), LARGEST_BATCH))


def drawing_bytes(architecture: Architecture, tokens: int, guidance: bool, size: int) -> int:
    """Bytes of activations of one forward pass for one image of ``tokens`` tokens; ``size``: bytes per value."""
    # On GPUs attention does not materialise the scores.
    scores = 0 if on_gpu() else architecture.heads * tokens**2
    widths = BLOCK_WIDTHS_CUDA if on_cuda() else BLOCK_WIDTHS if on_gpu() else BLOCK_WIDTHS_CPU
    return int((1 + guidance) * size * (widths * architecture.width * tokens + scores))


def decoding_bytes(decoder: nn.Module, latent_size: Sequence[int]) -> int:
    """Bytes of activations of decoding one latent (height, width), for a decoder with the layers of DiffusionKit's VAE.

    0 for a decoder with other layers, whose memory is unknown.
    """
    if not (hasattr(decoder, "conv_out") and hasattr(decoder, "up_blocks")):
        return 0
    weight = decoder.conv_out.weight
    widths, size = (DECODER_WIDTHS_GPU, weight.dtype.size) if on_gpu() else (DECODER_WIDTHS_CPU, 4)
    positions = latent_size[0] * latent_size[1]
    convolutions = widths * weight.shape[-1] * positions * shrink_factor(decoder) ** 2
    attention = 2 * positions**2  # the scores of all positions, before and after the softmax
    return int(size * max(convolutions, attention))


def shrink_factor(decoder: nn.Module) -> int:
    """Pixels of an image per position of its latent, along one side."""
    return int(2 ** sum("upsample" in block for block in decoder.up_blocks))


@dataclass(frozen=True)
class MemoryPlan:
    """Batch size and handling of the text encoders for ``memory`` bytes.

    Attributes:
        keep_text: whether the text encoders stay loaded while images are drawn.
        batch_size: images per batch.
        warning: what does not fit, and which setting to change; None where everything fits.
        read: bytes of weights that each forward reads, of a streamed model; 0: none.
    """

    needs: Needs
    memory: int
    keep_text: bool
    batch_size: int
    warning: str | None
    read: int = 0

    @classmethod
    def of(
        cls, needs: Needs, memory: int, batch_size: int | None = None, smaller_text: str = "", read: int = 0
    ) -> "MemoryPlan":
        """Keep the text encoders if one image can be drawn beside them; choose the largest useful batch that fits.

        Args:
            batch_size: the requested batch size; None: choose one.
            smaller_text: the setting that makes room for the text encoders, for the warning.
        """
        left = memory - needs.transformer - needs.decoder
        decoding = needs.decoders * needs.decoding
        keep_text = needs.text + max((batch_size or 1) * needs.drawing, decoding) <= left
        fitting = (left - needs.text * keep_text) // needs.drawing
        batch = batch_size or max(1, min(fitting, needs.useful_batch))
        problems = []
        if max(needs.drawing, needs.decoding) > left:
            problems.append("one image does not fit: choose a smaller sampler.image_size or model")
        elif batch > fitting:
            problems.append(f"choose sampler.batch_size={fitting}")
        if needs.encoding > memory:
            problems.append(
                f"the text encoders do not fit beside the transformer{smaller_text and f': {smaller_text}'}"
            )
        plan = cls(needs, memory, keep_text, batch, None, read)
        warning = f"{plan.describe()}; it may swap or fail: {'; '.join(problems)}" if problems else None
        return replace(plan, warning=warning)

    @property
    def drawing(self) -> int:
        """Largest number of bytes in use besides the weights."""
        return max(self.batch_size * self.needs.drawing, self.decoders * self.needs.decoding)

    @property
    def decoders(self) -> int:
        """Number of images to decode side by side."""
        return self.needs.decoders

    @property
    def peak(self) -> int:
        """Largest number of bytes in use at once."""
        needs = self.needs
        drawing = needs.transformer + needs.decoder + self.drawing + needs.text * self.keep_text
        return max(needs.encoding, drawing)

    def describe(self) -> str:
        """The plan in one line."""
        streamed = f" (streamed: each forward reads {readable_bytes(self.read)})" if self.read else ""
        unloaded = "" if self.keep_text else " (unloaded while drawing)"
        parts = (
            f"transformer {readable_bytes(self.needs.transformer)}{streamed}",
            f"text encoders {readable_bytes(self.needs.text)}{unloaded}",
            f"drawing {readable_bytes(self.drawing)} at batch {self.batch_size}",
        )
        return f"memory: {readable_bytes(self.peak)} of {readable_bytes(self.memory)}: {', '.join(parts)}"


def plan_memory(
    model: DiffusionModel,
    guidance: bool,
    batch_size: int | None = None,
    memory: int | None = None,
    parts: int = 1,
) -> MemoryPlan:
    """The plan for ``model`` on this device, or on one of ``memory`` bytes; ``batch_size`` None: choose one.

    As many images are decoded side by side as there are ``parts`` of a batch, and a quarter of the memory holds.
    """
    size, architecture = model.latent_shape[:2], model.architecture
    memory = device_memory() if memory is None else memory
    decoding = decoding_bytes(model.decoder, size) if model.decoding_bytes is None else model.decoding_bytes
    fitting = memory // 4 // decoding if decoding else 1
    tokens = architecture.tokens(size) + model.text_length
    streamed = model.streamed
    needs = Needs(
        transformer=nbytes(model.transformer) if streamed is None else streamed_bytes(model),
        decoder=nbytes(model.decoder),
        text=model.text_bytes,
        drawing=drawing_bytes(architecture, tokens, guidance, model.dtype.size),
        decoding=decoding,
        # The more at once, the fewer forwards there are to read the weights for.
        useful_batch=useful_batch(tokens, guidance) if streamed is None else LARGEST_BATCH,
        decoders=max(1, min(len(parts_of(parts, parts)), fitting)),
        idle=None if streamed is None else streamed.nbytes_idle,
    )
    read = 0 if streamed is None else streamed.bytes_read
    return MemoryPlan.of(needs, memory, batch_size, model.smaller_text, read)


def streamed_bytes(model: DiffusionModel) -> int:
    """Bytes of weights of a streamed transformer that are in memory, those of its quantized copy counted."""
    assert model.streamed is not None
    weights_of_layers = sum(int(layer.weight.size) for layer in model.architecture.layers().values())
    return model.streamed.nbytes + weights_of_layers * PACKED_BITS // 8
