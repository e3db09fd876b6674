"""Run a sweep's jobs; one that fails does not end the sweep, and the state of each is reported."""

import os
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from calib.base import interrupts
from calib.base.errors import CalibError, in_a_line
from calib.base.files import write_json, write_text
from calib.base.layout import COMPARISON_PAGE, CONSOLE, LOG, SWEEP
from calib.base.progress import counted, readable_duration, say
from calib.cli.compose import Planned
from calib.cli.job import short
from calib.cli.launchers import BESIDE_VARIABLE, JOBS_VARIABLE, jobs_at_once, jobs_in_all
from calib.models.memory import divide_memory
from calib.runs.compare.comparison import compare
from calib.runs.compare.tables import terminal_table
from calib.runs.directory import RunDirectory
from calib.runs.find import read_runs
from calib.runs.standing import RunState, Standing, standing
from calib.stages.settings import ReportForm

from hydra.conf import HydraConf

#: Environment variable with the id of the process that runs the sweep, for those that it starts.
PARENT_VARIABLE = "CALIB_SWEEP_PROCESS"


@contextmanager
def job_of_sweep(hydra_config: HydraConf, path: Path) -> Iterator[None]:
    """Run a sweep's job within the context; what it raises is recorded and reported, and the sweep goes on."""
    number, jobs, beside = hydra_config.job.num + 1, jobs_in_all(), jobs_at_once()
    say(f"job {number} of {jobs}: {path.name}")
    start = time.monotonic()
    error: Exception | None = None
    try:
        with _beside(path, beside):
            yield
    except Exception as raised:  # whatever it is, the other jobs can still be run
        if _is_requeued(raised):
            raise SystemExit(128 + signal.SIGTERM) from raised
        error = raised
        _record(path, raised)
    took = readable_duration(time.monotonic() - start)
    if error is not None:
        say(f"calib: job {number} of {jobs} failed after {took}, {path.name}: {in_a_line(error, path)}")
    elif beside > 1:
        say(f"job {number} of {jobs} done in {took}: {path.name}")


def _is_requeued(error: Exception) -> bool:
    """Whether SLURM will start this job again: at submitit's request it ends all processes of the job, this one too."""
    return (
        isinstance(error, subprocess.CalledProcessError)
        and error.cmd[:2] == ["scontrol", "requeue"]
        and error.returncode == -signal.SIGTERM
    )


def _record(path: Path, error: Exception) -> None:
    """Record a failure that came before the run directory was locked; later ones are recorded by the directory."""
    if standing(path).state in (RunState.RUNNING, RunState.FAILED):
        return
    with suppress(CalibError, OSError):
        run = RunDirectory(path, "", "")
        run.fail(error, "".join(traceback.format_exception(error)))


@contextmanager
def _beside(path: Path, jobs: int) -> Iterator[None]:
    """Give a job that runs beside others, in a process of its own, its share of the memory and a file for its output.

    No effect on a job that runs alone.
    """
    if jobs == 1:
        yield
        return
    _end_with_parent()
    divide_memory(jobs)
    path.mkdir(parents=True, exist_ok=True)
    with (
        open(path / CONSOLE, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as console,
        redirect_stdout(console),
        redirect_stderr(console),
    ):
        yield


_watching = False


def _end_with_parent() -> None:
    """End this process when its parent has ended, whose sweep may be started again with the same jobs."""
    global _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        return
    _watching = True
    interrupts.install()
    parent = os.environ.get(PARENT_VARIABLE)

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(0.5)
        os._exit(1)  # locks die with the process; what is half-written is a temporary file

    threading.Thread(target=watch, daemon=True).start()


def run_sweep(launch: Callable[[], object], what: Planned) -> int:
    """Run a sweep's jobs and report how each ended; returns the exit status."""
    os.environ[JOBS_VARIABLE] = str(len(what.folders) or 1)
    os.environ[BESIDE_VARIABLE] = str(what.side_by_side)
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if what.side_by_side > 1:
        say(f"{what.side_by_side} jobs side by side, each with its share of processors and memory")
    _announce(what)
    start, error = time.monotonic(), None
    try:
        launch()
    except (CalibError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as raised:  # of a launcher: a worker was killed, or there is no cluster
        error = raised
    jobs = [standing(folder) for folder in what.folders]
    lacking = [job for job in jobs if job.state is not RunState.COMPLETE]
    for line in _summary(what.sweep, jobs, time.monotonic() - start):
        print(line)
    with suppress(CalibError, OSError):  # of a full disk, for one, which the jobs themselves report
        for line in _compared(what.sweep) if what.folders else ():
            print(line)
    if error is not None and (lacking or not jobs):
        failed = f"the launcher failed: {in_a_line(error, 'launcher')[:300]}"
        raise CalibError(f"{failed}; the same command goes on from what is finished") from error
    if lacking:
        raise CalibError(_lacking(lacking, len(jobs)))
    return 0


def _announce(what: Planned) -> None:
    """Record which jobs the sweep has, so that those not begun are known even if it is killed."""
    if what.folders:
        what.sweep.mkdir(parents=True, exist_ok=True)
        write_json(what.sweep / SWEEP, {"jobs": [f.name for f in what.folders if f.parent == what.sweep]})


def _lacking(lacking: Sequence[Standing], jobs: int) -> str:
    """The jobs of a sweep that are not complete, by kind, each with what to do."""
    lines = []
    for states, what, todo in (
        ((RunState.FAILED,), "failed", f"their {LOG} says why; the same command runs them again"),
        ((RunState.INCOMPLETE, RunState.DAMAGED), "ended without a word", "the same command goes on with them"),
        ((RunState.RUNNING,), "are run by another process", "wait for it"),
    ):
        if names := [job.path.name for job in lacking if job.state in states]:
            lines.append(f"{len(names)} of the sweep's {counted(jobs, 'job')} {what} ({', '.join(names)}); {todo}")
    return ". ".join(lines)


def _summary(sweep: Path, jobs: Sequence[Standing], seconds: float) -> list[str]:
    """The state of a sweep in a few lines."""
    if not jobs:
        return []
    folder = short(sweep.absolute())
    counts = {state: sum(job.state is state for job in jobs) for state in RunState}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"\nSweep: {folder}: {counted(len(jobs), 'job')}, {states}, in {readable_duration(seconds)}"]
    for job in jobs:
        if job.state is not RunState.COMPLETE:
            lines.append(f"  {job.state:10} {job.path.name}: {' '.join(job.why.split())}")
    return lines


def _compared(folder: Path) -> list[str]:
    """The sweep's runs as a table; writes its page into the sweep's folder, unless no job is to have one."""
    runs = read_runs([str(folder)])
    if not any(run.metrics for run in runs):
        return []
    comparison, more = compare(runs), f"More: calib compare {short(folder.absolute())}"
    if any(run.config.get("report") != ReportForm.NONE for run in runs):
        from calib.runs.pages.comparison import comparison_page  # slow to import

        page = folder / COMPARISON_PAGE
        write_text(page, comparison_page(comparison, folder.absolute()))
        more = f"The page: {short(page.absolute())}. {more}"
    table = terminal_table(comparison, shutil.get_terminal_size((120, 24)).columns)
    return ["", table.rstrip(), more]
