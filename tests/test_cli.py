"""The command line, as people use it: whole jobs, stage by stage, interrupted; one of them in a real process."""

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from calib.activations.reader import ActivationFile
from calib.base.layout import MODEL_CONFIG
from calib.dataset import prompts
from calib.dataset.generate import generate
from calib.dataset.load import load_manifest
from calib.dataset.settings import SamplerSettings
from calib.models.model import DiffusionModel

import pytest
from helpers import (
    CHECKOUT,
    TINY,
    contents,
    environment,
    everything,
    is_one_clear_line,
    listed,
    run_here,
    run_in,
    run_process,
    start_process,
    wait_until,
    well,
)

#: Of jobs on the shared dataset.
BRIEF = ("sampler.num_steps=8", "sampler.batch_size=2", "report=none")
RUN_FILES = {
    "activations.h5",
    "analysis.txt",
    "collection_metadata.json",
    "config.resolved.yaml",
    "env.json",
    "evaluation.json",
    "evaluation.txt",
    "images/full/0000.png",
    "images/full/0001.png",
    "images/output_error.png",
    "images/pictures.png",
    "images/quantized/0000.png",
    "images/quantized/0001.png",
    "layer_statistics.json",
    "metrics.json",
    "quantization_config.json",
    "quantized/config.json",
    "quantized/model.safetensors",
    "run.log",
    "status.json",
    "timestep_config.json",
}


#: Of those the ones that hold times, places, what memory was in use, or the configuration with its wish for a page.
OF_THEIR_OWN = {
    *("activations.h5", "config.resolved.yaml", "env.json", "evaluation.txt", "metrics.json", "run.log", "status.json"),
    "timestep_config.json",
}


def check_files_of(run: Path, files: set[str]) -> None:
    """All of a run directory that nothing was left out of, and nothing half-made."""
    assert {name for name in contents(run) if not name.startswith(".hydra/")} == files
    assert not [path for path in run.iterdir() if path.name.startswith(".") and path.name not in (".hydra", ".lock")]


def test_the_whole_job_writes_every_file_of_a_run_directory_and_no_page_where_none_is_wanted(tiny_run: Path) -> None:
    check_files_of(tiny_run, RUN_FILES)
    assert (tiny_run / ".hydra" / "config.yaml").exists()
    assert not list(tiny_run.rglob("*.tmp"))
    status = json.loads((tiny_run / "status.json").read_text())
    assert (status["state"], status["stage"], status["error"]) == ("complete", "run", None)
    assert status["start"] <= status["end"]
    assert len(status["fingerprint"]) == 16
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert (metrics["images_generated"], metrics["images"], metrics["steps"], metrics["layers"]) == (2, 2, 5, 61)
    assert metrics["quantized_bytes"] < 0.4 * metrics["unquantized_bytes"]
    for name in ("psnr", "ssim", "output_error", "control_psnr", "control_ssim", "control_output_error"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"], name
    assert metrics["control_psnr"] > metrics["psnr"] + 10, "bfloat16 is much nearer than four bits"
    surroundings = json.loads((tiny_run / "env.json").read_text())
    assert surroundings["versions"]["mlx"]
    assert "num_images: 2" in (tiny_run / "config.resolved.yaml").read_text()
    assert "${" not in (tiny_run / "config.resolved.yaml").read_text()
    metadata = json.loads((tiny_run / "collection_metadata.json").read_text())
    assert metadata["image_ids"] == [0, 1]
    assert [step["step_index"] for step in metadata["steps"]] == [0, 1, 2, 3, 4]


def test_the_whole_job_prints_the_summary_and_the_run_directory(tiny_run: Path) -> None:
    out = (tiny_run.parent / "stdout.txt").read_text()
    assert (tiny_run / "analysis.txt").read_text() in out
    assert (tiny_run / "evaluation.txt").read_text() in out
    assert "Quantized model: " in out and " bits a weight over all: " in out
    assert out.splitlines()[-1] == "Run directory: run"


def test_the_default_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``calib`` does by itself, but for its sizes: it says what it predicts, what it saved and what it drew."""
    sizes = [
        *TINY[:4],
        "taps.include=[mm_block_1.image.mlp.*]",
        "data_dir=dataset",
        "report=none",
        "evaluation.steps=2",
        "sensitivity.images=1",
    ]
    outcome = well(run_here([*sizes, "evaluation.num_images=2", "hydra.run.dir=run"], capsys))
    metrics, about = (json.loads((folder / "run" / name).read_text()) for name in ("metrics.json", MODEL_CONFIG))
    assert (about["quantizer"]["name"], about["ranges"]["name"]) == ("gptq", "per_step")
    bits, size, predicted = metrics["average_weight_bits"], metrics["quantized_bytes"] / 1e6, about["predicted_psnr"]
    assert bits <= 4.5 and f"predicted PSNR = {about['predicted_weights_psnr']:.2f}" in outcome.out
    short, last = outcome.out.splitlines()[-2:]
    assert short.startswith(f"In short: {bits:.2f} bits a weight, {size:.1f} MB for ") and last == "Run directory: run"
    assert short.endswith(f"%); 2 held-out pictures at PSNR {metrics['psnr']:.2f} dB, {predicted:.2f} predicted")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["dataset.steps=schedule"], ("dataset.steps=schedule", "leaves out 1", "sensitivity.of=output")),
        (["taps=block"], ("they are blocks", "analysis=range")),
        (["analyze", "stats=layer_statistics.json"], ("name a run directory", "analysis=sqnr and range")),
    ],
)
def test_what_the_default_plan_cannot_do_is_told_before_anything_is_drawn(
    tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str], given: list[str], named: Sequence[str]
) -> None:
    shutil.copy(tiny_run / "layer_statistics.json", folder)
    outcome = run_here([*given, "hydra.run.dir=run"], capsys)
    line = is_one_clear_line(outcome, outcome.status)
    assert outcome.status and all(name in line for name in named), line
    assert sorted(path.name for path in folder.iterdir()) == ["layer_statistics.json"]


def test_a_process_of_its_own_makes_the_same_and_a_page(tiny_run: Path, tmp_path: Path) -> None:
    outcome = run_process(tmp_path, *TINY, "report=html", "data_dir=dataset", "hydra.run.dir=run")
    assert outcome.status == 0, outcome.err
    check_files_of(tmp_path / "run", RUN_FILES | {"report.html"})
    assert outcome.out.splitlines()[-1] == "Run directory: run; open run/report.html"
    assert "\r" not in outcome.err, "plain lines where output is not a terminal"
    preflight = r"generate: 2 images to do in batches of 2, up to [\d.]+ kB \([\d.]+ kB each\); .* free in dataset"
    assert re.fullmatch(preflight, outcome.err.splitlines()[0])
    assert "Traceback" not in outcome.err
    assert "Warning" not in outcome.err
    assert contents(tmp_path / "dataset") == contents(tiny_run.parent / "dataset")
    found, expected = contents(tmp_path / "run"), contents(tiny_run)
    for name in RUN_FILES - OF_THEIR_OWN:
        assert found[name] == expected[name], name


def test_a_complete_run_gets_its_page_where_one_is_wanted_later(
    tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run, folder / "run")
    before = contents(folder / "run")
    outcome = run_here([*TINY, "report=html", "data_dir=dataset", "hydra.run.dir=run"], capsys)
    assert (outcome.status, outcome.out) == (0, "Already complete: run\n"), outcome.err
    after = contents(folder / "run")
    assert len((folder / "run" / "report.html").read_text(encoding="utf-8")) > 10_000
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith(".hydra/")} == {"report.html"}


def test_the_log_has_what_was_done(tiny_run: Path) -> None:
    log = (tiny_run / "run.log").read_text()
    assert log.count("loaded emoji") == 1
    for done in ("collected 61 layers", "quantized 60 layers", "evaluated 2 images"):
        assert done in log


def test_a_complete_run_is_not_run_again(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_run.parent)
    before = {name: (tiny_run / name).stat().st_mtime_ns for name in RUN_FILES}
    outcome = run_here([*TINY, "data_dir=dataset", "hydra.run.dir=run"], capsys)
    assert outcome.status == 0
    assert outcome.out == "Already complete: run\n"
    assert {name: (tiny_run / name).stat().st_mtime_ns for name in RUN_FILES} == before


def test_stage_by_stage_gives_what_the_whole_job_gives(
    tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"analyze": "stats=collect", "quantize": "plan=analyze", "evaluate": "plan=quantize"}
    for stage in ("generate", "collect", "analyze", "quantize", "evaluate"):
        more = [given[stage]] if stage in given else []
        outcome = run_here([stage, *TINY, "data_dir=dataset", f"hydra.run.dir={stage}", *more], capsys)
        assert outcome.status == 0, outcome.err
    assert contents(folder / "dataset") == contents(tiny_run.parent / "dataset")
    (evaluation,) = folder.glob("emoji-evaluation-*")
    assert contents(evaluation) == contents(tiny_run.parent / evaluation.name)
    for stage, name in (
        ("collect", "layer_statistics.json"),
        ("analyze", "quantization_config.json"),
        ("analyze", "analysis.txt"),
        ("quantize", "quantization_config.json"),
        ("quantize", "quantized/config.json"),
        ("quantize", "quantized/model.safetensors"),
        ("evaluate", "evaluation.json"),
        ("evaluate", "images/pictures.png"),
        ("evaluate", "images/output_error.png"),
    ):
        assert (folder / stage / name).read_bytes() == (tiny_run / name).read_bytes(), name
    # What memory was in use at most is another matter.
    reports = [(run / "evaluation.txt").read_text().splitlines() for run in (folder / "evaluate", tiny_run)]
    assert reports[0][:-1] == reports[1][:-1]
    assert all(report[-1].startswith("peak memory while drawing quantized: ") for report in reports)
    configs = [json.loads((run / "timestep_config.json").read_text()) for run in (Path("analyze"), tiny_run)]
    for config, run in zip(configs, (Path("collect"), tiny_run), strict=True):
        assert Path(config.pop("statistics")).samefile(run / "activations.h5")
    assert configs[0] == configs[1]
    copied = (folder / "quantize" / "timestep_config.json").read_bytes()
    assert copied == (folder / "analyze" / "timestep_config.json").read_bytes()
    metrics = [json.loads((folder / stage / "metrics.json").read_text()) for stage in ("quantize", "evaluate")]
    whole = json.loads((tiny_run / "metrics.json").read_text())
    timed = ("_seconds", "_peak_bytes")
    assert {k: v for m in metrics for k, v in m.items() if not k.endswith(timed)}.items() <= whole.items()


def test_more_images_are_added_to_the_same_dataset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, new, complete in ((1, 1, "1 image"), (3, 2, "3 images"), (2, 0, "3 images")):
        outcome = run_here(["generate", f"num_images={number}", "sampler.num_steps=2", *BRIEF[1:]], capsys)
        assert outcome.status == 0, outcome.err
        assert f"({complete}, {new} new)" in outcome.out
    (dataset,) = (folder / "calibration_data").iterdir()
    assert dataset.name.startswith("emoji-emoji-2steps-")
    assert sorted(load_manifest(dataset).images) == [0, 1, 2]


def test_collect_takes_the_chosen_images_steps_and_layers(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_here(
        [
            *("collect", f"data_dir={data_dir}", *BRIEF, "hydra.run.dir=run"),
            *("subset=list", "subset.ids=[3,1]", "timestep_schedule=list", "timestep_schedule.steps=[5,0]"),
            *("taps=all", "taps.include=['*.mlp.fc2','mm_block_1']", "taps.exclude=['*.text.*']"),
        ],
        capsys,
    )
    assert outcome.status == 0, outcome.err
    metadata = json.loads((folder / "run" / "collection_metadata.json").read_text())
    assert metadata["image_ids"] == [1, 3]
    assert [step["step_index"] for step in metadata["steps"]] == [0, 5]
    with ActivationFile(folder / "run" / "activations.h5") as file:
        assert file.steps == [0, 5]
        fc2 = [f"mm_block_{i}.image.mlp.fc2" for i in range(4)]
        assert set(file.layers) == {*fc2, "mm_block_1", "mm_block_1.image", "mm_block_1.text"}
    statistics = json.loads((folder / "run" / "layer_statistics.json").read_text())
    assert set(statistics) == {*fc2, "mm_block_1"}, "a block is summarised as a whole"


def test_another_run_takes_what_is_collected_and_loads_no_model(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["collect", f"data_dir={data_dir}", *BRIEF, "taps.include=['*.fc2']"]
    schedule = ["timestep_schedule=list", "timestep_schedule.steps=[0,4,8]"]
    assert run_here([*given, *schedule, "hydra.run.dir=one"], capsys).status == 0
    outcome = run_here([*given, "timestep_schedule=list", "timestep_schedule.steps=[0,8]", "hydra.run.dir=two"], capsys)
    assert outcome.status == 0
    assert outcome.err == "", "nothing is computed"
    assert "loaded emoji" in (folder / "one" / "run.log").read_text()
    log = (folder / "two" / "run.log").read_text()
    assert "loaded emoji" not in log and "collected 7 layers of 4 images at 2 steps" in log
    with ActivationFile(folder / "one/activations.h5") as one, ActivationFile(folder / "two/activations.h5") as two:
        assert two.steps == [0, 8]
        assert two.layers == one.layers
        for name in two.layers:
            assert two.statistics(name).percentiles() == one.statistics(name, [0, 8]).percentiles()
            assert two.weight_sqnr(name) == one.weight_sqnr(name)


def test_the_block_view_names_the_blocks(data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(
        [
            *("collect", f"data_dir={data_dir}", *BRIEF, "taps=block"),
            *("timestep_schedule=quarters", "hydra.run.dir=run"),
        ],
        capsys,
    )
    assert outcome.status == 0, outcome.err
    outcome = run_here(["analyze", "stats=run", "analysis=range", "hydra.run.dir=run", "report=none"], capsys)
    assert "  Total layers: 4\n" in outcome.out
    plan = json.loads((folder / "run" / "quantization_config.json").read_text())
    assert list(plan) == ["mm_block_0", "mm_block_1", "mm_block_2", "mm_block_3"]


@pytest.mark.parametrize("stage", [None, "run", "generate", "collect", "analyze", "quantize", "evaluate"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_worth_reading(folder: Path, capsys: pytest.CaptureFixture[str], stage: str | None, flag: str) -> None:
    outcome = run_here([stage, flag] if stage else [flag], capsys)
    assert outcome.status == 0
    assert outcome.err == ""
    assert f"usage: calib {stage or '[stage]'} [key=value …] [-m]" in outcome.out
    for group in ("timestep_schedule=", "subset=", "analysis=", "model=", "key", "quarters", "uniform", "emoji"):
        assert group in outcome.out
    for group in ("ranges=", "quantizer=", "evaluation=", "allocate", "gptq", "per_step", "paired"):
        assert group in outcome.out
    if stage in ("quantize", "evaluate"):
        assert "plan" in outcome.out.split("config groups")[0]
    if stage is None:
        for name in ("generate", "collect", "analyze", "quantize", "evaluate", "doctor", "run"):
            assert f"\n  {name} " in outcome.out
    assert max(len(line) for line in outcome.out.splitlines()) <= 140
    assert everything(folder) == []


def test_the_configuration_can_be_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["--cfg", "job", "num_images=7"], capsys)
    assert outcome.status == 0
    assert "num_images: 7" in outcome.out
    assert "calib.dataset.timesteps.key" in outcome.out
    assert everything(folder) == []


DRAWING = ("num_images=1", "sampler.num_steps=1", "report=none")


@pytest.mark.parametrize(
    ("script", "arguments", "made"),
    [
        ("generate_calibration_data.py", [*DRAWING], "calibration_data/*/manifest.json"),
        ("collect_layer_activations.py", ["--help"], ""),
        ("analyze_activations.py", ["--help"], ""),
    ],
)
def test_scripts_are_the_same_commands(tmp_path: Path, script: str, arguments: list[str], made: str) -> None:
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "scripts" / script), *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if made:
        assert len(list(tmp_path.glob(made))) == 1
    else:
        stage = script.split("_")[0]
        assert done.stdout.startswith(f"usage: calib {stage} ")


# Interruption and company


@pytest.mark.slow
def test_interrupted_by_the_keyboard_it_says_so_and_goes_on_later(model: DiffusionModel, tmp_path: Path) -> None:
    job = ("num_images=5", "sampler.num_steps=8", "sampler.batch_size=1", "timestep_schedule=quarters")
    job += ("data_dir=dataset", "hydra.run.dir=run", "taps.include=[x_embedder]", "evaluation=none", "report=none")
    process = start_process(tmp_path, *job)
    wait_until(lambda: bool(listed(tmp_path / "dataset")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = listed(tmp_path / "dataset")
    assert 1 <= len(kept) < 5
    assert [line for line in err.splitlines() if line.startswith("calib: ")] == [
        f"calib: interrupted; {len(kept)} of 5 images done and kept in dataset; the same command goes on from there"
    ]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    outcome = run_in(tmp_path, *job)
    assert outcome.status == 0, outcome.err
    assert f"(5 images, {5 - len(kept)} new)" in outcome.out
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
    generate(model, prompts.emoji(), 5, tmp_path / "whole", SamplerSettings(num_steps=8, batch_size=1))
    assert contents(tmp_path / "dataset") == contents(tmp_path / "whole")


def test_a_second_process_in_the_same_run_directory_ends_with_a_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run").mkdir()
    with open(folder / "run" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        outcome = run_here([*TINY, "hydra.run.dir=run"], capsys)
    assert outcome.status == 1
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("calib: ")
    assert outcome.err.endswith("run: another process is running in this directory\n")
    assert not (folder / "calibration_data").exists()
    assert not (folder / "run" / "status.json").exists()
