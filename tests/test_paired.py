"""Paired comparisons: what is not changed is the same to the bit, and what is changed is counted as by hand."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from calib.activations.states import read_states
from calib.activations.taps import TapPoint, tapped
from calib.base.errors import CalibError
from calib.dataset.generate import generate
from calib.dataset.load import load_manifest
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StateDtype
from calib.evaluation.metrics import ssim
from calib.evaluation.paired import Paired, Reference, rounded_to_bfloat16
from helpers import velocity
from calib.models.model import DiffusionModel, weights, weights_fingerprint

import mlx.core as mx
import numpy as np
import pytest
from helpers import PROMPTS
from PIL import Image
from tiny_flux import flux_model
from watching import keep

STEPS = (0, 2, 3)

Change = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="module", params=["emoji", "flux"])
def drawn(
    request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffusionModel, Reference]:
    """The emoji model with guidance and a small FLUX without, and three pictures of each, drawn two at a time."""
    folder = tmp_path_factory.mktemp("drawn") / "dataset"
    own = model if request.param == "emoji" else flux_model(model)
    settings = SamplerSettings(num_steps=4, cfg_weight=3.0 if own is model else 0, batch_size=2)
    generate(own, PROMPTS, 3, folder, settings, seed=7, dtype=StateDtype.FLOAT32)
    return own, Reference(folder, load_manifest(folder), STEPS)


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


def test_an_unchanged_model_draws_the_same_pictures_to_the_bit(drawn: tuple[DiffusionModel, Reference]) -> None:
    model, reference = drawn
    paired = Paired(model, reference)
    outcome = paired.compare(nullcontext, "unchanged")
    assert outcome.pictures.dtype == np.float32
    assert outcome.pictures.shape == (3, 64, 64, 3)
    assert np.array_equal(outcome.pictures, paired.pictures)
    found = outcome.fidelity
    assert found.psnr.tolist() == [np.inf] * 3
    assert found.ssim == pytest.approx(np.ones(3), abs=1e-12)
    assert found.error.tolist() == [[0.0] * len(STEPS)] * 3
    assert found.steps.tolist() == list(STEPS)


def test_the_references_pictures_are_those_of_the_dataset(drawn: tuple[DiffusionModel, Reference]) -> None:
    model, reference = drawn
    pictures = Paired(model, reference).pictures
    assert reference.images == [0, 1, 2]
    assert reference.prompts == list(PROMPTS[:3])
    for picture, entry in zip(pictures, reference.manifest.images.values(), strict=True):
        with Image.open(reference.data_dir / entry.filename) as stored:
            assert np.array_equal(stored, (255 * picture).astype(np.uint8)), "as DiffusionKit stores it"
    some = {i: reference.manifest.images[i] for i in (0, 2)}
    fewer = Paired(model, replace(reference, manifest=replace(reference.manifest, images=some)))
    assert np.array_equal(fewer.pictures, pictures[[0, 2]])


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
                found.append(np.array(velocity(model.transformer, rows, text.tokens, text.pooled, timestep)))
    return np.array(found).astype(np.float64).reshape(len(reference.images), len(reference.steps), -1)


def test_errors_are_those_of_the_outputs_by_hand(drawn: tuple[DiffusionModel, Reference]) -> None:
    model, reference = drawn
    change = rounding(model)
    before, modules = weights_fingerprint(model.transformer), [id(m) for m in model.transformer.modules()]
    paired = Paired(model, reference)
    outcome = paired.compare(change, "rounded")
    assert weights_fingerprint(model.transformer) == before
    assert [id(m) for m in model.transformer.modules()] == modules
    v, v_q = (outputs(model, reference, c) for c in (nullcontext, change))
    expected = np.sum((v - v_q) ** 2, axis=2) / np.sum(v**2, axis=2)
    assert expected.min() > 1e-7
    np.testing.assert_allclose(outcome.fidelity.error, expected, rtol=1e-3)
    for i, (plain, changed) in enumerate(zip(paired.pictures, outcome.pictures, strict=True)):
        mse = np.mean((plain.astype(np.float64) - changed) ** 2)
        assert outcome.fidelity.psnr[i] == pytest.approx(10 * np.log10(1 / mse))
        assert outcome.fidelity.ssim[i] == pytest.approx(ssim(plain, changed))
    assert np.isfinite(outcome.fidelity.psnr).all()


def test_pictures_of_a_changed_model_are_those_it_draws(
    drawn: tuple[DiffusionModel, Reference], tmp_path: Path
) -> None:
    """The same prompts, seeds, blocks and sampler as a dataset of its own."""
    model, reference = drawn
    manifest = reference.manifest
    change = rounding(model)
    found = Paired(model, reference).compare(change, "rounded").pictures
    settings = SamplerSettings(num_steps=4, cfg_weight=manifest.cfg_weight, batch_size=2)
    with change():
        generate(model, PROMPTS, 3, tmp_path / "own", settings, seed=7, dtype=StateDtype.FLOAT32)
    own = Reference(tmp_path / "own", load_manifest(tmp_path / "own"), STEPS)
    assert np.array_equal(found, Paired(model, own).pictures)


def test_comparisons_do_not_depend_on_those_before(drawn: tuple[DiffusionModel, Reference]) -> None:
    """What the reference has in common for all is computed at full precision, whichever comes first."""
    model, reference = drawn
    paired = Paired(model, reference)
    several = [paired.compare(change, "some") for change in (rounding(model), rounding(model, 1), nullcontext)]
    alone = Paired(model, reference).compare(rounding(model, 1), "alone")
    assert np.array_equal(several[1].fidelity.error, alone.fidelity.error)
    assert np.array_equal(several[1].pictures, alone.pictures)
    assert several[2].fidelity.error.max() == 0
    assert several[0].fidelity.error.mean() < several[1].fidelity.error.mean()


def test_the_control_is_the_model_in_bfloat16_and_gives_it_back(drawn: tuple[DiffusionModel, Reference]) -> None:
    model, reference = drawn
    before, modules = weights_fingerprint(model.transformer), [id(m) for m in model.transformer.modules()]
    own = weights(model.transformer)
    seen: dict[str, mx.array] = {}
    state = mx.array(read_states(reference.data_dir, reference.manifest, [0], 2))
    text = model.encode([PROMPTS[0]], 0)
    # The control's rounding is put around the tap: it sees what the layer reads.
    with tapped(model.architecture, [TapPoint("x_embedder", "")], keep(seen)), rounded_to_bfloat16(model):
        mx.eval(velocity(model.transformer, state, text.tokens, text.pooled, mx.array([500.0])))
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
    assert [id(m) for m in model.transformer.modules()] == modules
    with pytest.raises(RuntimeError, match="enough"), rounded_to_bfloat16(model):
        raise RuntimeError("enough")
    assert weights_fingerprint(model.transformer) == before
    assert [id(m) for m in model.transformer.modules()] == modules
    control = Paired(model, reference).compare(lambda: rounded_to_bfloat16(model), "control").fidelity
    assert weights_fingerprint(model.transformer) == before
    assert np.all((control.error > 0) & (control.error < 1e-2))
    assert np.isfinite(control.psnr).all()


def test_a_changed_model_that_is_not_finite_ends_in_one_clear_line(drawn: tuple[DiffusionModel, Reference]) -> None:
    model, reference = drawn

    @contextmanager
    def broken() -> Iterator[None]:
        layer = model.transformer.final_layer.linear
        own = layer.bias
        try:
            layer.bias = mx.full(own.shape, float("nan"))
            yield
        finally:
            layer.bias = own

    with pytest.raises(CalibError) as error:
        Paired(model, reference).compare(broken, "broken")
    assert "not finite" in str(error.value)
    assert "\n" not in str(error.value)
