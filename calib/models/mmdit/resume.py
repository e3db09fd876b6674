"""Start a DiffusionKit MMDiT after a block whose output was kept from an earlier forward pass.

Earlier layers are not computed: MLX evaluates only what the output depends on. Blocks have one index over both kinds,
multimodal blocks first, then FLUX's unified blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)

import mlx.core as mx
from diffusionkit.mlx.mmdit import MMDiT
from mlx import nn

#: A block's output: image and text stream, each (rows, tokens, 1, width), the second None after the last multimodal
#: block; for a unified block text and image in one array.
Output: TypeAlias = tuple[mx.array, mx.array | None] | mx.array


class _Given(nn.Module):
    """Replaces a block, or all blocks up to one, and returns its given output."""

    def __init__(self, output: Output):
        super().__init__()
        self._output = lambda: output  # MLX would register an array as a parameter

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._output()


class _Kept(nn.Module):
    """Calls a block and passes its output to ``keep`` as well."""

    def __init__(self, inner: nn.Module, keep: Callable[[Any], None]):
        super().__init__()
        self["inner"] = inner
        self._keep = keep

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        output = self["inner"](*inputs, **options)
        self._keep(output)
        return output

    def __getattr__(self, key: str) -> Any:
        return super().__getattr__(key) if key in self else getattr(self["inner"], key)


@contextmanager
def _blocks(transformer: MMDiT) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
    """Yield lists of multimodal and unified blocks that may be changed; the transformer's own are restored after."""
    unified = transformer.config.depth_unified > 0
    own = transformer.multimodal_transformer_blocks, transformer.unified_transformer_blocks if unified else []
    try:
        changed = list(own[0]), list(own[1])
        transformer.multimodal_transformer_blocks = changed[0]
        if unified:
            transformer.unified_transformer_blocks = changed[1]
        yield changed
    finally:
        transformer.multimodal_transformer_blocks = own[0]
        if unified:
            transformer.unified_transformer_blocks = own[1]


@contextmanager
def keeping(transformer: MMDiT, block: int, keep: Callable[[Any], None]) -> Iterator[None]:
    """Call ``keep`` with the output of ``block`` in every forward pass in the context."""
    with _blocks(transformer) as (multimodal, unified):
        blocks, place = (multimodal, block) if block < len(multimodal) else (unified, block - len(multimodal))
        blocks[place] = _Kept(blocks[place], keep)
        yield


@contextmanager
def resumed(transformer: MMDiT, block: int, output: Output, text_length: int) -> Iterator[None]:
    """Start forward passes in the context after ``block``, whose output is ``output``; -1 starts at the beginning.

    The modulations of all blocks must exist: enter :func:`calib.models.mmdit.modulation.modulation` first.
    """
    if block < 0:
        yield
        return
    with _blocks(transformer) as (multimodal, unified):
        place = block - len(multimodal)
        if place < 0:
            multimodal[: block + 1] = [_Given(output)]
        else:
            assert isinstance(output, mx.array)
            # Only the shapes of the multimodal blocks' outputs are used then.
            unified[: place + 1] = [_Given(output)]
            multimodal[:] = [_Given((mx.zeros_like(output[:, text_length:]), mx.zeros_like(output[:, :text_length])))]
        yield
