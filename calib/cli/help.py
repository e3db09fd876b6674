"""The text of ``calib --help`` and ``calib STAGE --help``."""

import ast
import textwrap

from calib.cli.conf import PACKAGE, groups
from calib.stages import Stage

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
  verify DIR             read every file of a run, or of a sweep's runs: damaged, changed, made from something else
  merge DIR… --into DIR  join the run directories of calib collect's shards; as if it had not been split
  convergence DIR        do ranges still move with more images? a table and a plot; --layers, --json, --plot
  compare DIR…           a sweep, or any runs, as one table: what differs, what is best; --html, --layers for two plans
  export RUN --into DIR  the quantized model for other programs: --format mflux, mlx or recipe; with a model card

on pictures, likewise
  evaluate DIR_A DIR_B   two folders of pictures that anything drew, matched by name; --metrics, --json, --html

on this machine
  doctor     report device, BLAS, versions; `calib doctor --selftest` checks this device's numerics

examples
  calib                                            the whole job on the model that ships with calib
  calib num_images=50 timestep_schedule=uniform timestep_schedule.count=20
  calib analysis=allocate analysis.average_bits=4.5 quantizer=gptq      the best plan for a budget, measured
  calib analyze stats=outputs/2026-01-31/08-00-00-000000 analysis=uniform
  calib -m timestep_schedule=key,quarters,uniform analysis=range,uniform    a sweep; started again it goes on
  calib hparams_search=budgets hydra/launcher=joblib                         a ready one, jobs side by side
  calib report=none                                files alone, no page
  calib --config-dir my_conf analysis=mine         options of your own: docs/ARCHITECTURE.md, "Adding things"
"""


def help_text(stage: Stage | None) -> str:
    """The help of a stage, or of all of calib, with the config groups and their options."""
    options = "\n".join(
        textwrap.fill(f"  {group + '=':19}{' · '.join(names)}", 120, subsequent_indent=21 * " ")
        for group, names in groups().items()
    )
    head = HELP if stage is None else f"usage: calib {stage} [key=value …] [-m]\n\n{stage_help(stage)}\n"
    tail = "The whole configuration with its defaults: calib --cfg job. A comment tops every file under conf/."
    return f"{head}\nconfig groups\n{options}\n\n{tail}\n"


def stage_help(stage: Stage) -> str:
    """The docstring of the stage's module, which is read and not imported, so that help does not wait for MLX."""
    source = (PACKAGE / "stages" / f"{stage.value}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""
