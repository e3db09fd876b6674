"""Checks of what a quantizer did: it must return what the plan asks for, and leave the model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from calib.base.errors import CalibError, suggest
from calib.models.model import DiffusionModel, weights
from calib.models.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
from mlx.utils import tree_unflatten


def check_quantized(made: Quantized, work: QuantizerInput) -> None:
    """Raise where ``made`` is not one packed weight of the planned shape for each layer of ``work``, and no other.

    Raises:
        CalibError: names the layer, and what is expected of it.
    """
    if unknown := [name for name in made.layers if name not in work.layers]:
        hint = suggest(unknown[0], work.layers, list_all=False)
        raise CalibError(f"the quantizer returned layer {unknown[0]!r}, which it was not given.{hint}")
    for name, layer in work.layers.items():
        if name not in made.layers:
            raise CalibError(f"the quantizer returned no weights for {name}; it must return all of work.layers")
        packed, plan = made.layers[name], work.plan[name]
        if not isinstance(packed, Packed):
            raise CalibError(f"the quantizer returned {type(packed).__name__} for {name}; it must be a Packed")
        if (packed.bits, packed.group_size) != (plan.weight_bits, plan.group_size):
            found = f"{packed.bits} bits in groups of {packed.group_size}"
            wanted = f"{plan.weight_bits} bits in groups of {plan.group_size}"
            raise CalibError(f"the quantizer returned {found} for {name}; the plan has {wanted}")
        rows, columns = layer.weight.shape
        shapes = (packed.weight.shape, packed.scales.shape, packed.biases.shape)
        wide, groups = (rows, columns * plan.weight_bits // 32), (rows, columns // plan.group_size)
        if shapes != (wide, groups, groups):
            wanted = f"they must be {wide}, {groups} and {groups}"
            raise CalibError(f"the quantizer returned arrays of shapes {shapes} for {name}; {wanted}")
        if packed.scales.dtype != work.dtype or packed.biases.dtype != work.dtype:
            found, kind = (str(dtype).rpartition(".")[2] for dtype in (packed.scales.dtype, work.dtype))
            raise CalibError(f"the quantizer returned {found} scales for {name}; they must be {kind}")
    known = weights(work.architecture.module)
    if strange := [path for path in made.weights if path not in known]:
        hint = suggest(strange[0], known, list_all=False)
        raise CalibError(f"the quantizer returned other weights at {strange[0]!r}, which the model has not.{hint}")


@contextmanager
def model_kept(model: DiffusionModel) -> Iterator[list[str]]:
    """Restore the model's weights at the end; yields a list that then holds the paths of those that had changed.

    Full-precision pictures are drawn with the same model, and shared by all runs.

    Raises:
        CalibError: modules were replaced.
    """
    modules = {path: id(module) for path, module in model.transformer.named_modules()}
    own = weights(model.transformer)
    # Handles of their own, without copies: ``weight[...] = 0`` changes an array in place.
    kept = {path: array.reshape(array.shape) for path, array in own.items()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        now = weights(model.transformer)
        for path, array in kept.items():
            if now.get(path) is not own[path] or not mx.array_equal(own[path], array, equal_nan=True).item():
                changed.append(path)
        if now.keys() == kept.keys():
            model.transformer.update(tree_unflatten([(path, kept[path]) for path in changed]))
    if modules != {path: id(module) for path, module in model.transformer.named_modules()}:
        raise CalibError("the quantizer replaced modules of the model; it must leave the model as it is")
