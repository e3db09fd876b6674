"""What calib 0.1.0 wrote, before its modules moved, is read, compared and continued: tests/data/calib-0.1.0."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from calib.activations.reader import ActivationFile
from calib.analysis.layers import read_summaries
from calib.base.files import read_json, write_json
from calib.base.layout import ACTIVATIONS, MODEL, PLAN, STATISTICS, STATUS, STEPS
from calib.quantization.checkpoint import CHECKPOINT, load

import mlx.core as mx
import numpy as np
import pytest
from helpers import run_here

#: The command line's arguments -> what it printed.
Run: TypeAlias = Callable[..., str]

BEFORE = Path(__file__).parent / "data" / "calib-0.1.0"
#: The command that made it, but for the page, which is not kept.
COMMAND = (
    *("num_images=2", "sampler.num_steps=2", "sampler.batch_size=2", "timestep_schedule=all", "taps=all"),
    *("taps.include=[mm_block_1,mm_block_1.image.mlp.*]", "ranges=per_step", "evaluation=none"),
    *("data_dir=dataset", "cache_dir=cache", "hydra.run.dir=run", "report=none"),
)


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
    """The plan and what of it varies with the step, less where the statistics lie."""
    return {PLAN: read_json(run / PLAN), STEPS: read_json(run / STEPS) | {"statistics": None}}


def test_finished_run_stays_finished(before: Path, calib: Run) -> None:
    written = (before / "run" / STATUS).read_bytes()
    assert "Already complete: run" in calib(*COMMAND)
    assert (before / "run" / STATUS).read_bytes() == written


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
    calib("analyze", "stats=run", "ranges=per_step", "hydra.run.dir=again", "report=none")
    assert documents(before / "again") == documents(before / "run")


@pytest.fixture
def quantized(before: Path, calib: Run) -> Path:
    """Makes a quantized model of its plan; returns the folder."""
    assert "2 layers at" in calib("quantize", "plan=run", "hydra.run.dir=quantized", "report=none")
    return before / "quantized" / MODEL


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


def test_checkpoint_without_names(quantized: Path) -> None:
    document, whole = read_json(quantized / CHECKPOINT), load(quantized)
    write_json(quantized / CHECKPOINT, {key: value for key, value in document.items() if key != "names"})
    found = load(quantized)
    assert found.paths == whole.paths and found.layers.keys() == whole.layers.keys()
    for name, layer in whole.layers.items():
        assert mx.array_equal(found.layers[name].weight, layer.weight)
        assert np.array_equal(np.array(found.layers[name].scales), np.array(layer.scales))
