"""Apply a quantized model's weights and activation rules to a loaded transformer, for the time of a context."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from calib.activations.taps import TapPoint, tapped
from calib.base.device import on_metal
from calib.models.architecture import Architecture, parent_of
from calib.models.clock import Clock
from calib.models.memory import device_memory, nbytes
from calib.models.model import DiffusionModel, weights
from calib.models.packed import Packed
from calib.models.rotation import rotated
from calib.models.streamed import Streamed
from calib.models.wrapper import Wrapper, holds
from calib.quantization.model import InputRule, QuantizedModel

import mlx.core as mx
from mlx import nn


class PhasedLinear(nn.Module):
    """A layer with separate copies of its weights for the steps of some phases."""

    def __init__(self, inner: nn.Module, copies: Mapping[int, nn.Module], clock: Clock):
        super().__init__()
        self["inner"] = inner
        self._copies, self._clock = dict(copies), clock

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self._copies.get(self._clock.step, self["inner"])(x)
        return y

    def __getattr__(self, key: str) -> Any:
        return super().__getattr__(key) if key in self else getattr(self["inner"], key)

    def __setattr__(self, key: str, value: Any) -> None:
        # FLUX's unified blocks set mlp.fc2.bias in every forward: it must reach every copy.
        if "inner" in self and holds(self["inner"], key):
            for layer in (self["inner"], *self._copies.values()):
                setattr(layer, key, value)
        else:
            super().__setattr__(key, value)


class Rotated(Wrapper):
    """A layer that reads its input rotated in blocks, as its packed weights were."""

    def __init__(self, inner: nn.Module, block: int):
        super().__init__(inner)
        self._block = block

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self["inner"](rotated(x, self._block))
        return y


class Unpacked(Wrapper):
    """A linear layer with packed weights in place of its own, dequantized anew in each forward so as not to stay."""

    def __init__(self, inner: nn.Linear, packed: Packed):
        super().__init__(inner)
        self._packed = packed

    def __call__(self, x: mx.array) -> mx.array:
        inner = self["inner"]
        y = x @ self._packed.dequantize(inner.weight.dtype).T
        return y + inner.bias if "bias" in inner else y


class Dequantized(nn.Module):
    """A dense layer with the dequantized weights, made anew in each forward where they are too many to stay."""

    def __init__(self, packed: Packed, dtype: mx.Dtype):
        super().__init__()
        self._packed, self._dtype = packed, dtype

    def __call__(self, x: mx.array) -> mx.array:
        weight = self._packed.dequantize(self._dtype)
        y: mx.array = mx.addmm(self["bias"], x, weight.T) if "bias" in self else x @ weight.T
        return y


@contextmanager
def unpacked(architecture: Architecture, packed: Mapping[str, Packed]) -> Iterator[None]:
    """Run layers with ``packed`` weights, and everything else as it is, for the time of the context."""
    places = {name: parent_of(architecture.module, architecture.path(name)) for name in packed}
    own = {name: parent[key] for name, (parent, key) in places.items()}
    try:
        for name, (parent, key) in places.items():
            parent[key] = Unpacked(own[name], packed[name])
        with architecture.without(packed) if isinstance(architecture, Streamed) else nullcontext():
            yield
    finally:
        for name, (parent, key) in places.items():
            parent[key] = own[name]


def runs_dense() -> bool:
    """Whether quantized layers run by default as dense ones with the dequantized weights: everywhere but on Metal.

    On a CPU quantized products are slow. On CUDA MLX 0.32.4 compiles for a minute at every new bit-width, and a 2-bit
    product failed there (measured on an H100).
    """
    return not on_metal()


def stays_dense(model: DiffusionModel) -> bool:
    """Whether dequantized weights fit into memory beside the model's own, which stay loaded."""
    return model.streamed is None and 2 * nbytes(model.transformer) <= device_memory()


def as_module(layer: Packed, bias: mx.array | None, dtype: mx.Dtype, dequantize: bool, stays: bool = True) -> nn.Module:
    """A layer with packed weights on MLX's quantized kernels, or with ``dequantize`` a dense one of equal weights.

    MLX's quantized products are 14 to 85 times slower than dense ones on a CPU.

    Args:
        stays: whether the dequantized weights stay in memory, or are made anew in each forward.
    """
    rows, columns = layer.weight.shape[0], layer.weight.shape[1] * 32 // layer.bits
    module: nn.Module
    # The modules' initial weights are lazy, and replaced before anything computes them.
    if dequantize and not stays:
        module = Dequantized(layer, dtype)
    elif dequantize:
        module = nn.Linear(columns, rows, bias=False)
        module.weight = layer.dequantize(dtype)
    else:
        module = nn.QuantizedLinear(columns, rows, False, layer.group_size, layer.bits)
        module.weight, module.scales, module.biases = layer.weight, layer.scales, layer.biases
    if bias is not None:
        module.bias = bias.astype(dtype)
    return Rotated(module, layer.rotation) if layer.rotation and not dequantize else module


@contextmanager
def applied(model: DiffusionModel, quantized: QuantizedModel, dequantize: bool | None = None) -> Iterator[None]:
    """Turn ``model`` into the quantized one, which follows the denoising step, for the time of the context.

    Args:
        dequantize: run dense layers with the dequantized weights; None: :func:`runs_dense`.
    """
    clock = Clock(quantized.timesteps)
    with ExitStack() as stack:
        dense = runs_dense() if dequantize is None else dequantize
        stack.enter_context(_weights_of(model, quantized, clock, dense))
        if quantized.inputs:
            points = [TapPoint(name, "") for name in quantized.inputs]
            stack.enter_context(tapped(model.architecture, points, _recorder(quantized.inputs, clock)))
        yield


def _recorder(inputs: Mapping[str, InputRule], clock: Clock) -> Callable[[str, mx.array], mx.array]:
    def record(name: str, x: mx.array) -> mx.array:
        return inputs[name].apply(x, clock.step)

    return record


@contextmanager
def _weights_of(model: DiffusionModel, quantized: QuantizedModel, clock: Clock, dequantize: bool) -> Iterator[None]:
    """Replace the layers by quantized ones, the other parameters by 16-bit ones, and set a clock, in the context."""
    architecture, stays, streamed = model.architecture, stays_dense(model), model.streamed
    own = architecture.layers()
    types = {path: weight.dtype for path, weight in weights(model.transformer).items()}
    others = {path: weight.astype(types[path]) for path, weight in quantized.weights.items()}
    paths = {name: architecture.path(name) for name in quantized.layers}
    biases = {name: own[name].get("bias") for name in quantized.layers}
    changed = {name: quantized.weights.get(f"{paths[name]}.bias", bias) for name, bias in biases.items()}
    places = {name: parent_of(model.transformer, path) for name, path in paths.items()}
    unread = nullcontext() if streamed is None else streamed.without(quantized.layers)
    with model.changed(lambda path, weight: others.get(path, weight)), unread:
        try:
            model.clock = clock
            for name, layer in quantized.layers.items():
                module = as_module(layer, changed[name], model.dtype, dequantize, stays)
                copies: dict[int, nn.Module] = {}
                for phase, kept in quantized.copies.items():
                    if name in kept:
                        first, last = quantized.phases[phase]
                        own_copy = as_module(kept[name], changed[name], model.dtype, dequantize, stays)
                        copies |= dict.fromkeys(range(first, last + 1), own_copy)
                if copies:
                    module = PhasedLinear(module, copies, clock)
                parent, key = places[name]
                parent[key] = module
            if streamed is None:
                mx.eval(model.transformer.parameters())
            yield
        finally:
            model.clock = None
            for name, (parent, key) in places.items():
                parent[key] = own[name]
