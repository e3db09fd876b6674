"""Compose and check the jobs of a command line, then start them through Hydra."""

import faulthandler
import os
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from calib.base.encoding import print_any_text
from calib.base.errors import CalibError, ConfigError, in_a_line
from calib.base.layout import HYDRA_CONFIG, HYDRA_JOB, HYDRA_OVERRIDES
from calib.cli.compose import plain, planned
from calib.cli.conf import CONF
from calib.cli.job import run_job
from calib.cli.names import job_name, sweep_name
from calib.cli.overrides import take_apart
from calib.cli.sweep import job_of_sweep, run_sweep
from calib.stages import Stage

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


def task(config: DictConfig) -> None:
    """Run one job in the directory that Hydra made; in a sweep a failure is recorded, and the next job follows."""
    print_any_text()  # in a launcher's worker, too
    with suppress(OSError, ValueError, AttributeError):  # a standard error without a file, in a notebook
        faulthandler.enable()  # a crash in a library says in which call
    hydra_config = HydraConfig.get()
    path = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode != RunMode.MULTIRUN:
        try:
            run_job(plain(config), path, False, _records(config))
        except (CalibError, OSError) as error:
            # SystemExit, as Hydra prints a traceback for anything else.
            print(f"calib: {in_a_line(error, path)}", file=sys.stderr)
            raise SystemExit(error.exit_status if isinstance(error, CalibError) else 1) from None
        return
    with job_of_sweep(hydra_config, path):
        run_job(plain(config), path, True, _records(config))


def _records(config: DictConfig) -> dict[str, str]:
    """Hydra's record of a job, by name of file; written by calib, as Hydra would overwrite that of an earlier job."""
    own = OmegaConf.create({"hydra": HydraConfig.get()})
    found = {HYDRA_JOB: config, HYDRA_CONFIG: own, HYDRA_OVERRIDES: HydraConfig.get().overrides.task}
    return {name: OmegaConf.to_yaml(part) for name, part in found.items()}


def launch(stage: Stage | None, arguments: list[str]) -> int:
    """Run the jobs of ``arguments``, overrides and Hydra's flags; returns the exit status."""
    OmegaConf.register_new_resolver("calib_job", job_name, replace=True)
    OmegaConf.register_new_resolver("calib_sweep", sweep_name, replace=True)
    given = take_apart(arguments)
    if stage is not None:
        if others := [o for o in given.overrides if o.lstrip("+").startswith("stage=")]:
            raise ConfigError(f"{others[0]}: the stage is {stage} already; leave one of them out")
        given = replace(given, overrides=[f"stage={stage}", *given.overrides])
    what = planned(given)
    GlobalHydra.instance().clear()
    # Errors of Hydra itself (a full disk) are then reported by main, not by Hydra.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser takes overrides in one piece only.
    flags = [flag for flag in given.flags if flag != "--multirun"]
    flags += ["--multirun"] if what.multirun else []
    overrides = [] if "--hydra-help" in flags else what.overrides  # it is about Hydra alone, and knows no group of ours
    sys.argv = ["calib", *flags, "--", *overrides]
    start = hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)
    if what.multirun:
        return run_sweep(start, what)
    try:
        start()
    except (CalibError, OSError):
        raise
    except Exception as error:
        if any(frame.f_code is task.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        raise ConfigError(f"hydra: cannot start the job ({in_a_line(error)})") from error  # by hydra.callbacks, …
    return 0
