"""Watch the inputs and outputs of layers in a backward pass, without keeping them.

MLX gives gradients of what is differentiated, and nothing on the way. Functions with gradients of their own sit on the
way here: the "gradient" of a number that has no effect is a sum over the gradients that pass by.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from calib.activations.taps import TapPoint
from calib.models.architecture import parent_of
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

#: Bit-widths at which the input of a layer may be quantized.
INPUT_BITS = (4, 6, 8)

_custom: Any = mx.custom_function


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


@_custom  # type: ignore[untyped-decorator]
def _input(x: mx.array, errors: mx.array, low: mx.array, high: mx.array) -> mx.array:
    """``x``; the gradient of ``errors`` is Σ (∂/∂x)² Δx² where ``x`` is quantized over [low, high], by bit-width."""
    return x


@_input.vjp  # type: ignore[untyped-decorator]
def _input_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    x, _, low, high = primals
    squared = cotangent.astype(mx.float32) ** 2
    found = []
    for bits in INPUT_BITS:
        scale = mx.maximum(high - low, 1e-12) / (2**bits - 1)
        zero = mx.round(-low / scale)
        rounded = (mx.clip(mx.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
        found.append((squared * (rounded - x) ** 2).sum())
    return cotangent, mx.stack(found), mx.zeros_like(low), mx.zeros_like(high)


@_custom  # type: ignore[untyped-decorator]
def _output(y: mx.array, x: mx.array, columns: mx.array) -> mx.array:
    """``y``; the gradient of ``columns`` is Σ x² · mean over outputs of (∂/∂y)²."""
    return y


@_output.vjp  # type: ignore[untyped-decorator]
def _output_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    x = primals[1]
    weight = (cotangent.astype(mx.float32) ** 2).mean(axis=-1, keepdims=True)
    found = (x.astype(mx.float32) ** 2 * weight).reshape(-1, x.shape[-1]).sum(axis=0)
    return cotangent, mx.zeros_like(x), found


class _Watched(nn.Module):
    """Calls a linear layer on its watched input, and watches its output."""

    def __init__(self, inner: nn.Module, name: str, tap: str, watch: "Watch"):
        super().__init__()
        self["inner"] = inner
        self._name, self._tap, self._watch = name, tap, watch

    def __call__(self, x: mx.array) -> Any:
        x = self._watch.see(self._tap, x)
        return self._watch.weigh(self._name, self["inner"](x), x)

    def __getattr__(self, key: str) -> Any:
        return super().__getattr__(key) if key in self else getattr(self["inner"], key)

    def __setattr__(self, key: str, value: Any) -> None:
        # FLUX's unified blocks set mlp.fc2.bias in every forward: it must reach the layer itself.
        if "inner" in self and key in self["inner"]:
            setattr(self["inner"], key, value)
        else:
            super().__setattr__(key, value)


class Watch:
    """Wrappers around the layers of a model, for the time of the context, and the variables of a backward pass."""

    def __init__(self, model: DiffusionModel, layers: Mapping[str, nn.Module], points: Sequence[TapPoint]):
        self._architecture = model.architecture
        self._layers = dict(layers)
        self._tap_of = {name: point.name for point in points for name in point.names}
        self._replaced: list[tuple[Any, str | int, nn.Module]] = []
        self._own: dict[str, Any] = {}
        self._seen: dict[str, tuple[mx.array, mx.array]] = {}
        self.ranges: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> "Watch":
        for name in self._tap_of.keys() | self._layers.keys():
            parent, key = parent_of(self._architecture.module, self._architecture.path(name))
            self._replaced.append((parent, key, parent[key]))
            parent[key] = _Watched(parent[key], name, self._tap_of.get(name, ""), self)
        return self

    def __exit__(self, *error: object) -> None:
        for parent, key, child in reversed(self._replaced):
            parent[key] = child

    def variables(self) -> dict[str, dict[str, mx.array]]:
        """What gradients are taken of: weights, and zeros whose gradients are sums over a watched array."""
        return {
            "weights": {name: layer.weight for name, layer in self._layers.items()},
            "inputs": {tap: mx.zeros(len(INPUT_BITS)) for tap in set(self._tap_of.values())},
            "columns": {name: mx.zeros(layer.weight.shape[-1]) for name, layer in self._layers.items()},
        }

    @contextmanager
    def given(self, own: dict[str, Any]) -> Iterator[None]:
        """Run a forward with these variables in place of the model's own weights."""
        kept = {name: (layer.weight, layer.get("bias")) for name, layer in self._layers.items()}
        self._own, self._seen = own, {}
        try:
            for name, weight in own["weights"].items():
                self._layers[name].weight = weight
            yield
        finally:
            for name, (weight, bias) in kept.items():
                self._layers[name].weight = weight
                if bias is not None:
                    self._layers[name].bias = bias

    def see(self, tap: str, x: mx.array) -> mx.array:
        """The input of a layer, watched once for all layers that read the same array."""
        if tap not in self._own["inputs"]:
            return x
        if tap in self._seen and self._seen[tap][0] is x:
            return self._seen[tap][1]
        low, high = (mx.array(bound, mx.float32) for bound in self.ranges[tap])
        watched: mx.array = _input(x, self._own["inputs"][tap], low, high)
        self._seen[tap] = (x, watched)
        return watched

    def weigh(self, name: str, y: mx.array, x: mx.array) -> mx.array:
        """The output of a layer, watched for what reaches the picture by each column of its weights."""
        if name not in self._own["columns"]:
            return y
        weighed: mx.array = _output(y, mx.stop_gradient(x), self._own["columns"][name])
        return weighed
