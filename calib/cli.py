"""The command line: ``calib [stage] [overrides]``."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import calib
from calib import interrupts
from calib.commands import COMMANDS
from calib.compose import CONF, groups, plain, planned, take_apart
from calib.errors import CalibError, ConfigError, suggest
from calib.jobs import in_a_line, job_of_sweep, run_job, run_sweep
from calib.settings import Stage
from calib.sweeps import job_name, sweep_name

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

HELP = """calib: time-aware calibration and post-training quantization of diffusion transformers on MLX

usage: calib [stage] [key=value …] [-m]        any stage: calib STAGE --help

stages
  run        (default) all of the following into one run directory
  generate   draw images, keeping the latent of every denoising step
  collect    replay stored states with every layer tapped; statistics into activations.h5
  analyze    turn statistics into a plan: quantization_config.json
  quantize   apply a plan: a quantized model, as a folder that MLX loads
  evaluate   draw the same seeds at full precision and quantized, and say what was lost

on datasets, with ordinary arguments: calib COMMAND --help
  verify DIR             read every file of a dataset and say whether it is sound; --json, --repair
  rebuild-manifest DIR   restore a lost or damaged manifest.json from the files

on run directories, likewise
  merge DIR… --into DIR  join the run directories of calib collect's shards; as if it had not been split
  convergence DIR        do ranges still move with more images? a table and a plot; --layers, --json, --plot
  compare DIR…           a sweep, or any runs, as one table: what differs, what is best; --html, --layers for two plans

on this machine
  doctor     report device, BLAS, versions; `calib doctor --selftest` checks this device's numerics

examples
  calib                                            the whole job on the model that ships with calib
  calib num_images=50 timestep_schedule=uniform timestep_schedule.count=20
  calib analysis=allocate analysis.average_bits=4.5 quantizer=gptq      the best plan for a budget, measured
  calib analyze stats=outputs/2026-01-31/08-00-00-000000 analysis=uniform
  calib -m timestep_schedule=key,quarters,uniform analysis=range,uniform    a sweep; started again it goes on
  calib hparams_search=budgets hydra/launcher=joblib                         a ready one, jobs side by side
"""

STAGE_HELP = {
    Stage.RUN: "Runs generate, collect, analyze, quantize and evaluate into one run directory under outputs/.",
    Stage.GENERATE: "Draws images 0 … num_images - 1 into data_dir; those it has are kept.\n"
    "Main keys: num_images, prompts, sampler.num_steps, sampler.cfg_weight, seed, data_dir, dataset",
    Stage.COLLECT: "Replays stored states of chosen images and steps; draws no image unless generate_missing=true.\n"
    "What is in cache_dir is not collected again; the model is loaded only for what is missing.\n"
    "Main keys: data_dir, timestep_schedule, subset, taps, taps.cfg_halves, storage, collect.batch_size, shard.index,\n"
    "shard.count, cache_dir",
    Stage.ANALYZE: "Turns statistics into a bit-width plan, from files alone; analysis=sensitivity and allocate\n"
    "replay stored states once, and find what they measured in cache_dir ever after.\n"
    "Main keys: stats (a run directory or a layer_statistics.json), analysis, ranges, phase_bits, sensitivity,\n"
    "export_config",
    Stage.QUANTIZE: "Applies a plan: weights packed as MLX runs them, activation ranges that follow the step, as a\n"
    "folder quantized/ in the run directory.\n"
    "Main keys: plan (a run directory or a quantization_config.json), quantizer, calibration, stats",
    Stage.EVALUATE: "Draws held-out prompts at full precision and with a quantized model, same seeds and noise.\n"
    "Main keys: plan (the run directory of calib quantize), evaluation.num_images, evaluation.seed, evaluation.steps",
}


def help_text(stage: Stage | None) -> str:
    """What ``calib --help`` and ``calib STAGE --help`` print."""
    options = "\n".join(f"  {group + '=':19}{' · '.join(names)}" for group, names in groups().items())
    head = HELP if stage is None else f"usage: calib {stage} [key=value …] [-m]\n\n{STAGE_HELP[stage]}\n"
    tail = "The whole configuration with its defaults: calib --cfg job. A comment tops every file under conf/."
    return f"{head}\nconfig groups\n{options}\n\n{tail}\n"


def split_arguments(arguments: Sequence[str]) -> tuple[Stage | None, list[str]]:
    """The stage, if one is named first, and the rest."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "+", "~")):
        return None, list(arguments)
    known = [stage.value for stage in Stage]
    if arguments[0] not in known:
        raise ConfigError(f"{arguments[0]}: unknown stage.{suggest(arguments[0], [*known, *COMMANDS, 'doctor'])}")
    return Stage(arguments[0]), list(arguments[1:])


def task(config: DictConfig) -> None:
    """One job; Hydra has made its directory. A job of a sweep that fails is recorded, and does not end the sweep."""
    hydra_config = HydraConfig.get()
    path = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode != RunMode.MULTIRUN:
        try:
            run_job(plain(config), path, multirun=False)
        except (CalibError, OSError) as error:
            # SystemExit, as Hydra prints a traceback for anything else.
            print(f"calib: {in_a_line(error, path)}", file=sys.stderr)
            raise SystemExit(error.exit_status if isinstance(error, CalibError) else 1) from None
        return
    with job_of_sweep(hydra_config, path):
        run_job(plain(config), path, multirun=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``calib``.

    Exits 0; 2 for a bad configuration, 1 for other errors, 130 when interrupted, 143 (129) when
    terminated (its terminal closed).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    interrupts.install()
    try:
        sys.exit(_run(given))
    except CalibError as error:
        print(f"calib: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        print(f"calib: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        done = str(error) or "the same command goes on from what is finished"
        print(f"calib: interrupted; {done}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, interrupts.Terminated) else 130)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    stage, rest = split_arguments(arguments)
    if {"--help", "-h"} & set(rest):
        print(help_text(stage), end="")
        return 0
    if "--version" in rest:
        print(f"calib {calib.__version__}")
        return 0
    OmegaConf.register_new_resolver("calib_job", job_name, replace=True)
    OmegaConf.register_new_resolver("calib_sweep", sweep_name, replace=True)
    given = take_apart(rest)
    what = planned(replace(given, overrides=([f"stage={stage}"] if stage else []) + given.overrides))
    GlobalHydra.instance().clear()
    # What Hydra itself fails at (a full disk) is told by main, not by Hydra's own report.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser takes overrides in one piece only.
    flags = [flag for flag in given.flags if flag not in ("-m", "--multirun")]
    flags += ["--multirun"] if what.multirun else []
    sys.argv = ["calib", *flags, "--", *what.overrides]
    launch = hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)
    if what.multirun:
        return run_sweep(launch, what)
    launch()
    return 0
