"""Bad input ends with one clear line and the right status, and leaves nothing behind."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import (
    PROMPTS,
    TINY,
    contents,
    everything,
    flip_byte,
    is_one_clear_line,
    run_here,
    run_process,
    run_without_rights,
)

CHEAP = ("num_images=2", "sampler.num_steps=2", "evaluation=none", "report=none")

#: What the command line itself refuses, and of each sort of bad value one; tests/test_config.py has them all.
BAD = [
    (["num_image=3"], ("num_image=3", "'num_images'")),
    (["sampler.numsteps=3"], ("sampler.numsteps=3", "'sampler.num_steps'")),
    (["+extra=3"], ("extra", "no such key")),
    (["timestep_schedule=uniformm"], ("timestep_schedule=uniformm", "'uniform'")),
    ([*CHEAP, "sampler=sd3"], ("sampler=sd3", "sd3_medium")),
    ([*CHEAP, "experiment=quik"], ("experiment=quik", "'quick'")),
    (["timestep_schedules=key"], ("timestep_schedules=key", "'timestep_schedule'")),
    (["timestep_schedule.count=3"], ("timestep_schedule.count=3",)),
    (["num_images=three"], ("num_images=three", "integer")),
    (["dataset.dtype=float17"], ("dataset.dtype=float17", "float16, bfloat16, float32", "'float16'")),
    (["generate", "shard.index=3", "shard.count=3"], ("shard.index=3", "0 to 2")),
    (["collect", "shard.count=2"], ("calibration_data", "calib generate")),
    (["analyze", "shard.count=2"], ("shard.count=2", "calib generate")),
    (["storage.rows_per_image=4"], ("storage.rows_per_image=4", "storage=sampled takes it")),
    (["subset.num_images=11"], ("subset.num_images=11", "1 to 10")),
    ([*CHEAP, "subset=list", "subset.ids=[2]"], ("subset.ids=2", "2 images")),
    (["timestep_schedule=list"], ("timestep_schedule.steps=[]",)),
    (["prompts=file", "prompts.path=../empty.txt"], ("prompts.path=../empty.txt", "no prompts")),
    (["prompts.path=a.txt"], ("prompts.path=a.txt", "prompts=file takes it")),
    (["hydra.run.dir=../file/run"], ("hydra.run.dir=../file/run", "cannot be written")),
    (["data_dir=../file"], ("data_dir=../file", "cannot be written")),
    (["data_dir=../file/dataset"], ("data_dir=../file/dataset", "cannot be written")),
    (["export_config=../file/plan.json"], ("export_config=../file", "cannot be written")),
    (["-m", "hydra.sweep.dir=../file/sweep", "seed=1,2"], ("hydra.sweep.dir=../file/sweep", "cannot be written")),
    (["taps.include=[mm_block_0.image.mlp.fc3]"], ("taps.include=mm_block_0.image.mlp.fc3", "fc2'")),
    (["collect=3"], ("collect=3",)),
    (["taps=null"], ("taps",)),
    (["~analysis"], ("analysis",)),
    (["num_images"], ("num_images",)),
    (["sampler.num_steps=[1"], ("sampler.num_steps=[1",)),
    (["num_images=1", "num_images=x"], ("num_images=x",)),
    (["--multirrun"], ("--multirrun",)),
    (["-m", "analysis=range,rnge"], ("analysis=rnge", "'range'")),
    (["-m", "sampler.num_steps=8,0"], ("sampler.num_steps=0",)),
    (["-m", "timestep_schedule=key,uniform", "sampler.num_steps=4"], ("timestep_schedule.count=17",)),
    (["generat"], ("generat", "unknown stage", "'generate'")),
    (["draw", "num_images=3"], ("draw", "unknown stage", "generate")),
    (["generate", "collect"], ("collect",)),
    (["analyze"], ("stats", "calib analyze stats=")),
    (["analyze", "stats=nowhere"], ("stats=nowhere", "calib collect")),
    (["analyze", "stats=../file"], ("file",)),
    (["collect", "data_dir=nowhere"], ("nowhere", "calib generate")),
    (["collect"], ("calibration_data", "calib generate")),
]

#: What is missing rather than wrong may end with status 1.
MISSING = ("analyze", "collect")


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_ends_with_one_clear_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
) -> None:
    (folder.parent / "empty.txt").write_text("\n \n")
    (folder.parent / "file").write_text("in the way")
    outcome = run_here(arguments, capsys)
    files_missing = arguments[0] in MISSING and outcome.status == 1
    line = is_one_clear_line(outcome, status=1 if files_missing else 2)
    for word in words:
        assert word in line
    assert everything(folder) == []
    assert everything(folder.parent) == ["empty.txt", "file", "work"]
    assert (folder.parent / "file").read_text() == "in the way"


def test_bad_values_have_status_2_for_a_stats_that_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(["analyze", "stats=nowhere"], capsys).status == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["subset.num_images=5"], ("subset.num_images=5", "1 to 4")),
        (["subset.num_images=0"], ("subset.num_images=0",)),
        (["subset=list", "subset.ids=[0,4]"], ("subset.ids=4", "4 images")),
        (["sampler.num_steps=50"], ("steps",)),
        (["timestep_schedule=list", "timestep_schedule.steps=[9]"], ("timestep_schedule.steps=9", "0 … 8")),
        (["taps.include=[nothing]"], ("taps.include=nothing",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_dataset_does_not_have_is_one_clear_line(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
) -> None:
    outcome = run_here(["collect", f"data_dir={data_dir}", "sampler.num_steps=8", *arguments], capsys)
    line = is_one_clear_line(outcome)
    for word in words:
        assert word in line
    assert everything(folder) == []


def test_a_real_process_ends_so_too(tmp_path: Path) -> None:
    is_one_clear_line(run_process(tmp_path, "hydra.run.dir=/dev/null/run"))
    assert everything(tmp_path) == []


def test_a_folder_without_write_permission_is_refused(folder: Path) -> None:
    folder.chmod(0o555)
    try:
        outcome = run_without_rights(folder, *TINY)
        line = is_one_clear_line(outcome)
        assert "cannot be written (Permission denied)" in line
        assert everything(folder) == []
    finally:
        folder.chmod(0o755)


def test_other_settings_in_a_datasets_folder_end_with_one_clear_line(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(data_dir)
    outcome = run_here(
        ["generate", f"data_dir={data_dir}", "sampler.num_steps=4", "num_images=6", "report=none"], capsys
    )
    assert outcome.status in (1, 2)
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("calib: ")]
    assert len(lines) == 1
    assert "num_steps=8" in lines[0]
    assert contents(data_dir) == before


def test_a_folder_of_another_model_ends_with_one_clear_line(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_dir, folder / "dataset")
    path = folder / "dataset" / "manifest.json"
    sound = path.read_text(encoding="utf-8")
    given = ("data_dir=dataset", "sampler.num_steps=8", "num_images=5", "hydra.run.dir=run", "report=none")
    path.write_text(sound.replace('"model": "emoji"', '"model": "sd3_medium"', 1), encoding="utf-8")
    for stage in ("generate", "collect"):
        line = is_one_clear_line(run_here([stage, *given], capsys))
        assert line.startswith("model=emoji: dataset was drawn with model=sd3_medium;")
        assert everything(folder) == sorted(
            ["dataset", *(f"dataset/{name}" for name in everything(folder / "dataset"))]
        )
    # Other weights of the same model are known when it is loaded.
    fingerprint = json.loads(sound)["fingerprint"]
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    path.write_text(sound.replace(fingerprint, "0123456789abcdef"), encoding="utf-8")
    before = contents(folder / "dataset")
    outcome = run_here(["generate", *given, "prompts=file", "prompts.path=prompts.txt"], capsys)
    line = is_one_clear_line(outcome, status=1)
    assert f"fingerprint=0123456789abcdef, not {fingerprint}" in line
    assert contents(folder / "dataset") == before


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ("", "run"),
        ("half", "run"),
        ("half", "generate"),
        ("half", "collect"),
        ("[]", "collect"),
        ('{"format": "calib-dataset", "format_version": 1}', "collect"),
        ("no entries", "generate"),
    ],
)
def test_a_corrupt_manifest_ends_with_one_clear_line_that_offers_to_rebuild_it(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str], content: str, stage: str
) -> None:
    shutil.copytree(data_dir, folder / "dataset")
    path = folder / "dataset" / "manifest.json"
    sound = path.read_text(encoding="utf-8")
    if content == "half":
        content = sound[: len(sound) // 2]
    elif content == "no entries":
        content = json.dumps({name: value for name, value in json.loads(sound).items() if name != "images"})
    path.write_text(content, encoding="utf-8")
    before = everything(folder)
    line = is_one_clear_line(run_here([stage, "data_dir=dataset", "sampler.num_steps=8"], capsys), status=1)
    assert line.startswith("dataset/manifest.json: ")
    assert "calib rebuild-manifest dataset" in line
    assert everything(folder) == before
    assert path.read_text(encoding="utf-8") == content


def test_a_read_only_dataset_is_read_and_not_added_to(data_dir: Path, folder: Path) -> None:
    shutil.copytree(data_dir, folder / "dataset", ignore=shutil.ignore_patterns(".*"))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    folder.chmod(0o777)
    folders = [folder / "dataset", *(path for path in (folder / "dataset").iterdir() if path.is_dir())]
    given = ("data_dir=dataset", "sampler.num_steps=8", "prompts=file", "prompts.path=prompts.txt")
    given += ("hydra.run.dir=run", "report=none")
    before = contents(folder)
    for part in folders:
        part.chmod(0o555)
    try:
        line = is_one_clear_line(run_without_rights(folder, "generate", *given, "num_images=5"))
        assert line == "data_dir=dataset: cannot be written (Permission denied); choose another folder"
        assert contents(folder) == before
        # Writable itself, but not where the files go.
        (folder / "dataset").chmod(0o777)
        (folder / "dataset" / "manifest.json").chmod(0o666)
        line = is_one_clear_line(run_without_rights(folder, "generate", *given, "num_images=5"))
        assert line == "data_dir=dataset/samples: cannot be written (Permission denied); choose another folder"
        assert contents(folder / "dataset") == contents(data_dir)
        (folder / "dataset").chmod(0o555)
        outcome = run_without_rights(folder, "generate", *given, "num_images=4")
        assert outcome.status == 0, outcome
        assert "Dataset: dataset (4 images, 0 new)" in outcome.out
    finally:
        for part in folders:
            part.chmod(0o755)


def test_a_damaged_state_ends_with_one_clear_line_and_a_failed_run(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_dir, folder / "dataset")
    path = folder / "dataset" / "samples" / "0001.h5"
    flip_byte(path, path.stat().st_size // 2)
    arguments = ["data_dir=dataset", "sampler.num_steps=8", "timestep_schedule=all", "taps.include=[x_embedder]"]
    arguments += ["report=none"]
    outcome = run_here(["collect", *arguments, "hydra.run.dir=run"], capsys)
    assert outcome.status == 1
    lines = [line for line in outcome.err.splitlines() if not line.startswith("collect ")]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("calib: ")
    assert "0001.h5" in lines[0]
    status = json.loads((folder / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "0001.h5" in status["error"]
    assert "Traceback" in (folder / "run" / "run.log").read_text()
