"""Quantized models: built, saved, loaded, put into the network and taken out again, and run without calib."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.activations.taps import TapPoint, tapped
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges, static
from calib.analysis.steps import StepPlan
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import CalibError
from calib.base.files import checksum
from calib.dataset.timesteps import phase_bounds
from calib.models.architecture import Conditioning
from calib.models.clock import Clock
from calib.models.grids import searched
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, weights, weights_fingerprint
from calib.models.packed import Packed
from calib.quantization import rtn
from calib.quantization.apply import applied
from calib.quantization.build import Calibration, fitting, quantize_layers
from calib.quantization.check import check_fits
from calib.quantization.checkpoint import load, save
from calib.quantization.model import InputRule, QuantizedModel

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from diffusionkit.mlx.config import MMDiTConfig, PositionalEncoding
from diffusionkit.mlx.mmdit import MMDiT
from helpers import TINY, contents, flip_byte, run_here
from mlx import nn
from tiny_models import tiny_model
from watching import keep

#: Of eight steps.
TIMESTEPS = (1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)
PHASES = {name: (first, min(last, 7)) for name, (first, last) in phase_bounds(8).items()}
LAYER = "mm_block_1.image.mlp.fc1"
#: Of 256 columns, where most have 64.
WIDE = "mm_block_1.image.mlp.fc2"
LAYER_3 = "mm_block_2.image.mlp.fc1"


def plan_of(model: DiffusionModel) -> dict[str, LayerPlan]:
    """All layers of a model, with every kind of bits and groups that there is."""
    bits, names = (2, 3, 4, 5, 6, 8), model.architecture.layers()
    return {
        name: LayerPlan(bits[i % 6], (4, 6, 8, 16)[i % 4], group_size=GROUP_SIZES[i % 3])
        for i, name in enumerate(names)
    }


def steps_of(plan: Mapping[str, LayerPlan]) -> StepPlan:
    """Ranges that change in the middle, bits that change with the phase, and a few weights that do."""
    early = {name: max(2, 14 - layer.weight_bits - 4) if layer.weight_bits == 8 else 8 for name, layer in plan.items()}
    chosen = [name for name in plan if name.endswith(("adaln", "mlp.fc1", "final_layer.linear"))]
    return StepPlan(
        timesteps=TIMESTEPS,
        phases=PHASES,
        activation_bits={"early": dict.fromkeys(plan, 8), "late": dict.fromkeys(plan, 6)},
        weight_bits={
            "early": {name: early[name] for name in chosen},
            "mid": {name: plan[name].weight_bits for name in chosen},
            "late": {name: 3 for name in chosen},
        },
        ranges={name: StepRanges((0, 4), (-3.0, -2.5), (3.0, 4.0)) for name in plan},
    )


BARE = StepPlan(TIMESTEPS)


def built(
    model: DiffusionModel, plan: Mapping[str, LayerPlan], steps: StepPlan = BARE
) -> tuple[QuantizedModel, list[str]]:
    return quantize_layers(model, plan, steps, rtn.quantize, Calibration(None, static, None), {})


@pytest.fixture(scope="module", params=["sd3", "flux"])
def own(request: pytest.FixtureRequest, model: DiffusionModel) -> DiffusionModel:
    return tiny_model(model, request.param)


@pytest.fixture(scope="module")
def sd3(model: DiffusionModel) -> DiffusionModel:
    return tiny_model(model, "sd3")


@pytest.fixture(scope="module")
def quantized(own: DiffusionModel) -> QuantizedModel:
    """All that there can be: every bits and groups, ranges and bits that vary, copies for phases."""
    plan = plan_of(own)
    return built(own, plan, steps_of(plan))[0]


Inputs = tuple[mx.array, Conditioning]


@pytest.fixture(scope="module")
def inputs(model: DiffusionModel) -> Inputs:
    """Two states, and the text of two prompts."""
    text = model.encode(["red apple", "rocket"], 0)
    return mx.array(np.random.RandomState(0).randn(2, 8, 8, 16).astype(np.float32)), text


def output(model: DiffusionModel, inputs: Inputs, *timesteps: float) -> np.ndarray:
    """v at one timestep, 1000 unless told, or at one of each row."""
    times = mx.array(timesteps or (1000.0,))
    mx.eval(times)
    return np.array(model.velocity(*inputs, times))


def loss(plain: np.ndarray, found: np.ndarray) -> float:
    """‖v - v_q‖² / ‖v‖²."""
    return float(np.sum((plain - found).astype(np.float64) ** 2) / np.sum(plain.astype(np.float64) ** 2))


def identities(model: DiffusionModel) -> list[int]:
    return [id(module) for module in model.transformer.modules()]


# On disk


def check_same_packed(found: Packed, expected: Packed) -> None:
    assert (found.bits, found.group_size) == (expected.bits, expected.group_size)
    for part in ("weight", "scales", "biases"):
        one, other = getattr(found, part), getattr(expected, part)
        assert one.dtype == other.dtype
        assert mx.array_equal(one, other)


def check_same(found: QuantizedModel, expected: QuantizedModel) -> None:
    """Bit for bit."""
    assert set(found.layers) == set(expected.layers)
    for name, layer in expected.layers.items():
        check_same_packed(found.layers[name], layer)
    assert set(found.weights) == set(expected.weights)
    for path, array in expected.weights.items():
        assert found.weights[path].dtype == array.dtype
        assert mx.array_equal(found.weights[path], array), path
    assert found.inputs == expected.inputs
    assert (found.timesteps, found.phases, found.about) == (expected.timesteps, expected.phases, expected.about)
    assert {phase: set(layers) for phase, layers in found.copies.items()} == {
        phase: set(layers) for phase, layers in expected.copies.items()
    }
    for phase, layers in expected.copies.items():
        for name, layer in layers.items():
            check_same_packed(found.copies[phase][name], layer)


def test_loaded_is_saved(own: DiffusionModel, quantized: QuantizedModel, tmp_path: Path) -> None:
    assert len(quantized.layers) > 40 and quantized.inputs and set(quantized.copies) == {"early", "late"}
    save(quantized, tmp_path / "one")
    found = load(tmp_path / "one")
    check_same(found, replace(quantized, about=json.loads(json.dumps(quantized.about))))
    save(quantized, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    save(found, tmp_path / "two")
    check_same(load(tmp_path / "two"), found)
    assert set(contents(tmp_path / "one")) == {"config.json", "model.safetensors", "phases.safetensors"}
    save(built(own, {})[0], tmp_path / "one")
    assert set(contents(tmp_path / "one")) == {"config.json", "model.safetensors"}, "nothing is left of what was there"
    assert load(tmp_path / "one").layers == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"], "nothing half-made"


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A damage: ``config.json`` changed."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return damage


def of_first(**given: Any) -> Callable[[Path], None]:
    """A damage: other bits or another group size of the first layer."""
    return rewritten(lambda c: next(iter(c["layers"].values())).update(given))


def announcing(folder: Path) -> None:
    """A damage with a checksum that holds: the header announces terabytes."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    rewritten(lambda c: c["files"].update({"model.safetensors": checksum(folder / "model.safetensors")}))(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no quantized model there"),
    "no config": (lambda d: (d / "config.json").unlink(), "no quantized model there"),
    "config cut short": (lambda d: (d / "config.json").write_text('{"format": '), "config.json: not valid JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: not a calib-quantized-model"),
    "another format": (rewritten(lambda c: c.update(format="x")), "config.json: not a calib-quantized-model"),
    "a later version": (rewritten(lambda c: c.update(format_version=9)), "has format version 9, this calib reads 1"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: is missing"),
    "a flipped byte": (lambda d: flip_byte(d / "model.safetensors", 50_000), "model.safetensors: is damaged"),
    "no copies": (lambda d: (d / "phases.safetensors").unlink(), "phases.safetensors: is missing"),
    "a flipped byte of a copy": (
        lambda d: flip_byte(d / "phases.safetensors", 20_000),
        "phases.safetensors: is damaged",
    ),
    "no files": (rewritten(lambda c: c.pop("files")), "config.json: lacks or garbles 'files'"),
    "no layers": (rewritten(lambda c: c.pop("layers")), "config.json: lacks or garbles 'layers'"),
    "a layer too many": (rewritten(lambda c: c["layers"].update(x={"bits": 4, "group_size": 64})), "'x.weight'"),
    "bits of one layer": (rewritten(lambda c: c["activation_bits"].popitem()), "config.json: lacks or garbles"),
    "a garbled range": (rewritten(lambda c: c["activation_ranges"].update(x=3)), "activation_ranges of 'x'"),
    "phases": (rewritten(lambda c: c.update(phases={"early": 3})), "config.json: lacks or garbles"),
    "a copy's phase": (rewritten(lambda c: c["phases"].pop("early")), "garbles the steps of phase 'early'"),
    "bits that MLX has not": (of_first(bits=7), "garbles 7, where"),
    "bits as text": (of_first(bits="4"), "garbles '4', where"),
    "no bits": (of_first(bits=0), "garbles 0, where"),
    "a group of 2**40": (of_first(group_size=1 << 40), f"garbles {1 << 40}, where"),
    "bits of other shapes": (of_first(bits=8), "garbles the shapes of "),
    "activation bits": (rewritten(lambda c: c["activation_bits"].update({LAYER_3: [99]})), "garbles 99, where"),
    "a header that lies": (announcing, "model.safetensors: not a readable safetensors file"),
    "timesteps": (rewritten(lambda c: c.update(timesteps=["x"])), "config.json: lacks or garbles"),
}
NO_ADVICE = ("no folder", "no config", "config cut short", "a garbled range", "a header that lies")


@pytest.fixture(scope="module")
def saved(sd3: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some layers, with copies; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "quantized"
    plan = {name: layer for name, layer in plan_of(sd3).items() if "mm_block_2.image.mlp" in name or "final" in name}
    save(built(sd3, plan, steps_of(plan))[0], folder)
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(saved: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "quantized"))
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(CalibError) as error:
        load(folder)
    message = str(error.value)
    assert words in message
    assert str(folder) in message
    assert "run calib quantize again" in message or case in NO_ADVICE
    assert "\n" not in message


def test_checkpoints_of_0_1_0_are_read(saved: Path, tmp_path: Path) -> None:
    """They do not name their layers."""
    folder = Path(shutil.copytree(saved, tmp_path / "quantized"))
    rewritten(lambda c: c.pop("names"))(folder)
    check_same(load(folder), load(saved))


# In the network


@pytest.mark.parametrize("other", ["layer", "shape", "weight", "input"])
def test_another_models_is_refused(own: DiffusionModel, quantized: QuantizedModel, other: str) -> None:
    packed = quantized.layers[LAYER]
    check_fits(quantized, own)
    strange = {
        "layer": replace(quantized, layers={"nobody": packed}),
        "shape": replace(quantized, layers={WIDE: packed}),
        "weight": replace(quantized, weights={path: array[:1] for path, array in quantized.weights.items()}),
        "input": replace(quantized, inputs={"nobody": next(iter(quantized.inputs.values()))}),
    }[other]
    with pytest.raises(CalibError, match=f"^the quantized model has a .* that {own.name} has not"):
        check_fits(strange, own)


@pytest.mark.parametrize("dequantize", [True, False])
def test_the_model_is_given_back(
    own: DiffusionModel, quantized: QuantizedModel, inputs: Inputs, dequantize: bool
) -> None:
    plain, before, fingerprint = output(own, inputs), identities(own), weights_fingerprint(own.transformer)
    some = quantized if dequantize else only(quantized, [LAYER, "unified_block_1.mlp.fc2", "final_layer.adaln"])
    with applied(own, some, dequantize):
        changed = output(own, inputs)
    assert loss(plain, changed) > 1e-6
    assert identities(own) == before
    assert weights_fingerprint(own.transformer) == fingerprint
    assert own.clock is None
    assert np.array_equal(output(own, inputs), plain)


def only(quantized: QuantizedModel, names: Sequence[str]) -> QuantizedModel:
    """Of the layers only some; the kernels are slow on a CPU."""
    layers = {name: layer for name, layer in quantized.layers.items() if name in names}
    copies = {phase: {n: p for n, p in own.items() if n in names} for phase, own in quantized.copies.items()}
    return replace(quantized, layers=layers, copies=copies)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_given_back_after_an_error(
    own: DiffusionModel, quantized: QuantizedModel, inputs: Inputs, error: type[BaseException]
) -> None:
    plain, before, fingerprint = output(own, inputs), identities(own), weights_fingerprint(own.transformer)
    with pytest.raises(error), applied(own, quantized, True):
        output(own, inputs)
        raise error
    assert identities(own) == before
    assert weights_fingerprint(own.transformer) == fingerprint
    assert own.clock is None
    assert np.array_equal(output(own, inputs), plain)


def test_the_model_is_given_back_from_a_misfit(own: DiffusionModel, quantized: QuantizedModel) -> None:
    before, fingerprint = identities(own), weights_fingerprint(own.transformer)
    rule = next(iter(quantized.inputs.values()))
    packed = next(iter(quantized.layers.values()))
    for wrong in (
        replace(quantized, inputs={"mm_block_9.image.attn.q_proj": rule}),
        replace(quantized, layers={**quantized.layers, "mm_block_9.image.attn.q_proj": packed}),
        replace(quantized, weights={**quantized.weights, "nowhere.weight": mx.zeros(3)}),
    ):
        with pytest.raises((KeyError, IndexError, ValueError)), applied(own, wrong, True):
            raise AssertionError("it fitted")
        assert identities(own) == before
        assert weights_fingerprint(own.transformer) == fingerprint
        assert own.clock is None


def test_dense_layers_equal_kernels(own: DiffusionModel, quantized: QuantizedModel, inputs: Inputs) -> None:
    """Every bits and groups; without the grids of activations, which make a leap of a rounding error."""
    weights_alone, one = replace(quantized, inputs={}), (inputs[0][:1], inputs[1][slice(1)])
    plain = output(own, one)
    for timestep in (1000.0, 125.0):
        found = []
        for dequantize in (True, False):
            with applied(own, weights_alone, dequantize):
                kind = type(own.architecture.layers()["context_embedder"])
                assert kind is (nn.Linear if dequantize else nn.QuantizedLinear)
                found.append(output(own, one, timestep))
        assert loss(*found) < 1e-10
        assert loss(plain, found[0]) > 1e-3


def test_output_by_hand(own: DiffusionModel, quantized: QuantizedModel, inputs: Inputs) -> None:
    by_hand = MMDiTArchitecture(MMDiT(own.transformer.config))
    stored = {path: array.astype(mx.float32) for path, array in quantized.weights.items()}
    for name, layer in quantized.layers.items():
        scales, biases = (
            np.repeat(np.array(x).astype(np.float32), layer.group_size, 1) for x in (layer.scales, layer.biases)
        )
        ones, zeros = mx.ones_like(layer.scales), mx.zeros_like(layer.biases)
        integers = mx.dequantize(layer.weight, ones, zeros, group_size=layer.group_size, bits=layer.bits)
        stored[f"{by_hand.path(name)}.weight"] = mx.array(scales * np.array(integers).astype(np.float32) + biases)
    by_hand.module.load_weights(list(stored.items()), strict=False)
    expected = np.array(by_hand.velocity(*inputs, mx.array([500.0])))
    with applied(own, replace(quantized, inputs={}, copies={}), True):
        assert loss(expected, output(own, inputs, 500.0)) < 1e-10


# Phases


def test_weights_follow_the_phase(own: DiffusionModel, quantized: QuantizedModel, inputs: Inputs) -> None:
    """At every step the output is that of a model with the weights of its phase alone."""
    follows = replace(quantized, inputs={})
    found = {}
    with applied(own, follows, True):
        for step, timestep in enumerate(TIMESTEPS):
            found[step] = output(own, inputs, timestep)
    changed = 0
    for phase, (first, last) in PHASES.items():
        alone = replace(follows, layers=follows.layers | follows.copies.get(phase, {}), copies={})
        with applied(own, alone, True):
            for step in range(first, last + 1):
                assert np.array_equal(output(own, inputs, TIMESTEPS[step]), found[step]), step
        with applied(own, replace(follows, copies={}), True):
            changed += not np.array_equal(output(own, inputs, TIMESTEPS[first]), found[first])
    assert changed == 2, "early and late have weights of their own"


def test_copies_where_bits_differ(own: DiffusionModel, quantized: QuantizedModel) -> None:
    plan = plan_of(own)
    steps = steps_of(plan)
    for phase, bits in steps.weight_bits.items():
        layers = {name: b for name, b in bits.items() if name in quantized.layers}
        other = {name: b for name, b in layers.items() if b != plan[name].weight_bits}
        found = quantized.copies.get(phase, {})
        assert {name: layer.bits for name, layer in found.items()} == other
        for name, layer in found.items():
            weight = own.architecture.layers()[name].weight
            check_same_packed(layer, searched(weight, layer.bits, quantized.layers[name].group_size, mx.float16))
    one_copy = replace(quantized, copies={})
    extra = sum(layer.nbytes for copies in quantized.copies.values() for layer in copies.values())
    assert extra > 0
    assert quantized.size().nbytes == one_copy.size().nbytes + extra
    assert quantized.size().average_bits > one_copy.size().average_bits
    values = one_copy.size().quantized_values
    assert quantized.size().average_bits - one_copy.size().average_bits == pytest.approx(8 * extra / values)


def test_rows_of_several_steps_are_refused(own: DiffusionModel, quantized: QuantizedModel, inputs: Inputs) -> None:
    for part in (replace(quantized, inputs={}), replace(quantized, copies={})):
        with applied(own, part, True), pytest.raises(CalibError, match="run them step by step"):
            output(own, inputs, 1000.0, 125.0)
    with applied(own, replace(quantized, inputs={}, copies={}), True):
        assert np.isfinite(output(own, inputs, 1000.0, 125.0)).all()


# Sizes


def test_sizes(own: DiffusionModel, quantized: QuantizedModel, tmp_path: Path) -> None:
    size, before = quantized.size(), weights(own.transformer)
    save(quantized, tmp_path / "quantized")
    arrays, copies = (mx.load(str(tmp_path / "quantized" / f"{name}.safetensors")) for name in ("model", "phases"))
    assert size.nbytes == sum(array.nbytes for held in (arrays, copies) for array in held.values())
    on_disk = sum((tmp_path / "quantized" / f"{name}.safetensors").stat().st_size for name in ("model", "phases"))
    assert size.nbytes < on_disk < size.nbytes + 100_000
    parameters = sum(array.size for array in before.values())
    assert size.quantized_values + size.other_values == parameters
    assert size.nbytes_before == 2 * parameters
    assert size.bits_per_weight == 8 * size.nbytes / parameters
    packed = {name: array for name, array in arrays.items() if name not in quantized.weights}
    assert len(packed) == 3 * len(quantized.layers)
    shared = sum(array.nbytes for array in [*packed.values(), *copies.values()])
    assert size.average_bits == 8 * shared / size.quantized_values
    assert size.quantized_values == sum(
        before[f"{own.architecture.path(name)}.weight"].size for name in quantized.layers
    )


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_dequantized_as_mlx_does(bits: int) -> None:
    """To the bit, whatever the types; and in less memory than an array of the single bits."""
    weight = mx.random.normal((512, 1024), key=mx.random.key(bits))
    for half, size in ((mx.float16, 32), (mx.bfloat16, 64), (mx.float16, 128)):
        packed = Packed.nearest(weight, bits, size, half)
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            ends = (packed.scales.astype(dtype), packed.biases.astype(dtype))
            expected = mx.dequantize(packed.weight, *ends, group_size=size, bits=bits)
            mx.eval(expected)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            found = packed.dequantize(dtype)
            mx.eval(found)
            assert dtype != mx.float32 or mx.get_peak_memory() - before < 2.8 * weight.nbytes
            assert found.dtype == dtype and mx.array_equal(found, expected)


def test_four_bits_take_four_and_a_half(model: DiffusionModel) -> None:
    plan = {name: LayerPlan(4, 16) for name in model.architecture.layers()}
    size = built(model, plan)[0].size()
    assert size.average_bits == 4.5
    assert 4.5 < size.bits_per_weight < 5


# Activations


class Seen:
    """What one layer's input becomes, and what it was."""

    def __init__(self, model: DiffusionModel, inputs: Inputs, name: str):
        self._model, self._inputs, self._name = model, inputs, name

    def _input(self, rules: Mapping[str, InputRule], timestep: float) -> np.ndarray:
        seen: dict[str, mx.array] = {}
        # The rule is put around the tap: what the tap sees is what the layer reads.
        point, quantized = TapPoint(self._name, ""), QuantizedModel({}, {}, dict(rules), TIMESTEPS, {})
        with tapped(self._model.architecture, [point], keep(seen)), applied(self._model, quantized, True):
            output(self._model, self._inputs, timestep)
        return np.array(seen[self._name]).astype(np.float64)

    def both(self, rule: InputRule, timestep: float) -> tuple[np.ndarray, np.ndarray]:
        return self._input({}, timestep), self._input({self._name: rule}, timestep)


def by_hand(x: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize("name", ["x_embedder", "t_embedder.2", LAYER, "mm_block_2.text.attn.v_proj"])
def test_activations_follow_the_step(sd3: DiffusionModel, inputs: Inputs, name: str) -> None:
    ranges = StepRanges((0, 2, 5), (-1.0, -0.5, 0.25), (2.0, 0.5, 3.0))
    rule = InputRule(ranges, (4, 4, 4, 8, 8, 3, 16, 16))
    seen = Seen(sd3, inputs, name)
    # On the steps, and nearer to one than to its neighbour.
    for timestep, low, high, bits in (
        (1000.0, -1.0, 2.0, 4),
        (900.0, -1.0, 2.0, 4),
        (750.0, -0.5, 0.5, 4),
        (500.0, -0.5, 0.5, 8),
        (440.0, -0.5, 0.5, 8),
        (430.0, 0.25, 3.0, 3),
        (375.0, 0.25, 3.0, 3),
    ):
        plain, found = seen.both(rule, timestep)
        expected = by_hand(plain, low, high, bits)
        assert len(np.unique(expected)) > 3
        wrong = np.abs(found - expected) > 1e-6
        assert wrong.mean() < 1e-3, "but for what lies just between two values"
        step = (max(high, 0) - min(low, 0)) / (2**bits - 1)
        assert np.abs(found - expected).max() < 1.001 * step
    for timestep in (250.0, 125.0, 1.0):
        plain, found = seen.both(rule, timestep)
        assert np.array_equal(found, plain), "16 bits leave it as it is"


def test_a_range_of_nothing_changes_nothing(sd3: DiffusionModel, inputs: Inputs) -> None:
    """At one step it is zero always, at the next it is not."""
    rule = InputRule(StepRanges((0, 1), (0.0, -1.0), (0.0, 1.0)), (4,) * 8)
    seen = Seen(sd3, inputs, LAYER)
    plain, found = seen.both(rule, 1000.0)
    assert np.array_equal(found, plain)
    plain, found = seen.both(rule, 875.0)
    assert np.unique(found).size <= 16


@pytest.mark.parametrize("value", [3.0, -0.5])
def test_a_constant_input_stays(sd3: DiffusionModel, inputs: Inputs, value: float) -> None:
    """Its range has no width, but zero belongs to every grid."""
    rule = InputRule(StepRanges((0,), (value,), (value,)), (4,) * 8)
    constant = mx.full(inputs[0].shape, value), inputs[1]
    plain, found = Seen(sd3, constant, "x_embedder").both(rule, 500.0)
    assert np.unique(plain).tolist() == [value]
    np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_which_inputs_are_quantized(own: DiffusionModel) -> None:
    plan = plan_of(own)
    names = list(plan)
    zero, missing, free = names[4], names[5], next(n for n in names if plan[n].activation_bits == 16)
    whole = steps_of(plan)
    ranges = {**whole.ranges, zero: StepRanges((0, 3), (0.0, 0.0), (0.0, 0.0))}
    del ranges[missing]
    steps = replace(whole, ranges=ranges, activation_bits={"early": dict.fromkeys(plan, 8)})
    steps.activation_bits["early"][free] = 16
    made, notes = built(own, plan, steps)
    sixteen = {name for name in plan if plan[name].activation_bits == 16 and steps.activation_bits["early"][name] == 16}
    assert set(made.inputs) == set(plan) - {zero, missing} - sixteen
    for name, rule in made.inputs.items():
        assert rule.bits == (8,) * 2 + (plan[name].activation_bits,) * 6, "the plan's own outside the phases"
        assert rule.ranges == ranges[name]
    told = [note for note in notes if "input" in note]
    assert any(zero in note and "zero always" in note for note in told)
    assert any(note.startswith("1 layers have no activation ranges") for note in told)


def test_a_plan_without_steps(own: DiffusionModel, inputs: Inputs, tmp_path: Path) -> None:
    """As from a layer_statistics.json alone, which says nothing of steps."""
    plan = {name: LayerPlan(8, 8) for name in own.architecture.layers()}
    made, notes = built(own, plan, StepPlan())
    assert made.inputs == {}
    assert any(f"{len(plan)} layers have no activation ranges" in note for note in notes)
    save(made, tmp_path / "quantized")
    for quantized in (made, load(tmp_path / "quantized")):
        with applied(own, quantized, True):
            for timestep in (1000.0, 3.0):
                assert np.isfinite(output(own, inputs, timestep)).all()


def test_planned_blocks_are_passed_over(own: DiffusionModel, inputs: Inputs) -> None:
    """Blocks that were tapped are planned; there is nothing of theirs to quantize."""
    names = ["mm_block_1", LAYER if own.name == "tiny_sd3" else "unified_block_0", "context_embedder"]
    plan = {name: LayerPlan(4, 8) for name in names}
    made, _ = built(own, plan, steps_of(plan))
    assert {"mm_block_1", "unified_block_0"}.isdisjoint(made.inputs)
    assert "context_embedder" in made.inputs
    with applied(own, made, True):
        assert np.isfinite(output(own, inputs)).all()


# Odd layers


def test_group_sizes_give_way() -> None:
    layers = {
        "wide": nn.Linear(256, 8),
        "ragged": nn.Linear(192, 8),
        "narrow": nn.Linear(96, 8),
        "odd": nn.Linear(48, 8),
        "patches": nn.Conv2d(16, 8, 2),
    }
    plan = {name: LayerPlan(4, 8, group_size=128) for name in layers} | {"mm_block_0": LayerPlan(4, 8)}
    found, notes = fitting(plan, layers)
    assert {name: layer.group_size for name, layer in found.items()} == {"wide": 128, "ragged": 64, "narrow": 32}
    assert len(notes) == 4
    for note, words in zip(
        notes,
        (
            "ragged: groups of 128 do not divide its 192 columns; 64 instead",
            "narrow: groups of 128 do not divide its 96 columns; 32 instead",
            "odd: groups of (32, 64, 128) do not divide its 48 columns; it stays at 16 bits",
            "patches is no linear layer",
        ),
        strict=True,
    ):
        assert words in note
    smaller, notes = fitting({"wide": LayerPlan(4, 8, group_size=32)}, layers)
    assert (smaller["wide"].group_size, notes) == (32, [])


def test_widths_that_do_not_fit(model: DiffusionModel, inputs: Inputs) -> None:
    small = tiny_model(model, "flux")  # of 64 channels, and 256 where its MLP is
    plan = {name: LayerPlan(8, 16, group_size=128) for name in small.architecture.layers()}
    made, notes = built(small, plan)
    assert {layer.group_size for layer in made.layers.values()} == {64, 128}
    assert sum("64 instead" in note for note in notes) == sum(layer.group_size == 64 for layer in made.layers.values())
    plain = output(small, inputs)
    with applied(small, made, True):
        assert 0 < loss(plain, output(small, inputs)) < 0.01


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_huge_weight(sd3: DiffusionModel, inputs: Inputs, bits: int) -> None:
    layer = sd3.architecture.layers()[WIDE]
    own, plan = layer.weight, {WIDE: LayerPlan(bits, 16)}
    plain = built(sd3, plan)[0].layers[WIDE]
    try:
        layer.weight = mx.array(own)
        layer.weight[3, 70] = 60_000.0
        made = built(sd3, plan)[0]
        with applied(sd3, made, True):
            assert np.isfinite(output(sd3, inputs)).all()
    finally:
        layer.weight = own
    found, expected = np.array(made.layers[WIDE].dequantize()), np.array(plain.dequantize())
    assert np.isfinite(found).all()
    assert found[3, 70] == pytest.approx(60_000, rel=2e-3)
    group = np.zeros(found.shape, bool)
    group[3, 64:128] = True
    assert np.array_equal(found[~group], expected[~group])
    assert np.abs(found[3, 64:128][np.arange(64) != 6]).max() <= 0.51 * 60_000 / (2**bits - 1)


def test_weights_beyond_16_bits(sd3: DiffusionModel) -> None:
    """They would be infinite, and the sd3's output would not be a number."""
    layer = sd3.architecture.layers()[WIDE]
    own = layer.weight
    try:
        layer.weight = mx.array(own)
        layer.weight[3, 70] = 1e5
        with pytest.raises(CalibError, match=WIDE):
            built(sd3, {WIDE: LayerPlan(4, 16)})
    finally:
        layer.weight = own


def test_bfloat16_stays(model: DiffusionModel, inputs: Inputs) -> None:
    small = tiny_model(model, "flux", dtype=mx.bfloat16)
    made, _ = built(small, {name: LayerPlan(8, 16, group_size=32) for name in small.architecture.layers()})
    assert {array.dtype for array in made.weights.values()} == {mx.bfloat16}
    assert {layer.scales.dtype for layer in made.layers.values()} == {mx.bfloat16}
    arguments = (inputs[0].astype(mx.bfloat16), inputs[1].astype(mx.bfloat16), mx.array([500.0]).astype(mx.bfloat16))
    mx.eval(arguments[2])
    plain = small.velocity(*arguments)
    with applied(small, made, True):
        found = small.velocity(*arguments)
        mx.eval(found)
    assert found.dtype == mx.bfloat16
    assert loss(*(np.array(v.astype(mx.float32)) for v in (plain, found))) < 0.02


# The clock


def test_clock() -> None:
    clock = Clock([1000.0, 700.0, 100.0])
    for timestep, step in ((1000.0, 0), (2000.0, 0), (851.0, 0), (849.0, 1), (700.0, 1), (399.0, 2), (0.0, 2)):
        clock.set_timestep(timestep)
        assert clock.step == step, timestep
    clock.set_timestep(None)
    with pytest.raises(CalibError, match="step by step"):
        _ = clock.step
    timeless = Clock([])
    timeless.set_timestep(500.0)
    assert timeless.step == 0


# Without calib


def bare(folder: Path, images: Sequence[Inputs], timesteps: mx.array, **more: Any) -> Iterator[list[mx.array]]:
    """A quantized model run by MLX and DiffusionKit alone: its output at all timesteps, image after image."""
    config = json.loads((folder / "config.json").read_text())
    transformer = MMDiT(MMDiTConfig(**config["mmdit"], dtype=getattr(mx, config["dtype"]), **more))
    nn.quantize(transformer, class_predicate=lambda path, _: config["layers"].get(path, False))
    transformer.load_weights(str(folder / "model.safetensors"))
    for x, text in images:
        transformer.cache_modulation_params(text.pooled, timesteps)
        yield [transformer(x, text.tokens[:, :, None, :], timestep) for timestep in timesteps]
        # For the next image, as caching empties the adaLN layers; not strict, as their shapes are gone.
        transformer.load_weights(str(folder / "model.safetensors"), strict=False)


def check_bare(model: DiffusionModel, folder: Path, timesteps: Sequence[float], **more: Any) -> None:
    """Image after image MLX and DiffusionKit alone give what calib does, its grids for activations left out.

    But for the rounding of calib's GELU on a CPU.
    """
    quantized = replace(load(folder), inputs={})
    assert {name for name in quantized.layers if name.endswith("adaln")}, "adaLN layers, which caching empties"
    images = []
    for seed, prompt in enumerate(("red apple", "rocket")):
        text = model.encode([prompt], 0)
        x = mx.array(np.random.RandomState(seed).randn(1, *model.latent_shape).astype(np.float32))
        images.append((x, text))
    found = list(bare(folder, images, mx.array(list(timesteps)), **more))
    assert len(found) == 2
    with applied(model, quantized, dequantize=False):
        for image, outputs in zip(images, found, strict=True):
            for timestep, own in zip(timesteps, outputs, strict=True):
                expected = output(model, image, timestep)
                np.testing.assert_allclose(np.array(own), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert not np.array_equal(np.array(found[0][0]), np.array(found[1][0]))
    assert loss(output(model, images[1], timesteps[0]), np.array(found[1][0])) > 1e-4, "it is quantized"


def test_mlx_and_diffusionkit_alone(model: DiffusionModel, tiny_run: Path) -> None:
    check_bare(model, tiny_run / "quantized", (1000.0, 334.0, 1.0))


def test_flux_from_drawing_to_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole job, and what it makes."""
    own = ("model.name=tiny_flux", "model._target_=tiny_models.load", "~model.skeleton", "~model.dtype")
    job = [*TINY, *own, "sampler.cfg_weight=0", "sampler=flux_schnell", "sampler.image_size=[64,64]"]
    job += ["analysis=uniform", "analysis.weight_bits=8", "ranges=per_step", "hydra.run.dir=run", "data_dir=dataset"]
    outcome = run_here(job, capsys)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["output_error"] < 0.1 and metrics["control_output_error"] < metrics["output_error"]
    encoding = json.loads((folder / "run" / "quantized" / "config.json").read_text())["pos_embed_type"]
    model = tiny_models.load("tiny_flux", 1.0, (64, 64))
    check_bare(model, folder / "run" / "quantized", (1000.0, 500.0), pos_embed_type=PositionalEncoding[encoding])
