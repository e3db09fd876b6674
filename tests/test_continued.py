"""What calib 0.1.0 wrote, before its modules moved, is read, compared and continued: tests/data/calib-0.1.0."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from calib.activations.reader import ActivationFile
from calib.analysis.layers import read_summaries
from calib.analysis.rules import recorded_rule
from calib.analysis.steps import ORIGIN
from calib.base.files import read_json, write_json
from calib.base.layout import ACTIVATIONS, MODEL, PLAN, STATISTICS, STATUS, STEPS
from calib.quantization.checkpoint import CHECKPOINT, load, save

import mlx.core as mx
import pytest
from helpers import run_here

#: The command line's arguments -> what it printed.
Run: TypeAlias = Callable[..., str]

BEFORE = Path(__file__).parent / "data" / "calib-0.1.0"
#: The command that made it, but for the page, which is not kept.
THE_COMMAND = (
    *("num_images=2", "sampler.num_steps=2", "sampler.batch_size=2", "timestep_schedule=all", "taps=all"),
    *("taps.include=[mm_block_1,mm_block_1.image.mlp.*]", "ranges=per_step", "evaluation=none"),
    "quantizer.search=false",
    *("data_dir=dataset", "cache_dir=cache", "hydra.run.dir=run", "report=none"),
)
#: What calib 0.1.0 took where nothing was said.
DEFAULTS = ("analysis=range", "quantizer=rtn", "quantizer.search=false")
COMMAND = (*THE_COMMAND, *DEFAULTS)


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as calib 0.1.0 left it."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calib(before: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line where calib 0.1.0 was run; returns what it printed."""

    def run(*arguments: str) -> str:
        outcome = run_here(arguments, capsys)
        assert outcome.status == 0, outcome.err
        return outcome.out

    return run


def documents(run: Path) -> dict[str, Any]:
    """The plan and what of it varies with the step, less where the statistics lie; the rule in its form of today."""
    steps = read_json(run / STEPS)
    own = dict.fromkeys(ORIGIN) | {"ranges": recorded_rule(steps["ranges"])}
    return {PLAN: read_json(run / PLAN), STEPS: steps | own}


def test_finished_run_stays_finished(before: Path, calib: Run) -> None:
    written = (before / "run" / STATUS).read_bytes()
    assert "Already complete: run" in calib(*COMMAND)
    assert (before / "run" / STATUS).read_bytes() == written


def test_command_that_names_no_plan_is_another_job_since(before: Path, calib: Run) -> None:
    """Made anew in the same place, with what was drawn and collected; the old one comes back by naming its plan."""
    plans = documents(before / "run")
    out = calib(*THE_COMMAND)
    assert "Dataset: dataset (2 images, 0 new)" in out and "predicted PSNR" in out
    assert documents(before / "run") != plans
    assert "Already complete: run" in calib(*THE_COMMAND)
    again = calib(*COMMAND)
    assert "Already complete" not in again and "predicted" not in again
    for name, plan in documents(before / "run").items():
        assert_alike(plan, plans[name])


def test_half_finished_run_goes_on(before: Path, calib: Run) -> None:
    status, plans = read_json(before / "run" / STATUS), documents(before / "run")
    write_json(before / "run" / STATUS, status | {"state": "running", "end": None})
    out = calib(*COMMAND)
    assert "Dataset: dataset (2 images, 0 new)" in out
    after = read_json(before / "run" / STATUS)
    assert after["state"] == "complete" and after["fingerprint"] == status["fingerprint"]
    for name, plan in documents(before / "run").items():
        assert_alike(plan, plans[name])


def assert_alike(found: Any, expected: Any) -> None:
    """Equal but for the rounding of another processor."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    else:
        assert found == expected


def test_dataset_is_sound_and_complete(before: Path, calib: Run) -> None:
    assert "sound: 2 images" in calib("verify", "dataset")
    assert "0 new" in calib("generate", *COMMAND[:3], "data_dir=dataset")


def test_plan_is_made_again_from_its_statistics(before: Path, calib: Run) -> None:
    calib("analyze", "stats=run", "analysis=range", "ranges=per_step", "hydra.run.dir=again", "report=none")
    assert documents(before / "again") == documents(before / "run")


def test_plan_is_applied(before: Path, calib: Run) -> None:
    assert "2 layers at" in calib("quantize", "plan=run", "hydra.run.dir=again", "report=none")
    assert (before / "again" / MODEL / CHECKPOINT).is_file()


def test_statistics_are_read(before: Path, calib: Run) -> None:
    with ActivationFile(before / "run" / ACTIVATIONS) as file:
        layers, steps = file.layers, file.steps
    assert steps == [0, 1, 2]
    streams = ("mm_block_1.image", "mm_block_1.text")
    assert layers[0] == "mm_block_1" and set(streams) < set(layers)
    assert [name for name in layers if ".mlp." in name] == [f"mm_block_1.image.mlp.fc{i}" for i in (1, 2)]
    summaries, num_steps = read_summaries(before / "run")
    assert num_steps == 2
    assert {name: layer.to_json() for name, layer in summaries.items()} == read_json(before / "run" / STATISTICS)


@pytest.mark.parametrize("form", ["--json", "--csv", "--markdown", "--all"])
def test_run_is_compared(before: Path, calib: Run, form: str) -> None:
    out = calib("compare", "run", form)
    metrics = read_json(before / "run" / "metrics.json")
    assert f"{metrics['quantized_bytes'] / 1e6:.2f}" in out or str(metrics["quantized_bytes"]) in out


def test_plans_are_compared(before: Path, calib: Run) -> None:
    calib("analyze", "stats=run", "analysis=uniform", "hydra.run.dir=uniform", "report=none")
    document = json.loads(calib("compare", "run", "uniform", "--layers", "--all", "--json"))
    assert set(document["layers"]) == set(read_json(before / "run" / PLAN))


def test_checkpoint_is_loaded_and_saved_again(before: Path, tmp_path: Path) -> None:
    """Of a small network with random weights, a copy of one layer for the late steps, and ranges for three inputs."""
    stored, found = read_json(before / "quantized" / CHECKPOINT), load(before / "quantized")
    assert "names" not in stored and set(found.paths.values()) == set(stored["layers"])
    assert found.paths["mm_block_0.image.mlp.fc1"].endswith("image_transformer_block.mlp.fc1")
    assert (list(found.copies), len(found.inputs), found.phases["late"]) == (["late"], 3, (2, 2))
    save(found, tmp_path / "again")
    again = load(tmp_path / "again")
    assert (again.inputs, again.paths, again.about) == (found.inputs, found.paths, found.about)
    arrays = mx.load(str(before / "quantized" / "model.safetensors"))
    assert again.parameters().keys() == found.parameters().keys() == arrays.keys()
    for path, array in again.parameters().items():
        assert mx.array_equal(array, arrays[path])
