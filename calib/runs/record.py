"""What a run directory says of itself, read without MLX or Hydra; whatever is damaged there is told, never raised."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

from calib.errors import CalibError
from calib.files import is_locked, read_json
from calib.runs.layout import CONFIG, ENVIRONMENT, HYDRA, LOCK, METRICS, STATUS

import yaml

Scalar: TypeAlias = str | int | float | bool | None

#: C's reader where PyYAML has it: ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: Names of functions that many options share: their module's name says which option it is.
_COMMON = ("plan_layer", "plan_layers", "quantize", "load")


class State(StrEnum):
    """How a run stands."""

    COMPLETE = "complete"
    FAILED = "failed"
    RUNNING = "running"
    INCOMPLETE = "incomplete"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class RunRecord:
    """A run directory.

    Attributes:
        name: what tells it from the others that are looked at, the end of its path.
        error: of a failed run, why.
        config: by dotted key, lists as text; a group's chosen option under the group's own name.
        metrics: finite numbers by key.
        command: the command line that made it.
        problems: files that could not be read, a line each.
    """

    path: Path
    name: str
    state: State
    stage: str = ""
    error: str | None = None
    start: str | None = None
    end: str | None = None
    config: Mapping[str, Scalar] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """What is wrong with it, in one line; '' where nothing is."""
        return " ".join("; ".join(filter(None, [self.error, *self.problems])).split())


def read_run(path: Path, name: str) -> RunRecord:
    """The run directory ``path``."""
    problems: list[str] = []
    status = _mapping(path / STATUS, problems, _json)
    config = _config(path, problems)
    metrics = _mapping(path / METRICS, problems, _json) if (path / METRICS).exists() else {}
    surroundings = _mapping(path / ENVIRONMENT, [], _json)
    state = _state(path, status)
    if state is State.INCOMPLETE and not problems:
        problems.append("its process ended without a word; the same command goes on")
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
        metrics={key: float(value) for key, value in metrics.items() if _is_number(value)},
        command=tuple(map(str, command)) if isinstance(command, list) else (),
        problems=tuple(problems),
    )


def _state(path: Path, status: Mapping[str, Any]) -> State:
    if not (path / STATUS).exists():
        return State.INCOMPLETE
    state = status.get("state")
    if state == "running":
        return State.RUNNING if is_locked(path / LOCK) else State.INCOMPLETE
    return State(state) if state in ("complete", "failed") else State.DAMAGED


def _config(path: Path, problems: list[str]) -> dict[str, Scalar]:
    """Flat, a group's option under the group's name: as Hydra recorded it, or by the function that it names."""
    document = _mapping(path / CONFIG, problems, _yaml)
    hydra = path / HYDRA / "hydra.yaml"
    choices: Any = {}
    if hydra.exists():
        found: Any = _mapping(hydra, [], _yaml)
        for key in ("hydra", "runtime", "choices"):
            found = found.get(key) if isinstance(found, dict) else None
        choices = found if isinstance(found, dict) else {}
    flat: dict[str, Scalar] = {}
    for key, value in document.items():
        if not isinstance(value, dict):
            flat[str(key)] = _scalar(value)
            continue
        option = choices.get(key) or _option(value.get("_target_"))
        if option:
            flat[str(key)] = str(option)
        flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items() if inner not in ("_target_", "skeleton")}
    return flat


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
    """A file's mapping; what keeps it from being read goes to ``problems``."""
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
    return read_json(path)


def _yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except FileNotFoundError:
        raise CalibError(f"{path}: no such file") from None
    except OSError as error:
        raise CalibError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CalibError(f"{path}: not valid YAML ({' '.join(str(error).split())[:80]})") from None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
