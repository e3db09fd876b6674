"""Transformers of mflux's whose forward pass is written in parts, for a batch: what such families have in common.

mflux draws one picture at a time. Layers and blocks are its own; the way between them is a family's ``parts``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from calib.models.architecture import Conditioning, Part

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray


@dataclass(frozen=True)
class Names:
    """Layers by canonical name, in the order in which they run.

    Attributes:
        before, after: paths of layers before the blocks, and after them.
        blocks: where mflux has a kind of blocks, and the paths of a block's layers, in the order in which kinds run.
        kinds: kind of a layer's input by the end of its name; the first that fits.
        streams: the arrays that a block returns, of kinds that return several.
    """

    before: Mapping[str, str]
    blocks: Mapping[str, tuple[str, Mapping[str, str]]]
    after: Mapping[str, str]
    kinds: Mapping[str, str]
    streams: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class InParts:
    """Most of an :class:`~calib.models.architecture.Architecture` of ``module``, resumable, by ``names`` and ``parts``.

    A family has the rest: ``parts``, ``shared_input``, ``tokens``, ``text_widths``, ``describe``.
    """

    def __init__(self, module: nn.Module, names: Names):
        self.module, self.names = module, names
        self.depth = tuple(len(getattr(module, place)) for place, _ in names.blocks.values())
        self._keep: tuple[int, Callable[[Any], None]] | None = None

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
        raise NotImplementedError

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        return self._run(-1, [x], x, text, timestep)

    def velocity_after(
        self, block: int, output: list[mx.array], x: mx.array, text: Conditioning, timestep: mx.array
    ) -> mx.array:
        return self._run(block + 1, output, x, text, timestep)

    def _run(self, done: int, passed: list[mx.array], x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """The output by the parts after number ``done``, which passed on ``passed``."""
        parts = self.parts(text, timestep, x.shape)
        for number, part in enumerate(parts[done + 1 :], done + 1):
            passed = part(passed)
            if self._keep is not None and number == self._keep[0] + 1:
                self._keep[1](passed)
        return passed[0]

    @contextmanager
    def keeping(self, block: int, keep: Callable[[Any], None]) -> Iterator[None]:
        self._keep = (block, keep)
        try:
            yield
        finally:
            self._keep = None

    def layers(self) -> dict[str, nn.Module]:
        within = [f"{block}.{layer}" for block in self.blocks() for layer in self.names.blocks[_stem(block)][1]]
        modules = dict(self.module.named_modules())
        paths = {name: self.path(name) for name in (*self.names.before, *within, *self.names.after)}
        return {name: modules[path] for name, path in paths.items() if path in modules}

    def path(self, name: str) -> str:
        if name in self.names.before or name in self.names.after:
            return {**self.names.before, **self.names.after}[name]
        block, _, layer = name.partition(".")
        place, within = self.names.blocks.get(_stem(block), (block, {}))
        path = f"{place}.{block.rpartition('_')[2]}"
        return f"{path}.{within.get(layer, layer)}" if layer else path

    def blocks(self) -> list[str]:
        return [f"{stem}_{i}" for stem, count in zip(self.names.blocks, self.depth, strict=True) for i in range(count)]

    def streams(self, block: str) -> tuple[str, ...]:
        return self.names.streams.get(_stem(block), ())

    def block_of(self, name: str) -> int | None:
        if name in self.names.before:
            return None
        return sum(self.depth) if name in self.names.after else self.blocks().index(name.partition(".")[0])

    def kind(self, name: str) -> str:
        return next((kind for end, kind in self.names.kinds.items() if name.endswith(end)), "embedding")


def _stem(block: str) -> str:
    return block.rpartition("_")[0]


def by_row(apply: Callable[..., mx.array], axes: int) -> Callable[..., mx.array]:
    """mflux's rotation ``apply`` of tokens by tables of ``axes`` axes, also for tables with one more, of the rows.

    The turn of a token is its own affair: all rows' tokens in one row are turned as each would be.
    """

    def applied(x: mx.array, *given: Any, **more: Any) -> mx.array:
        if given[0].ndim == axes:
            return apply(x, *given, **more)
        flat = [table.reshape(-1, *table.shape[2:]) if isinstance(table, mx.array) else table for table in given]
        return apply(x.reshape(1, -1, *x.shape[2:]), *flat, **more).reshape(x.shape)

    return applied


def repeated(rows: Sequence[int], longest: int) -> NDArray[np.intp]:
    """Places (rows, longest) of a row's own tokens, as many as ``rows`` says, and then of the last of these again."""
    places: NDArray[np.intp] = np.minimum(np.arange(longest), np.array(rows)[:, None] - 1)
    return places


def times_of(timestep: mx.array, rows: int, dtype: mx.Dtype) -> mx.array:
    """The timestep of each row, (rows,)."""
    return mx.broadcast_to(timestep.reshape(-1), (rows,)).astype(dtype)
