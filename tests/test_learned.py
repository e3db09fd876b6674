"""quantizer=learned: gradients of pictures by the unrolled sampler, what is trained by hand; it never loses."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.analysis.backward import Backward
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import static
from calib.analysis.steps import StepPlan
from calib.base.device import on_gpu
from calib.base.errors import CalibError
from calib.dataset.load import load_manifest
from calib.dataset.sampling import initial_noise, initial_state, noise_levels
from calib.models.grids import searched
from calib.models.model import DiffusionModel, weights
from calib.models.packed import Packed
from calib.models.parallel import shared_cores
from calib.quantization import gptq, learned, output_side, rtn
from calib.quantization.build import Calibration, quantize_layers
from calib.quantization.model import QuantizedModel
from calib.quantization.quantizer import Quantized, QuantizerInput
from calib.quantization.training import pictures
from calib.quantization.training.pictures import Drawn, PictureLoss
from calib.quantization.training.trainable import BIAS, INTEGER, SCALE, Trainable
from calib.stages.evaluate import prompts_seen

import mlx.core as mx
import numpy as np
import pytest
from helpers import PROMPTS, check_config_error, float64
from mlx import nn
from quantizing import integers_of, same
from tiny_models import STRUCTURES, draw, tiny_model

TRIED = ("sd3", *(pytest.param(structure, marks=pytest.mark.slow) for structure in STRUCTURES if structure != "sd3"))


def linear_layers(model: DiffusionModel) -> dict[str, nn.Linear]:
    layers = model.architecture.layers()
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and layer.weight.shape[1] % 32 == 0
    }


def changed_by(layers: dict[str, nn.Linear], bits: int = 4) -> dict[str, Packed]:
    return {name: Packed.nearest(layer.weight, bits, 32, mx.float16) for name, layer in layers.items()}


@pytest.mark.parametrize("structure", TRIED)
@pytest.mark.parametrize(("guidance", "passes", "by_parts"), [(3.0, 2, False), (0.0, 1, True)])
def test_gradients(model: DiffusionModel, structure: str, guidance: float, passes: int, by_parts: bool) -> None:
    """Equal to those of the sampler unrolled from the noise with the changed weights; the model is as it was."""
    own, wanted = tiny_model(model, structure), Drawn(PROMPTS[:3], [5, 6, 7], 2)
    layers, before = linear_layers(own), weights(own.transformer)
    changed = {name: packed.dequantize() for name, packed in changed_by(layers).items()}
    backward = Backward(own, layers, [], by_parts)
    with backward.running(), shared_cores(passes, passes):
        loss = PictureLoss(own, backward, layers, guidance, at_once=2, side_by_side=passes, decoded=passes)
        errors, found = loss.gradients(wanted, changed)
        loss.restore()
    assert all(weights(own.transformer)[path] is array for path, array in before.items() if not path.endswith("bias"))

    def pictures() -> mx.array:
        text = own.encode(wanted.prompts, guidance)
        sigmas = noise_levels(own.sampler, wanted.num_steps)
        x = initial_state(
            mx.stack([initial_noise(seed, own.latent_shape) for seed in wanted.seeds]), own.sampler, sigmas
        )
        for step in range(wanted.num_steps):
            rows = mx.concatenate([x, x]) if guidance > 0 else x
            v = own.velocity(rows, text, mx.array(1000 * sigmas[step].item()))
            if guidance > 0:
                conditional, unconditional = mx.split(v, 2)
                v = unconditional + guidance * (conditional - unconditional)
            x = x + v * (sigmas[step + 1] - sigmas[step])
        return own.decode_latents(own.latent_format.process_out(x)) / 2

    def unrolled(given: dict[str, mx.array]) -> mx.array:
        for name, weight in given.items():
            layers[name].weight = weight
        return mx.log(mx.square(pictures() - exact).mean(axis=(1, 2, 3))).mean()

    kept, exact = {name: layer.weight for name, layer in layers.items()}, pictures()
    mx.eval(exact)
    value, expected = mx.value_and_grad(unrolled)(changed)
    for name, layer in layers.items():
        layer.weight = kept[name]
    assert np.log(errors).mean() == pytest.approx(value.item(), rel=1e-3)
    for name, gradient in expected.items():
        scale = max(float(mx.linalg.norm(gradient).item()), 1e-6)
        assert float(mx.linalg.norm(found[name] - gradient).item()) < 1e-3 * scale, name


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_trained(bits: int, rounding: bool) -> None:
    """Begins as the packed layer, ends as what was trained, and its gradients are those of the formula."""
    random = np.random.RandomState(bits)
    weight, gradient = random.randn(6, 128), random.randn(6, 128)
    packed = searched(mx.array(weight, mx.float32), bits, 64, mx.float16)
    layer = Trainable.of(packed, rounding)
    own = layer.start(mx.array(weight, mx.float32))
    assert mx.array_equal(layer.weight(own), packed.dequantize())
    assert same(layer.finished(own), packed)
    found = layer.gradients(own, mx.array(gradient, mx.float32))
    scales = float64(packed.scales)
    by_group, q = gradient.reshape(6, 2, 64), integers_of(packed).reshape(6, 2, 64)
    expected = {
        "scale": SCALE * np.abs(scales) * (by_group * q).sum(-1),
        "bias": BIAS * np.abs(scales) * by_group.sum(-1),
        **({"integer": INTEGER * by_group * scales[..., None]} if rounding else {}),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(np.array(found[name]), values, rtol=1e-4, atol=1e-5)
    moved = {name: value + 0.3 * mx.array(random.randn(*value.shape), mx.float32) for name, value in own.items()}
    s = (scales + SCALE * np.abs(scales) * float64(moved["scale"])).astype(np.float16).astype(np.float64)
    b = (float64(packed.biases) + BIAS * np.abs(scales) * float64(moved["bias"])).astype(np.float16).astype(np.float64)
    integers = np.clip(np.rint(INTEGER * float64(moved["integer"])), 0, 2**bits - 1) if rounding else q
    values = (s[..., None] * integers + b[..., None]).reshape(6, 128)
    for made in (layer.weight(moved), layer.finished(moved).dequantize()):
        np.testing.assert_allclose(np.array(made), values, rtol=2e-3, atol=2e-3 * np.abs(scales).max())


@pytest.fixture(scope="module")
def drawn(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, StoredStates]:
    own, folder = tiny_model(model, "sd3"), tmp_path_factory.mktemp("learned") / "data"
    manifest = load_manifest(draw(own, folder))
    return own, StoredStates(folder, manifest, sorted(manifest.images), range(manifest.num_steps))


FEW = {"updates": 4, "batch_size": 2, "num_steps": 2, "held_out": 1, "rate": 0.02, "pictures": 0}


def made_by(drawn: tuple[DiffusionModel, StoredStates], scratch: Path | None = None, **parameters: Any) -> Quantized:
    """What ``learned`` makes of 3 bits."""
    return quantized(drawn, partial(learned.quantize, **{**FEW, **parameters}), scratch)


def quantized(
    drawn: tuple[DiffusionModel, StoredStates], by: Callable[..., Quantized], scratch: Path | None = None
) -> Quantized:
    model, states = drawn
    made: list[Quantized] = []

    def quantizer(work: QuantizerInput) -> Quantized:
        made.append(by(replace(work, scratch=scratch)))
        return made[0]

    plan = {
        name: LayerPlan(3, 16, group_size=32) for name in linear_layers(model) if name.startswith("mm_block_1.image")
    }
    quantize_layers(model, plan, StepPlan(), quantizer, Calibration(None, static, lambda: states), {})
    return made[0]


@pytest.fixture(scope="module")
def start(drawn: tuple[DiffusionModel, StoredStates]) -> Quantized:
    """What it starts from."""
    return quantized(drawn, gptq.quantize)


def alike(one: Quantized, two: Quantized) -> bool:
    return all(same(packed, two.layers[name]) for name, packed in one.layers.items())


def held_out(note: str) -> tuple[float, float]:
    """PSNR of the start and of the best, from a note."""
    start, best = note.split(" from ")[1].split(" dB")[0].split(" to ")
    return float(start), float(best)


def test_held_out_pictures_are_better(drawn: tuple[DiffusionModel, StoredStates], start: Quantized) -> None:
    before = weights(drawn[0].transformer)
    more = {"updates": 8, "batch_size": 4, "rate": 0.01, "rounding": False}
    made = made_by(drawn, **more, seed=1)
    assert all(array is before[path] for path, array in weights(drawn[0].transformer).items())
    first, best = held_out(made.notes[-1])
    assert best > first
    assert not alike(made, start)


def test_what_gains_nothing_is_the_start(drawn: tuple[DiffusionModel, StoredStates], start: Quantized) -> None:
    """At a rate that ruins every grid, or none at all."""
    for parameters in ({"updates": 0}, {"rate": 1.0}):
        made = made_by(drawn, **parameters)
        assert alike(made, start)
    assert "no update made the 1 held-out calibration pictures better than gptq's" in made.notes[-1]


@pytest.mark.parametrize(
    ("batch_size", "images", "held_out"), [(4, 24, 8), (48, 100, 33), (20, 100, 20), (4, 12, 4), (4, 3, 1), (4, 2, 1)]
)
def test_images_held_out(batch_size: int, images: int, held_out: int) -> None:
    assert learned.images_held_out(batch_size, images) == held_out


@pytest.mark.skipif(on_gpu(), reason="by its memory, there")
def test_pictures_of_an_update(drawn: tuple[DiffusionModel, StoredStates], monkeypatch: pytest.MonkeyPatch) -> None:
    own, sizes = PictureLoss.gradients, list[int]()

    def record(self: PictureLoss, wanted: Drawn, weights: Any) -> Any:
        sizes.append(len(wanted.prompts))
        return own(self, wanted, weights)

    monkeypatch.setattr(PictureLoss, "gradients", record)
    for size in (None, 2):
        made_by(drawn, batch_size=size, updates=1)
    assert sizes == [4, 2]


def test_it_goes_on(drawn: tuple[DiffusionModel, StoredStates], tmp_path: Path) -> None:
    """To the same bits, from the last it saved; damaged, from the start; with other parameters, as another."""
    whole = made_by(drawn)
    saved: list[bytes] = []

    def stop(after: int, **parameters: Any) -> None:
        """End in the middle, as a killed process does."""
        count = 0
        own = PictureLoss.gradients

        def gradients(self: PictureLoss, *given: Any) -> Any:
            nonlocal count
            count += 1
            if count > after:
                raise KeyboardInterrupt
            return own(self, *given)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PictureLoss, "gradients", gradients)
            made_by(drawn, tmp_path, **parameters)

    stop(3)
    (state,) = tmp_path.glob("*.safetensors")
    saved.append(state.read_bytes())
    stop(0)
    assert state.read_bytes() == saved[0], "the three are not made again"
    assert alike(made_by(drawn, tmp_path), whole)
    state.write_bytes(state.read_bytes()[:-100])
    assert alike(made_by(drawn, tmp_path), whole)
    stop(1, seed=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "ROUNDS", 0)  # of another procedure
        stop(1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3, "and from another start"


@pytest.mark.slow
def test_texts(drawn: tuple[DiffusionModel, StoredStates], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those given are drawn beside the dataset's that are not held out; the model names what it saw, and no more."""
    model, states = drawn
    own = [states.manifest.images[image].prompt for image in states.images]
    given, seen, found = [own[-1], "a red fish", "a green dog", "a blue cup"], set[str](), list[Any]()

    def record(self: PictureLoss, wanted: Drawn, weights: Any) -> Any:
        """What was found of the first pictures will do for all, as it is their texts that count."""
        seen.update(wanted.prompts)
        if not found:
            found.append(gradients(self, wanted, weights))
        return found[0]

    gradients = PictureLoss.gradients
    monkeypatch.setattr(PictureLoss, "gradients", record)
    plan = {"final_layer.linear": LayerPlan(3, 16, group_size=32)}

    def quantized(quantizer: Any, **parameters: Any) -> QuantizedModel:
        source = Calibration(None, static, lambda: states, prompts=lambda: given)
        return quantize_layers(model, plan, StepPlan(), partial(quantizer, **parameters), source, {})[0]

    for prompts, expected in ((2, 2), (None, 3), (0, 0)):
        seen.clear()
        quantized(learned.quantize, **{**FEW, "updates": 8, "prompts": prompts})
        assert own[-1] not in seen and len(seen - {*own}) == expected and seen <= {*own, *given}
    made = quantized(learned.quantize, **{**FEW, "updates": 0})
    assert prompts_seen(made, given) == 1, "of the calibration alone, as nothing was trained"
    made = quantized(gptq.quantize, pictures=len(own) + 2)
    assert prompts_seen(made, [*given, "another"]) == 3, "two drawn, and one of the calibration"
    assert prompts_seen(quantized(rtn.quantize), [*given, *own]) == 0


def test_rows_by_pictures(drawn: tuple[DiffusionModel, StoredStates], monkeypatch: pytest.MonkeyPatch) -> None:
    """gptq draws pictures for its outputs where it is told to, and leaves out what reads one vector a picture.

    And what memory has no room for.
    """
    made: list[Quantized] = []

    def quantizer(work: QuantizerInput) -> Quantized:
        made.extend(gptq.quantize(work, pictures=pictures) for pictures in (0, 2, 2))
        monkeypatch.setattr(output_side, "MEMORY_SHARE", 0.0)
        made.append(gptq.quantize(work, pictures=2))
        return made[0]

    plan = {
        name: LayerPlan(3, 16, group_size=32) for name in linear_layers(drawn[0]) if name.startswith("mm_block_1.text")
    }
    quantize_layers(drawn[0], plan, StepPlan(), quantizer, Calibration(None, static, lambda: drawn[1]), {})
    plain, one, two, none = made
    assert alike(none, plain)
    assert alike(one, two)
    for name, packed in plain.layers.items():
        assert same(packed, one.layers[name]) == name.endswith("adaln"), name
    nothing = QuantizerInput.without_layers(drawn[0].architecture, mx.float16)
    check_config_error(lambda: gptq.quantize(nothing, pictures=-1), ["quantizer.pictures", "-1"])


@pytest.mark.parametrize(("images", "damping"), [(1, 1.0), (40, 0.8), (120, 0.3)])
def test_damping_by_images(drawn: tuple[DiffusionModel, StoredStates], images: int, damping: float) -> None:
    model, states = drawn
    many, made = replace(states, images=states.images[:1] * images, steps=[1]), list[Quantized]()

    def quantizer(work: QuantizerInput) -> Quantized:
        made.extend(gptq.quantize(work, damping=own) for own in (None, damping, 2 * damping))
        return made[0]

    plan = {"mm_block_1.image.mlp.fc1": LayerPlan(3, 16, group_size=32)}
    quantize_layers(model, plan, StepPlan(), quantizer, Calibration(None, static, lambda: many), {})
    assert alike(made[0], made[1]) and not alike(made[0], made[2])


def test_bad_input(drawn: tuple[DiffusionModel, StoredStates]) -> None:
    lowest = {"updates": 0, "batch_size": 1, "num_steps": 2, "held_out": 1, "pictures": 0, "prompts": 0, "seed": 0}
    for key, value in {"rate": 0.0, **{key: value - 1 for key, value in lowest.items()}}.items():
        check_config_error(
            lambda key=key, value=value: made_by(drawn, **{key: value}), [f"quantizer.{key}", str(value)]
        )
    with pytest.raises(CalibError, match="held_out=3: of 3 collected images none is left to train on"):
        made_by(drawn, held_out=3)
    model, _ = drawn
    with pytest.raises(CalibError, match="stats=DIR"):
        quantize_layers(
            model,
            {"final_layer.linear": LayerPlan(4, 16)},
            StepPlan(),
            learned.quantize,
            Calibration(None, static, None),
            {},
        )


def test_gradients_that_are_not_finite(drawn: tuple[DiffusionModel, StoredStates]) -> None:
    """At the start an error that names where; later the best before it stays."""
    own = PictureLoss.draw
    count = 0

    def draw_wrongly(self: PictureLoss, *given: Any) -> list[mx.array]:
        nonlocal count
        count += 1
        found = own(self, *given)
        return [*found[:-1], found[-1] * np.nan] if count > after else found

    for after in (1, 9):
        count = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PictureLoss, "draw", draw_wrongly)
            if after == 1:
                with pytest.raises(CalibError, match="the gradient of the picture is not finite, first in the decoder"):
                    made_by(drawn)
            else:
                assert "is not finite: the best before it is kept" in made_by(drawn).notes[-2]


def test_too_little_memory(
    drawn: tuple[DiffusionModel, StoredStates], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is noted before anything is computed, and only where it is too little."""
    for memory, noted in ((10**12, False), (10**6, True)):
        monkeypatch.setattr(pictures, "device_memory", lambda memory=memory: memory)
        with pictures.picture_loss(drawn[0], linear_layers(drawn[0]), 3.0, 1):
            assert ("gradients of pictures take about " in capsys.readouterr().err) == noted
