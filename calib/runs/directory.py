"""One job's output directory: its configuration, state, surroundings and log."""

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

logger = logging.getLogger("calib")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """The directory at ``path``, for the job whose configuration has ``fingerprint``."""

    def __init__(self, path: Path, stage: str, fingerprint: str):
        self.path, self.stage, self.fingerprint = path, stage, fingerprint
        self._start = _now()

    def is_complete(self) -> bool:
        """True where this very job, by fingerprint, has ended well here before."""
        if not (self.path / STATUS).exists():
            return False
        try:
            status = read_json(self.path / STATUS)
        except CalibError:
            return False
        wanted = ("complete", self.fingerprint)
        return isinstance(status, dict) and (status.get("state"), status.get("fingerprint")) == wanted

    def write_status(self, state: str, error: str | None = None) -> None:
        ended = None if state == "running" else _now()
        status = {"state": state, "stage": self.stage, "error": error, "start": self._start, "end": ended}
        write_json(self.path / STATUS, {**status, "fingerprint": self.fingerprint})

    @contextmanager
    def job(self, config_yaml: str) -> Iterator[Path]:
        """Yield the path while holding the directory; records the configuration, the log, and how it ended."""
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
            self.write_status("running")
            with _logging_to(self.path / LOG):
                try:
                    yield self.path
                except BaseException as error:
                    logger.error("%s", traceback.format_exc())
                    with suppress(OSError):  # of a full disk, say: the first error is the one to tell
                        self.write_status("failed", in_a_line(error))
                    raise
            self.write_status("complete")

    def fail(self, error: BaseException, trace: str) -> None:
        """Record a job that failed before it began, its ``trace`` in the log."""
        self.path.mkdir(parents=True, exist_ok=True)
        with _logging_to(self.path / LOG):
            logger.error("%s", trace)
        self.write_status("failed", in_a_line(error))

    def _forget_other_job(self) -> None:
        """Remove the figures of a job of another configuration: those that this one does not replace would mislead."""
        with suppress(CalibError):
            status = read_json(self.path / STATUS) if (self.path / STATUS).exists() else None
            if isinstance(status, dict) and status.get("fingerprint") != self.fingerprint:
                (self.path / METRICS).unlink(missing_ok=True)

    def forget(self, names: Sequence[str]) -> None:
        """Remove files and folders that speak of something else from now on."""
        for name in names:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name, ignore_errors=True)
            else:
                (self.path / name).unlink(missing_ok=True)

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Merge numbers into ``metrics.json``, one a key."""
        path = self.path / METRICS
        write_json(path, (read_json(path) if path.exists() else {}) | dict(metrics))


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written must not hide what is to be told
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def environment() -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_name(),
        "blas": blas.status().library,
        "cpus": os.cpu_count(),
        "git_commit": git_commit(),
        "command": sys.argv,
    }
