"""Sensitivities of the picture as a job: killed, in company, and of a dataset that was drawn otherwise."""

import io
import json
import signal
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from calib.analysis.sensitivities import UNTRUSTED

import pytest
from helpers import (
    TINY,
    Outcome,
    contents,
    end,
    exit_status,
    is_one_clear_line,
    run_in,
    start_process,
    wait_until,
    well,
)
from test_quantize_cli import FEW

PLAN = ("quantization_config.json", "timestep_config.json", "analysis.txt")


@pytest.fixture(scope="module")
def few(tiny_run: Path) -> Path:
    """Statistics of a few layers."""
    well(run_in(tiny_run.parent, "collect", *TINY, "data_dir=dataset", FEW, "hydra.run.dir=few"))
    return tiny_run.parent / "few"


def analyze(few: Path, *more: str) -> list[str]:
    """A command that plans by errors of the picture, with a cache of its own."""
    given = [f"stats={few}", f"data_dir={few.parent / 'dataset'}", "cache_dir=cache", "hydra.run.dir=run"]
    asked = {argument.partition("=")[0] for argument in more}
    # Of the two images' passes, which run side by side, there are two more when the first are done.
    given += ["analysis=allocate", "analysis.average_bits=4", "sensitivity.group_sizes=[64]", "sensitivity.probes=2"]
    return ["analyze", *TINY, *(g for g in given if g.partition("=")[0] not in asked), *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def plan_in(run: Path) -> dict[str, str]:
    """Checksums of what was planned there."""
    return {name: checksum for name, checksum in contents(run).items() if name in PLAN}


def passes(work: Path) -> list[Path]:
    """What backward passes found, in the cache."""
    return sorted(work.glob("cache/gradients/*/picture/*.npz"))


@pytest.fixture(scope="module")
def undisturbed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("undisturbed")
    well(run_in(work, *analyze(few)))
    assert len(passes(work)) == 4
    return work


@pytest.mark.slow
def test_killed(few: Path, undisturbed: Path, folder: Path) -> None:
    """It goes on with the passes that are left, to the same bytes."""
    process = start_process(folder, *analyze(few))
    wait_until(lambda: bool(passes(folder)), process)
    process.kill()
    status, err = end(process)
    assert status == -signal.SIGKILL, err
    before = {path: path.stat().st_mtime_ns for path in passes(folder)}
    assert 0 < len(before) < 4
    outcome = well(run_in(folder, *analyze(few)))
    assert f"gradients: {4 * (4 - len(before))} steps\n" in outcome.err, "of the others"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(folder / "cache") == contents(undisturbed / "cache")
    assert plan_in(folder / "run") == plan_in(undisturbed / "run")


@pytest.mark.slow
def test_two_at_once(few: Path, undisturbed: Path, folder: Path) -> None:
    """One waits, says so, and finds what the other measured."""
    first = start_process(folder, *analyze(few))
    wait_until(lambda: bool(passes(folder)), first)
    first.send_signal(signal.SIGSTOP)

    class Listener(io.StringIO):
        """Lets the first process go on once this one says that it waits."""

        def write(self, text: str) -> int:
            if "waiting for the process that measures the same" in text:
                first.send_signal(signal.SIGCONT)
            return super().write(text)

    with chdir(folder), redirect_stderr(Listener()) as err, redirect_stdout(io.StringIO()):
        status = exit_status(analyze(few, "hydra.run.dir=second"))
    assert status == 0, err.getvalue()
    assert end(first)[0] == 0
    assert "waiting" in err.getvalue() and "gradients" not in err.getvalue().replace("cache/gradients", "")
    assert plan_in(folder / "run") == plan_in(folder / "second") == plan_in(undisturbed / "run")


def test_drawn_otherwise(few: Path, undisturbed: Path) -> None:
    """With other guidance: what counts is how the dataset was drawn, and that the configuration differs is noted."""
    outcome: Outcome = well(run_in(undisturbed, *analyze(few, "sampler.cfg_weight=7", "hydra.run.dir=other")))
    said = f"sensitivities are of {few.parent / 'dataset'} as it was drawn, with 3.0"
    assert f"calib: note: sampler.cfg_weight=7.0: {said}\n" in outcome.err
    assert plan_in(undisturbed / "other") == plan_in(undisturbed / "run")


def test_prediction(few: Path, undisturbed: Path) -> None:
    """What is predicted is of the picture, with how steps reach it; a low PSNR is said not to be trusted."""
    predicted = read(undisturbed / "run" / "timestep_config.json")["predicted"]
    assert predicted["of"] == "picture" and set(predicted) == {"of", "plan", "applied", "psnr", "weights_psnr", "reach"}
    latent, output = (predicted["reach"][key] for key in ("latent", "output"))
    assert len(latent) == len(output) + 1 == 5 and latent[-1] == 1 and min(latent + output) > 0
    for bits, psnr in ((2.5, UNTRUSTED[0][0]), (6, None)):
        outcome = well(run_in(undisturbed, *analyze(few, f"analysis.average_bits={bits}", f"hydra.run.dir={bits}")))
        found = read(undisturbed / str(bits) / "metrics.json")["predicted_weights_psnr"]
        assert f"predicted PSNR = {found:.2f} ± " in outcome.out
        assert ("too large to be predicted well" in outcome.out) == (psnr is not None and found < UNTRUSTED[-1][0])


@pytest.mark.slow
def test_too_few_states(few: Path, folder: Path) -> None:
    """A dataset of some states alone is refused before anything is loaded, with the keys to change."""
    sparse = [*TINY, "num_images=1", "sampler.num_steps=8", "data_dir=sparse"]
    well(run_in(folder, "generate", *sparse, "dataset.steps=schedule", "hydra.run.dir=g"))
    well(run_in(folder, "collect", *sparse, FEW, "hydra.run.dir=sparse_run"))
    given = [f"stats={folder / 'sparse_run'}", f"data_dir={folder / 'sparse'}"]
    said = is_one_clear_line(run_in(folder, *analyze(few, *given)))
    assert said.startswith("sensitivity.of=picture: ") and "not state " in said
    assert "draw another data_dir with dataset.steps=all, or set sensitivity.of=output" in said
    assert not (folder / "run").exists()
