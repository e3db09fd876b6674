"""Watch the inputs of layers in a backward pass: their gradients, added up at once rather than kept."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from calib.activations.taps import InputTap, TapPoint
from calib.analysis.grid import Grid
from calib.analysis.sensitivities import INPUT_BITS
from calib.models.architecture import parent_of
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten


@contextmanager
def in_float32(model: DiffusionModel) -> Iterator[None]:
    """Compute with the model's weights in float32 within the context; 16 bits overflow in a backward pass."""
    own, dtype = weights(model.transformer), model.dtype
    try:
        model.transformer.update(tree_unflatten([(path, w.astype(mx.float32)) for path, w in own.items()]))
        model.dtype = mx.float32
        yield
    finally:
        model.dtype = dtype
        model.transformer.update(tree_unflatten(list(own.items())))


class Watch:
    """Taps on the inputs of a model's layers for the time of the context, and the variables of a backward pass.

    A variable of zeros is added to the input of each tap, once for all layers that read the same array; its gradient is
    that of the input.
    """

    def __init__(self, model: DiffusionModel, layers: Mapping[str, nn.Module], points: Sequence[TapPoint]):
        self._architecture = model.architecture
        self._layers = dict(layers)
        self._tap_of = {name: point.name for point in points for name in point.names}
        self._replaced: list[tuple[Any, str | int, nn.Module]] = []
        self._zeros: Mapping[str, mx.array] = {}
        self._seen: dict[str, tuple[mx.array, mx.array]] = {}

    def __enter__(self) -> "Watch":
        for name in self._tap_of:
            parent, key = parent_of(self._architecture.module, self._architecture.path(name))
            self._replaced.append((parent, key, parent[key]))
            parent[key] = InputTap(parent[key], name, self._see)
        return self

    def __exit__(self, *error: object) -> None:
        for parent, key, child in reversed(self._replaced):
            parent[key] = child

    def weights(self) -> dict[str, mx.array]:
        """The variables that stand for the weights."""
        return {name: layer.weight for name, layer in self._layers.items()}

    def zeros(self) -> dict[str, mx.array]:
        """The variables that are added to inputs: as in the last forward, without memory of their own."""
        return {tap: mx.broadcast_to(mx.array(0.0), x.shape) for tap, (x, _) in self._seen.items()}

    def inputs(self) -> dict[str, mx.array]:
        """The input of each tap in the last forward."""
        return {tap: x for tap, (x, _) in self._seen.items()}

    @contextmanager
    def given(self, own: Mapping[str, mx.array], zeros: Mapping[str, mx.array]) -> Iterator[None]:
        """Run a forward with these variables in place of the model's own weights, and beside its inputs."""
        kept = {name: (layer.weight, layer.get("bias")) for name, layer in self._layers.items()}
        self._zeros, self._seen = zeros, {}
        try:
            for name, weight in own.items():
                self._layers[name].weight = weight
            yield
        finally:
            for name, (weight, bias) in kept.items():
                self._layers[name].weight = weight
                if bias is not None:  # FLUX's unified blocks set one in every forward
                    self._layers[name].bias = bias

    def _see(self, name: str, x: mx.array) -> mx.array:
        tap = self._tap_of[name]
        if tap not in self._seen or self._seen[tap][0] is not x:
            self._seen[tap] = (x, x + self._zeros[tap] if tap in self._zeros else x)
        return self._seen[tap][1]


def input_errors(x: mx.array, gradient: mx.array, low: float, high: float) -> mx.array:
    """Σ gradient² Δx² where ``x`` is quantized over [low, high], for each of :data:`INPUT_BITS`; lazy."""
    x, gradient = x.astype(mx.float32), gradient.astype(mx.float32)
    changes = (Grid.over(low, high, bits).apply_mx(x) - x for bits in INPUT_BITS)
    return mx.stack([((gradient * change) ** 2).sum() for change in changes])
