"""Checks of what a quantizer did: it must return what the plan asks for, and leave the model as it was."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from calib.analysis.rules import step_ranges
from calib.base.errors import CalibError, suggest
from calib.base.option import Option, Unfit, kind_of, several, whole_number
from calib.models.model import DiffusionModel, weights
from calib.models.packed import Packed
from calib.models.rotation import BLOCKS
from calib.quantization.model import InputRule, QuantizedModel
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten


def checked_quantizer(quantizer: Callable[..., Any], named: str = "the quantizer") -> Option[Quantized]:
    """``quantizer``, with checks of what it returns; ``named`` names it, for errors."""
    if isinstance(quantizer, Option):
        return quantizer
    return Option(named, quantizer, ("work",), "a Quantized of work.layers, an empty one for none", _quantized)


def _quantized(found: Any, work: QuantizerInput) -> Quantized:
    """What a quantizer returned, packed weights by layer alone or a Quantized, with NumPy's values as MLX's."""
    made = Quantized(dict(found)) if isinstance(found, Mapping) else found
    if not isinstance(made, Quantized):
        raise Unfit(f"returned {kind_of(found)}")
    if unknown := [name for name in made.layers if name not in work.layers]:
        hint = suggest(unknown[0], work.layers, list_all=False)
        raise Unfit(f"returned layer {unknown[0]!r}, which it was not given.{hint}")
    if lacking := [name for name in work.layers if name not in made.layers]:
        raise Unfit(f"returned no weights for {lacking[0]}, one of work.layers")
    known = weights(work.architecture.module)
    if strange := [path for path in made.weights if path not in known]:
        hint = suggest(strange[0], known, list_all=False)
        raise Unfit(f"returned other weights at {strange[0]!r}, which the model has not.{hint}")
    others = {path: _array(value, f"at {path!r}", known[path].shape) for path, value in made.weights.items()}
    return Quantized(
        {name: _packed(name, made.layers[name], work) for name in work.layers},
        others,
        {name: step_ranges(ranges) for name, ranges in made.ranges.items()},
        _texts(made.notes),
        _of_channels(made.divisors, made, work, "divisors"),
        _of_channels(made.shifts, made, work, "shifts"),
        _rotations(made, work),
        _texts(made.drawn),
    )


def _rotations(made: Quantized, work: QuantizerInput) -> dict[str, int]:
    """Sizes of the blocks in which inputs are rotated, by layer."""
    checked = {}
    for name, size in dict(made.rotations).items():
        if name not in work.layers or name not in made.ranges:
            raise Unfit(f"returned a rotation of {name!r}, of which it returned no layer with ranges")
        checked[name] = _block(size, f"a rotation of {name}", work.layers[name].weight.shape[1])
    return checked


def _block(size: Any, which: str, columns: int) -> int:
    block = whole_number(size, which)
    if block not in BLOCKS or columns % block:
        raise Unfit(f"returned {which} in blocks of {block}; they must be {BLOCKS} and divide its {columns} columns")
    return block


def _texts(found: Any) -> list[str]:
    return [found] if isinstance(found, str) else list(map(str, several(found)))


def _of_channels(found: Any, made: Quantized, work: QuantizerInput, what: str) -> dict[str, tuple[float, ...]]:
    """Numbers of an input's channels, by layer."""
    checked = {}
    for name, values in dict(found).items():
        own = tuple(map(float, several(values)))
        if name not in work.layers or name not in made.ranges:
            raise Unfit(f"returned {what} of {name!r}, of which it returned no layer with ranges")
        if len(own) != work.layers[name].weight.shape[1] or not np.isfinite(own).all() or (what[0] == "d" and 0 in own):
            raise Unfit(f"returned {what} of {name} that are not a finite number for each channel")
        checked[name] = own
    return checked


def _packed(name: str, found: Any, work: QuantizerInput) -> Packed:
    """The packed weights of a layer, which must be those of its plan."""
    if not isinstance(found, Packed):
        raise Unfit(f"returned {kind_of(found)} for {name}, no Packed")
    plan, (rows, columns) = work.plan[name], work.layers[name].weight.shape
    shape = tuple(whole_number(getattr(found, key), f"{name} has {key}=") for key in ("bits", "group_size"))
    if shape != (plan.weight_bits, plan.group_size):
        bits, size = shape
        wanted = f"{plan.weight_bits} bits in groups of {plan.group_size}"
        raise Unfit(f"returned {bits} bits in groups of {size} for {name}; the plan has {wanted}")
    groups = (rows, columns // plan.group_size)
    return Packed(
        _array(found.weight, f"for {name}", (rows, columns * plan.weight_bits // 32), mx.uint32),
        _array(found.scales, f"for {name}", groups, work.dtype),
        _array(found.biases, f"for {name}", groups, work.dtype),
        *shape,
        _block(found.rotation, f"{name} rotated", columns) if found.rotation else 0,
    )


def _array(found: Any, which: str, shape: tuple[int, ...], dtype: mx.Dtype | None = None) -> mx.array:
    """An array of MLX's, which may be given as one of NumPy's."""
    array = mx.array(found) if isinstance(found, np.ndarray) else found
    if not isinstance(array, mx.array):
        raise Unfit(f"returned {kind_of(found)} {which}, no array")
    if array.shape != shape or (dtype is not None and array.dtype != dtype):
        kind = "" if dtype is None else f"{str(dtype).rpartition('.')[2]} of "
        there = f"{str(array.dtype).rpartition('.')[2]} of shape {array.shape}"
        raise Unfit(f"returned {there} {which}; it must be {kind}shape {shape}")
    return array


def check_fits(quantized: QuantizedModel, model: DiffusionModel) -> None:
    """Raise where a quantized model that was read from a file is none of ``model``, whatever the file says."""
    layers, own = model.architecture.layers(), weights(model.transformer)
    packed = [(name, layer) for kept in (quantized.layers, *quantized.copies.values()) for name, layer in kept.items()]
    fits = {name: name in layers and _has_channels(layers[name], rule) for name, rule in quantized.inputs.items()} | {
        path: path in own and own[path].shape == array.shape for path, array in quantized.weights.items()
    }
    for name, layer in packed:
        shape = (layer.weight.shape[0], layer.weight.shape[1] * 32 // layer.bits)
        known = isinstance(layers.get(name), nn.Linear) and layers[name].weight.shape == shape
        fits[name] = fits.get(name, True) and known and (not layer.rotation or shape[1] % layer.rotation == 0)
    if strange := [name for name, holds in fits.items() if not holds]:
        raise CalibError(
            f"the quantized model has a {strange[0]} that {model.name} has not; calib quantize makes another"
        )


def _has_channels(layer: nn.Module, rule: InputRule) -> bool:
    """Whether a rule's divisors and shifts are of as many channels as a layer reads, or its rotation divides these."""
    lengths = {len(values) for values in (rule.divisors, rule.shifts) if values}
    if not lengths and not rule.rotation:
        return True
    if not isinstance(layer, nn.Linear) or (lengths and rule.rotation):
        return False
    columns = layer.weight.shape[1]
    return columns % rule.rotation == 0 if rule.rotation else lengths == {columns}


@contextmanager
def model_kept(model: DiffusionModel) -> Iterator[list[str]]:
    """Restore the model's weights at the end; yields a list that then holds the paths of those that had changed.

    Full-precision pictures are drawn with the same model, and shared by all runs.

    Raises:
        CalibError: modules were replaced.
    """
    modules = {path: id(module) for path, module in model.transformer.named_modules()}
    streamed, own = model.streamed, weights(model.transformer)
    own = own if streamed is None else streamed.staying(own)
    # Handles of their own, without copies: ``weight[...] = 0`` changes an array in place.
    kept = {path: array.reshape(array.shape) for path, array in own.items()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        now = weights(model.transformer)
        if streamed is not None:  # the others are read again
            now = streamed.staying(now)
            streamed.release()
        for path, array in kept.items():
            if now.get(path) is not own[path] or not mx.array_equal(own[path], array, equal_nan=True).item():
                changed.append(path)
        if now.keys() == kept.keys():
            model.transformer.update(tree_unflatten([(path, kept[path]) for path in changed]))
    if modules != {path: id(module) for path, module in model.transformer.named_modules()}:
        raise CalibError("the quantizer replaced modules of the model; it must leave the model as it is")
