"""Launchers of sweeps: the packages they are in, and how many jobs they run side by side."""

import os
from collections.abc import Mapping
from typing import Any

#: Packages of launchers by option of hydra/launcher, with the extra of calib that installs them.
LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "calib[joblib]"),
    "submitit_local": ("hydra-submitit-launcher", "calib[slurm]"),
    "submitit_slurm": ("hydra-submitit-launcher", "calib[slurm]"),
    "ray": ("hydra-ray-launcher", None),
    "rq": ("hydra-rq-launcher", None),
}
#: Environment variables for the processes that run a sweep's jobs: how many there are, and how many at once.
JOBS_VARIABLE, BESIDE_VARIABLE = "CALIB_SWEEP_JOBS", "CALIB_SWEEP_SIDE_BY_SIDE"


def missing_launcher(option: str) -> str:
    """Advice on what to install for a launcher; '' for an unknown one."""
    if option not in LAUNCHERS:
        return ""
    package, extra = LAUNCHERS[option]
    also = f" (or {extra})" if extra else ""
    return f" It is in a package of its own: pip install {package}{also}"


def is_joblib(launcher: Mapping[str, Any]) -> bool:
    """Whether jobs run side by side in processes of this machine."""
    return str(launcher.get("_target_")).endswith(".JoblibLauncher")


def side_by_side(launcher: Mapping[str, Any], jobs: int) -> int:
    """Number of a sweep's jobs that the launcher runs at once on this machine."""
    if not is_joblib(launcher):
        return 1
    import joblib

    return int(max(1, min(joblib.effective_n_jobs(launcher["n_jobs"]), jobs)))


def sensible_jobs(jobs: int, processors: int, memory: int, transformer: int) -> int:
    """Default number of jobs side by side: at most one a processor, and as many as fit into memory.

    A job is estimated at four times its transformer's bytes (SD3-medium with T5: 3.7 times) and half a gigabyte.
    """
    return max(1, min(jobs, processors, memory // (4 * transformer + 500_000_000)))


def jobs_in_all() -> int:
    """Number of jobs of the sweep that this process belongs to."""
    return int(os.environ.get(JOBS_VARIABLE, "1"))


def jobs_at_once() -> int:
    """Number of jobs that run at once on this machine in the sweep that this process belongs to."""
    return int(os.environ.get(BESIDE_VARIABLE, "1"))
