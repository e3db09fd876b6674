"""Sweeps: which jobs there are, what their folders are called, how many run at once, and how they ended."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.config import BESIDES
from calib.errors import CalibError, ConfigError
from calib.files import is_locked, read_json, short_hash
from calib.runs.layout import LOCK, STATUS

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

LONGEST_NAME = 80
#: Launchers that are packages of their own, by option of hydra/launcher.
LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "calib[joblib]"),
    "submitit_local": ("hydra-submitit-launcher", "calib[slurm]"),
    "submitit_slurm": ("hydra-submitit-launcher", "calib[slurm]"),
    "ray": ("hydra-ray-launcher", None),
    "rq": ("hydra-rq-launcher", None),
}
#: How many jobs the sweep has, for the processes that run them.
JOBS_VARIABLE = "CALIB_SWEEP_JOBS"


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _own(overrides: Sequence[str], swept: Sequence[str]) -> list[str]:
    """What a name depends on, by key; those of the same key stay in their order, as the last one wins.

    What no result depends on is left out, unless it varies: two jobs never share a folder.
    """
    return sorted((o for o in overrides if _key(o) in swept or _key(o) not in BESIDES), key=_key)


def _name(words: Sequence[str], everything: Sequence[str], leaves_out: bool) -> str:
    """``words`` as the name of a folder, and a hash of ``everything`` where they do not say it all."""
    name = ",".join(words)
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", name)
    # Names that differ in case alone are one on most Macs.
    if not leaves_out and safe == name == name.lower() and len(name) <= LONGEST_NAME:
        return name
    return f"{safe[:LONGEST_NAME]}-{short_hash(list(everything))}"


def job_name(overrides: Sequence[str], swept: Sequence[str] = ()) -> str:
    """Folder name of one job of a sweep: readable, safe as a file name, unique and stable.

    The stage, the overrides that vary, and a hash of all where that leaves anything out.
    """
    own = _own(overrides, swept)
    stage = [o.partition("=")[2] for o in own if _key(o) == "stage" and o != "stage=run"]
    rest = [o for o in own if _key(o) != "stage"]
    varied = [o for o in rest if _key(o) in swept] or rest
    return _name([*stage, *varied] or ["default"], own, len(varied) < len(rest))


def sweep_name(overrides: Sequence[str], swept: Sequence[str] = ()) -> str:
    """Folder name of a sweep: the stage, the keys that vary, and a hash of what is fixed, if anything is.

    The values are not in it: the same sweep with more of them goes on in the same folder.
    """
    own = _own(overrides, swept)
    stage = [o.partition("=")[2] for o in own if _key(o) == "stage" and o != "stage=run"]
    fixed = [o for o in own if _key(o) not in (*swept, "stage")]
    return _name([*stage, *sorted(swept)] or ["default"], [*stage, *sorted(swept), *fixed], bool(fixed))


def in_short(override: Override) -> str:
    """An override as Hydra passes it to a job, so that a name made before is that of the job."""
    if override.is_delete() or override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def with_params(overrides: Sequence[str], keys: Sequence[str], config: DictConfig) -> list[str]:
    """``overrides``, of ``keys``, and what ``hparams_search`` sweeps besides; the command line has the last word."""
    params = config.hydra.sweeper.get("params") or {}
    return [*overrides, *(f"{key}={value}" for key, value in params.items() if key not in keys)]


def jobs_of(overrides: Sequence[Override], config: DictConfig) -> list[list[str]]:
    """The jobs that Hydra's own sweeper will run; of another sweeper only it knows: one job, of what is fixed."""
    if not str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        return [[o.input_line or "" for o in overrides if not o.is_sweep_override()]]
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            allowed = "is a range without steps; name values, or use range(…), or another hydra/sweeper"
            raise ConfigError(f"{override.input_line}: {allowed}")
    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    return jobs


@dataclass(frozen=True)
class Ended:
    """How one job of a sweep stands: 'complete', 'failed', 'running' elsewhere, or 'incomplete'; and why."""

    path: Path
    state: str
    error: str | None = None


def ended(path: Path) -> Ended:
    """How the job in ``path`` stands, by its ``status.json`` and the lock that its process holds."""
    if is_locked(path / LOCK):
        return Ended(path, "running", "another process runs it")
    if not (path / STATUS).exists():
        return Ended(path, "incomplete", "was not begun")
    try:
        status = read_json(path / STATUS)
    except CalibError as error:
        return Ended(path, "incomplete", str(error))
    state = status.get("state") if isinstance(status, Mapping) else None
    if state in ("complete", "failed"):
        return Ended(path, state, status.get("error"))
    return Ended(path, "incomplete", "its process ended without a word: killed, or out of memory")


def missing_launcher(option: str) -> str:
    """What to install where a launcher is not there; '' where nobody knows it."""
    if option not in LAUNCHERS:
        return ""
    package, extra = LAUNCHERS[option]
    also = f" (or {extra})" if extra else ""
    return f" It is in a package of its own: pip install {package}{also}"


def is_joblib(launcher: Mapping[str, Any]) -> bool:
    """Whether jobs run side by side in processes of this machine."""
    return str(launcher.get("_target_")).endswith(".JoblibLauncher")


def side_by_side(launcher: Mapping[str, Any], jobs: int) -> int:
    """How many jobs of a sweep the launcher runs at once on this machine."""
    if not is_joblib(launcher):
        return 1
    import joblib

    return int(max(1, min(joblib.effective_n_jobs(launcher["n_jobs"]), jobs)))


def sensible_jobs(jobs: int, processors: int, memory: int, transformer: int) -> int:
    """How many jobs to run side by side where nobody says it: no more than there are processors, and than fit.

    A job is taken to need four times its transformer's bytes (SD3-medium with T5: 3.7 times) and half a gigabyte.
    """
    return max(1, min(jobs, processors, memory // (4 * transformer + 500_000_000)))


def jobs_in_all() -> int:
    """Jobs of the sweep that this process belongs to."""
    return int(os.environ.get(JOBS_VARIABLE, "1"))
