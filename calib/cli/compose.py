"""Compose Hydra's configuration, and check every job before Hydra makes a directory for it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from calib.base.device import cores
from calib.base.errors import CalibError, ConfigError, first_line, suggest
from calib.base.files import check_writable
from calib.cli.conf import CONF, groups
from calib.cli.launchers import is_joblib, missing_launcher, sensible_jobs, side_by_side
from calib.cli.names import job_name
from calib.cli.overrides import Arguments, in_short, jobs_of, parse, with_params
from calib.models.memory import device_memory, nbytes
from calib.stages.build import build
from calib.stages.settings import Settings
from calib.stages.stages import check_stage

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

#: How an override with configuration folders of the user's own begins.
SEARCH = "hydra.searchpath=["


@dataclass(frozen=True)
class Planned:
    """The checked input of Hydra.

    Attributes:
        multirun: whether every combination of listed values is a job with a folder of its own.
        folders: of a sweep's jobs, in their order; empty with any but Hydra's own sweeper, which decides by itself.
        side_by_side: number of jobs that run at once on this machine.
    """

    overrides: list[str]
    multirun: bool
    folders: list[Path]
    side_by_side: int = 1


def planned(arguments: Arguments) -> Planned:
    """Compose and check every job of a command line; raises a ConfigError for the first that is wrong."""
    folders = ",".join(f"'file://{Path(folder).absolute()}'" for folder in arguments.config_dirs)
    search = [f"{SEARCH}{folders}]"] if folders else []
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="calib"):
        parsed = parse(arguments.overrides)
        config = _compose([*search, *(o.input_line or "" for o in parsed if _of_launch(o))])
        multirun = arguments.multirun or config.hydra.mode == RunMode.MULTIRUN
        if not multirun:
            for override in parsed:
                if override.is_sweep_override():
                    raise ConfigError(f"{override.input_line}: several values; sweep over them with -m, or quote them")
            _check_job([*search, *arguments.overrides], False, arguments.shows)
            return Planned(arguments.overrides, False, [])
        return _planned_sweep(arguments, parsed, config, search)


def _of_launch(override: Override) -> bool:
    """Whether an override decides how jobs are made and run; one that is swept belongs to the jobs."""
    own = override.key_or_group.startswith("hydra") or override.key_or_group in ("experiment", "hparams_search")
    return own and not override.is_sweep_override()


def _planned_sweep(
    arguments: Arguments, parsed: Sequence[Override], config: DictConfig, search: Sequence[str]
) -> Planned:
    keys = [o.get_key_element() for o in parsed]
    overrides = parse(with_params([in_short(o) for o in parsed], keys, config))
    swept = [o.key_or_group for o in overrides if o.is_sweep_override()]
    if twice := [key for key in swept if swept.count(key) > 1]:
        raise ConfigError(f"{twice[0]}: two lists of values; name them all in one")
    given = [*(o.input_line or "" for o in overrides), f"swept=[{','.join(swept)}]"]
    if "calib_sweep" not in str(OmegaConf.to_container(config.hydra.sweep, resolve=False)):
        # A folder of the user's own choice may be named by the time, which differs in each composition.
        given = [o for o in given if not o.startswith("hydra.sweep.dir=")]
        given.append(f"hydra.sweep.dir='{_folder(config, 'sweep', 'dir')}'")
    jobs = jobs_of(parse(given), config)
    paths: list[Path] = []
    transformer = 0
    for number, job in enumerate(jobs):
        try:
            folder, settings = _check_job([*search, *job], True, arguments.shows, number)
        except ConfigError as error:
            which = job_name([o for o in job if not o.startswith("hydra")], swept)
            raise ConfigError(f"{error} (job {which}, of {len(jobs)}; none was started)") from None
        if folder in paths:
            raise ConfigError(_shared(folder, job, jobs[paths.index(folder)]))
        paths.append(folder)
        if settings.job.model.skeleton is not None:
            transformer = max(transformer, nbytes(settings.job.model.skeleton().module))
    launcher = dict(config.hydra.launcher)
    if is_joblib(launcher) and launcher["n_jobs"] == 0:
        raise ConfigError.bad_value("hydra.launcher.n_jobs", 0, "must be 1 or more, or -1 for one a processor")
    if is_joblib(launcher) and "hydra.launcher.n_jobs" not in [o.key_or_group for o in parsed]:
        launcher["n_jobs"] = sensible_jobs(len(jobs), cores(), device_memory(), transformer)
        given.append(f"hydra.launcher.n_jobs={launcher['n_jobs']}")
    if arguments.shows:  # of a sweep the first job: Hydra shows one
        return Planned(jobs[0], False, [])
    basic = str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")
    return Planned(given, True, paths if basic else [], side_by_side(launcher, len(jobs)))


def _shared(folder: Path, job: Sequence[str], earlier: Sequence[str]) -> str:
    """The error for two jobs of a sweep with one folder."""
    if job == earlier:
        return f"{' '.join(o for o in job if not o.startswith(('hydra', 'swept=')))}: this job twice; name it once"
    return f"hydra.sweep.subdir: gives two jobs the folder {folder.name}; leave it out"


def _check_job(overrides: list[str], multirun: bool, shows: bool, number: int = 0) -> tuple[Path, Settings]:
    """Check that a job can be run, as far as can be known; returns its folder and settings."""
    config = _compose(overrides)
    settings = build(plain(config), multirun)
    if not shows:
        _check_folders(config, settings, multirun)
        try:
            check_stage(settings)
        except CalibError as error:  # damaged files, for one: in a sweep they are the failure of one job, when it runs
            if not multirun or isinstance(error, ConfigError):
                raise
    if not multirun:
        return Path(_folder(config, "run", "dir")), settings
    with open_dict(config):
        config.hydra.job.num, config.hydra.job.id = number, str(number)  # as Hydra will
    return Path(_folder(config, "sweep", "dir"), _folder(config, "sweep", "subdir")), settings


def _folder(config: DictConfig, section: str, key: str) -> str:
    try:
        return str(config.hydra[section][key])
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.{section}.{key}: {first_line(error)}") from None


def _compose(overrides: list[str]) -> DictConfig:
    parse(overrides)
    try:
        config = compose("config", overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = f": {first_line(error.__cause__)}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        raise ConfigError(_explain(str(error), overrides, cause)) from None
    _check_sampler(config)
    return config


def _check_sampler(config: DictConfig) -> None:
    """Raise where the chosen sampler is no option; one of the model's name may be missing, so Hydra accepts any."""
    sources, choices = config.hydra.runtime.config_sources, config.hydra.runtime.choices
    folders = [Path(source.path, "sampler") for source in sources if source.schema == "file"]
    known = [file.stem for folder in folders for file in folder.glob("*.yaml")]
    packaged = any(source.schema == "pkg" and source.provider != "hydra" for source in sources)  # may have options, too
    if not packaged and (chosen := choices.get("sampler")) not in (*known, choices.get("model")):
        raise ConfigError(f"sampler={chosen}: no such option.{suggest(str(chosen), known)}")


def _explain(message: str, overrides: Sequence[str], cause: str = "") -> str:
    """Hydra's message in one line, with the nearest valid name or ``cause``, OmegaConf's message about a value."""
    search = [o for o in overrides if o.startswith(SEARCH)]
    own = [Path(folder.strip("'").removeprefix("file://")) for o in search for folder in o[len(SEARCH) : -1].split(",")]
    known = groups(own)
    if match := re.match(r"(?:In '.*': )?Could not find '(.+)/(.+)'", message):
        group, option = match.groups()
        if group == "hydra/launcher":
            return f"{group}={option}: no such launcher.{missing_launcher(option)}"
        return f"{group}={option}: no such option.{suggest(option, known.get(group, []))}"
    if match := re.match(r"Could not override '(.+?)'", message):
        key = match.group(1)
        given = next((o for o in overrides if o.lstrip("+~").partition("=")[0] == key), key)
        group = key.rpartition(".")[0]
        chosen = [*search, *(o for o in overrides if o.partition("=")[0] in known)]
        if group in known:
            parameters = [k for k in known_keys(chosen) if k.startswith(f"{group}.")]
            takes = ", ".join(parameters) or "no parameters"
            others = [option for option in known[group] if key in known_keys([*chosen, f"{group}={option}"])]
            named = " or ".join(f"{group}={option}" for option in others)
            hint = f" {named} takes it." if others else suggest(key, parameters, list_all=False)
            return f"{given}: the chosen {group} takes {takes}.{hint}"
        return f"{given}: no such key.{suggest(key, known_keys(chosen))}"
    if match := re.match(r"Error merging override (\S+)", message):
        return f"{match.group(1)}: not possible{cause}"
    return f"{' '.join(overrides)}: {message.strip().splitlines()[0] if message.strip() else 'not possible'}"


def known_keys(choices: Sequence[str] = ()) -> list[str]:
    """Every dotted key of the configuration with the given group choices, and every group."""

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        found = []
        for name, value in node.items():
            found += [f"{prefix}{name}", *walk(value, f"{prefix}{name}.")]
        return found

    values = plain(compose("config", overrides=list(choices)))
    return [key for key in [*walk(values, ""), *groups()] if not key.endswith("_target_")]


def plain(config: DictConfig) -> dict[str, Any]:
    """The job's configuration as plain containers, interpolations resolved, without Hydra's own part."""
    names = [name for name in cast(Mapping[str, Any], OmegaConf.to_container(config)) if name != "hydra"]
    values = {}
    for name in names:
        try:
            value = config[name]
            values[name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}: {first_line(error)}") from None
    return values


def _check_folders(config: DictConfig, settings: Settings, multirun: bool) -> None:
    section = "sweep" if multirun else "run"
    check_writable(f"hydra.{section}.dir", Path(_folder(config, section, "dir")))
    if settings.analyze.export_config is not None:
        if settings.analyze.export_config.is_dir():
            raise ConfigError.bad_value("export_config", settings.analyze.export_config, "is a folder; name a file")
        check_writable("export_config", settings.analyze.export_config.parent)
