"""The interface between calib and a transformer of any family.

A family is one class with the members of :class:`Architecture`; nothing outside ``calib.models`` knows more about a
network. Layers have canonical names, the same in every file, table and plot; the class maps a name to its module.
:class:`Resumable`, :class:`Divisible` and :class:`Smoothable` are optional: without the first, measuring sensitivities
by trials runs whole forward passes; without the second a backward pass keeps the activations of all blocks; without the
third ``quantizer=smooth`` is not available.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

from calib.base.errors import ConfigError

import mlx.core as mx
from mlx import nn


@dataclass(frozen=True)
class Conditioning:
    """Encoded text of a batch.

    Attributes:
        tokens: (rows, length, width).
        pooled: (rows, width), where the family has it.
        lengths: number of tokens of each row, where texts differ in it; behind those, a row of ``tokens`` has zeros.
            They are numbers, as a forward pass that read them from the device would wait for it.
    """

    tokens: mx.array
    pooled: mx.array | None = None
    lengths: tuple[int, ...] | None = None

    @classmethod
    def batch(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenate the rows of all ``parts``, as long as the longest of them."""
        longest = max(part.tokens.shape[1] for part in parts)
        parts = [part.padded(longest) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        lengths = [part.lengths for part in parts if part.lengths is not None]
        return cls(
            mx.concatenate([part.tokens for part in parts]),
            mx.concatenate(pooled) if pooled else None,
            tuple(length for own in lengths for length in own) if lengths else None,
        )

    def padded(self, length: int) -> "Conditioning":
        """The same with room for ``length`` tokens in a row; itself where it has as much."""
        more = length - self.tokens.shape[1]
        return self if more <= 0 else replace(self, tokens=mx.pad(self.tokens, [(0, 0), (0, more), (0, 0)]))

    def __getitem__(self, rows: slice) -> "Conditioning":
        return Conditioning(
            self.tokens[rows],
            None if self.pooled is None else self.pooled[rows],
            None if self.lengths is None else self.lengths[rows],
        )

    def astype(self, dtype: mx.Dtype) -> "Conditioning":
        """The same conditioning cast to ``dtype``; lazy."""
        pooled = None if self.pooled is None else self.pooled.astype(dtype)
        return replace(self, tokens=self.tokens.astype(dtype), pooled=pooled)

    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return [self.tokens] if self.pooled is None else [self.tokens, self.pooled]

    def of_arrays(self, arrays: Sequence[mx.array], lengths: tuple[int, ...] | None) -> "Conditioning":
        """Other rows, whose :meth:`arrays` and lengths are these."""
        return Conditioning(arrays[0], arrays[1] if self.pooled is not None else None, lengths)


class Architecture(Protocol):
    """A transformer, with weights or with shapes alone."""

    @property
    def module(self) -> nn.Module:
        """The network, whose parameters are saved, quantized and fingerprinted."""

    @property
    def depth(self) -> tuple[int, ...]:
        """Number of blocks of each kind, in the order in which the kinds run."""

    @property
    def width(self) -> int:
        """Channels of the residual stream."""

    @property
    def heads(self) -> int:
        """Attention heads per block."""

    @property
    def input_layer(self) -> str:
        """Name of the layer that reads the latent."""

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """The output v for ``x`` (rows, height, width, channels), of the same shape: ``x - sigma * v`` is denoised.

        ``timestep`` is 1000 sigma, or what the model's :class:`~calib.models.noise.Flow` says; evaluated, of size 1 or
        (rows,). The first axis of every layer's input must be that of the rows: an input that all rows share, such as
        the embedding of one timestep, must be repeated.
        """

    def layers(self) -> dict[str, nn.Module]:
        """Every linear layer by canonical name, in network order; a patch convolution counts as linear."""

    def path(self, name: str) -> str:
        """Path, as in ``named_modules``, of the module of a layer's or a block's name."""

    def blocks(self) -> list[str]:
        """Names of the blocks in the order in which they run."""

    def streams(self, block: str) -> tuple[str, ...]:
        """Names of the arrays that a block returns; empty where it returns one."""

    def block_of(self, name: str) -> int | None:
        """Index of the block that contains a layer; the number of blocks for a layer after them.

        None for a layer before the blocks, which affects all of them.
        """

    def shared_input(self, name: str) -> str:
        """The first layer with the same input array as layer ``name``; ``name`` itself where no other shares it."""

    def kind(self, name: str) -> str:
        """Kind of a layer's input: modulated, post-attention, post-gelu, post-silu, embedding, or a family's own."""

    def tokens(self, latent_size: Sequence[int]) -> int:
        """Number of tokens of one latent (height, width)."""

    def text_widths(self) -> tuple[int, int | None]:
        """Widths of :class:`Conditioning`'s ``tokens`` and ``pooled``; None where the family has no pooled text."""

    def describe(self) -> dict[str, Any]:
        """JSON-able description that suffices to rebuild the network; stored with quantized models."""


#: A part of a forward pass: a function of arrays.
Part: TypeAlias = Callable[[list[mx.array]], list[mx.array]]


@runtime_checkable
class Resumable(Protocol):
    """A transformer whose forward pass can start after any block; blocks are indexed as in ``Architecture.blocks``."""

    def keeping(self, block: int, keep: Callable[[Any], None]) -> AbstractContextManager[None]:
        """Call ``keep`` with the output of ``block``, an array or a tree of arrays, in every forward in the context."""

    def velocity_after(self, block: int, output: Any, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """:meth:`Architecture.velocity` started after ``block``, whose output for these rows is ``output``."""


@runtime_checkable
class Divisible(Protocol):
    """A transformer whose forward pass can be run in parts: what precedes the blocks, each block, what follows them."""

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> Sequence[Part]:
        """:meth:`Architecture.velocity` for x of ``shape``, as functions to be called in turn.

        Each takes what the one before returned, the first [x]; the last returns [v]. Whatever depends on weights of an
        earlier part must be among what is passed on, as gradients reach these by it alone.
        """


@dataclass(frozen=True)
class Producer:
    """A linear layer that produces channels: chunk ``chunk`` of ``chunks`` of its output.

    The model adds ``offset`` to that chunk.
    """

    name: str
    chunk: int = 0
    chunks: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """Layers that read the same channels, and the linear layers that produce these channels."""

    readers: tuple[str, ...]
    producers: tuple[Producer, ...]


@runtime_checkable
class Smoothable(Protocol):
    """A transformer that lists where per-channel factors can move from a layer's input into the layers before it."""

    def sites(self) -> Iterator[Site]:
        """Yield every site, in network order."""


def check_architecture(architecture: object, named: str) -> None:
    """Check that ``architecture`` has the members of :class:`Architecture` and that its names are consistent.

    Raises:
        ConfigError: it does not; the message begins with ``named``.
    """
    members = [member for member in vars(Architecture) if not member.startswith("_")]
    if lacking := [member for member in members if not hasattr(architecture, member)]:
        raise ConfigError(f"{named}: {type(architecture).__name__} is no Architecture, it lacks {', '.join(lacking)}")
    found = cast(Architecture, architecture)
    layers, paths = found.layers(), {path for path, _ in found.module.named_modules()}
    for name in [*layers, *found.blocks()]:
        if "/" in name:
            raise ConfigError(f"{named}: {name} has a /, which names of layers and blocks must not have")
        if found.path(name) not in paths:
            raise ConfigError(f"{named}: {name} has path {found.path(name)!r}, where the network has no module")
    for name, shared in {name: found.shared_input(name) for name in layers}.items():
        if shared not in layers:
            raise ConfigError(f"{named}: {name} shares its input with {shared!r}, which is no layer")
    if found.input_layer not in layers:
        raise ConfigError(f"{named}: input_layer {found.input_layer!r} is no layer")


def names_in_order(architecture: Architecture) -> list[str]:
    """Names of layers and blocks in network order, each block before its first layer."""
    blocks, found = architecture.blocks(), list[str]()
    for name in architecture.layers():
        number = architecture.block_of(name)
        if number is not None and number < len(blocks) and blocks[number] not in found:
            found.append(blocks[number])
        found.append(name)
    return found


def part_of(architecture: Architecture, name: str) -> int:
    """The number of the part (:class:`Divisible`) in which a layer or a block runs: 0 before the blocks."""
    blocks = architecture.blocks()
    block = blocks.index(name) if name in blocks else architecture.block_of(name)
    return 0 if block is None else block + 1


def parent_of(root: nn.Module, path: str) -> tuple[Any, str | int]:
    """The container of the module at ``path``, and its key there."""
    *parents, last = path.split(".")
    node: Any = root
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node, int(last) if isinstance(node, list) else last
