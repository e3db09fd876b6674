"""Rotated layers: H by its properties, inputs by a float64 oracle, the model dense, on kernels, saved and loaded."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges, static
from calib.analysis.steps import StepPlan
from calib.base.errors import CalibError
from calib.base.files import read_json, write_json
from calib.dataset.load import load_manifest
from calib.models.grids import searched
from calib.models.model import DiffusionModel
from calib.models.packed import Packed
from calib.models.rotation import BLOCKS, block_of, hadamard, rotated
from calib.quantization import gptq
from calib.quantization.apply import applied
from calib.quantization.build import Calibration, quantize_layers
from calib.quantization.check import check_fits
from calib.quantization.checkpoint import load, save
from calib.quantization.model import InputRule, QuantizedModel
from calib.quantization.quantizer import Quantized, QuantizerInput
from calib.quantization.rotation import _places

import mlx.core as mx
import numpy as np
import pytest
from helpers import check_config_error, float64
from quantizing import same, values_of
from tiny_models import draw, tiny_model

LAYERS = ("mm_block_1.image.mlp.fc1", "mm_block_1.image.mlp.fc2", "mm_block_1.image.adaln")


@pytest.mark.parametrize("block", BLOCKS)
def test_matrix(block: int) -> None:
    """Symmetric, its own inverse, ±1/√block, rows that sum alike."""
    h = float64(hadamard(block))
    np.testing.assert_array_equal(h, h.T)
    np.testing.assert_allclose(h @ h, np.eye(block), atol=1e-12)
    assert set(np.abs(h).ravel()) == {block**-0.5} and set(h.sum(axis=0)) == {1.0}
    x = np.random.RandomState(0).randn(3, 2, 2 * block)
    turned = float64(rotated(mx.array(x, mx.float32), block))
    np.testing.assert_allclose(turned, (x.reshape(-1, block) @ h).reshape(x.shape), atol=1e-5)


def test_blocks() -> None:
    found = [block_of(columns, 256) for columns in (1536, 320, 2432, 144, 40)]
    assert found == [256, 64, 64, 16, 0] and block_of(1536, 64) == 64 and block_of(1536, 0) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_input(bits: int) -> None:
    """Q(x H) H, at each step over its own range."""
    rule = InputRule(StepRanges((0, 2), (-1.0, -3.0), (2.0, 3.0)), (bits,), rotation=16)
    x, h = np.random.RandomState(1).randn(5, 32), float64(hadamard(16))
    for step, (low, high) in ((0, (-1.0, 2.0)), (3, (-3.0, 3.0))):
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        y = (x.reshape(-1, 16) @ h).reshape(x.shape)
        q = scale * (np.clip(np.round(y / scale) + zero, 0, 2**bits - 1) - zero)
        expected = (q.reshape(-1, 16) @ h).reshape(x.shape)
        np.testing.assert_allclose(np.array(rule.apply(mx.array(x, mx.float32), step)), expected, atol=1e-5)


@pytest.fixture(scope="module")
def drawn(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, StoredStates]:
    own, folder = tiny_model(model, "sd3"), tmp_path_factory.mktemp("rotation") / "data"
    manifest = load_manifest(draw(own, folder))
    return own, StoredStates(folder, manifest, sorted(manifest.images), range(manifest.num_steps))


def made(drawn: tuple[DiffusionModel, StoredStates], bits: int = 4, **parameters: Any) -> QuantizedModel:
    plan = dict.fromkeys(LAYERS, LayerPlan(4, bits, group_size=32))
    source = Calibration(None, static, lambda: drawn[1])
    steps = StepPlan(tuple(drawn[1].manifest.timesteps[:-1]))
    return quantize_layers(drawn[0], plan, steps, partial(gptq.quantize, **parameters), source, {})[0]


def outputs(drawn: tuple[DiffusionModel, StoredStates], quantized: QuantizedModel, **how: Any) -> list[np.ndarray]:
    model, states = drawn
    found = []
    for batch in states.batches(model, 2):
        given = batch()
        with applied(model, quantized, **how):
            found.append(np.array(model.velocity(given.x, given.text, given.timesteps)))
    return found


def test_model(drawn: tuple[DiffusionModel, StoredStates], tmp_path: Path) -> None:
    """Dense and on kernels it gives the same, and still does once it was saved; its weights are those of W H."""
    quantized = made(drawn, rotation=256)
    assert {name: packed.rotation for name, packed in quantized.layers.items()} == {
        name: block_of(packed.scales.shape[1] * 32, 256) for name, packed in quantized.layers.items()
    }
    assert {name: rule.rotation for name, rule in quantized.inputs.items()} == {
        name: packed.rotation for name, packed in quantized.layers.items()
    }
    for name, packed in quantized.layers.items():
        h, weight = float64(hadamard(packed.rotation)), float64(drawn[0].architecture.layers()[name].weight)
        back = (values_of(packed).reshape(-1, packed.rotation) @ h).reshape(weight.shape)
        np.testing.assert_allclose(np.array(packed.dequantize()), back, atol=2e-3 * np.abs(back).max())
        assert np.square(back - weight).sum() < 0.02 * np.square(weight).sum()
    alone = replace(quantized, inputs={})
    for dense, kernels in zip(*(outputs(drawn, alone, dequantize=how) for how in (True, False)), strict=True):
        np.testing.assert_allclose(dense, kernels, atol=1e-4 * np.abs(dense).max())
    save(quantized, tmp_path / "made")
    found = load(tmp_path / "made")
    assert all(same(found.layers[name], packed) for name, packed in quantized.layers.items())
    assert {n: p.rotation for n, p in found.layers.items()} == {n: p.rotation for n, p in quantized.layers.items()}
    assert found.inputs == quantized.inputs
    document = read_json(tmp_path / "made" / "config.json")
    assert document["format_version"] == 3
    write_json(tmp_path / "made" / "config.json", document | {"activation_rotation": {LAYERS[0]: 7}})
    with pytest.raises(CalibError, match=r"config\.json"):
        load(tmp_path / "made")


def test_an_outlier(drawn: tuple[DiffusionModel, StoredStates]) -> None:
    """Inputs of 4 bits are read better rotated, and a plan that leaves them at 16 bits has no ranges of them."""
    name = LAYERS[1]
    plan = {name: LayerPlan(8, 4, group_size=32)}
    wide = np.ones(256, np.float32)
    wide[7] = 40.0
    losses: dict[int, float] = {}

    def quantizer(work: QuantizerInput) -> Quantized:
        """Measures the error of the input, with one channel of it made wide."""
        own = replace(work, replay=lambda points, record, pending, replaced: replay(work, points, record, pending))
        for rotation in (0, 64):
            found = gptq.quantize(own, rotation=rotation)
            x = mx.concatenate(seen)
            rule = InputRule(StepRanges((0,), (x.min().item(),), (x.max().item(),)), (4,))
            if rotation:
                rule = InputRule(found.ranges[name], (4,), rotation=found.rotations[name])
            losses[rotation] = mx.square(rule.apply(x, 1) - x).sum().item()
        return found

    seen: list[mx.array] = []

    def replay(work: QuantizerInput, points: Any, record: Any, pending: Any) -> None:
        def widened(tap: str, x: mx.array, steps: Any) -> mx.array:
            seen.append((x * mx.array(wide)).reshape(-1, 256))
            return record(tap, x * mx.array(wide), steps)

        seen.clear()
        work.replay(points, widened, lambda: [*pending(), *seen], {})

    quantize_layers(drawn[0], plan, StepPlan(), quantizer, Calibration(None, static, lambda: drawn[1]), {})
    assert losses[64] < 0.5 * losses[0]
    assert not made(drawn, 16, rotation=64).inputs
    nothing = QuantizerInput.without_layers(drawn[0].architecture, mx.float16)
    check_config_error(lambda: gptq.quantize(nothing, rotation=32), ["quantizer.rotation=32", "16", "64", "256"])


@pytest.mark.parametrize(("tokens", "channels"), [(1024, 1536), (64, 64), (77, 2432), (1, 320)])
def test_every_block_is_sampled(tokens: int, channels: int) -> None:
    places = _places(tokens, channels)
    assert places.max() < tokens * channels
    assert {*(places % channels // 16)} == set(range(channels // 16))


@pytest.mark.parametrize("structure", ["sd3", "flux"])
@pytest.mark.parametrize("dense", [True, False])
def test_with_copies_and_rules(model: DiffusionModel, structure: str, dense: bool) -> None:
    """FLUX's unified blocks set a bias in every forward, to reach the layer through all before it."""
    own = tiny_model(model, structure)
    names = [name for name, layer in own.architecture.layers().items() if name.endswith("mlp.fc2")]
    layers = own.architecture.layers()

    def packed(name: str, bits: int) -> Packed:
        weight = rotated(layers[name].weight.astype(mx.float32), 64)
        return replace(searched(weight, bits, 32, mx.float16), rotation=64)

    wide = InputRule(StepRanges((0,), (-8.0,), (8.0,)), (8,), rotation=64)
    bare = QuantizedModel({}, {}, {}, (1000.0, 500.0), {name: own.architecture.path(name) for name in names})
    made = replace(bare, layers={n: packed(n, 8) for n in names}, inputs=dict.fromkeys(names, wide))
    made = replace(made, copies={"late": {n: packed(n, 4) for n in names}}, phases={"late": (1, 1)})
    x, text = mx.random.normal((1, *own.latent_shape), key=mx.random.key(0)), own.encode(["a"], 0)
    plain, found = [], []
    for timestep in (1000.0, 500.0):
        plain.append(np.array(own.velocity(x, text, timestep)))
        with applied(own, made, dense):
            found.append(np.array(own.velocity(x, text, timestep)))
    errors = [np.square(a - b).sum() / np.square(a).sum() for a, b in zip(plain, found, strict=True)]
    assert 0 < errors[0] < 1e-3 and errors[0] < errors[1] < 0.1


@pytest.mark.parametrize("fault", ["width", "both"])
def test_misfits(drawn: tuple[DiffusionModel, StoredStates], fault: str) -> None:
    """A rotation by what does not divide the width, or beside a shift, is no model's."""
    quantized, name = made(drawn, rotation=64), LAYERS[0]
    rule, columns = quantized.inputs[name], drawn[0].architecture.layers()[name].weight.shape[1]
    check_fits(quantized, drawn[0])
    wrong = replace(rule, rotation=256) if fault == "width" else replace(rule, shifts=(0.0,) * columns)
    with pytest.raises(CalibError, match="that tiny_sd3 has not"):
        check_fits(replace(quantized, inputs={**quantized.inputs, name: wrong}), drawn[0])


def test_ranges_that_are_static(drawn: tuple[DiffusionModel, StoredStates]) -> None:
    """Stay so."""
    found = []

    def quantizer(work: QuantizerInput) -> Quantized:
        for steps in (1, 2):
            own = StepRanges((0, 1)[:steps], (-1.0,) * steps, (1.0,) * steps)
            found.append(gptq.quantize(replace(work, ranges=lambda *_, own=own: own), rotation=64).ranges[LAYERS[0]])
        return gptq.quantize(work)

    plan = {LAYERS[0]: LayerPlan(4, 8, group_size=32)}
    quantize_layers(drawn[0], plan, StepPlan(), quantizer, Calibration(None, static, lambda: drawn[1]), {})
    one, many = found
    assert one.from_step == (0,) and len(many.from_step) > 1
    assert (one.low, one.high) == ((min(many.low),), (max(many.high),))
