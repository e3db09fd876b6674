"""Taps: observe the inputs of linear layers and the outputs of blocks, without changing the network's code.

MLX has no hooks. Within a context each observed module is replaced by a wrapper that records its input or output and
calls the module; ``finally`` restores the original modules.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from calib.base.errors import ConfigError, suggest
from calib.models.architecture import Architecture, parent_of
from calib.models.wrapper import Wrapper

import mlx.core as mx
from mlx import nn

#: Called as record(tap name, activation) during a forward pass; returns the activation, possibly with dependencies.
Recorder = Callable[[str, mx.array], mx.array]


class TapKind(StrEnum):
    """Kinds of taps: inputs of linear layers, outputs of blocks, or both."""

    LINEAR = "linear"
    BLOCK = "block"
    ALL = "all"


class Halves(StrEnum):
    """Statistics of the guidance batch: both halves pooled, or each half also separately."""

    POOLED = "pooled"
    APART = "apart"


@dataclass(frozen=True)
class TapPoint:
    """One tap.

    Attributes:
        name: canonical name of the layer whose input is observed, or of the block whose output is.
        kind: kind of the layer's input by the architecture (modulated, post-gelu …), or 'block'.
        aliases: further layers with the same input array.
    """

    name: str
    kind: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class TapSelection:
    """Selection of taps: a kind, restricted by patterns over canonical names (``*.mlp.fc2``), and guidance halves."""

    kind: TapKind = TapKind.LINEAR
    include: Sequence[str] = field(default=("*",))
    exclude: Sequence[str] = field(default=())
    cfg_halves: Halves = Halves.POOLED


def _matching(names: Sequence[str], patterns: Sequence[str], key: str) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = {*names, *("*." + ".".join(name.split(".")[-2:]) for name in names if name.count(".") > 1)}
            raise ConfigError(f"taps.{key}={pattern}: matches no layer.{suggest(pattern, near)}")
        chosen.update(hits)
    return chosen


def tap_points(architecture: Architecture, selection: TapSelection) -> list[TapPoint]:
    """The taps of ``selection``, in network order; layers with the same input array share a tap.

    Raises:
        ConfigError: a pattern matches no layer, or none is left.
    """
    linear = list(architecture.layers()) if selection.kind is not TapKind.BLOCK else []
    blocks = architecture.blocks() if selection.kind is not TapKind.LINEAR else []
    known = [*linear, *blocks]
    chosen = _matching(known, selection.include, "include") - _matching(known, selection.exclude, "exclude")
    if not chosen:
        raise ConfigError("taps.exclude leaves no layer to observe; loosen it")
    groups: dict[str, list[str]] = {}
    for name in linear:
        if name in chosen:
            groups.setdefault(architecture.shared_input(name), []).append(name)
    points = [TapPoint(names[0], architecture.kind(names[0]), tuple(names[1:])) for names in groups.values()]
    return points + [TapPoint(name, "block") for name in blocks if name in chosen]


class InputTap(Wrapper):
    """Records the input of ``inner`` and calls it."""

    def __init__(self, inner: nn.Module, name: str, record: Recorder):
        super().__init__(inner)
        self.observe = partial(record, name)

    def __call__(self, x: mx.array) -> Any:
        return self["inner"](self.observe(x))


class BlockTap(nn.Module):
    """Calls a block and records its outputs, those of several streams separately (``name.stream``)."""

    def __init__(self, inner: nn.Module, name: str, streams: Sequence[str], record: Recorder):
        super().__init__()
        self["inner"] = inner
        self.tap_name, self.streams = name, tuple(streams)
        self.observe = record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self["inner"](*args, **kwargs)
        if not isinstance(output, tuple):
            return self.observe(self.tap_name, output)
        # MMDiT's last block has no text stream.
        streams = zip(self.streams, output, strict=True)
        return tuple(x if x is None else self.observe(f"{self.tap_name}.{stream}", x) for stream, x in streams)

    def __getattr__(self, key: str) -> Any:
        return super().__getattr__(key) if key in self else getattr(self["inner"], key)


@contextmanager
def tapped(architecture: Architecture, points: Sequence[TapPoint], record: Recorder) -> Iterator[None]:
    """Install taps, which call ``record`` in every forward pass, for the time of the context; then remove them."""
    replaced: list[tuple[Any, str | int, nn.Module]] = []
    # Blocks last: once a block is wrapped, paths into it lead through the wrapper.
    ordered = sorted(points, key=lambda point: point.kind == "block")
    try:
        for point in ordered:
            parent, key = parent_of(architecture.module, architecture.path(point.name))
            child = parent[key]
            # Recorded first: an interrupt between the two statements must not leave the wrapper in place.
            replaced.append((parent, key, child))
            if point.kind == "block":
                parent[key] = BlockTap(child, point.name, architecture.streams(point.name), record)
            else:
                parent[key] = InputTap(child, point.name, record)
        yield
    finally:
        for parent, key, child in reversed(replaced):
            parent[key] = child
