"""mflux's models through calib: drawn as mflux draws them, tapped and rounded without a trace, and the whole job."""

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("mflux", reason="mflux is not installed: uv sync --group mflux")

from calib.activations.reader import ActivationFile
from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.versions import numerics, numerics_of, versions
from calib.dataset.load import load_manifest
from calib.dataset.store import read_state
from calib.models import emoji
from calib.models.mflux import zimage
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.quantization.apply import applied
from calib.quantization.checkpoint import load

import make_standin_checkpoint as standin
import mlx.core as mx
import numpy as np
from drawn_by_mflux import Mfluxs
from helpers import is_one_clear_line, run_in, run_process, well
from huggingface_hub import constants
from mflux.models.common.resolution import path_resolution
from mflux.models.common.resolution.model_revisions import ModelRevisions
from mflux.models.common.weights.saving.model_saver import ModelSaver
from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition
from tiny_zimage import SIZES, TINY, small_zimage

#: Texts of 1, 2 and 5 times 32 tokens, once padded.
TEXTS = ("red apple", "a lighthouse on a rocky coast at dusk, painted in oil", "one fox, two foxes, " * 12)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_zimage(tmp_path_factory.mktemp("zimage")) as folder:
        yield folder


def loaded(files: Path, size: tuple[int, int] = (64, 64), dtype: ModelDtype = ModelDtype.FLOAT32) -> DiffusionModel:
    return zimage.load("zimage_turbo", "nowhere/nothing", str(files), dtype, image_size=size)


@pytest.fixture(scope="module")
def model(files: Path) -> DiffusionModel:
    return loaded(files)


@pytest.fixture(scope="module")
def mfluxs(files: Path) -> Mfluxs:
    return Mfluxs(TINY, files, mx.float32)


JOB = (
    *("model=zimage_turbo", "model.dtype=float32", "prompts=file", "prompts.path=texts.txt", "num_images=3"),
    *("sampler.image_size=[64,64]", "sampler.num_steps=3", "sampler.batch_size=2"),
    *("data_dir=dataset", "dataset.dtype=float32"),
    *("timestep_schedule=all", "taps=all", "sensitivity.images=1", "sensitivity.group_sizes=[32,64]"),
    *("calibration.images=1", "calibration.steps=1", "evaluation.num_images=1", "evaluation.steps=1"),
)


@pytest.fixture(scope="module")
def job(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder after the whole job at its defaults: gradients, allocate, gptq, pictures, the page."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    well(run_in(folder, *JOB, f"model.checkpoint={files}", "hydra.run.dir=run"))
    return folder


def test_the_whole_job(job: Path, model: DiffusionModel) -> None:
    run, layers = job / "run", list(model.architecture.layers())
    metrics, plan = read_json(run / "metrics.json"), read_json(run / "quantization_config.json")
    assert set(plan) >= set(layers) and len({own["suggested_weight_bits"] for own in plan.values()}) > 1
    assert 0 < metrics["output_error"] < 1 and metrics["psnr"] < metrics["control_psnr"]
    assert read_json(run / "quantized" / "config.json")["z_image"]["dim"] == SIZES.transformer["dim"]
    assert "unified_block_1.mlp.w2" in (run / "report.html").read_text(encoding="utf-8")
    with ActivationFile(run / "activations.h5") as file:
        assert file.kind("unified_block_0.mlp.w2") == "post-swiglu"
        assert file.same_data("unified_block_0.attn.v_proj") == file.same_data("unified_block_0.attn.q_proj")


def test_the_dataset_is_mfluxs_and_sound(job: Path, mfluxs: Mfluxs) -> None:
    manifest = load_manifest(job / "dataset")
    assert manifest.noise == "mlx" and "sound" in well(run_in(job, "verify", "dataset")).out
    for image in (0, 2):
        entry = manifest.images[image]
        assert entry.prompt is not None and entry.seed is not None
        states, *_ = mfluxs.draw(entry.prompt, entry.seed, manifest.num_steps, (64, 64))
        np.testing.assert_allclose(read_state(job / "dataset", manifest, image, 3), states[-1], atol=1e-5)


def test_a_lost_manifest_is_restored(job: Path, tmp_path: Path) -> None:
    """It says whose noise the states are made of, as the files of the images do."""
    copy = shutil.copytree(job / "dataset", tmp_path / "dataset")
    before = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").unlink()
    well(run_in(tmp_path, "rebuild-manifest", "dataset"))
    assert b'"noise": "mlx"' in before and (copy / "manifest.json").read_bytes() == before


def test_states_of_other_noise_are_found(job: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(job / "dataset", tmp_path / "dataset")
    manifest = load_manifest(copy)
    manifest.noise = "numpy"
    manifest.save(copy)
    outcome = run_in(tmp_path, "verify", "dataset")
    assert outcome.status == 1 and f"state 0 is not the noise of seed {manifest.images[0].seed}" in outcome.out


def test_a_batch_has_room_for_texts_that_are_not_in_it(model: DiffusionModel) -> None:
    """So that what is drawn again has the shapes that it had."""
    (text,) = model.encode_batches([TEXTS[:1] * 2], 0, True, [TEXTS])
    whole = model.encode(TEXTS, 0)
    assert whole.lengths == tuple(map(model.token_count, TEXTS))
    assert text.tokens.shape[1] == whole.tokens.shape[1] and text.lengths == (whole.lengths or ())[:1] * 2


def test_kept_activations_are_as_many_for_every_image(job: Path, files: Path, tmp_path: Path) -> None:
    """Though texts differ in length; joined shards have those of the whole."""
    copy = shutil.copytree(job, tmp_path / "copy")
    taps = "taps.include=['context_refiner_0.mlp.w1','unified_block_1.attn.q_proj']"
    given = (*JOB, "storage=full", "report=none", taps, f"model.checkpoint={files}")
    well(run_in(copy, "collect", *given, "hydra.run.dir=whole"))
    for index in range(2):
        well(run_in(copy, "collect", *given, f"shard.index={index}", "shard.count=2", f"hydra.run.dir=part{index}"))
    well(run_in(copy, "merge", "part0", "part1", "--into", "joined"))
    with (
        ActivationFile(copy / "whole" / "activations.h5") as whole,
        ActivationFile(copy / "joined" / "activations.h5") as joined,
    ):
        for name, tokens in (("context_refiner_0.mlp.w1", 5 * 32), ("unified_block_1.attn.q_proj", 6 * 32)):
            assert whole.samples(name, 1).shape == (3 * tokens, SIZES.transformer["dim"])
            np.testing.assert_array_equal(joined.samples(name, 1), whole.samples(name, 1))


def test_another_version_of_mflux_is_noted(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("calib.models.mflux.TESTED", "0.1.0")
    loaded(files)
    told = f"mflux is {version('mflux')}, tested is 0.1.0: pip install --no-deps mflux==0.1.0"
    assert told in capsys.readouterr().err


def test_a_lost_image_is_drawn_again_to_the_bit(job: Path, files: Path, tmp_path: Path) -> None:
    """Though those beside it, whose texts are longer, are not."""
    copy = shutil.copytree(job, tmp_path / "copy")
    lost = copy / "dataset" / load_manifest(copy / "dataset").images[0].samples[0]
    before = lost.read_bytes()
    lost.unlink()
    outcome = well(run_in(copy, "generate", *JOB, f"model.checkpoint={files}"))
    assert "1 new" in outcome.out and lost.read_bytes() == before


def test_the_quantized_model_comes_and_goes(job: Path, model: DiffusionModel) -> None:
    before, quantized = weights(model.transformer), load(job / "run" / "quantized")
    x, text = mx.ones((1, 8, 8, 16)), model.encode(TEXTS[:1], 0)
    plain = np.array(model.velocity(x, text, 0.5))
    with applied(model, quantized):
        assert np.abs(np.array(model.velocity(x, text, 0.5)) - plain).max() > 1e-3
    after = weights(model.transformer)
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in before)
    np.testing.assert_array_equal(np.array(model.velocity(x, text, 0.5)), plain)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("sampler.cfg_weight=3",), "sampler.cfg_weight=3.0: zimage_turbo takes only 0"),
        (("sampler.shift=3",), "sampler.shift=3.0: zimage_turbo takes only 1"),
        (
            ("sampler.image_size=[64,72]",),
            "sampler.image_size=[64, 72]: must be [height, width], each a multiple of 16",
        ),
        (("model.dtype=float16",), "model.dtype=float16: must be bfloat16 or float32"),
        (("model.checkpoint=none",), "model.checkpoint=none: no such folder"),
        (("model.checkpoint=.",), "model.checkpoint=.: has no vae/*.safetensors"),
        (("quantizer=smooth", "generate_missing=true"), "quantizer=smooth: this model does not say"),
    ],
)
def test_what_cannot_be_is_one_line(given: tuple[str, ...], words: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("red apple\n")
    line = is_one_clear_line(run_in(tmp_path, *JOB, f"model.checkpoint={files}", *given))
    assert line.startswith(words)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_without_mflux_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that does not find it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'mflux' else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = is_one_clear_line(run_process(tmp_path, "model=zimage_turbo"))
    assert "uv run --group mflux calib" in line and "pip install --no-deps mflux==" in line


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    for module in (constants, path_resolution):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_the_hubs_cache_is_read_at_mfluxs_commit(model: DiffusionModel, files: Path, hub: Path) -> None:
    with pytest.raises(CalibError) as error:
        zimage.load("zimage_turbo", standin.ZIMAGE, dtype=ModelDtype.FLOAT32)
    told = str(error.value)
    assert told.startswith(f"{standin.ZIMAGE}: not in the cache") and told.endswith("or give model.checkpoint=DIR")
    assert "\n" not in told
    commit = standin.Repository(hub, standin.ZIMAGE, ModelRevisions.get(standin.ZIMAGE)).path("")
    shutil.copytree(files, commit, dirs_exist_ok=True)
    assert zimage.skeleton("zimage_turbo", standin.ZIMAGE).depth == model.architecture.depth
    found = zimage.load("zimage_turbo", standin.ZIMAGE, dtype=ModelDtype.FLOAT32, image_size=(64, 64))
    assert found.fingerprint == model.fingerprint


@pytest.mark.parametrize("bits", [None, 4])
def test_what_mflux_saved(bits: int | None, model: DiffusionModel, files: Path, mfluxs: Mfluxs, tmp_path: Path) -> None:
    """Read where it is not quantized; it has no sizes beside it, as a model of mflux's own sizes needs none."""
    ModelSaver.save_model(mfluxs.model, bits, str(tmp_path), ZImageWeightDefinition)
    for component in ("transformer", "text_encoder"):
        shutil.copy(files / component / "config.json", tmp_path / component)
    if bits is None:
        assert loaded(tmp_path).fingerprint == model.fingerprint
        text, expected = loaded(tmp_path).encode(TEXTS[:1], 0), model.encode(TEXTS[:1], 0)
        assert mx.array_equal(text.tokens, expected.tokens).item() and text.lengths == expected.lengths
        return
    with pytest.raises(CalibError, match="transformer: its weights have 4 bits already, calib needs those of 16 bits"):
        loaded(tmp_path)


def changed(weights: dict[str, mx.array], change: str) -> dict[str, mx.array]:
    name = "layers.1.feed_forward.w2.weight"
    if change == "unknown":
        return {**weights, "layers.1.feed_forward.w4.weight": mx.zeros((2, 2))}
    if change == "shape":
        return {**weights, name: weights[name][:, :64]}
    return {path: value for path, value in weights.items() if path != name}


@pytest.mark.parametrize("change", ["missing", "shape", "unknown", "cut", "config", "tokenizer"])
def test_a_damaged_folder_is_one_line(
    change: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(files, tmp_path / "copy"))
    (weights_file,) = (copy / "transformer").glob("*.safetensors")
    if change == "cut":
        weights_file.write_bytes(weights_file.read_bytes()[:50_000])
    elif change == "config":
        (copy / "transformer" / "config.json").write_text("{")
    elif change == "tokenizer":
        (copy / "tokenizer" / "tokenizer.json").write_text("{")
    else:
        given = mx.load(str(weights_file))
        assert isinstance(given, dict)
        mx.save_safetensors(str(weights_file), changed(given, change), metadata={"format": "pt"})
    if change == "unknown":
        loaded(copy)
        told = "holds 1 tensor that mflux does not read, 'layers.1.feed_forward.w4.weight' first"
        assert f"{copy / 'transformer'}: {told}" in capsys.readouterr().err
        return
    with pytest.raises(CalibError) as error:
        loaded(copy)
    assert str(error.value).startswith(str(copy)) and "\n" not in str(error.value)


def test_versions_that_count() -> None:
    """mflux's is recorded for its own models alone, though it is imported here."""
    for network, own in ((emoji.load().transformer, False), (TINY.architecture().module, True)):
        assert ("mflux" in versions(network)) == own
        assert numerics(network) == numerics_of(versions(network)) and ("mflux" in numerics(network)) == own
