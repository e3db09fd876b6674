"""What calib asks of a transformer, whatever family it is of.

A family is one class with the members of :class:`Architecture`; nothing outside ``calib.models`` knows more of a
network. Layers have canonical names, the same in every file, table and plot; the class says which module a name stands
for. :class:`Resumable` and :class:`Smoothable` are more that a family may offer: without the first, measuring
sensitivities runs whole forwards; without the second there is no ``quantizer=smooth``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
from mlx import nn


@dataclass(frozen=True)
class Conditioning:
    """Encoded text of a batch: ``tokens`` (rows, length, width), ``pooled`` (rows, width) where the family has it."""

    tokens: mx.array
    pooled: mx.array | None = None

    @classmethod
    def batch(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of all ``parts``, one after the other."""
        pooled = [p.pooled for p in parts if p.pooled is not None]
        return cls(mx.concatenate([p.tokens for p in parts]), mx.concatenate(pooled) if pooled else None)

    def __getitem__(self, rows: slice) -> "Conditioning":
        return Conditioning(self.tokens[rows], None if self.pooled is None else self.pooled[rows])

    def astype(self, dtype: mx.Dtype) -> "Conditioning":
        """The same as ``dtype``; lazy."""
        return Conditioning(self.tokens.astype(dtype), None if self.pooled is None else self.pooled.astype(dtype))

    def arrays(self) -> list[mx.array]:
        """What has to be evaluated."""
        return [self.tokens] if self.pooled is None else [self.tokens, self.pooled]


class Architecture(Protocol):
    """A transformer, with weights or only in shape."""

    @property
    def module(self) -> nn.Module:
        """The network itself, whose parameters are saved, rounded and fingerprinted."""

    @property
    def depth(self) -> tuple[int, ...]:
        """How many blocks there are of each sort, in the order in which the sorts run."""

    @property
    def width(self) -> int:
        """Channels of the stream that runs through the blocks."""

    @property
    def heads(self) -> int:
        """Attention heads of a block."""

    @property
    def input_layer(self) -> str:
        """Name of the layer that reads the latent."""

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """The output v for ``x`` (rows, height, width, channels), of the same shape.

        ``timestep`` is evaluated and of size 1, or holds one for each row, (rows,).
        """

    def layers(self) -> dict[str, nn.Module]:
        """Every linear layer by canonical name, in the order of the network; a patch convolution counts as one."""

    def path(self, name: str) -> str:
        """Path of the module that a layer's or a block's name stands for, as ``named_modules`` has it."""

    def blocks(self) -> list[str]:
        """Names of the blocks in the order in which they run."""

    def streams(self, block: str) -> tuple[str, ...]:
        """Names of the arrays that a block returns, where it returns several; else empty."""

    def block_of(self, name: str) -> int | None:
        """The number of the block that a layer is in; what comes after the blocks counts as one more.

        None for what comes before them, and reaches all.
        """

    def shared_input(self, name: str) -> str:
        """The first layer that reads the very array that layer ``name`` reads; ``name`` where there is no other."""

    def kind(self, name: str) -> str:
        """What a layer reads: modulated, post-attention, post-gelu, post-silu, embedding, or a word of the family's."""

    def tokens(self, latent_size: Sequence[int]) -> int:
        """Tokens of one latent (height, width)."""

    def text_widths(self) -> tuple[int, int | None]:
        """Widths of :class:`Conditioning`'s ``tokens`` and ``pooled``; None where there is no pooled text."""

    def describe(self) -> dict[str, Any]:
        """What builds the network again, JSON-able; it is kept with quantized models."""


@runtime_checkable
class Resumable(Protocol):
    """A transformer that can be started in the middle; blocks are numbered as :meth:`Architecture.blocks` has them."""

    def keeping(self, block: int, keep: Callable[[Any], None]) -> AbstractContextManager[None]:
        """Within the context ``keep`` gets what ``block`` returns in every forward: an array, or a tree of them."""

    def velocity_after(self, block: int, output: Any, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """:meth:`Architecture.velocity`, begun after ``block``, which gave ``output`` for these rows."""


@dataclass(frozen=True)
class Source:
    """The layer whose output, its chunk ``chunk`` of ``chunks``, is to be divided, once ``offset`` is added to it."""

    name: str
    chunk: int = 0
    chunks: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """Layers that read the same channels, and what makes these by a linear rule."""

    readers: tuple[str, ...]
    sources: tuple[Source, ...]


@runtime_checkable
class Smoothable(Protocol):
    """A transformer that says where a factor of its input channels can be moved into the layers before."""

    def sites(self) -> Iterator[Site]:
        """All such places, in the order of the network."""


def names_in_order(architecture: Architecture) -> list[str]:
    """Layers and blocks in the order of the network, each block before its first layer."""
    blocks, found = architecture.blocks(), list[str]()
    for name in architecture.layers():
        number = architecture.block_of(name)
        if number is not None and number < len(blocks) and blocks[number] not in found:
            found.append(blocks[number])
        found.append(name)
    return found


def parent_of(root: nn.Module, path: str) -> tuple[Any, str | int]:
    """What holds the module at ``path``, and the key it holds it by."""
    *parents, last = path.split(".")
    node: Any = root
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node, int(last) if isinstance(node, list) else last
