"""The command line: ``calib [stage] [overrides]``. The only place that knows Hydra."""

import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

from calib.config import Settings, Stage, build, check_writable
from calib.errors import CalibError, ConfigError, suggest
from calib.files import short_hash
from calib.pipeline import precheck, run_stage
from calib.runs.directory import RunDirectory

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
LONGEST_NAME = 80

#: Hydra's flags that show something and run no job.
MULTIRUN_FLAGS = ("-m", "--multirun")
SHOW_FLAGS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--shell-completion", "-sc")

HELP = """calib: time-aware calibration and post-training quantization of diffusion transformers on MLX

usage: calib [stage] [key=value …] [-m]        any stage: calib STAGE --help

stages
  run        (default) generate, collect and analyze into one run directory
  generate   draw images, keeping the latent of every denoising step
  collect    replay stored states with every layer tapped; exact statistics into activations.h5
  analyze    turn statistics into a plan: quantization_config.json
  doctor     report device, BLAS, versions; `calib doctor --selftest` checks this device's numerics

examples
  calib                                            the whole job on the model that ships with calib
  calib num_images=50 timestep_schedule=uniform timestep_schedule.count=20
  calib analyze stats=outputs/2026-01-31/08-00-00-000000 analysis=uniform
  calib -m timestep_schedule=key,quarters,uniform analysis=range,uniform
"""

STAGE_HELP = {
    Stage.RUN: "Runs generate, collect and analyze into one run directory under outputs/.",
    Stage.GENERATE: "Draws images 0 … num_images - 1 into data_dir; those it has are kept.\n"
    "Main keys: num_images, prompts, sampler.num_steps, sampler.cfg_weight, seed, data_dir, dataset",
    Stage.COLLECT: "Replays stored states of chosen images and steps; draws no image unless generate_missing=true.\n"
    "Main keys: data_dir, timestep_schedule, subset.num_images, taps, storage.histogram_rows, collect.batch_size",
    Stage.ANALYZE: "Turns statistics into a bit-width plan, from files alone.\n"
    "Main keys: stats (a run directory or a layer_statistics.json), analysis, export_config",
}


def job_name(overrides: Sequence[str], swept: Sequence[str] = ()) -> str:
    """Folder name of one job of a sweep: readable, safe as a file name, unique and stable.

    The overrides that vary, spelt out, and a hash of all where that leaves anything out.
    """
    own = sorted(o for o in overrides if o.partition("=")[0] not in ("stage", "swept"))
    varied = [o for o in own if o.partition("=")[0] in swept]
    name = ",".join(varied or own) or "default"
    safe = re.sub(r"[^\w.,=+-]+", "_", name)
    if safe == name and len(name) <= LONGEST_NAME and len(varied or own) == len(own):
        return name
    return f"{safe[:LONGEST_NAME]}-{short_hash(own)}"


def groups() -> dict[str, list[str]]:
    """The config groups and their options."""
    folders = sorted(folder for folder in CONF.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


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
        raise ConfigError(f"{arguments[0]}: unknown stage.{suggest(arguments[0], [*known, 'doctor'])}")
    return Stage(arguments[0]), list(arguments[1:])


def check(arguments: Sequence[str]) -> None:
    """Compose and check every job that ``arguments`` ask for, before Hydra makes a directory."""
    multirun = any(flag in arguments for flag in MULTIRUN_FLAGS)
    extra = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a in ("--config-dir", "-cd")]
    overrides = [a for a in arguments if not a.startswith("-") and a not in extra]
    searched = [f"hydra.searchpath=[{','.join(f'file://{Path(folder).absolute()}' for folder in extra)}]"] * bool(extra)
    jobs = _jobs(_parse(overrides)) if multirun else [overrides]
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="calib"):
        for job in jobs:
            config = _compose([*searched, *job])
            settings = build(_plain(config), multirun)
            _check_folders(config, settings, multirun)
            precheck(settings)


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"{' '.join(overrides)}: {_first_line(error)}") from None


def swept_keys(arguments: Sequence[str]) -> list[str]:
    """The keys that a multirun varies."""
    overrides = _parse([a for a in arguments if "=" in a and not a.startswith("-")])
    return [override.get_key_element() for override in overrides if override.is_sweep_override()]


def _jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """The jobs that Hydra's basic sweeper will run."""
    choices = []
    for override in overrides:
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    return [list(job) for job in product(*choices)]


def _compose(overrides: list[str]) -> DictConfig:
    try:
        config = compose("config", overrides=overrides, return_hydra_config=True)
        OmegaConf.to_container(config.hydra.run, resolve=False)
        return config
    except HydraException as error:
        raise ConfigError(_explain(str(error), overrides)) from None
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None


def _explain(message: str, overrides: Sequence[str]) -> str:
    """Hydra's message in one line, with the nearest valid name."""
    if match := re.match(r"In '.*': Could not find '(.+)/(.+)'|Could not find '(.+)/(.+)'", message):
        group, option = (part for part in match.groups() if part)
        return f"{group}={option}: no such option.{suggest(option, groups().get(group, []))}"
    if match := re.match(r"Could not override '(.+?)'", message):
        key = match.group(1)
        given = next((o for o in overrides if o.lstrip("+~").partition("=")[0] == key), key)
        group = key.rpartition(".")[0]
        chosen = [o for o in overrides if o.partition("=")[0] in groups()]
        if group in groups():
            parameters = [k for k in known_keys(chosen) if k.startswith(f"{group}.")]
            takes = ", ".join(parameters) or "no parameters"
            return f"{given}: this {group} takes {takes}.{suggest(key, parameters, list_all=False)}"
        return f"{given}: no such key.{suggest(key, known_keys(chosen))}"
    return message.splitlines()[0]


def known_keys(choices: Sequence[str] = ()) -> list[str]:
    """Every key, dotted, of the configuration with the given group choices, and every group."""

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        found = []
        for name, value in node.items():
            found += [f"{prefix}{name}", *walk(value, f"{prefix}{name}.")]
        return found

    plain = _plain(compose("config", overrides=list(choices)))
    return [key for key in [*walk(plain, ""), *groups()] if not key.endswith("_target_")]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _plain(config: DictConfig) -> dict[str, Any]:
    """The job's configuration as plain containers, interpolations resolved, Hydra's own part left out."""
    try:
        plain = OmegaConf.to_container(config, resolve=False)
        own = {name: config[name] for name in cast(dict[str, Any], plain) if name != "hydra"}
        return {n: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for n, v in own.items()}
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None


def _check_folders(config: DictConfig, settings: Settings, multirun: bool) -> None:
    section = "sweep" if multirun else "run"
    check_writable(f"hydra.{section}.dir", Path(str(config.hydra[section].dir)))
    if settings.stage is Stage.GENERATE or settings.generate_missing:
        check_writable("data_dir", settings.data_dir)
    if settings.export_config is not None:
        check_writable("export_config", settings.export_config.parent)


def _short(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def task(config: DictConfig) -> None:
    """One job; Hydra has made its directory."""
    hydra_config = HydraConfig.get()
    settings = build(_plain(config), multirun=hydra_config.mode == RunMode.MULTIRUN)
    run = RunDirectory(Path(hydra_config.runtime.output_dir), settings.stage.value, settings.fingerprint)
    if run.is_complete():
        print(f"Already complete: {_short(run.path)}")
        return
    config_yaml = OmegaConf.to_yaml(OmegaConf.create(_plain(config)))
    try:
        with run.job(config_yaml):
            run_stage(settings, run, config_yaml)
    except CalibError as error:
        # SystemExit passes through Hydra, which would print a traceback for anything else.
        print(f"calib: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    print(f"Run directory: {_short(run.path)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``calib``; exits 0, 2 for a bad configuration, 1 for other errors, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(_run(given))
    except CalibError as error:
        print(f"calib: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("calib: interrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)


def _run(arguments: list[str]) -> int:
    stage, rest = split_arguments(arguments)
    if "--help" in rest or "-h" in rest:
        print(help_text(stage), end="")
        return 0
    OmegaConf.register_new_resolver("calib_job", job_name, replace=True)
    if stage is not None:
        rest = [f"stage={stage}", *rest]
    if any(flag in rest for flag in MULTIRUN_FLAGS):
        rest = [*rest, f"swept=[{','.join(swept_keys(rest))}]"]
    if not any(flag in rest for flag in SHOW_FLAGS):
        check(rest)
    GlobalHydra.instance().clear()
    sys.argv = ["calib", *rest]
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    return 0


if __name__ == "__main__":
    main()
