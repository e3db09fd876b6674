"""One job in its run directory, and many of them: a sweep that survives what happens to its jobs."""

import os
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from calib import interrupts
from calib.compose import Planned
from calib.config import build
from calib.errors import CalibError
from calib.files import write_json, write_text
from calib.models.memory import divide_memory
from calib.pipeline import content_fingerprint, run_stage
from calib.progress import counted, readable_duration, say
from calib.report.comparison import comparison_page
from calib.report.run import write_report
from calib.runs.comparison import compare
from calib.runs.directory import RunDirectory
from calib.runs.find import read_runs
from calib.runs.layout import COMPARISON, REPORT, SWEEP
from calib.runs.tables import terminal_table
from calib.sweeps import JOBS_VARIABLE, Ended, ended, jobs_in_all, side_by_side

from hydra.conf import HydraConf
from omegaconf import OmegaConf

#: What a job prints that runs beside others, in its run directory.
CONSOLE = "console.txt"

#: The process that runs the sweep, for those that it starts.
PARENT_VARIABLE = "CALIB_SWEEP_PROCESS"
#: How jobs of a sweep may stand at its end.
STATES = ("complete", "failed", "running", "incomplete")


def short(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def in_a_line(error: BaseException, path: Path) -> str:
    """What went wrong in the run directory ``path``, for people."""
    if isinstance(error, CalibError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or path}: {error.strerror or error}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def run_job(values: Mapping[str, Any], path: Path, multirun: bool) -> None:
    """Do what ``values``, a composed configuration, asks for, unless it is done; raises what goes wrong."""
    settings = build(values, multirun)
    run = RunDirectory(path, settings.stage.value, content_fingerprint(settings))
    if run.is_complete():
        if not (path / REPORT).exists():
            _report(path)
        print(f"Already complete: {short(run.path)}")
        return
    try:
        with run.job(OmegaConf.to_yaml(OmegaConf.create(dict(values)))):
            (path / REPORT).unlink(missing_ok=True)  # it would speak of an earlier job
            run_stage(settings, run, values)
    except Exception:
        if ended(path).state == "failed":
            _report(path, told=False)  # the first error is the one to tell
        raise
    print(f"Run directory: {short(run.path)}{_report(path)}")


def _report(path: Path, told: bool = True) -> str:
    """Write the page of a run; what there is to say of it. It is for people: a run is as good without it."""
    try:
        return f"; open {short(write_report(path))}"
    except Exception as error:  # of a full disk, say
        if told:
            say(f"calib: note: {path / REPORT}: could not be written ({in_a_line(error, path)})")
        return ""


@contextmanager
def job_of_sweep(hydra_config: HydraConf, path: Path) -> Iterator[None]:
    """One job of a sweep: what it raises is recorded and told, and the sweep goes on."""
    number, jobs = hydra_config.job.num + 1, jobs_in_all()
    beside = side_by_side(hydra_config.launcher, jobs)
    say(f"job {number} of {jobs}: {path.name}")
    start = time.monotonic()
    error: Exception | None = None
    try:
        with _beside(path, beside):
            yield
    except Exception as raised:  # whatever it is, the other jobs are none the worse
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
    """Whether SLURM will start this job again: asked to by submitit, it ends all its processes, even the asking one."""
    return (
        isinstance(error, subprocess.CalledProcessError)
        and error.cmd[:2] == ["scontrol", "requeue"]
        and error.returncode == -signal.SIGTERM
    )


def _record(path: Path, error: Exception) -> None:
    """Write a failure down that came before the run directory was taken; in it the directory does so itself."""
    if ended(path).state != "incomplete":
        return
    with suppress(CalibError, OSError):
        run = RunDirectory(path, "", "")
        run.fail(error, "".join(traceback.format_exception(error)))


@contextmanager
def _beside(path: Path, jobs: int) -> Iterator[None]:
    """A job that runs beside others, in a process of its own: its share of the memory, its words in a file."""
    if jobs == 1:
        yield
        return
    _end_with_parent()
    divide_memory(jobs)
    path.mkdir(parents=True, exist_ok=True)
    with (
        open(path / CONSOLE, "w", encoding="utf-8", buffering=1) as console,
        redirect_stdout(console),
        redirect_stderr(console),
    ):
        yield


_watching = False


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: killed, it cannot say so, and would be run over."""
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
    """Run a sweep's jobs and say how each ended; the exit status."""
    os.environ[JOBS_VARIABLE] = str(len(what.folders) or 1)
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if what.side_by_side > 1:
        say(f"{what.side_by_side} jobs side by side, each with its share of processors and memory")
    _announce(what.folders)
    start, error = time.monotonic(), None
    try:
        launch()
    except (CalibError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as raised:  # a launcher's: a worker killed, no cluster here
        error = raised
    jobs = [ended(folder) for folder in what.folders]
    lacking = [job for job in jobs if job.state != "complete"]
    for line in _summary(jobs, time.monotonic() - start):
        print(line)
    with suppress(CalibError, OSError):  # of a disk that is full, say: the runs themselves tell
        for line in _compared(what.folders[0].parent) if what.folders else ():
            print(line)
    if error is not None and (lacking or not jobs):
        raise CalibError(f"{_launcher_failed(error)}; the same command goes on from what is finished") from error
    if lacking:
        raise CalibError(_lacking(lacking, len(jobs)))
    return 0


def _announce(folders: Sequence[Path]) -> None:
    """Write down which jobs there will be: killed, the sweep could not say which it had not begun."""
    if folders:
        sweep = folders[0].parent
        sweep.mkdir(parents=True, exist_ok=True)
        write_json(sweep / SWEEP, {"jobs": [f.name for f in folders if f.parent == sweep]})


def _lacking(lacking: Sequence[Ended], jobs: int) -> str:
    """Which jobs of a sweep are not complete, each kind with what to do."""
    told = []
    for states, what, todo in (
        (("failed",), "failed", "their run.log says why; the same command runs them again"),
        (("incomplete",), "ended without a word", "the same command goes on with them"),
        (("running",), "are run by another process", "wait for it"),
    ):
        if names := [job.path.name for job in lacking if job.state in states]:
            told.append(f"{len(names)} of the sweep's {counted(jobs, 'job')} {what} ({', '.join(names)}); {todo}")
    return ". ".join(told)


def _launcher_failed(error: Exception) -> str:
    return "the launcher failed: " + " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _summary(jobs: Sequence[Ended], seconds: float) -> list[str]:
    """The sweep in a few lines."""
    if not jobs:
        return []
    folder = short(jobs[0].path.absolute().parent)
    counts = {state: sum(job.state == state for job in jobs) for state in STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"\nSweep: {folder}: {counted(len(jobs), 'job')}, {told}, in {readable_duration(seconds)}"]
    for job in jobs:
        if job.state != "complete":
            lines.append(f"  {job.state:10} {job.path.name}: {' '.join((job.error or '').split())}")
    return lines


def _compared(folder: Path) -> list[str]:
    """The sweep's outcome as one table, and as a page in its folder."""
    runs = read_runs([str(folder)])
    if not any(run.metrics for run in runs):
        return []
    comparison = compare(runs)
    page = folder / COMPARISON
    write_text(page, comparison_page(comparison, folder.absolute()))
    table = terminal_table(comparison, shutil.get_terminal_size((120, 24)).columns)
    return ["", table.rstrip(), f"The page: {short(page.absolute())}. More: calib compare {short(folder.absolute())}"]
