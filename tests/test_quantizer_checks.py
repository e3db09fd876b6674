"""What a quantizer of the user's own may not do: return other weights than planned, or change the model for others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import static
from calib.analysis.steps import StepPlan
from calib.base.errors import CalibError
from calib.models.model import DiffusionModel, ModelDtype
from calib.models.packed import Packed
from calib.quantization import rtn
from calib.quantization.build import Calibration, quantize_layers
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import plain_dit
import pytest
from mlx import nn

PLAN = LayerPlan(4, 16, group_size=32)


def small_model() -> DiffusionModel:
    """A model of its own for each test: some change it."""
    return plain_dit.load("plain_dit", ModelDtype.FLOAT32, 1.0, (16, 16), depth=1)


def quantized(quantizer: Callable[[QuantizerInput], Quantized], model: DiffusionModel) -> list[str]:
    """The notes of a model that is quantized by ``quantizer``, every layer as :data:`PLAN` has it."""
    plan = dict.fromkeys(model.architecture.layers(), PLAN)
    source = Calibration(None, static, None)
    return quantize_layers(model, plan, StepPlan(), quantizer, source, {})[1]


def with_first(change: Callable[[Packed], Any]) -> Callable[[QuantizerInput], Quantized]:
    """Rounds to nearest, and changes the first layer's weights by ``change``."""

    def quantizer(work: QuantizerInput) -> Quantized:
        made = rtn.quantize(work)
        first = next(iter(made.layers))
        made.layers[first] = change(made.layers[first])
        return made

    return quantizer


def without_first(work: QuantizerInput) -> Quantized:
    made = rtn.quantize(work)
    return Quantized(dict(list(made.layers.items())[1:]))


def with_another(work: QuantizerInput) -> Quantized:
    made = rtn.quantize(work)
    return Quantized({**made.layers, "nobody": next(iter(made.layers.values()))})


def cut(packed: Packed) -> Packed:
    return replace(packed, weight=packed.weight[:-1])


def wide(packed: Packed) -> Packed:
    return replace(packed, scales=packed.scales.astype(mx.float32))


WRONG = {
    "missing": (without_first, "returned no weights for "),
    "unknown": (with_another, "returned layer 'nobody', which it was not given"),
    "dense": (with_first(lambda packed: packed.dequantize()), "returned array for "),
    "bits": (with_first(lambda packed: replace(packed, bits=8)), "returned 8 bits in groups of 32 for "),
    "shape": (
        with_first(cut),
        r"returned uint32 of shape \(63, 8\) for time_mlp.0; it must be uint32 of shape \(64, 8\)",
    ),
    "float32": (with_first(wide), "returned float32 of shape .* it must be float16 of shape "),
}


@pytest.mark.parametrize("fault", WRONG)
def test_refused(fault: str) -> None:
    quantizer, words = WRONG[fault]
    with pytest.raises(CalibError, match=words) as error:
        quantized(quantizer, small_model())
    assert "\n" not in str(error.value)


def replaced(work: QuantizerInput) -> None:
    for layer in work.layers.values():
        layer.weight = 2 * layer.weight


def in_place(work: QuantizerInput) -> None:
    next(iter(work.layers.values())).weight[0] = 7.0


@pytest.mark.parametrize("change", [replaced, in_place])
def test_model_is_put_back(change: Callable[[QuantizerInput], None]) -> None:
    model = small_model()
    before = {name: mx.array(layer.weight.tolist()) for name, layer in model.architecture.layers().items()}

    def quantizer(work: QuantizerInput) -> Quantized:
        made = rtn.quantize(work)
        mx.eval([[p.weight, p.scales, p.biases] for p in made.layers.values()])
        change(work)
        return made

    (note,) = (note for note in quantized(quantizer, model) if "put back" in note)
    assert "changed weights of the model itself" in note
    for name, layer in model.architecture.layers().items():
        assert mx.array_equal(layer.weight, before[name])


def test_no_note_without_a_change() -> None:
    assert not [note for note in quantized(rtn.quantize, small_model()) if "put back" in note]


def test_replaced_modules_are_refused() -> None:
    model = small_model()

    def quantizer(work: QuantizerInput) -> Quantized:
        made = rtn.quantize(work)
        work.architecture.module.update_modules(
            {"head": nn.Linear(*reversed(work.architecture.module.head.weight.shape))}
        )
        return made

    with pytest.raises(CalibError, match="replaced modules of the model"):
        quantized(quantizer, model)
