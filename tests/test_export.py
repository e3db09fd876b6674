"""``calib export``: what mflux loads is the run's model to the bit, and draws its pictures; all else is refused."""

import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest

pytest.importorskip("mflux", reason="mflux is not installed: uv sync --group mflux")

from calib.analysis.ranges import StepRanges
from calib.base.device import on_gpu
from calib.base.files import read_json, write_json
from calib.base.folders import new_folder
from calib.models.mflux import folder as mflux_folders
from calib.models.mflux.precision import in_precision
from calib.models.model import weights
from calib.models.packed import Packed
from calib.quantization.checkpoint import load, save
from calib.quantization.model import InputRule, QuantizedModel
from calib.runs.card import Card, card_text
from calib.runs.record import read_run

import mlx.core as mx
import numpy as np
from helpers import (
    Outcome,
    command,
    contents,
    environment,
    everything,
    flip_byte,
    is_one_clear_line,
    run_in,
    run_process,
    well,
)
from huggingface_hub import constants
from make_standin_checkpoint import ZIMAGE, Repository
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.resolution import path_resolution
from mflux.models.common.resolution.model_revisions import ModelRevisions
from mflux.models.common.weights.saving.model_saver import ModelSaver
from mflux.models.z_image.variants.z_image import ZImage
from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition
from mlx import nn
from PIL import Image
from test_docs import commands
from tiny_mflux import Tiny
from tiny_models import EACH_OF_MFLUX, tiny_of
from tiny_zimage import SIZES, TINY, small_zimage

Change: TypeAlias = Callable[[QuantizedModel], object]

#: The page's commands: the whole job, and its exports for mflux, as a recipe and for MLX.
JOB, *EXPORTS = commands("docs/MFLUX.md")
#: What makes the job one of seconds, drawn as mflux draws: packed.
SMALL = (
    *("model.dtype=float32", "sampler.image_size=[64,64]", "sampler.num_steps=2", "data_dir=dataset", "report=none"),
    *("timestep_schedule=all", "sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[32,64]"),
    *("quantizer=rtn", "ranges=static", "evaluation.num_images=1", "evaluation.steps=1"),
    *("evaluation.dequantize=false", "prompts.path=texts.txt"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_zimage(tmp_path_factory.mktemp("zimage")) as folder:
        yield folder


def quantized_zimage(tiny: Tiny = TINY) -> QuantizedModel:
    """A small Z-Image of every grid that its layers allow, every seventh layer dense; its rest in bfloat16."""
    own, layers = tiny.architecture(), {}
    for number, (name, layer) in enumerate(own.layers().items()):
        sizes = [size for size in (32, 64) if layer.weight.shape[1] % size == 0]
        if number % 7 and sizes:
            bits, size = (2, 3, 4, 5, 6, 8)[number % 6], sizes[number % len(sizes)]
            layers[name] = Packed.nearest(layer.weight, bits, size, mx.bfloat16)
    paths = {name: own.path(name) for name in layers}
    packed = {f"{path}.weight" for path in paths.values()}
    rest = {path: weight.astype(mx.bfloat16) for path, weight in weights(own.module).items() if path not in packed}
    about = {"model": tiny.option, "fingerprint": "0" * 16, **own.describe()}
    return QuantizedModel(layers, rest, {}, (), paths, about=about)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized model and nothing else."""
    home = tmp_path_factory.mktemp("run")
    save(quantized_zimage(), home / "quantized")
    return home


def export(folder: Path, *arguments: Any) -> Outcome:
    return run_in(folder, "export", *map(str, arguments))


def loaded(folder: Path) -> ZImage:
    with in_precision(mx.float32):
        return ZImage(model_path=str(folder), model_config=ModelConfig.z_image_turbo())


SAVED = pytest.param(None, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["hub", SAVED, 4], ids=["hub", "saved", "saved in 4 bits"])
def base(request: pytest.FixtureRequest, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other components in the hub's layout, or as mflux saves them."""
    if request.param == "hub":
        return files
    folder = tmp_path_factory.mktemp("saved")
    model = loaded(files)
    if request.param:
        nn.quantize(model.text_encoder, bits=request.param)
    ModelSaver.save_model(model, request.param, str(folder), ZImageWeightDefinition)
    shutil.copy(files / "text_encoder" / "config.json", folder / "text_encoder")
    return folder


@pytest.mark.parametrize("structure", EACH_OF_MFLUX[1:])
def test_other_families(structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mflux holds them to the bit, too, and their cards name mflux's command for them."""
    tiny = tiny_of(structure)
    tiny.patched(monkeypatch)
    tiny.write(tmp_path / "base", mx.bfloat16)
    save(quantized_zimage(tiny), tmp_path / "run" / "quantized")
    given = ("--format", "mflux", "--into", tmp_path / "out", "--base", tmp_path / "base")
    well(export(tmp_path, tmp_path / "run", *given))
    made, expected = tiny.mfluxs(tmp_path / "out"), load(tmp_path / "run" / "quantized").parameters()
    found = weights(made.transformer)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert mx.array_equal(found[path], array).item(), path
    assert f"{tiny.family.command} --model ./out" in (tmp_path / "out" / "README.md").read_text()


def test_mflux_holds_what_the_run_has(base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight, scale and bias of every grid, and what is dense, to the bit; in several files."""
    monkeypatch.setattr(mflux_folders, "LARGEST_FILE", 200_000)
    well(export(tmp_path, run, "--format", "mflux", "--into", "out", "--base", base))
    made, expected = loaded(tmp_path / "out"), load(run / "quantized").parameters()
    found = weights(made.transformer)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype and mx.array_equal(found[path], array).item(), path
    shards = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 300_000 for shard in shards)
    plain = loaded(base)
    for part in ("text_encoder", "vae"):
        own, others = weights(getattr(made, part)), weights(getattr(plain, part))
        assert own.keys() == others.keys() and all(mx.array_equal(own[path], others[path]).item() for path in own)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def job(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's commands were run, for one image."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "texts.txt").write_text("red apple\ngreen heart\none fox\n")
    smaller = {"num_images=10": "num_images=1", "prompts=builtin": "prompts=file"}
    well(run_in(folder, *(smaller.get(word, word) for word in JOB), *SMALL, f"model.checkpoint={files}"))
    for exported in EXPORTS:
        outcome = well(run_in(folder, *exported))
        assert outcome.out.startswith(f"{exported[-1]}: 37 layers at 4.")
        assert ("model.dtype was float32" in outcome.err) == ("mflux" in exported)
    return folder


def test_mflux_draws_what_calib_evaluated(job: Path) -> None:
    """The same 8-bit picture on a CPU, where both multiply by the packed weights; a GPU's sums differ in order."""
    run, made, (manifest,) = job / "z-image", loaded(job / EXPORTS[0][-1]), job.glob("*-evaluation-*/manifest.json")
    for number, image in enumerate(read_json(manifest)["images"]):
        with in_precision(mx.float32):
            drawn = made.generate_image(image["seed"], image["prompt"], 2, 64, 64).image
        full, own = (
            np.array(Image.open(run / "images" / which / f"{number:04}.png")).astype(int)
            for which in ("full", "quantized")
        )
        assert np.abs(np.array(drawn) - own).max() <= (2 if on_gpu() else 0)
        assert np.abs(full - own).max() > 5


def test_a_streamed_model_is_exported(job: Path, files: Path) -> None:
    """It has the weights and the figures of the model in memory, and the folder for mflux the same bytes."""
    given = [word for word in JOB if not word.startswith("hydra.")]
    given += (*SMALL, "prompts=file", f"model.checkpoint={files}", "model.stream=true")
    measured = ("evaluation.metrics=[psnr,ssim,lpips_effnet]",)
    for stage, *own in (("quantize", "plan=z-image"), ("evaluate", "plan=quantize", *measured)):
        said = well(run_in(job, stage, *given, *own, f"hydra.run.dir={stage}")).out
    assert "(quantized weights alone)" in said
    well(run_in(job, "export", "quantize", "--format", "mflux", "--into", "streamed"))
    whole, streamed = (contents(job / folder / "transformer") for folder in (EXPORTS[0][-1], "streamed"))
    assert whole == streamed and len(whole) > 1
    before, after = (read_json(job / run / "metrics.json") for run in ("z-image", "evaluate"))
    assert after["psnr"] == before["psnr"] and after["output_error"] == before["output_error"]
    assert after["control_psnr"] == before["control_psnr"] and after["lpips_effnet"] > 0


def test_the_card_has_the_runs_figures(job: Path) -> None:
    metrics = read_json(job / "z-image" / "metrics.json")
    for exported in EXPORTS:
        card = (job / exported[-1] / "README.md").read_text()
        assert f"{metrics['psnr']:.2f} [{metrics['psnr_low']:.2f}, {metrics['psnr_high']:.2f}]" in card
        assert "held-out prompt" in card and "calibrated or trained on" not in card
        assert f"PSNR {metrics['predicted_weights_psnr']:.2f} dB" in card
        assert f"| {metrics['average_weight_bits']:.3f} |" in card and "`rtn " in card
        assert 'base_model: "Tongyi-MAI/Z-Image-Turbo"' in card and f"calib {shlex.join(exported)}" in card


def test_the_card_says_which_prompts_were_seen_and_has_further_measures(job: Path) -> None:
    record = read_run(job / "z-image", "z-image")
    of_sets = {"fid": 123.4, "fid_low": 120.5, "fid_high": 125.25, "kid_effnet": 0.5, "kid_effnet_low": 0.25}
    metrics = {**record.metrics, "prompts_seen": 1, "lpips_effnet": 0.25, "lpips_effnet_low": 0.2, **of_sets}
    about, notes = {"model": "z", "fingerprint": "0"}, ["fid: of 2 pictures it is biased"]
    card = Card(replace(record, metrics=metrics), about, metrics, [], None, 2, notes, [], 0, [], "mlx")
    text = card_text(card)
    assert "The whole set of 2 pictures against as many of full precision; 95% intervals." in text
    assert "| FID, lower is closer | 123.4 [120.5, 125.2] |\n" in text
    assert "| KID (EffNet), lower is closer | 0.5 [0.25] |" in text and "\n- fid: of 2 pictures it is biased\n" in text
    of_folder = replace(card.record, config={**card.record.config, "evaluation.reference": "somewhere/real"})
    assert "2 pictures against those of a folder, real;" in card_text(replace(card, record=of_folder))
    assert "Measured on 2 prompts (1 of them calibrated or trained on)" in text
    assert "| perceptual distance (EfficientNet, 0: equal) | 0.2500 [0.2000] |" in text


def test_a_recipe_says_what_the_plan_says(job: Path) -> None:
    recipe = read_json(job / EXPORTS[1][-1] / "recipe.json")
    plan = read_json(job / "z-image" / "quantization_config.json")
    assert (recipe["format"], recipe["format_version"], recipe["paths"]) == ("calib-recipe", 1, "mflux")
    assert {layer["name"]: (layer["bits"], layer["group_size"]) for layer in recipe["layers"].values()} == {
        name: (layer["suggested_weight_bits"], layer["group_size"]) for name, layer in plan.items()
    }
    assert recipe["layers"]["layers.0.feed_forward.w1"]["name"] == "unified_block_0.mlp.w1"
    for layer in recipe["layers"].values():
        assert plan[layer["name"]]["figure"] == f"alone {layer['alone_psnr']:.1f} dB"


def test_mlx_is_the_runs_own(tiny_run: Path, tmp_path: Path) -> None:
    well(export(tmp_path, tiny_run / "quantized", "--format", "mlx", "--into", "a/b"))
    made = contents(tmp_path / "a" / "b")
    assert made.pop("README.md") and made == contents(tiny_run / "quantized")
    assert load(tmp_path / "a" / "b").inputs.keys() == load(tiny_run / "quantized").inputs.keys()


def test_weights_only_says_so(tiny_run: Path, tmp_path: Path) -> None:
    well(export(tmp_path, tiny_run, "--format", "recipe", "--into", "out", "--weights-only"))
    assert "This folder has the weights alone" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    for module in (constants, path_resolution):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_the_hubs_cache_is_linked(hub: Path, job: Path, files: Path, tmp_path: Path) -> None:
    """Where the run used it; weights take no room a second time."""
    home = shutil.copytree(job / "z-image", tmp_path / "run")
    config = home / "config.resolved.yaml"
    config.write_text(config.read_text().replace(f"checkpoint: {files}", "checkpoint: null"))
    given = (home, "--format", "mflux", "--into", tmp_path / "out")
    line = is_one_clear_line(export(tmp_path, *given))
    assert line.startswith("--base is not set") and f"hf download {ZIMAGE}" in line
    commit = Path(Repository(hub, ZIMAGE, ModelRevisions.get(ZIMAGE)).path(""))
    shutil.copytree(files, commit, dirs_exist_ok=True)
    well(export(tmp_path, *given))
    for name in ("vae", "text_encoder"):
        (own,) = (tmp_path / "out" / name).glob("*.safetensors")
        assert own.samefile(commit / name / own.name)
    assert not (tmp_path / "out" / "tokenizer" / "tokenizer.json").samefile(commit / "tokenizer" / "tokenizer.json")
    loaded(tmp_path / "out")


# What is refused


def with_phases(model: QuantizedModel) -> None:
    name = next(iter(model.layers))
    model.copies, model.phases = {"early": {name: model.layers[name]}}, {"early": (0, 1)}


def with_rules(model: QuantizedModel, **more: tuple[float, ...]) -> None:
    model.timesteps = (1.0, 0.5)
    model.inputs = {next(iter(model.layers)): InputRule(StepRanges((0,), (-1.0,), (1.0,)), (8,), **more)}


def with_divisors(model: QuantizedModel) -> None:
    with_rules(model, divisors=(2.0,) * 64)


def rotated(model: QuantizedModel) -> None:
    name = next(iter(model.layers))
    model.layers[name] = replace(model.layers[name], rotation=64)


def misspelt(model: QuantizedModel) -> None:
    model.weights["layers.0.attention_norm9.weight"] = mx.zeros(192)


def lacking(model: QuantizedModel) -> None:
    del model.weights["x_pad_token"]


def misshapen(model: QuantizedModel) -> None:
    model.weights["x_pad_token"] = mx.zeros((1, 96))


def narrow(model: QuantizedModel) -> None:
    name = next(iter(model.layers))
    model.layers[name] = Packed.nearest(mx.zeros((192, 96)), 4, 32, mx.bfloat16)


@pytest.mark.parametrize(
    ("change", "form", "words"),
    [
        (
            with_phases,
            "mflux",
            "has other weights in phases (early), which mflux cannot hold; analysis.per_phase=false",
        ),
        (with_phases, "recipe", "which recipe cannot hold"),
        (with_rules, "mflux", "rounds the inputs of 1 layer, which mflux cannot hold; --weights-only leaves that out"),
        (with_rules, "recipe", "which recipe cannot hold"),
        (with_divisors, "mflux", "divides the inputs of 1 layer channel by channel"),
        (with_divisors, "recipe --weights-only", "which recipe cannot hold"),
        (rotated, "mflux", "rotates 1 layer (quantizer.rotation), which mflux cannot hold; quantizer.rotation=0"),
        (misspelt, "mflux", "has 'layers.0.attention_norm9.weight', which mflux's transformer does not take"),
        (lacking, "mflux", "lacks 'x_pad_token', which mflux's transformer has"),
        (misshapen, "mflux", "'x_pad_token' has the shape (1, 96), mflux's transformer has (1, 192)"),
        (narrow, "mflux", "mflux's transformer has"),
    ],
)
def test_what_a_form_cannot_hold(change: Change, form: str, words: str, files: Path, tmp_path: Path) -> None:
    model = quantized_zimage()
    change(model)
    save(model, tmp_path / "quantized")
    base = ("--base", files) if form == "mflux" else ()
    outcome = export(tmp_path, tmp_path, "--format", *form.split(), "--into", "new/out", *base)
    line = is_one_clear_line(outcome, outcome.status)
    assert outcome.status in (1, 2) and line.startswith(str(tmp_path)) and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / name)


def of_another_family(folder: Path) -> None:
    (path,) = (folder / "vae").glob("*.safetensors")
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(path), {f"other.{name}": array for name, array in arrays.items()}, {"format": "pt"})


def of_another_size(folder: Path) -> None:
    path = folder / "text_encoder" / "config.json"
    write_json(path, {**SIZES.text, "intermediate_size": 64})


def cut(folder: Path) -> None:
    (path,) = (folder / "vae").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


def garbled(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("tokenizer"), "has no tokenizer/"),
        (without("text_encoder"), "has no text_encoder/*.safetensors; is it the right model's?"),
        (of_another_family, "vae: The vae weights in"),
        (of_another_size, "is it the right model's?"),
        (cut, "was cut, it has"),
        (garbled, "tokenizer: "),
    ],
)
def test_a_base_that_mflux_cannot_draw_with(
    change: Callable[[Path], object], words: str, run: Path, files: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(files, tmp_path / "base")
    change(base)
    outcome = export(tmp_path, run, "--format", "mflux", "--into", "out", "--base", base)
    assert words in is_one_clear_line(outcome, outcome.status)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none", "--format", "mlx", "--into", "out"), "none: no such run directory"),
        (("empty", "--format", "mlx", "--into", "out"), "empty: is no run directory"),
        (("begun", "--format", "mlx", "--into", "out"), "begun: no quantized model there; calib quantize plan=begun"),
        ((".", "--format", "mlx", "--into", "out"), ".: holds 3 runs; name one of them"),
        (("damaged", "--format", "recipe", "--into", "out"), "model.safetensors: is damaged; run calib quantize again"),
        (("whole", "--format", "mflux", "--into", "out"), "--format mflux: holds models of mflux's alone, and emoji"),
        (("whole", "--format", "mlx", "--into", "whole"), "whole: is not an empty folder"),
        (("whole", "--format", "mlx", "--into", "."), ".: is not an empty folder"),
        (("whole", "--format", "mlx", "--into", "out", "--weights-only"), "--weights-only: --format mlx holds"),
        (("whole", "--format", "mlx", "--into", "out", "--base", "whole"), "--base whole: is for --format mflux"),
        (("whole", "--format", "gguf", "--into", "out"), "invalid choice: 'gguf'"),
        (("whole", "--format", "mlx"), "the following arguments are required: --into"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    arguments: tuple[str, ...], words: str, tiny_run: Path, tmp_path: Path
) -> None:
    for name in ("whole", "damaged"):
        shutil.copytree(tiny_run, tmp_path / name)
    flip_byte(tmp_path / "damaged" / "quantized" / "model.safetensors", -9)
    (tmp_path / "begun").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy(tiny_run / "status.json", tmp_path / "begun")
    before = everything(tmp_path)
    outcome = export(tmp_path, *arguments)
    assert words in is_one_clear_line(outcome, outcome.status)
    assert outcome.status in (1, 2) and everything(tmp_path) == before


# Whole or not at all


def test_a_full_disk_leaves_nothing(tiny_run: Path, small_disk: Path) -> None:
    line = is_one_clear_line(export(small_disk, tiny_run, "--format", "mlx", "--into", "out"), status=1)
    assert line == "out: No space left on device"
    assert list(small_disk.iterdir()) == []


def test_a_file_that_may_not_grow_leaves_nothing(tiny_run: Path, tmp_path: Path) -> None:
    """By a limit of the system's, met in the middle of the weights."""
    given = command("export", str(tiny_run), "--format", "mlx", "--into", "new/out")
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash", *given]
    done = subprocess.run(limited, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    line = is_one_clear_line(Outcome(done.returncode, done.stdout, done.stderr), status=1)
    assert line == f"{tmp_path / 'new' / 'out'}: File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_is_none_and_the_next_removes_it(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the weights are written, before anything takes its place."""
    code, work = tmp_path / "code", tmp_path / "work"
    code.mkdir(), work.mkdir()
    (code / "sitecustomize.py").write_text("import os\nos.fsync = lambda handle: os.kill(os.getpid(), 9)\n")
    given = ("export", str(tiny_run), "--format", "mlx", "--into", "out")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(code))
        assert run_process(work, *given).status == -9
    left = {path.name for path in work.iterdir()}
    assert left and "out" not in left
    well(run_in(work, *given))
    assert [path.name for path in work.iterdir()] == ["out"]
    assert load(work / "out").layers


def test_two_exports_into_one_folder(tiny_run: Path, tmp_path: Path) -> None:
    """The second says so, and leaves what the first has made so far; the first's folder is whole."""
    given = ("export", str(tiny_run), "--format", "mlx", "--into", "out")
    with new_folder(tmp_path / "out") as made:
        (made / "half").write_text("half")
        line = is_one_clear_line(run_in(tmp_path, *given), status=1)
        assert line == f"{tmp_path / 'out'}: another process is making this folder"
        assert (made / "half").exists()
    assert everything(tmp_path) == ["out", "out/half"]


def test_without_mflux_there_are_the_other_forms(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u, sys\nfind = u.find_spec\nsys.modules['mflux'] = None\n"
        "u.find_spec = lambda name, package=None: None if name == 'mflux' else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = is_one_clear_line(run_process(tmp_path, "export", str(run), "--format", "mflux", "--into", "out"))
    assert "uv run --group mflux calib" in line and "pip install --no-deps mflux==" in line
    well(run_process(tmp_path, "export", str(run), "--format", "recipe", "--into", "out"))
    assert read_json(tmp_path / "out" / "recipe.json")["paths"] == "mflux"
