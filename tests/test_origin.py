"""A product of another origin than what lies beside it is refused, and the command that the refusal names renews it."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.base.layout import ACTIVATIONS, MODEL, PAGE, PLAN, STATISTICS, STATUS, STEPS

import h5py
import pytest
from helpers import Outcome, contents, everything, is_one_clear_line, run_here, tiny, well

#: ``calib`` with these arguments, the settings of the shared run, and no dataset or cache but those in the folder.
Calib = Callable[..., Outcome]
RESULTS = (ACTIVATIONS, STATISTICS, "collection_metadata.json")


@pytest.fixture
def calib(tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Calib:
    """The shared run as ``run``, its dataset and its cache, to change and go on with."""
    shutil.copytree(tiny_run, folder / "run")
    shutil.copytree(tiny_run.parent / "dataset", folder / "dataset")
    for name in ("calibration_cache", *(path.name for path in tiny_run.parent.glob("emoji-evaluation-*"))):
        shutil.copytree(tiny_run.parent / name, folder / name)

    def call(*arguments: str) -> Outcome:
        first, *more = arguments
        return run_here([first, *(more if first in ("verify", "compare") else tiny(*more))], capsys)

    return call


def edited(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def plan_by_hand(calib: Calib) -> None:
    edited(Path("run") / PLAN, lambda plan: plan["mm_block_1.image.mlp.fc1"].update(suggested_weight_bits=8))


def ranges_by_hand(calib: Calib) -> None:
    edited(Path("run") / STEPS, lambda steps: steps["activation_ranges"]["x_embedder"].update(low=[-9.0]))


def other_plan(calib: Calib) -> None:
    well(calib("analyze", "stats=run", "analysis=uniform", "hydra.run.dir=other"))
    for name in (PLAN, STEPS):
        shutil.copy(Path("other") / name, Path("run") / name)


def older_model(calib: Calib) -> None:
    """As of calib 0.2.0, which did not record the plan: the bits of the layers tell."""
    plan_by_hand(calib)
    edited(Path("run") / STATUS, lambda status: status.pop("made"))
    edited(Path("run") / MODEL / "config.json", lambda config: config.pop("made_from"))


def other_model(calib: Calib) -> None:
    well(calib("quantize", "plan=run", "quantizer=percentile", "hydra.run.dir=other"))
    shutil.rmtree(Path("run") / MODEL)
    shutil.copytree(Path("other") / MODEL, Path("run") / MODEL)


def other_statistics(calib: Calib) -> None:
    well(calib("collect", "data_dir=dataset", "subset.num_images=1", "hydra.run.dir=other"))
    for name in RESULTS:
        shutil.copy(Path("other") / name, Path("run") / name)
    (Path("run") / STATUS).unlink()


def touched_statistics(calib: Calib) -> None:
    with h5py.File(Path("run") / ACTIVATIONS, "r+") as file:
        file.attrs["config"] = "{}"


def statistics_by_hand(calib: Calib) -> None:
    edited(Path("run") / STATISTICS, lambda layers: layers["x_embedder"].update(max=99.0))


def other_dataset(calib: Calib) -> None:
    shutil.rmtree("dataset")
    well(calib("generate", "data_dir=dataset", "seed=1", "hydra.run.dir=other"))


OF_ANOTHER_PLAN = f"run/{MODEL}: was made from another plan than {PLAN} and {STEPS} beside it"
OF_OTHER_IMAGES = "run: was collected from another image 0 than dataset now holds"
#: What was changed, the command that meets it, what it says, and whether its advice is followed, which takes seconds.
CHANGES: list[tuple[Callable[[Calib], None], str, str, bool]] = [
    (plan_by_hand, "evaluate plan=run", OF_ANOTHER_PLAN, True),
    (ranges_by_hand, "evaluate plan=run", OF_ANOTHER_PLAN, False),
    (older_model, "evaluate plan=run", OF_ANOTHER_PLAN, False),
    (touched_statistics, "analyze stats=run", f"run/{ACTIVATIONS}: was changed after it was collected", False),
    (touched_statistics, "quantize plan=run", f"run/{ACTIVATIONS}: was changed after it was collected", False),
    (statistics_by_hand, "analyze stats=run", f"run/{STATISTICS}: was changed after it was collected", False),
    (other_dataset, "quantize plan=run", OF_OTHER_IMAGES, False),
]
#: Further ones, each of which runs jobs.
LONGER: list[tuple[Callable[[Calib], None], str, str, bool]] = [
    (other_plan, "evaluate plan=run", OF_ANOTHER_PLAN, False),
    (other_model, "evaluate plan=run", f"run/{MODEL}: was changed after the job that made it", False),
    (other_statistics, "quantize plan=run", f"run/{PLAN}: was made from other statistics than run now holds", True),
    (other_dataset, "analyze stats=run", OF_OTHER_IMAGES, True),
]


def advised(line: str) -> list[str]:
    """The arguments of the command that a refusal names."""
    (command,) = (part for part in line.split("; ") if part.endswith(("renews it", "makes one")))
    return shlex.split(command.removeprefix("calib ").rpartition(" ")[0].rpartition(" ")[0])


@pytest.mark.parametrize(
    ("change", "command", "words", "followed"),
    [*CHANGES, *(pytest.param(*row, marks=pytest.mark.slow) for row in LONGER)],
)
def test_another_origin(
    calib: Calib, folder: Path, change: Callable[[Calib], None], command: str, words: str, followed: bool
) -> None:
    change(calib)
    before = everything(folder)
    again = [*command.split(), "data_dir=dataset", "hydra.run.dir=again", "evaluation.num_images=1"]
    line = is_one_clear_line(calib(*again), status=1)
    assert line.startswith(words) and everything(folder) == before
    found = calib("verify", "run")
    assert found.status == 1 and words in found.out
    if followed:
        outcome = calib(
            again[0], "-m", *(o for o in again[1:] if "run.dir" not in o), "hydra.sweep.dir=sweep", "seed=1,2"
        )
        assert outcome.status == 1 and outcome.err.count(words) == 2
        well(calib(*advised(line)))
        well(calib(*again))
        if command.startswith("evaluate"):
            assert "sound: job, statistics, activations, plan, quantized model of run" in calib("verify", "run").out


def test_configuration_is_that_of_what_made_it(calib: Calib) -> None:
    """Of a plan that was made elsewhere, the analysis is the one that made it, not the default of this job."""
    well(calib("analyze", "stats=run", "analysis=uniform", "analysis.weight_bits=5", "hydra.run.dir=plan"))
    well(calib("quantize", "plan=plan", "hydra.run.dir=model"))
    runs = json.loads(calib("compare", "run", "plan", "model", "--json", "--all").out)["runs"]
    found = {run["run"]: run["config"] for run in runs}
    assert [found[name]["analysis"] for name in ("run", "plan", "model")] == ["range", "uniform", "uniform"]
    assert found["model"]["analysis.weight_bits"] == 5
    assert found["plan"]["num_images"] == found["run"]["num_images"] == 2


def test_an_analysis_made_again_takes_what_followed_from_it(calib: Calib, folder: Path) -> None:
    """The plan's own model, pictures and page are gone; what it was made from stays."""
    kept = {name: content for name, content in contents(folder / "run").items() if name in RESULTS}
    well(calib("analyze", "stats=run", "analysis=uniform", "hydra.run.dir=run"))
    found = contents(folder / "run")
    assert kept.items() <= found.items()
    assert not {name for name in found if name.startswith((MODEL, "images", "evaluation")) or name == PAGE}
    line = is_one_clear_line(calib("evaluate", "plan=run"))
    assert "run: no quantized model there; calib quantize plan=run hydra.run.dir=run" in line


@pytest.mark.slow
def test_what_renews_keeps_the_options(calib: Calib, folder: Path) -> None:
    """Of a model by another quantizer than the default; and of a plan whose options came with it."""
    well(calib("analyze", "stats=run", "analysis=uniform", "analysis.weight_bits=6", "hydra.run.dir=plan"))
    well(calib("quantize", "plan=plan", "quantizer=percentile", "quantizer.low=0.5", "hydra.run.dir=plan"))
    before = json.loads((folder / "plan" / MODEL / "config.json").read_text())
    edited(folder / "plan" / PLAN, lambda plan: plan["mm_block_1.image.mlp.fc1"].update(suggested_weight_bits=8))
    for mistyped in ("plan", f"plan/{MODEL}", f"plan/{PLAN}"):
        line = is_one_clear_line(calib("evaluate", f"plan={mistyped}"), status=1)
    well(calib(*advised(line)))
    after = json.loads((folder / "plan" / MODEL / "config.json").read_text())
    assert after["quantizer"] == before["quantizer"] and after["made_from"] != before["made_from"]
    well(
        calib("evaluate", f"plan=plan/{MODEL}", "data_dir=dataset", "evaluation.num_images=1", "hydra.run.dir=figures")
    )
    assert calib("verify", "figures").status == 0
    well(calib("quantize", "plan=plan", "hydra.run.dir=plan"))
    assert (
        "figures/evaluation.json: is of another quantized model than plan/quantized" in calib("verify", "figures").out
    )
    assert "note: figures: its figures are of an earlier quantized model" in calib("compare", "figures").out


FOREIGN = [
    ("generate num_images=3 data_dir=more hydra.run.dir=other", ACTIVATIONS),
    ("analyze stats=run hydra.run.dir=other", STATISTICS),
    ("quantize plan=run hydra.run.dir=other", PLAN),
    ("evaluate plan=run hydra.run.dir=other", f"{MODEL}/config.json"),
]


@pytest.mark.parametrize(("command", "name"), FOREIGN)
def test_results_beside_those_of_another_origin(calib: Calib, folder: Path, command: str, name: str) -> None:
    shutil.copytree("run", "other")
    path = folder / "other" / name
    path.write_bytes(path.read_bytes() + b"\n")
    before = contents(folder)
    line = is_one_clear_line(calib(*command.split()))
    assert line.startswith(f"hydra.run.dir={folder / 'other'}: holds") and name in line
    assert contents(folder) == before


def test_results_changed_after_the_job(calib: Calib, folder: Path) -> None:
    """They are not overwritten by the same command, and a comparison says so."""
    whole = ["data_dir=dataset", "hydra.run.dir=run"]
    assert "Already complete" in well(calib(*whole)).out
    plan_by_hand(calib)
    before = contents(folder)
    line = is_one_clear_line(calib(*whole), status=1)
    assert f"run/{PLAN}: was changed after this job was complete; calib quantize plan=" in line
    assert contents(folder) == before
    assert f"note: run: {PLAN} was changed after the job" in calib("compare", "run").out
