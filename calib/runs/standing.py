"""How a run directory stands: the state of its latest job, and of the one that its results are of."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import content_of, read_json
from calib.base.layout import CHECKED, LOCK, NEXT, STATUS
from calib.base.locks import is_locked
from calib.runs.exchange import settle

#: Why a run is incomplete.
NOT_BEGUN, ENDED = "was not begun", "its process ended without a word"
#: What a run directory holds whose latest job is not complete, where an earlier one was.
KEPT = "the results of the job before it are kept"


class RunState(StrEnum):
    """State of a run."""

    COMPLETE = "complete"
    FAILED = "failed"
    RUNNING = "running"
    INCOMPLETE = "incomplete"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Standing:
    """State of a job in a run directory, and the reason where it is not complete.

    Attributes:
        fingerprint: of the job's configuration; None where no ``status.json`` can be read, '' where it has none.
    """

    path: Path
    state: RunState
    why: str = ""
    fingerprint: str | None = None


def standing(path: Path) -> Standing:
    """State of the latest job in ``path``, from its ``status.json`` and the lock that its process holds."""
    settle(path)
    if not has_later_job(path):
        return results_of(path)
    found = _standing(path, path / NEXT / STATUS)
    return replace(found, why=f"{found.why}; {KEPT}")


def has_later_job(path: Path) -> bool:
    """Whether a later job than the one that the results are of was begun, and is not complete."""
    with suppress(OSError):
        return (path / NEXT / STATUS).exists()
    return False


def results_of(path: Path) -> Standing:
    """State of the job that the results in ``path`` are of; a later one may have failed or be running."""
    return _standing(path, path / STATUS)


def _standing(path: Path, file: Path) -> Standing:
    problems: list[str] = []
    begun = is_there(file)
    status = mapping_in(file, problems, read_json) if begun else {}
    fingerprint = str(status.get("fingerprint", "")) if begun and not problems else None
    state = state_of(path, status)
    if state is RunState.RUNNING:
        why = "another process runs it"
    elif state is RunState.INCOMPLETE:
        why = f"{ENDED}: killed, or out of memory" if begun else NOT_BEGUN
    else:
        why = "; ".join(problems) or text_of(status.get("error")) or ""
    return Standing(path, state, why, fingerprint)


@dataclass(frozen=True)
class Made:
    """What ``status.json`` records of a complete job: checksums of files by name, and keys of metrics by stage."""

    files: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[str]] = field(default_factory=dict)


def made_in(path: Path) -> Made:
    """What the complete job in ``path`` made; nothing where that is not recorded, as by calib 0.2.0 and earlier."""
    document = mapping_in(path / STATUS, [], read_json).get("made")
    files, metrics = (document.get(key) if isinstance(document, dict) else None for key in ("files", "metrics"))
    return Made(
        {name: str(files[name]) for name in CHECKED if name in files} if isinstance(files, dict) else {},
        {str(stage): keys for stage, keys in metrics.items() if isinstance(keys, list)}
        if isinstance(metrics, dict)
        else {},
    )


def changed_files(path: Path, names: Sequence[str] = CHECKED[:-1]) -> list[str]:
    """Those of ``names`` in ``path`` that were changed after the job; a file that was removed is not."""
    found, recorded = [], made_in(path).files
    for name in names:
        with suppress(OSError):  # cannot be read, which the file's readers report
            if name in recorded and (path / name).is_file() and content_of(path / name) != recorded[name]:
                found.append(name)
    return found


def state_of(path: Path, status: Mapping[str, Any]) -> RunState:
    """State of the job in ``path`` whose ``status.json`` holds ``status``."""
    state = status.get("state")
    if state in ("complete", "failed"):
        return RunState(state)
    if state != "running" and is_there(path / STATUS):
        return RunState.DAMAGED
    return RunState.RUNNING if is_locked(path / LOCK) else RunState.INCOMPLETE


def is_there(path: Path) -> bool:
    """Whether a file exists; True where its folder cannot be looked into."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def mapping_in(path: Path, problems: list[str], read: Any) -> dict[str, Any]:
    """The mapping in a file; {} where it cannot be read, with the reason added to ``problems``."""
    try:
        found = read(path)
    except CalibError as error:
        problems.append(str(error).replace(str(path), path.name))
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name}: holds no keys")
        return {}
    return found


def text_of(value: Any) -> str | None:
    """The text of a value; None where there is none."""
    return None if value is None else str(value)
