"""Watch the inputs of layers in a backward pass: their gradients, added up at once rather than kept."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from calib.activations.taps import TapPoint
from calib.analysis.grid import Grid
from calib.analysis.sensitivities import INPUT_BITS
from calib.models.architecture import parent_of
from calib.models.model import DiffusionModel, weights
from calib.models.wrapper import Wrapper

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten


@contextmanager
def in_float32(model: DiffusionModel, chosen: Callable[[str], bool] = lambda path: True) -> Iterator[None]:
    """Compute with the weights of ``chosen`` paths in float32 in the context; 16 bits overflow in a backward pass."""
    own, dtype = {path: w for path, w in weights(model.transformer).items() if chosen(path)}, model.dtype
    try:
        model.transformer.update(tree_unflatten([(path, w.astype(mx.float32)) for path, w in own.items()]))
        model.dtype = mx.float32
        yield
    finally:
        model.dtype = dtype
        model.transformer.update(tree_unflatten(list(own.items())))


@mx.custom_function
def _beside(x: mx.array, zero: mx.array) -> mx.array:
    """x + zero, where ``zero`` is a variable that is zero: nothing is computed."""
    return x


@_beside.vjp
def _to_both(given: Sequence[mx.array], gradient: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    return gradient, gradient


def _with(x: mx.array, zero: mx.array | None) -> mx.array:
    """``x``, of which ``zero`` has the gradient, too; in the type of both."""
    if zero is None:
        return x
    return cast(mx.array, _beside(x.astype(zero.dtype), zero))


class _Watched(Wrapper):
    """A layer whose input and output ``watch`` sees, and may change."""

    def __init__(self, inner: nn.Module, name: str, watch: "Watch"):
        super().__init__(inner)
        self._name, self._watch = name, watch

    def __call__(self, x: mx.array) -> mx.array:
        return self._watch.see_output(self._name, self["inner"](self._watch.see_input(self._name, x)))


@dataclass(frozen=True)
class Zeros:
    """The variables that are added to inputs, by tap, and to outputs, by layer: without memory of their own."""

    inputs: dict[str, mx.array] = field(default_factory=dict)
    outputs: dict[str, mx.array] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalGradients:
    """Gradients by weights, by inputs of taps (beside these) and by what is given; mean squares of those by outputs."""

    weights: dict[str, mx.array]
    inputs: dict[str, tuple[mx.array, mx.array]]
    outputs: dict[str, mx.array]
    given: list[mx.array]


class Watch:
    """Taps on a model's layers for the time of the context, and the variables of a backward pass.

    A variable of zeros is added to the input of each tap, once for all layers that read the same array, and to the
    output of each layer; its gradient is that of the input or output.
    """

    def __init__(self, model: DiffusionModel, layers: Mapping[str, nn.Module], points: Sequence[TapPoint]):
        self._architecture = model.architecture
        self._layers = dict(layers)
        self._tap_of = {name: point.name for point in points for name in point.names}
        self._replaced: list[tuple[Any, str | int, nn.Module]] = []
        self._zeros = Zeros()
        self._seen: dict[str, tuple[mx.array, mx.array]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> "Watch":
        for name in self._tap_of:
            parent, key = parent_of(self._architecture.module, self._architecture.path(name))
            self._replaced.append((parent, key, parent[key]))
            parent[key] = _Watched(parent[key], name, self)
        return self

    def __exit__(self, *error: object) -> None:
        for parent, key, child in reversed(self._replaced):
            parent[key] = child

    def zeros(self, layers: Collection[str]) -> Zeros:
        """Variables for the inputs of the last forward, and for the outputs of those of ``layers`` that ran in it."""
        zero = mx.array(0.0)
        return Zeros(
            {tap: mx.broadcast_to(zero, x.shape) for tap, (x, _) in self._seen.items()},
            {name: mx.broadcast_to(zero, shape) for name, shape in self._shapes.items() if name in layers},
        )

    def gradients(
        self,
        layers: Mapping[str, nn.Module],
        loss: Callable[[list[mx.array]], mx.array],
        given: list[mx.array],
        of_weights: bool = True,
    ) -> LocalGradients:
        """The gradients of ``loss(given)``, a number; by the weights of ``layers`` only where asked for. Lazy."""

        def run(
            own: dict[str, mx.array], inputs: dict[str, mx.array], outputs: dict[str, mx.array], given: list[mx.array]
        ) -> tuple[mx.array, dict[str, mx.array]]:
            with self.given(own, Zeros(inputs, outputs)):
                return loss(given), self.inputs()

        own = {name: layer.weight for name, layer in layers.items()} if of_weights else {}
        run(own, {}, {}, given)  # nothing is computed: for the shapes of inputs and outputs
        zeros = self.zeros(layers)
        (_, seen), (weights, inputs, outputs, by_given) = mx.value_and_grad(run, argnums=(0, 1, 2, 3))(
            own, zeros.inputs, zeros.outputs, given
        )
        squares = {name: mx.square(g.astype(mx.float32)).mean() for name, g in outputs.items()}
        return LocalGradients(weights, {tap: (x, inputs[tap]) for tap, x in seen.items()}, squares, by_given)

    def inputs(self) -> dict[str, mx.array]:
        """The input of each tap in the last forward."""
        return {tap: x for tap, (x, _) in self._seen.items()}

    @contextmanager
    def given(self, own: Mapping[str, mx.array], zeros: Zeros) -> Iterator[None]:
        """Run a forward with these variables in place of the model's own weights, and beside inputs and outputs."""
        kept = {name: (layer.weight, layer.get("bias")) for name, layer in self._layers.items()}
        self._zeros, self._seen, self._shapes = zeros, {}, {}
        try:
            for name, weight in own.items():
                self._layers[name].weight = weight
            yield
        finally:
            for name, (weight, bias) in kept.items():
                self._layers[name].weight = weight
                if bias is not None:  # FLUX's unified blocks set one in every forward
                    self._layers[name].bias = bias

    def see_input(self, name: str, x: mx.array) -> mx.array:
        """What a layer is to read in place of ``x``."""
        tap, zeros = self._tap_of[name], self._zeros.inputs
        if tap not in self._seen or self._seen[tap][0] is not x:
            self._seen[tap] = (x, _with(x, zeros.get(tap)))
        return self._seen[tap][1]

    def see_output(self, name: str, y: mx.array) -> mx.array:
        """What a layer is to give in place of ``y``."""
        self._shapes[name] = y.shape
        return _with(y, self._zeros.outputs.get(name))


def input_errors(x: mx.array, gradient: mx.array, low: float, high: float) -> mx.array:
    """Σ gradient² Δx² where ``x`` is quantized over [low, high], for each of :data:`INPUT_BITS`; lazy."""
    x, gradient = x.astype(mx.float32), gradient.astype(mx.float32)
    changes = (Grid.over(low, high, bits).apply_mx(x) - x for bits in INPUT_BITS)
    return mx.stack([mx.square(gradient * change).sum() for change in changes])
