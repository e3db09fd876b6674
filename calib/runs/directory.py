"""One job's output directory: its configuration, state, environment and log."""

import logging
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calib.base import blas
from calib.base.device import device_name
from calib.base.errors import CalibError, in_a_line
from calib.base.files import content_of, read_json, remove_abandoned, write_json, write_text
from calib.base.layout import (
    CHECKED,
    ENVIRONMENT,
    LOCK,
    LOG,
    METRICS,
    NEXT,
    PAGE,
    PLAN,
    PRODUCTS,
    STATUS,
    STEPS,
)
from calib.base.locks import take_lock
from calib.base.versions import git_commit, versions
from calib.runs.exchange import discard, exchange, is_decided, prepare, remove, settle
from calib.runs.standing import RunState, changed_files, made_in, results_of

logger = logging.getLogger("calib")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """The directory ``home`` of a job whose configuration has ``fingerprint``.

    Attributes:
        home: where the results are found, by people too.
        path: where the job reads and writes what it makes: ``home``, or a folder in it for the time of the job where
            ``home`` holds the results of an earlier job, which stay until the new ones are complete.
    """

    def __init__(self, home: Path, stage: str, fingerprint: str):
        self.home = self.path = home
        self.stage, self.fingerprint = stage, fingerprint
        self._start = _now()
        self._metrics: dict[str, list[str]] = {}
        self._obsolete: list[str] = []
        self._recorded: dict[str, str] = {}

    def is_complete(self) -> bool:
        """Whether a job of the same fingerprint is complete here.

        Raises:
            CalibError: its results were changed since, which a repetition would overwrite.
        """
        settle(self.home)
        found = results_of(self.home)
        if found.state is not RunState.COMPLETE or found.fingerprint != self.fingerprint:
            return False
        if changed := changed_files(self.home):
            apply = f"calib quantize plan={self.home} hydra.run.dir={self.home} applies it; " if PLAN in changed else ""
            again = f"without {self.home / STATUS} this job is run again"
            raise CalibError(f"{self.home / changed[0]}: was changed after this job was complete; {apply}{again}")
        with suppress(OSError), self._held():
            discard(self.home)  # of another job, which failed
        return True

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the directory's lock; raises a BlockingIOError where another process does."""
        with open(self.home / LOCK, "a") as lock:
            if not take_lock(lock, wait=False):
                raise BlockingIOError
            yield

    @contextmanager
    def job(self, records: Mapping[str, str], surroundings: Mapping[str, Any]) -> Iterator[None]:
        """Hold the directory within the context; records configuration, log and final state.

        Args:
            records: text by name of further files that describe the job.
            surroundings: further entries of ``env.json``.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(self._held())
            except BlockingIOError:
                raise CalibError(f"{self.home}: another process is running in this directory") from None
            with _logging_to(self.home / LOG):
                try:
                    self._begin(records, surroundings)
                    yield
                    self._finish()
                except BaseException as error:
                    logger.error("%s", traceback.format_exc())
                    with suppress(OSError):  # of a full disk, for one; the first error is the one to report
                        self._write_status(RunState.FAILED, in_a_line(error, self.home))
                    raise
            self.path = self.home

    def _begin(self, records: Mapping[str, str], surroundings: Mapping[str, Any]) -> None:
        """Choose where to write, and remove what is obsolete there."""
        if is_decided(self.home):
            exchange(self.home)
        discard(self.home)
        remove_abandoned(self.home)
        kept = self._kept_stages()
        metrics, self._obsolete = self._metrics_of(kept), self._stale(kept)
        products = {name for stage in kept for name in PRODUCTS[stage]}
        recorded = made_in(self.home).files
        self._recorded = {name: recorded[name] for name in recorded if name.partition("/")[0] in products}
        if _has_results(self.home):
            self.path = self.home / NEXT
            self.path.mkdir()
        else:
            remove(self.home, self._obsolete)
        self._write_status(RunState.RUNNING)
        for name, text in records.items():
            write_text(self.path / name, text)
        write_json(self.path / ENVIRONMENT, {**environment(), **surroundings})
        if metrics:
            write_json(self.path / METRICS, metrics)

    def _finish(self) -> None:
        """Record what was made, and put it in its place."""
        files = {}
        for name in CHECKED:
            made = self.path / name
            stayed = self.path == self.home and name in self._recorded
            if made.is_file() and not stayed:
                files[name] = content_of(made)
            elif name.partition("/")[0] not in self._obsolete and (self.home / name).is_file():
                # What an earlier stage made keeps its checksum: a change since then is still one.
                files[name] = self._recorded.get(name) or content_of(self.home / name)
        if self.path != self.home:
            prepare(self.home, self._obsolete)
        self._write_status(RunState.COMPLETE, made={"files": files, "metrics": self._metrics})
        if self.path != self.home:
            exchange(self.home)

    def fail(self, error: BaseException, trace: str) -> None:
        """Record a job that failed before it began, with ``trace`` in the log; without effect while another runs."""
        self.home.mkdir(parents=True, exist_ok=True)
        with suppress(BlockingIOError), self._held(), _logging_to(self.home / LOG):
            logger.error("%s", trace)
            self.path = self.home / NEXT if _has_results(self.home) else self.home
            self._write_status(RunState.FAILED, in_a_line(error, self.home))

    def _write_status(self, state: RunState, error: str | None = None, made: Mapping[str, Any] | None = None) -> None:
        ended = None if state is RunState.RUNNING else _now()
        status = {"state": state, "stage": self.stage, "error": error, "start": self._start, "end": ended}
        more = {} if made is None else {"made": made}
        write_json(self.path / STATUS, {**status, "fingerprint": self.fingerprint, **more})

    def _kept_stages(self) -> list[str]:
        """Earlier stages whose products and metrics stay, where the directory has them."""
        stages = list(PRODUCTS)
        kept = [] if self.stage == "run" else stages[: stages.index(self.stage)]
        if self.stage == "quantize" and PLAN in changed_files(self.home):  # by hand: the analysis is another plan's
            kept.remove("analyze")
        return kept

    def _stale(self, kept: Sequence[str]) -> list[str]:
        """Results of an earlier job that this one makes anew, or that were made from what it makes anew."""
        products = [name for stage, names in PRODUCTS.items() if stage not in kept for name in names]
        if self.stage == "quantize":
            products = [name for name in products if name not in (PLAN, STEPS)]
        return [*products, PAGE, METRICS]

    def _metrics_of(self, kept: Sequence[str]) -> dict[str, float]:
        """Metrics of the stages ``kept``, as the directory has them."""
        self._metrics = {stage: list(keys) for stage, keys in made_in(self.home).metrics.items() if stage in kept}
        try:
            known = read_json(self.home / METRICS) if self._metrics else {}
            return {key: known[key] for keys in self._metrics.values() for key in keys}
        except (CalibError, KeyError, TypeError):  # damaged: they are lost
            self._metrics = {}
            return {}

    def add_metrics(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Add numbers of a stage to ``metrics.json``, one a key."""
        path = self.path / METRICS
        self._metrics.setdefault(stage, []).extend(metrics)
        write_json(path, (read_json(path) if path.exists() else {}) | dict(metrics))


def _has_results(home: Path) -> bool:
    """Whether a directory holds results to keep: of a complete job, or of one without a readable status."""
    found = results_of(home).state
    if (home / STATUS).exists():
        return found in (RunState.COMPLETE, RunState.DAMAGED)
    return any((home / name).exists() for names in PRODUCTS.values() for name in names)


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
