"""A run directory as a record and in its state, read without MLX and Hydra; damaged files are reported, not raised."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

from calib.base.errors import CalibError, reason_of
from calib.base.files import is_locked, read_json, read_text
from calib.base.layout import CONFIG, ENVIRONMENT, HYDRA_CONFIG, LOCK, METRICS, STATUS

import yaml

#: Keys of a configuration that do not affect results.
WITHOUT_EFFECT = ("swept", "cache_dir", "keep_awake", "report")

Scalar: TypeAlias = str | int | float | bool | None

#: The reader in C where PyYAML has it: ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: Names of functions that many options share; such an option is called by its module.
_COMMON = ("plan_layer", "plan_layers", "quantize", "load")


#: Why a run is incomplete.
NOT_BEGUN, ENDED = "was not begun", "its process ended without a word"


class RunState(StrEnum):
    """State of a run."""

    COMPLETE = "complete"
    FAILED = "failed"
    RUNNING = "running"
    INCOMPLETE = "incomplete"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class RunRecord:
    """A run directory.

    Attributes:
        name: the end of its path that no other run in view has.
        error: why it failed.
        config: values by dotted key, lists as text; a group's chosen option under the group's own name.
        asked: keys of the configuration that the command line set.
        metrics: finite numbers by key.
        command: the command line of the job.
        problems: files that could not be read, a line each.
    """

    path: Path
    name: str
    state: RunState
    stage: str = ""
    error: str | None = None
    start: str | None = None
    end: str | None = None
    config: Mapping[str, Scalar] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    metrics: Mapping[str, float] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Error and problems in one line; '' where there are none."""
        line = " ".join("; ".join(filter(None, [self.error, *self.problems])).split())
        return "".join(character for character in line if character.isprintable())


def read_run(path: Path, name: str) -> RunRecord:
    """Read the run directory ``path``, which is to be called ``name``."""
    if not _is_there(path):
        return RunRecord(path, name, RunState.INCOMPLETE, problems=(f"{NOT_BEGUN}; the same command runs it",))
    problems: list[str] = []
    status = _mapping(path / STATUS, problems, _json)
    config, asked = _config(path, problems)
    metrics = _metrics(path, problems)
    surroundings = _mapping(path / ENVIRONMENT, [], _json)
    state = _state(path, status)
    if state is RunState.COMPLETE and not _is_there(path / METRICS):
        problems.append(f"{METRICS} is lost, and with it the run's figures")
    if state is RunState.INCOMPLETE and not problems:
        problems.append(f"{ENDED}; the same command goes on")
    command = surroundings.get("command")
    return RunRecord(
        path=path,
        name=name,
        state=state,
        stage=_text(status.get("stage")) or "",
        error=_text(status.get("error")),
        start=_text(status.get("start")),
        end=_text(status.get("end")),
        config=config,
        asked=asked,
        metrics=metrics,
        command=tuple(map(str, command)) if isinstance(command, list) else (),
        problems=tuple(problems),
    )


@dataclass(frozen=True)
class Standing:
    """State of the job in a run directory, and the reason where it is not complete.

    Attributes:
        fingerprint: of the job's configuration; None where no ``status.json`` can be read, '' where it has none.
    """

    path: Path
    state: RunState
    why: str = ""
    fingerprint: str | None = None


def standing(path: Path) -> Standing:
    """State of the job in ``path``, from its ``status.json`` and the lock that its process holds."""
    problems: list[str] = []
    begun = _is_there(path / STATUS)
    status = _mapping(path / STATUS, problems, _json) if begun else {}
    fingerprint = str(status.get("fingerprint", "")) if begun and not problems else None
    state = _state(path, status)
    if state is RunState.RUNNING:
        why = "another process runs it"
    elif state is RunState.INCOMPLETE:
        why = f"{ENDED}: killed, or out of memory" if begun else NOT_BEGUN
    else:
        why = "; ".join(problems) or _text(status.get("error")) or ""
    return Standing(path, state, why, fingerprint)


def _state(path: Path, status: Mapping[str, Any]) -> RunState:
    state = status.get("state")
    if state in ("complete", "failed"):
        return RunState(state)
    if state != "running" and _is_there(path / STATUS):
        return RunState.DAMAGED
    return RunState.RUNNING if is_locked(path / LOCK) else RunState.INCOMPLETE


def _is_there(path: Path) -> bool:
    """Whether a file exists; True where its folder cannot be looked into."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _metrics(path: Path, problems: list[str]) -> dict[str, float]:
    """Finite numbers by key; other values are added to ``problems``, but for null, which stands for none."""
    found = _mapping(path / METRICS, problems, _json) if _is_there(path / METRICS) else {}
    if strange := [key for key, value in found.items() if value is not None and not _is_number(value)]:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        problems.append(f"{METRICS}: {strange[0]}{more}: no finite number")
    return {key: float(value) for key, value in found.items() if _is_number(value)}


def _config(path: Path, problems: list[str]) -> tuple[dict[str, Scalar], frozenset[str]]:
    """The flat configuration, and the keys that the command line set.

    A group's option is under the group's name, as Hydra recorded it, or else from the function that it names.
    """
    document = _mapping(path / CONFIG, problems, _yaml)
    recorded = _mapping(path / HYDRA_CONFIG, [], _yaml) if _is_there(path / HYDRA_CONFIG) else {}
    choices, task = _within(recorded, "runtime", "choices"), _within(recorded, "overrides", "task")
    choices = choices if isinstance(choices, dict) else {}
    overrides = task if isinstance(task, list) else []
    asked = frozenset(str(override).lstrip("+~").partition("=")[0] for override in overrides)
    flat: dict[str, Scalar] = {}
    for key, value in document.items():
        if not isinstance(value, dict):
            flat[str(key)] = _scalar(value)
            continue
        option = choices.get(key) or _option(value.get("_target_"))
        if option:
            flat[str(key)] = str(option)
        flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items() if inner not in ("_target_", "skeleton")}
    return flat, asked


def _within(recorded: Any, *keys: str) -> Any:
    """An entry of Hydra's own configuration; None where it is missing."""
    for key in ("hydra", *keys):
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    return recorded


def _option(target: Any) -> str | None:
    module, _, name = str(target).rpartition(".")
    return None if target is None else module.rpartition(".")[2] if name in _COMMON else name


def _flat(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _scalar(value)
    return flat


def _scalar(value: Any) -> Scalar:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _mapping(path: Path, problems: list[str], read: Any) -> dict[str, Any]:
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


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in thousands
        raise CalibError(f"{path}: not valid JSON ({reason_of(error)[:80]})") from None


def _yaml(path: Path) -> Any:
    try:
        text = read_text(path)
        # The reader in C refuses the escapes that stand for bytes of a file's name that are not UTF-8.
        return yaml.load(text, Loader=yaml.SafeLoader if "\\uDC" in text else _LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a 13th month, for one
        raise CalibError(f"{path}: not valid YAML ({reason_of(error)[:80]})") from None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
