"""A run directory as a record and in its state, read without MLX and Hydra; damaged files are reported, not raised."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from calib.base.errors import CalibError, reason_of
from calib.base.files import content_of, read_json, read_text
from calib.base.layout import CONFIG, DETAILS, ENVIRONMENT, HYDRA_CONFIG, METRICS, MODEL, MODEL_CONFIG, STATUS
from calib.base.targets import short_name
from calib.runs.exchange import settle
from calib.runs.standing import (
    ENDED,
    NOT_BEGUN,
    RunState,
    changed_files,
    has_later_job,
    is_there,
    mapping_in,
    standing,
    state_of,
    text_of,
)

import yaml

#: Key of ``env.json`` with the chosen options that the job took over with what it started from.
CARRIED = "carried_options"
#: Keys of a configuration that do not affect results.
WITHOUT_EFFECT = ("swept", "cache_dir", "keep_awake", "report")

Scalar: TypeAlias = str | int | float | bool | None


class _WithoutAliases:
    """Refuses aliases, which calib and Hydra never write: a few lines of them stand for gigabytes."""

    def construct_object(self: Any, node: Any, deep: bool = False) -> Any:
        if node in self.constructed_objects:
            raise yaml.constructor.ConstructorError(None, None, "has an alias", node.start_mark)
        return super().construct_object(node, deep)  # type: ignore[misc]


class _PlainLoader(_WithoutAliases, yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's own reader, which makes plain values and calls nothing."""


class _Loader(_WithoutAliases, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The reader in C where PyYAML has it: ten times as fast."""


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
    if not is_there(path):
        return RunRecord(path, name, RunState.INCOMPLETE, problems=(f"{NOT_BEGUN}; the same command runs it",))
    settle(path)
    problems: list[str] = []
    status = mapping_in(path / STATUS, problems, read_json)
    config = read_configuration(path, problems)
    metrics = _metrics(path, problems)
    surroundings = mapping_in(path / ENVIRONMENT, [], read_json)
    state = state_of(path, status)
    if state is RunState.COMPLETE and not is_there(path / METRICS):
        problems.append(f"{METRICS} is lost, and with it the run's figures")
    if state is RunState.INCOMPLETE and not problems:
        problems.append(f"{ENDED}; the same command goes on")
    if state is RunState.COMPLETE:
        problems += [f"{name} was changed after the job that the figures are of" for name in changed_files(path)]
    if has_later_job(path):
        latest = standing(path)
        problems.append(f"a later job here is not complete ({latest.state}: {latest.why})")
    if _has_older_evaluation(path, config.values):
        problems.append(f"its figures are of an earlier quantized model than {config.values['plan']} now holds")
    command = surroundings.get("command")
    return RunRecord(
        path=path,
        name=name,
        state=state,
        stage=text_of(status.get("stage")) or "",
        error=text_of(status.get("error")),
        start=text_of(status.get("start")),
        end=text_of(status.get("end")),
        config=_flat_config(config),
        asked=config.asked,
        metrics=metrics,
        command=tuple(map(str, command)) if isinstance(command, list) else (),
        problems=tuple(problems),
    )


def home_of(named: Path) -> Path:
    """The run directory that ``named`` is, or in which it is a file or the quantized model."""
    is_model = named.name == MODEL and (named.parent / MODEL_CONFIG).is_file() and not (named / MODEL_CONFIG).is_file()
    return named.parent if is_model or named.is_file() else named


def _has_older_evaluation(path: Path, values: Mapping[str, Any]) -> bool:
    """Whether an evaluation in a directory of its own is of another model than the plan's directory holds by now."""
    model = home_of(Path(str(values.get("plan")))) / MODEL_CONFIG
    with suppress(OSError, CalibError):
        if is_there(path / DETAILS) and not (path / MODEL_CONFIG).exists() and model.is_file():
            made_from = mapping_in(path / DETAILS, [], read_json).get("made_from")
            recorded = made_from.get("quantized") if isinstance(made_from, dict) else None
            return recorded is not None and recorded != content_of(model)
    return False


def _metrics(path: Path, problems: list[str]) -> dict[str, float]:
    """Finite numbers by key; other values are added to ``problems``, but for null, which stands for none."""
    found = mapping_in(path / METRICS, problems, read_json) if is_there(path / METRICS) else {}
    if strange := [key for key, value in found.items() if value is not None and not _is_number(value)]:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        problems.append(f"{METRICS}: {strange[0]}{more}: no finite number")
    return {key: float(value) for key, value in found.items() if _is_number(value)}


@dataclass(frozen=True)
class Configuration:
    """What a run directory records of its configuration.

    Attributes:
        values: by top-level key.
        options: the chosen option of each group.
        asked: keys that the command line set.
        carried: groups whose options were taken over with what the job started from.
    """

    values: Mapping[str, Any]
    options: Mapping[str, str]
    asked: frozenset[str]
    carried: frozenset[str]


def read_configuration(path: Path, problems: list[str]) -> Configuration:
    """Read the configuration recorded in the run directory ``path``."""
    values = mapping_in(path / CONFIG, problems, read_yaml)
    recorded = mapping_in(path / HYDRA_CONFIG, [], read_yaml) if is_there(path / HYDRA_CONFIG) else {}
    carried = mapping_in(path / ENVIRONMENT, [], read_json).get(CARRIED)
    choices, task = _within(recorded, "runtime", "choices"), _within(recorded, "overrides", "task")
    options = [found for found in (choices, carried) if isinstance(found, dict)]
    return Configuration(
        {str(key): value for key, value in values.items()},
        {str(key): str(option) for found in options for key, option in found.items() if option},
        frozenset(str(o).lstrip("+~").partition("=")[0] for o in (task if isinstance(task, list) else [])),
        frozenset(map(str, carried)) if isinstance(carried, dict) else frozenset(),
    )


def _flat_config(found: Configuration) -> dict[str, Scalar]:
    """The values by dotted key; a group's option is under the group's name, or else derived from its function."""
    flat: dict[str, Scalar] = {}
    for key, value in found.values.items():
        if not isinstance(value, dict):
            flat[key] = _scalar(value)
            continue
        target = value.get("_target_")
        if option := found.options.get(key) or (None if target is None else short_name(str(target))):
            flat[key] = option
        flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items() if inner not in ("_target_", "skeleton")}
    return flat


def _within(recorded: Any, *keys: str) -> Any:
    """An entry of Hydra's own configuration; None where it is missing."""
    for key in ("hydra", *keys):
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    return recorded


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


def read_yaml(path: Path) -> Any:
    """The YAML value in ``path``, of plain values; raises a CalibError where the file is missing or damaged."""
    try:
        text = read_text(path)
        # The reader in C refuses the escapes that stand for bytes of a file's name that are not UTF-8.
        return yaml.load(text, Loader=_PlainLoader if "\\uDC" in text else _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a 13th month, for one
        raise CalibError(f"{path}: not valid YAML ({reason_of(error)[:80]})") from None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
