"""Estimate the memory of a backward pass through a transformer, and choose how it goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calib.base.device import on_gpu
from calib.models.architecture import Architecture, Divisible
from calib.models.memory import LARGEST_BATCH, device_memory, nbytes
from calib.models.model import weights
from calib.models.streamed import Streamed

#: Activations that a backward pass in float32 keeps of a block, in units of (tokens, hidden size): 23 GB on an H200 for
#: an image of 512 px with guidance, and half a gigabyte on a CPU for 24 blocks of 256 channels and 272 tokens; and
#: tokens of text.
BACKWARD_WIDTHS_CPU, BACKWARD_WIDTHS_GPU, TEXT_TOKENS = 24, 60, 256


@dataclass(frozen=True)
class BackwardPlan:
    """How a backward pass through the transformer goes, in float32.

    Attributes:
        batch_size: images at once.
        by_parts: whether it goes block by block, and computes the activations of each once more.
        nbytes: what it takes at once, the model's weights counted.
    """

    batch_size: int
    by_parts: bool
    nbytes: int


def plan_backward(
    architecture: Architecture,
    latent_shape: Sequence[int],
    guidance: bool,
    images: int,
    text_length: int = TEXT_TOKENS,
    memory: int | None = None,
    largest: int = LARGEST_BATCH,
) -> BackwardPlan:
    """The plan for at most ``images`` at once, and ``largest``, on this device, or on one of ``memory`` bytes.

    In one piece where that fits for one image.
    """
    memory = device_memory() if memory is None else memory
    sizes = {path: weight.size for path, weight in weights(architecture.module).items()}
    held, total, depth = nbytes(architecture.module), 4 * sum(sizes.values()), sum(architecture.depth)
    passed, block = _activations(architecture, architecture.tokens(latent_shape[:2]) + text_length, guidance)
    # The sums of gradients; of all layers at once, or of one block, gradients and, of 16 bits, weights in float32.
    whole = held + total * (2 + (held < total))
    parts = held + total + 2 * 4 * _largest_block(architecture, sizes)
    by_parts = isinstance(architecture, Divisible) and whole + depth * block > memory
    fixed, each = (parts, block + passed * (depth + 2)) if by_parts else (whole, depth * block)
    batch = max(1, min(images, (memory - fixed) // each, largest))
    return BackwardPlan(batch, by_parts, fixed + batch * each)


def streamed_backward(
    streamed: Streamed, latent_shape: Sequence[int], guidance: bool, text_length: int = TEXT_TOKENS
) -> int:
    """What a pass of one image through a streamed transformer takes at once, in float32, weights counted."""
    architecture = streamed.inner
    sizes = {path: weight.size for path, weight in weights(architecture.module).items()}
    passed, block = _activations(architecture, architecture.tokens(latent_shape[:2]) + text_length, guidance)
    outside = sum(sizes[path] for path in streamed.staying(weights(architecture.module)))
    # In float32 a part's weights, their gradients and the sums of these.
    return streamed.nbytes + 3 * 4 * max(_largest_block(architecture, sizes), outside) + block + 4 * passed


def _activations(architecture: Architecture, tokens: int, guidance: bool) -> tuple[int, int]:
    """Bytes of what passes between two blocks of one image of so many ``tokens``, and of what is kept of a block."""
    rows, stream = 1 + guidance, 4 * architecture.width * tokens
    # On GPUs attention does not materialise the scores.
    scores, widths = (0, BACKWARD_WIDTHS_GPU) if on_gpu() else (architecture.heads * tokens**2, BACKWARD_WIDTHS_CPU)
    return rows * stream, rows * (widths * stream + 2 * 4 * scores)


def _largest_block(architecture: Architecture, sizes: Mapping[str, int]) -> int:
    """Weights of the block that has the most."""
    paths = [f"{architecture.path(block)}." for block in architecture.blocks()]
    return max((sum(size for path, size in sizes.items() if path.startswith(prefix)) for prefix in paths), default=0)
