"""Launchers of sweeps: what to install for them, and how many jobs run side by side."""

import os
from collections.abc import Mapping
from typing import Any

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
