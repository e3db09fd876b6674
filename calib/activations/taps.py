"""Taps: observe the input of every linear layer, and the outputs of blocks, without touching DiffusionKit.

MLX has no hooks. For the time of a context, each observed child module is replaced by a wrapper that reports what
it sees and calls the child; ``finally`` puts every child back, so weights and structure are the loaded ones.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.errors import ConfigError, suggest
from calib.models.names import layer_name, module_path, network_order

import mlx.core as mx
from diffusionkit.mlx.mmdit import MMDiT
from mlx import nn

#: Called as record(tap name, activation) during a forward; returns the activation, and may have tied it to other work.
Recorder = Callable[[str, mx.array], mx.array]

#: What a layer reads, by the end of its name.
_KINDS = {
    "attn.q_proj": "modulated",
    "attn.k_proj": "modulated",
    "attn.v_proj": "modulated",
    "mlp.fc1": "modulated",
    "final_layer.linear": "modulated",
    "attn.o_proj": "post-attention",
    "mlp.fc2": "post-gelu",
    "adaln": "post-silu",
    "embedder.2": "post-silu",
}


class TapKind(StrEnum):
    """What is observed: inputs of linear layers, outputs of blocks, or both."""

    LINEAR = "linear"
    BLOCK = "block"
    ALL = "all"


class Halves(StrEnum):
    """Whether both halves of the guidance batch are observed together, or each also by itself."""

    POOLED = "pooled"
    APART = "apart"


@dataclass(frozen=True)
class TapPoint:
    """One place of observation.

    Attributes:
        name: canonical name of the layer whose input is observed, or of the block whose output is.
        aliases: further layers that read the very same array.
        kind: modulated, post-attention, post-gelu, post-silu, embedding, or block.
    """

    name: str
    kind: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class TapSelection:
    """Which taps to place: a kind, narrowed by patterns over canonical names (``*.mlp.fc2``); what they tell apart."""

    kind: TapKind = TapKind.LINEAR
    include: Sequence[str] = field(default=("*",))
    exclude: Sequence[str] = field(default=())
    cfg_halves: Halves = Halves.POOLED


def linear_layers(transformer: MMDiT) -> dict[str, nn.Module]:
    """Every linear layer by canonical name, in the order of the network; the patch convolution counts as one."""
    types = (nn.Linear, nn.QuantizedLinear, nn.Conv2d)
    found = {layer_name(path): module for path, module in transformer.named_modules() if isinstance(module, types)}
    return dict(sorted(found.items(), key=lambda item: network_order(item[0])))


def block_names(transformer: MMDiT) -> list[str]:
    """Names of the blocks: ``mm_block_i`` and ``unified_block_i``."""
    config = transformer.config
    unified = [f"unified_block_{i}" for i in range(config.depth_unified)]
    return [*(f"mm_block_{i}" for i in range(config.depth_multimodal)), *unified]


def _reads_same_input(name: str, transformer: MMDiT) -> str:
    """The layer whose input is the same array as that of ``name``: q stands for k and v, one adaLN for all."""
    if name.endswith(".adaln"):
        return "mm_block_0.image.adaln"
    if name.endswith((".k_proj", ".v_proj")):
        return name[: -len("k_proj")] + "q_proj"
    if name.startswith("unified_block") and name.endswith(".mlp.fc1"):
        parallel = transformer.config.parallel_mlp_for_unified_blocks
        return name.removesuffix("mlp.fc1") + "attn.q_proj" if parallel else name
    return name


def _kind(name: str) -> str:
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), "embedding")


def _matching(names: Sequence[str], patterns: Sequence[str], key: str) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = {*names, *("*." + ".".join(name.split(".")[-2:]) for name in names if "." in name)}
            raise ConfigError(f"taps.{key}={pattern}: matches no layer.{suggest(pattern, near)}")
        chosen.update(hits)
    return chosen


def tap_points(transformer: MMDiT, selection: TapSelection) -> list[TapPoint]:
    """The taps of ``selection``, in network order; layers that share an input share a tap."""
    linear = list(linear_layers(transformer)) if selection.kind is not TapKind.BLOCK else []
    blocks = block_names(transformer) if selection.kind is not TapKind.LINEAR else []
    known = [*linear, *blocks]
    chosen = _matching(known, selection.include, "include") - _matching(known, selection.exclude, "exclude")
    if not chosen:
        raise ConfigError("taps.exclude leaves no layer to observe; loosen it")
    groups: dict[str, list[str]] = {}
    for name in linear:
        if name in chosen:
            groups.setdefault(_reads_same_input(name, transformer), []).append(name)
    points = [TapPoint(names[0], _kind(names[0]), tuple(names[1:])) for names in groups.values()]
    return points + [TapPoint(name, "block") for name in blocks if name in chosen]


class InputTap(nn.Module):
    """Reports the input of ``inner`` and calls it; any other attribute is that of ``inner``."""

    def __init__(self, inner: nn.Module, name: str, record: Recorder):
        super().__init__()
        self["inner"] = inner
        self.observe = partial(record, name)

    def __call__(self, x: mx.array) -> Any:
        return self["inner"](self.observe(x))

    def __getattr__(self, key: str) -> Any:
        return super().__getattr__(key) if key in self else getattr(self["inner"], key)

    def __setattr__(self, key: str, value: Any) -> None:
        # FLUX's unified blocks set mlp.fc2.bias in every forward: it must reach the layer itself.
        if "inner" in self and key in self["inner"]:
            setattr(self["inner"], key, value)
        else:
            super().__setattr__(key, value)


class BlockTap(nn.Module):
    """Reports the outputs of a block, image and text streams apart (``name.image``), and passes them on."""

    def __init__(self, inner: nn.Module, name: str, record: Recorder):
        super().__init__()
        self["inner"] = inner
        self.tap_name = name
        self.observe = record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self["inner"](*args, **kwargs)
        if not isinstance(output, tuple):
            return self.observe(self.tap_name, output)
        # The last block has no text stream.
        streams = zip(("image", "text"), output, strict=True)
        return tuple(x if x is None else self.observe(f"{self.tap_name}.{stream}", x) for stream, x in streams)

    def __getattr__(self, key: str) -> Any:
        return super().__getattr__(key) if key in self else getattr(self["inner"], key)


def parent_of(root: nn.Module, path: str) -> tuple[Any, str | int]:
    """What holds the module at ``path``, and the key it holds it by."""
    *parents, last = path.split(".")
    node: Any = root
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node, int(last) if isinstance(node, list) else last


@contextmanager
def tapped(transformer: MMDiT, points: Sequence[TapPoint], record: Recorder) -> Iterator[None]:
    """Within the context every forward reports to ``record``; afterwards the children are the original objects."""
    replaced: list[tuple[Any, str | int, nn.Module]] = []
    # Blocks last: once a block is wrapped, paths into it lead through the wrapper.
    ordered = sorted(points, key=lambda point: point.kind == "block")
    try:
        for point in ordered:
            parent, key = parent_of(transformer, module_path(point.name))
            child = parent[key]
            # Noted first: an interrupt between the two lines must not leave the wrapper behind.
            replaced.append((parent, key, child))
            parent[key] = (BlockTap if point.kind == "block" else InputTap)(child, point.name, record)
        yield
    finally:
        for parent, key, child in reversed(replaced):
            parent[key] = child
