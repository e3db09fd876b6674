"""Paired comparisons: what is not changed is the same to the bit, and what is changed is counted as by hand."""

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import calib.evaluation.reference
from calib.activations.states import read_states
from calib.activations.taps import TapPoint, tapped
from calib.base.errors import CalibError
from calib.dataset.load import load_manifest
from calib.dataset.settings import SamplerSettings
from calib.evaluation.measures import NONE
from calib.evaluation.metrics import Fidelity, ssim
from calib.evaluation.paired import Paired, Reference, rounded_to_bfloat16
from calib.evaluation.reference import control_of, draw_reference
from calib.evaluation.report import fidelity_text
from calib.models.model import DiffusionModel, weights, weights_fingerprint

import mlx.core as mx
import numpy as np
import pytest
from helpers import PROMPTS, contents
from PIL import Image
from tiny_models import draw, tiny_model
from watching import keep

STEPS = (0, 2, 3)

Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Drawn:
    """A model, three pictures of it in full precision, and comparisons with them."""

    model: DiffusionModel
    reference: Reference
    paired: Paired

    def modules(self) -> list[int]:
        return [id(module) for module in self.model.transformer.modules()]


@pytest.fixture(scope="module", params=["sd3", "flux"])
def drawn(request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A small SD3 with guidance, and a small FLUX without."""
    own = tiny_model(model, request.param)
    folder = draw(own, tmp_path_factory.mktemp("drawn") / "dataset", batch_size=2)
    reference = Reference(folder, load_manifest(folder), STEPS)
    return Drawn(own, reference, Paired(own, reference))


@dataclass(frozen=True)
class Outcome:
    """A comparison's pictures, (images, height, width, 3), and its figures."""

    pictures: np.ndarray
    fidelity: Fidelity


def compared(paired: Paired, change: Change, label: str) -> Outcome:
    seen: list[np.ndarray] = []
    fidelity = paired.compare(change, label, see=lambda exact, own: seen.append(own))
    return Outcome(np.concatenate(seen), fidelity)


@pytest.fixture(scope="module")
def rounded(drawn: Drawn) -> Outcome:
    """One layer's weights rounded; the first comparison of all."""
    before, modules = weights_fingerprint(drawn.model.transformer), drawn.modules()
    outcome = compared(drawn.paired, rounding(drawn.model), "rounded")
    assert weights_fingerprint(drawn.model.transformer) == before
    assert drawn.modules() == modules
    return outcome


def rounding(model: DiffusionModel, digits: int = 2) -> Change:
    """A change of one layer's weights."""

    @contextmanager
    def change() -> Iterator[None]:
        layer = model.architecture.layers()["mm_block_1.image.mlp.fc2"]
        own = layer.weight
        try:
            layer.weight = mx.round(own, digits)
            yield
        finally:
            layer.weight = own

    return change


def test_an_unchanged_model(drawn: Drawn) -> None:
    outcome = compared(drawn.paired, nullcontext, "unchanged")
    assert outcome.pictures.dtype == np.float32
    assert outcome.pictures.shape == (3, 64, 64, 3)
    assert np.array_equal(outcome.pictures, drawn.paired.pictures(drawn.reference.images))
    found = outcome.fidelity
    assert found.psnr.tolist() == [np.inf] * 3
    assert found.ssim == pytest.approx(np.ones(3), abs=1e-12)
    assert found.error.tolist() == [[0.0] * len(STEPS)] * 3
    assert found.steps.tolist() == list(STEPS)


def test_the_references_pictures(drawn: Drawn) -> None:
    reference, pictures = drawn.reference, drawn.paired.pictures(drawn.reference.images)
    assert reference.images == [0, 1, 2]
    assert reference.prompts == list(PROMPTS[:3])
    for picture, entry in zip(pictures, reference.manifest.images.values(), strict=True):
        with Image.open(reference.data_dir / entry.filename) as stored:
            assert np.array_equal(stored, (255 * picture).astype(np.uint8)), "as DiffusionKit stores it"
    some = {i: reference.manifest.images[i] for i in (0, 2)}
    fewer = Paired(drawn.model, replace(reference, manifest=replace(reference.manifest, images=some)))
    assert np.array_equal(fewer.pictures([2, 0]), pictures[[2, 0]])


def outputs(model: DiffusionModel, reference: Reference, change: Change) -> np.ndarray:
    """v of every image and step, each by itself, guidance halves together: (images, steps, values) in float64."""
    manifest = reference.manifest
    found = []
    for image in reference.images:
        text = model.encode([str(manifest.images[image].prompt)], manifest.cfg_weight)
        for step in reference.steps:
            x = mx.array(read_states(reference.data_dir, manifest, [image], step))
            rows, timestep = mx.concatenate([x] * len(text.tokens)), mx.array([manifest.timesteps[step]])
            with change():
                mx.eval(timestep)
                found.append(np.array(model.architecture.velocity(rows, text, timestep)))
    return np.array(found).astype(np.float64).reshape(len(reference.images), len(reference.steps), -1)


def test_errors_by_hand(drawn: Drawn, rounded: Outcome) -> None:
    v, v_q = (outputs(drawn.model, drawn.reference, c) for c in (nullcontext, rounding(drawn.model)))
    expected = np.sum((v - v_q) ** 2, axis=2) / np.sum(v**2, axis=2)
    assert expected.min() > 1e-7
    np.testing.assert_allclose(rounded.fidelity.error, expected, rtol=1e-3)
    for i, (plain, changed) in enumerate(
        zip(drawn.paired.pictures(drawn.reference.images), rounded.pictures, strict=True)
    ):
        mse = np.mean((plain.astype(np.float64) - changed) ** 2)
        assert rounded.fidelity.psnr[i] == pytest.approx(10 * np.log10(1 / mse))
        assert rounded.fidelity.ssim[i] == pytest.approx(ssim(plain, changed))
    assert np.isfinite(rounded.fidelity.psnr).all()


def test_pictures_by_hand(drawn: Drawn, rounded: Outcome, tmp_path: Path) -> None:
    """The same prompts, seeds, blocks and sampler as a dataset of its own."""
    with rounding(drawn.model)():
        folder = draw(drawn.model, tmp_path / "own", batch_size=2)
    own = Reference(folder, load_manifest(folder), STEPS)
    assert np.array_equal(rounded.pictures, Paired(drawn.model, own).pictures(own.images))


def test_comparisons_are_independent(drawn: Drawn, rounded: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference has in common for all is computed at full precision, whichever comes first."""
    later = compared(drawn.paired, rounding(drawn.model, 1), "later")
    monkeypatch.setattr("calib.evaluation.paired.KEPT", 2)  # nor what is kept in memory
    alone = compared(Paired(drawn.model, drawn.reference), rounding(drawn.model, 1), "alone")
    assert np.array_equal(later.fidelity.error, alone.fidelity.error)
    assert np.array_equal(later.fidelity.psnr, alone.fidelity.psnr)
    assert np.array_equal(later.pictures, alone.pictures)
    assert rounded.fidelity.error.mean() < later.fidelity.error.mean()


def test_control(drawn: Drawn) -> None:
    """The model in bfloat16; afterwards it is what it was."""
    model, reference = drawn.model, drawn.reference
    before, modules, own = weights_fingerprint(model.transformer), drawn.modules(), weights(model.transformer)
    seen: dict[str, mx.array] = {}
    state, timestep = mx.array(read_states(reference.data_dir, reference.manifest, [0], 2)), mx.array([500.0])
    mx.eval(timestep)
    # The control's rounding is put around the tap: it sees what the layer reads.
    with tapped(model.architecture, [TapPoint("x_embedder", "")], keep(seen)), rounded_to_bfloat16(model):
        mx.eval(model.velocity(state, model.encode([PROMPTS[0]], 0), timestep))
    x = seen["x_embedder"]
    assert mx.array_equal(x.astype(mx.bfloat16).astype(mx.float32), x)
    with rounded_to_bfloat16(model):
        inside = weights(model.transformer)
        changed = 0
        for path, array in own.items():
            rounded = inside[path.replace("x_embedder.proj.", "x_embedder.proj.inner.")]
            assert mx.array_equal(rounded, array.astype(mx.bfloat16).astype(array.dtype)), path
            changed += not mx.array_equal(rounded, array)
        assert changed > 20
    assert weights_fingerprint(model.transformer) == before
    assert drawn.modules() == modules
    with pytest.raises(RuntimeError, match="enough"), rounded_to_bfloat16(model):
        raise RuntimeError("enough")
    assert weights_fingerprint(model.transformer) == before
    assert drawn.modules() == modules
    control = drawn.paired.compare(lambda: rounded_to_bfloat16(model), "control")
    assert weights_fingerprint(model.transformer) == before
    assert np.all((control.error > 0) & (control.error < 1e-2))
    assert np.isfinite(control.psnr).all()


def test_a_model_that_is_not_finite(drawn: Drawn) -> None:
    @contextmanager
    def broken() -> Iterator[None]:
        layer = drawn.model.transformer.final_layer.linear
        own = layer.bias
        try:
            layer.bias = mx.full(own.shape, float("nan"))
            yield
        finally:
            layer.bias = own

    with pytest.raises(CalibError) as error:
        drawn.paired.compare(broken, "broken")
    assert "not finite" in str(error.value)
    assert "\n" not in str(error.value)


# The reference and its control


def test_reference_and_control(drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures that are there are not drawn again, and a control that was measured is read; a damaged one is not."""
    sampler = SamplerSettings(num_steps=4, cfg_weight=drawn.reference.manifest.cfg_weight, batch_size=2)
    given = (drawn.model, tmp_path / "dataset", PROMPTS, 2, sampler, 7, 2)
    reference = draw_reference(*given)
    assert (reference.images, list(reference.steps)) == ([0, 1], [0, 3])
    fingerprints = contents(tmp_path / "dataset")
    assert draw_reference(*given).manifest == reference.manifest
    assert contents(tmp_path / "dataset") == fingerprints
    paired = Paired(drawn.model, reference)
    found = control_of(drawn.model, reference, paired, tmp_path)
    (path,) = (tmp_path / "evaluation").glob("control_*.json")
    assert found.to_json() == json.loads(path.read_text())

    def never(change: Change, label: str, images: Sequence[int]) -> Fidelity:
        raise AssertionError("measured again")

    kept = control_of(drawn.model, reference, cast(Paired, SimpleNamespace(compare=never, measures=NONE)), tmp_path)
    assert kept.to_json() == found.to_json()
    with pytest.raises(AssertionError, match="measured again"):
        other = replace(reference, steps=(1,))
        control_of(drawn.model, other, cast(Paired, SimpleNamespace(compare=never, measures=NONE)), tmp_path)
    for damage in ('{"psnr": ', "[]", '{"psnr": [1], "ssim": [1], "error": [[1]], "steps": [1, 2]}'):
        path.write_text(damage)
        assert control_of(drawn.model, reference, paired, tmp_path).to_json() == found.to_json()


@pytest.mark.parametrize(("nearest", "drawn_of"), [(10.1, 2), (9.9, 3), (-5.0, 3), (-np.inf, 3)])
def test_a_control_of_few_pictures(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nearest: float, drawn_of: int
) -> None:
    """A landmark far off is measured on the first pictures alone, a floor that is near on all."""
    monkeypatch.setattr(calib.evaluation.reference, "FEW_IMAGES", 2)
    whole = control_of(drawn.model, drawn.reference, drawn.paired, tmp_path)
    psnr = whole.psnr - np.array([60.0, nearest, 0.0])
    quantized = Fidelity(psnr, whole.ssim, whole.error, whole.steps)
    found = control_of(drawn.model, drawn.reference, drawn.paired, tmp_path, quantized)
    assert found.prompts == drawn_of and whole.prompts == 3
    np.testing.assert_allclose(found.psnr, whole.psnr[:drawn_of], atol=0.1)
    np.testing.assert_allclose(found.error, whole.error[:drawn_of], rtol=1e-2)
    text = fidelity_text(quantized, found, 4)
    assert ("note: control: of the first 2 prompts alone" in text) == (drawn_of == 2)


def test_memory_does_not_grow_with_the_number_of_pictures(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, peaks = tiny_model(model, "sd3"), []
    monkeypatch.setattr("calib.evaluation.paired.KEPT", 4)
    for count in (12, 48):
        sampler = SamplerSettings(num_steps=1, cfg_weight=0.0, batch_size=4)
        reference = draw_reference(own, tmp_path / str(count), PROMPTS, count, sampler, 7, 1)
        tracemalloc.start()
        paired = Paired(own, reference)
        paired.compare(rounding(own), "rounded")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    picture = 64 * 64 * 3 * 4
    assert peaks[1] - peaks[0] < 4 * picture, "not two for each of 36 more"
