"""One job's output directory: its configuration, state, environment and log."""

import fcntl
import logging
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calib.base import blas
from calib.base.device import device_name
from calib.base.errors import CalibError, in_a_line
from calib.base.files import read_json, remove_abandoned, write_json, write_text
from calib.base.layout import CONFIG, ENVIRONMENT, LOCK, LOG, METRICS, STATUS
from calib.base.versions import git_commit, versions
from calib.runs.record import RunState, standing

logger = logging.getLogger("calib")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """The directory ``path`` of a job whose configuration has ``fingerprint``."""

    def __init__(self, path: Path, stage: str, fingerprint: str):
        self.path, self.stage, self.fingerprint = path, stage, fingerprint
        self._start = _now()

    def is_complete(self) -> bool:
        """Whether a job of the same fingerprint is complete here."""
        found = standing(self.path)
        return found.state is RunState.COMPLETE and found.fingerprint == self.fingerprint

    def write_status(self, state: RunState, error: str | None = None) -> None:
        ended = None if state is RunState.RUNNING else _now()
        status = {"state": state, "stage": self.stage, "error": error, "start": self._start, "end": ended}
        write_json(self.path / STATUS, {**status, "fingerprint": self.fingerprint})

    @contextmanager
    def job(self, config_yaml: str) -> Iterator[Path]:
        """Hold the directory within the context and yield its path; records configuration, log and final state."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CalibError(f"{self.path}: another process is running in this directory") from None
            remove_abandoned(self.path)
            self._forget_other_job()
            write_text(self.path / CONFIG, config_yaml)
            write_json(self.path / ENVIRONMENT, environment())
            self.write_status(RunState.RUNNING)
            with _logging_to(self.path / LOG):
                try:
                    yield self.path
                except BaseException as error:
                    logger.error("%s", traceback.format_exc())
                    with suppress(OSError):  # of a full disk, for one; the first error is the one to report
                        self.write_status(RunState.FAILED, in_a_line(error, self.path))
                    raise
            self.write_status(RunState.COMPLETE)

    def fail(self, error: BaseException, trace: str) -> None:
        """Record a job that failed before it began, with ``trace`` in the log."""
        self.path.mkdir(parents=True, exist_ok=True)
        with _logging_to(self.path / LOG):
            logger.error("%s", trace)
        self.write_status(RunState.FAILED, in_a_line(error, self.path))

    def _forget_other_job(self) -> None:
        """Remove the metrics of a job of another configuration: those that this one does not replace would mislead."""
        if standing(self.path).fingerprint not in (None, self.fingerprint):
            (self.path / METRICS).unlink(missing_ok=True)

    def forget(self, names: Sequence[str]) -> None:
        """Remove files and folders that what the job writes next makes obsolete."""
        for name in names:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name, ignore_errors=True)
            else:
                (self.path / name).unlink(missing_ok=True)

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add numbers to ``metrics.json``, one a key."""
        path = self.path / METRICS
        write_json(path, (read_json(path) if path.exists() else {}) | dict(metrics))


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written must not hide the job's own error
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def environment() -> dict[str, Any]:
    """Everything besides the configuration that a result may depend on."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_name(),
        "blas": blas.status().library,
        "cpus": os.cpu_count(),
        "git_commit": git_commit(),
        "command": sys.argv,
    }
