"""Collection of what is not there, damaged or spoiled: one clear line, the right exit status, nothing half-made."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.dataset.generate import generate
from calib.models.model import DiffusionModel

import h5py
import numpy as np
import pytest
from damage import SETTINGS, restated, set_states
from helpers import PROMPTS, contents, everything, flip_byte, is_one_clear_line, lines_of, run_here, temporaries

#: Of a dataset of four images and two steps.
COLLECT = (
    *("collect", "data_dir=dataset", "sampler.num_steps=2", "timestep_schedule=all", "report=none"),
    "hydra.run.dir=run",
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which ``dataset`` lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_failed_run(work: Path, message: str) -> None:
    """The run says why it failed, and made nothing else; nothing was collected."""
    status = json.loads((work / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert message in status["error"]
    made = {path.name for path in (work / "run").iterdir() if not path.name.startswith(".")}
    assert made - {"report.html"} == {"config.resolved.yaml", "env.json", "run.log", "status.json"}
    assert list(work.rglob("step_*")) == []
    assert temporaries(work) == set()


# States that are missing or damaged

STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a lost file": (lambda d: (d / "samples/0001.h5").unlink(), "samples/0001.h5 is missing"),
    "a flipped byte": (lambda d: flip_byte(d / "samples/0002.h5", 3000), "samples/0002.h5 is damaged"),
    "an empty file": (lambda d: os.truncate(d / "samples/0000.h5", 0), "samples/0000.h5 is damaged"),
    "a folder": (
        lambda d: ((d / "samples/0000.h5").unlink(), (d / "samples/0000.h5").mkdir()),
        "samples/0000.h5 cannot be read (Is a directory)",
    ),
    "two files": (
        lambda d: [os.truncate(d / f"samples/000{i}.h5", 99) for i in (1, 3)],
        "samples/0001.h5 is damaged, samples/0003.h5 is damaged",
    ),
    "all files": (
        lambda d: shutil.rmtree(d / "samples"),
        "samples/0000.h5 is missing, samples/0001.h5 is missing, samples/0002.h5 is missing and 1 more",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_are_not_sound_are_named_before_anything_is_collected(
    dataset: Path, work: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, words = STATES[case]
    damage(dataset)
    line = is_one_clear_line(run_here(COLLECT, capsys), status=1)
    mend = "calib verify dataset says what else is wrong; calib generate draws them again"
    assert line == f"dataset: {words}; {mend}"
    check_failed_run(work, words)
    assert not (work / "run" / "report.html").exists()


def test_a_failed_run_has_a_page_that_says_why(dataset: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = STATES["a lost file"]
    damage(dataset)
    assert words in is_one_clear_line(run_here([*COLLECT, "report=html"], capsys), status=1)
    check_failed_run(work, words)
    assert words in (work / "run" / "report.html").read_text(encoding="utf-8")


def test_of_states_in_files_of_their_own_only_those_asked_for_must_be_sound(
    npz_dataset: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (npz_dataset / "samples/0001_001.npz").unlink()
    flip_byte(npz_dataset / "samples/0003_001.npz", 700)
    line = is_one_clear_line(run_here(COLLECT, capsys), status=1)
    assert line.startswith("dataset: samples/0001_001.npz is missing, samples/0003_001.npz is damaged; calib verify")
    given = [*COLLECT, "taps.include=[x_embedder]"]
    given[3:4] = ["timestep_schedule=list", "timestep_schedule.steps=[0,2]"]
    assert run_here(given, capsys).status == 0


def test_a_dataset_drawn_again_is_collected_again(
    model: DiffusionModel, dataset: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """States of other content have another place in the cache."""
    given = [*COLLECT, "taps.include=[x_embedder]"]
    assert run_here(given, capsys).status == 0
    before = (work / "run" / "activations.h5").read_bytes()
    set_states(dataset / "samples/0001.h5", lambda x: x.__setitem__(1, x[1] * 2))
    restated(dataset)
    outcome = run_here([*given[:-2], "hydra.run.dir=run2", given[-1]], capsys)
    assert outcome.status == 0, outcome.err
    assert "collect 4 images at 3 steps" in outcome.err
    assert (work / "run2" / "activations.h5").read_bytes() != before


def test_steps_that_the_dataset_does_not_keep_are_named_before_anything_is_made(
    model: DiffusionModel, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(model, PROMPTS, 2, work / "dataset", SETTINGS, steps=(0, 2))
    capsys.readouterr()
    before = everything(work)
    line = is_one_clear_line(run_here(COLLECT, capsys))
    assert "dataset does not keep state 1 (it keeps 2 of 3)" in line
    assert everything(work) == before
    given = ["timestep_schedule=drift", "timestep_schedule.count=2"]
    line = is_one_clear_line(run_here([*COLLECT[:3], *given, "hydra.run.dir=run"], capsys))
    assert "timestep_schedule.count=2: dataset keeps 1 state" in line
    assert everything(work) == before


def test_a_shard_without_images_is_named_before_anything_is_made(
    dataset: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(work)
    line = is_one_clear_line(run_here([*COLLECT, "shard.index=3", "shard.count=4"], capsys))
    assert line.startswith("shard.count=4: ") and "4 images" in line
    assert everything(work) == before


# Another model's dataset

OTHERS: dict[str, tuple[Mapping[str, Any], str]] = {
    "other weights": ({"fingerprint": "0123456789abcdef"}, "made by emoji with other weights (0123456789abcdef, not "),
    "other encoders": ({"text_encoders": "clip_l"}, "its prompts were encoded by clip_l, not emoji"),
    "another shape": ({"latent_shape": [32, 32, 16]}, "holds latents of shape (32, 32, 16), emoji has (16, 16, 16)"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_dataset_of_another_model_is_told(
    dataset: Path, work: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    changes, words = OTHERS[case]
    restated(dataset, lambda document: document.update(changes))
    line = is_one_clear_line(run_here(COLLECT, capsys), status=1)
    assert line.startswith(f"dataset: {words}")
    check_failed_run(work, words)


# Files of other versions, folders that cannot be used


def test_activations_of_a_later_version_are_told(
    tiny_run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "run").mkdir()
    shutil.copy(tiny_run / "activations.h5", work / "run")
    with h5py.File(work / "run" / "activations.h5", "a") as file:
        file.attrs["format_version"] = 3
    before = contents(work)
    line = is_one_clear_line(run_here(["analyze", "stats=run"], capsys), status=1)
    assert line.startswith("run/activations.h5: has format version 3, this calib reads 1 and 2; ")
    assert contents(work) == before
    assert not (work / "outputs").exists()


@pytest.mark.parametrize("place", ["file", "file/cache"])
def test_a_cache_that_cannot_be_made_is_one_clear_line(
    dataset: Path, work: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (work / "file").write_text("in the way")
    outcome = run_here([*COLLECT, f"cache_dir={place}"], capsys)
    line = is_one_clear_line(outcome, status=outcome.status)
    assert outcome.status in (1, 2)
    assert "file" in line
    assert (work / "file").read_text() == "in the way"
    assert not (work / "run" / "activations.h5").exists()


# NaN and infinity


#: Some that a spoiled state reaches, and some that it does not.
REACHED = "taps.include=[x_embedder,context_embedder,t_embedder.0,mm_block_1,final_layer.linear]"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named_left_out_and_marked_and_the_run_goes_on(
    dataset: Path, work: Path, capsys: pytest.CaptureFixture[str], bad: float
) -> None:
    def spoil(x: Any) -> None:
        x[1, 3, 4, 5] = bad

    every_row = ("taps=all", REACHED, "storage.histogram_rows=null")
    set_states(dataset / "samples/0001.h5", spoil)
    restated(dataset)
    outcome = run_here([*COLLECT, *every_row], capsys)
    assert outcome.status == 0, outcome.err
    metadata = json.loads((work / "run" / "collection_metadata.json").read_text())
    assert metadata["non_finite_output"] == [1]
    spoiled = metadata["non_finite"]
    assert "x_embedder" in spoiled and "final_layer.linear" in spoiled
    assert "context_embedder" not in spoiled and "t_embedder.0" not in spoiled
    assert all(set(by_step) == {"1"} for by_step in spoiled.values())
    kind = "nan" if np.isnan(bad) else "inf"
    assert spoiled["x_embedder"]["1"] == {"nan": 0, "inf": 0} | {kind: 2}, "one in each half"
    notes = lines_of(outcome.err)
    assert len(notes) == 2
    assert notes[0].startswith("note: step 1: NaN or infinity at ")
    first = notes[0].split(" at ")[1].split(" and ")[0]
    assert first in spoiled
    assert "see non_finite in collection_metadata.json" in notes[0]
    assert notes[1] == "note: the model's output holds NaN or infinity at steps 1"
    with ActivationFile(work / "run" / "activations.h5") as file:
        for name in file.layers:
            statistics = file.by_step(name)
            for step in (0, 2):
                assert (statistics[step].nan, statistics[step].inf) == (0, 0)
                assert np.isfinite(file.image_ranges(name, [step])).all()
            assert np.isfinite(list(statistics[1].percentiles().values())).all()
            assert np.isfinite(statistics[1].over_channels()[:4]).all()
            others = file.image_ranges(name, [1])[0][[0, 2, 3]]
            assert np.isfinite(others).all(), "the other images are unharmed"
        x = file.by_step("x_embedder")[1]
        assert x.count.min() == 4 * 2 * 256 - 2 and x.count.max() == 4 * 2 * 256
        assert np.isfinite(file.image_ranges("x_embedder", [1])).all(), "one value of many"
    outcome = run_here(["analyze", "stats=run", "analysis=range", "hydra.run.dir=run2", "report=none"], capsys)
    assert outcome.status == 0, outcome.err
    # What is in the cache is told again, by the run that takes it from there.
    outcome = run_here([*COLLECT[:-1], "hydra.run.dir=run3", *every_row], capsys)
    assert outcome.status == 0, outcome.err
    assert "images at" not in outcome.err
    again = json.loads((work / "run3" / "collection_metadata.json").read_text())
    assert (again["non_finite"], again["non_finite_output"]) == (spoiled, [1])


def test_a_layer_that_is_never_finite_is_named_when_a_plan_is_asked_for(
    dataset: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in range(4):
        set_states(dataset / f"samples/000{image}.h5", lambda x: x.__setitem__(slice(None), np.nan))
    restated(dataset)
    outcome = run_here([*COLLECT, "taps.include=[x_embedder,t_embedder.0]"], capsys)
    assert outcome.status == 0, outcome.err
    line = is_one_clear_line(run_here(["analyze", "stats=run", "hydra.run.dir=run2", "report=none"], capsys), status=1)
    assert "'x_embedder' has no finite activations; look at collection_metadata.json" in line
