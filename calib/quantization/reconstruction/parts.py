"""A part of a transformer's forward pass, run with other computations in the places of its planned layers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

from calib.models.architecture import Architecture, Divisible, parent_of, part_of
from calib.models.model import weights
from calib.models.wrapper import Wrapper
from calib.quantization.reconstruction.kept import Kept
from calib.quantization.reconstruction.rows import Rows, States

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

#: Called in a layer's place: run(name, layer, x).
Run: TypeAlias = Callable[[str, nn.Module, mx.array], mx.array]


def planned_parts(architecture: Architecture, plan: Iterable[str]) -> list[tuple[str, dict[str, nn.Module]]]:
    """Name and planned layers of each part, in network order; a plan may name blocks, too."""
    layers, chosen = architecture.layers(), set(plan)
    names = ["the embedders", *architecture.blocks(), "the final layer"]
    found: list[dict[str, nn.Module]] = [{} for _ in names]
    for name in layers:
        if name in chosen:
            found[part_of(architecture, name)][name] = layers[name]
    return list(zip(names, found, strict=True))


class PlannedPart:
    """A part of the transformer, and its planned layers."""

    def __init__(
        self, architecture: Architecture, number: int, name: str, layers: dict[str, nn.Module], states: States
    ):
        self.architecture, self.number, self.name, self.layers, self.states = architecture, number, name, layers, states

    def outputs(self, rows: Rows, given: list[mx.array], run: Run) -> list[mx.array]:
        """What it passes on for ``rows``, its planned layers run by ``run``; lazy."""
        assert isinstance(self.architecture, Divisible)
        with replaced(self.architecture, self.layers, run):
            return self.architecture.parts(*self.states.arguments(rows))[self.number](given)

    def passed(self, given: Kept, run: Callable[..., mx.array]) -> Kept:
        """What it passes on for all rows; ``run(steps, name, layer, x)`` runs its planned layers."""
        kept = None
        for rows in self.states.batches(self.states.all):
            found = self.outputs(rows, given.get(rows), partial(run, self.states.steps[rows]))
            kept = kept or self.states.kept(found)
            kept.put(rows, found, self.name)
        assert kept is not None
        return kept


class _Replaced(Wrapper):
    """A layer in whose place ``run`` is called."""

    def __init__(self, inner: nn.Module, name: str, run: Run):
        super().__init__(inner)
        self._name, self._run = name, run

    def __call__(self, x: mx.array) -> mx.array:
        return self._run(self._name, self["inner"], x)


@contextmanager
def replaced(architecture: Architecture, names: Iterable[str], run: Run) -> Iterator[None]:
    """Call ``run`` in the places of layers, in the context."""
    places = {name: parent_of(architecture.module, architecture.path(name)) for name in names}
    own = {name: parent[key] for name, (parent, key) in places.items()}
    try:
        for name, (parent, key) in places.items():
            parent[key] = _Replaced(own[name], name, run)
        yield
    finally:
        for name, (parent, key) in places.items():
            parent[key] = own[name]


@contextmanager
def in_float32(architecture: Architecture, number: int) -> Iterator[None]:
    """Hold the weights of one part in float32, in the context: 16 bits overflow in a backward pass."""
    blocks = tuple(f"{architecture.path(name)}." for name in architecture.blocks())
    own = blocks[number - 1 : number] if 0 < number <= len(blocks) else None

    def chosen(path: str) -> bool:
        return path.startswith(own) if own is not None else not path.startswith(blocks)

    kept = {path: w for path, w in weights(architecture.module).items() if chosen(path)}
    try:
        architecture.module.update(tree_unflatten([(path, w.astype(mx.float32)) for path, w in kept.items()]))
        yield
    finally:
        architecture.module.update(tree_unflatten(list(kept.items())))
