"""Compose Hydra's configuration, and check every job before Hydra makes a directory for it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from calib.base.device import cores
from calib.base.errors import CalibError, ConfigError, first_line, suggest
from calib.base.files import check_writable
from calib.cli.blocked import check_targets
from calib.cli.conf import CONF
from calib.cli.explain import FUNCTIONS, OPTIONAL, explain, known_keys, lacks_header, not_removed, several
from calib.cli.launchers import is_joblib, sensible_jobs, side_by_side
from calib.cli.names import job_name
from calib.cli.one_sweep import check_parts, check_same, folder_of, text_of
from calib.cli.overrides import (
    Arguments,
    as_list,
    in_short,
    is_basic,
    jobs_of,
    parse,
    quoted,
    with_params,
    with_search_path,
)
from calib.models.memory import device_memory, nbytes
from calib.stages.build import build
from calib.stages.settings import Settings
from calib.stages.stages import check_stage

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


@dataclass(frozen=True)
class Planned:
    """The checked input of Hydra.

    Attributes:
        multirun: whether every combination of listed values is a job with a folder of its own.
        folders: of a sweep's jobs, in their order; empty with any but Hydra's own sweeper, which decides by itself.
        sweep: the folder of the sweep.
        side_by_side: number of jobs that run at once on this machine.
    """

    overrides: list[str]
    multirun: bool
    folders: list[Path]
    sweep: Path = Path()
    side_by_side: int = 1


@dataclass(frozen=True)
class _Given:
    """The command line, parsed.

    Attributes:
        search: the override with folders of the user's own, if there are any.
        whole: composed of all overrides but lists of values, where ``complete``; else without values of options, as
            only options that are swept over have them.
    """

    arguments: Arguments
    search: list[str]
    overrides: list[Override]
    whole: DictConfig
    complete: bool = True


def planned(arguments: Arguments) -> Planned:
    """Compose and check every job of a command line; raises a ConfigError for the first that is wrong."""
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="calib"):
        search, overrides = with_search_path(arguments.config_dirs, parse(arguments.overrides))
        _check_overrides(overrides)
        given = _composed(arguments, search, overrides)
        if given.arguments.multirun or given.whole.hydra.mode == RunMode.MULTIRUN:
            return _planned_sweep(given)
        for override in overrides:
            if override.is_sweep_override():
                raise ConfigError(f"{override.input_line}: several values; sweep over them with -m, or quote them")
        if not arguments.shows:  # what is only shown runs nothing
            _check_job(given.whole, False)
        _check_package(arguments.package, given.whole)
        return Planned([*search, *_lines(overrides)], False, [])


def _lines(overrides: Sequence[Override]) -> list[str]:
    return [o.input_line or "" for o in overrides]


def _check_overrides(overrides: Sequence[Override]) -> None:
    """Raise for what Hydra's grammar has and calib does not take."""
    for override in overrides:
        if override.is_delete() and not _may_be_removed(override.key_or_group):
            raise ConfigError(not_removed(override))
        if (line := several(override)) is not None:
            raise ConfigError(line)
        if override.is_hydra_override() and override.is_sweep_override():
            allowed = "is one for the whole sweep and cannot be listed; name one value"
            raise ConfigError(f"{override.input_line}: {allowed}")


def _may_be_removed(key: str) -> bool:
    """Whether the configuration may be without a key: optional groups, and parameters that a function has by itself."""
    return key in OPTIONAL or (key.partition(".")[0] in FUNCTIONS and "." in key)


def _composed(arguments: Arguments, search: list[str], overrides: list[Override]) -> _Given:
    """Compose what all jobs have in common, as Hydra does before it makes the jobs of a sweep."""
    fixed = [o for o in overrides if not o.is_sweep_override()]
    try:
        return _Given(arguments, search, overrides, _compose([*search, *_lines(fixed)]))
    except ConfigError as error:
        try:
            config = _compose([*search, *(_lines([o for o in fixed if not _is_value_of_option(o)]))])
        except ConfigError:
            raise error from None
        if not (arguments.multirun or config.hydra.mode == RunMode.MULTIRUN):
            raise
        return _Given(arguments, search, overrides, config, complete=False)


def _is_value_of_option(override: Override) -> bool:
    return "." in override.key_or_group and not override.is_hydra_override()


def _planned_sweep(given: _Given) -> Planned:
    config, arguments, parsed = given.whole, given.arguments, given.overrides
    check_parts(config)
    keys = [o.get_key_element() for o in parsed]
    overrides = parse(with_params([in_short(o) for o in parsed], keys, config))
    _check_overrides(overrides)
    swept = _swept(overrides)
    if not given.complete:
        overrides = parse([as_list(o) if _is_value_of_option(o) else o.input_line or "" for o in overrides])
    lines = [*_lines(overrides), f"swept=[{','.join(swept)}]"]
    jobs = jobs_of(parse(lines), config)
    if arguments.shows:  # of a sweep the first job: Hydra shows one
        _compose([*given.search, *jobs[0]])
        _check_package(arguments.package, config)
        return Planned([*given.search, *jobs[0]], False, [])
    checked = _check_jobs(given, jobs, swept)
    launcher = dict(config.hydra.launcher)
    if is_joblib(launcher) and launcher["n_jobs"] == 0:
        raise ConfigError.bad_value("hydra.launcher.n_jobs", 0, "must be 1 or more, or -1 for one a processor")
    lines = [o for o in lines if not o.startswith(("hydra.sweep.dir=", "hydra.mode="))]
    # Hydra composes it from lists of values, not from those of a job, and at another time.
    lines += [f"hydra.sweep.dir={quoted(checked.sweep)}", "hydra.mode=MULTIRUN"]
    if is_joblib(launcher) and "hydra.launcher.n_jobs" not in keys:
        launcher["n_jobs"] = sensible_jobs(len(jobs), cores(), device_memory(), checked.transformer)
        lines.append(f"hydra.launcher.n_jobs={launcher['n_jobs']}")
    folders = checked.folders if is_basic(config) else []
    return Planned([*given.search, *lines], True, folders, checked.sweep, side_by_side(launcher, len(jobs)))


@dataclass(frozen=True)
class _Checked:
    """The checked jobs of a sweep: its folder, theirs, and the bytes of the largest transformer."""

    sweep: Path
    folders: list[Path]
    transformer: int


def _check_jobs(given: _Given, jobs: Sequence[list[str]], swept: Sequence[str]) -> _Checked:
    """Check every job of a sweep over the keys ``swept``, each a list of overrides."""
    folders: list[Path] = []
    sweep, transformer, first = Path(), 0, None
    for number, job in enumerate(jobs):
        try:
            config = _compose([*given.search, *job])
            if first is not None:
                OmegaConf.copy_cache(first, config)  # a folder that is named by the time has one name in all jobs
            with open_dict(config):
                config.hydra.job.num, config.hydra.job.id = number, str(number)  # as Hydra will
            check_same(given.whole, config, [*given.search, *job], swept, _compose)
            sweep, folder = folder_of(config, swept, None if first is None else sweep)
            settings = _check_job(config, True)
        except ConfigError as error:
            which = job_name([o for o in job if not o.startswith("hydra")], swept)
            raise ConfigError(f"{error} (job {which}, of {len(jobs)}; none was started)") from None
        if folder in folders:
            raise ConfigError(_shared(folder, job, jobs[folders.index(folder)]))
        folders.append(folder)
        if first is None:
            first = config
        if settings.job.model.skeleton is not None:
            transformer = max(transformer, nbytes(settings.job.model.skeleton().module))
    return _Checked(sweep, folders, transformer)


def _swept(overrides: Sequence[Override]) -> list[str]:
    """The keys that vary; raises where one has several lists of values, or another value after its list."""
    swept = [o.key_or_group for o in overrides if o.is_sweep_override()]
    if twice := [key for key in swept if swept.count(key) > 1]:
        raise ConfigError(f"{twice[0]}: two lists of values; name them all in one")
    last = {o.get_key_element(): o for o in overrides}
    for override in last.values():
        if override.key_or_group in swept and not override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: undoes the list of values before it; leave one of them out")
    return swept


def _shared(folder: Path, job: Sequence[str], earlier: Sequence[str]) -> str:
    """The error for two jobs of a sweep with one folder."""
    if job == earlier:
        return f"{' '.join(o for o in job if not o.startswith(('hydra', 'swept=')))}: this job twice; name it once"
    return f"hydra.sweep.subdir: gives two jobs the folder {folder.name}; leave it out"


def _check_job(config: DictConfig, multirun: bool) -> Settings:
    """Check that a job can be run, as far as can be known; returns its settings."""
    if not isinstance(config.hydra.verbose, bool | str) and not OmegaConf.is_list(config.hydra.verbose):
        raise ConfigError.bad_value("hydra.verbose", config.hydra.verbose, "must be true, false or names of loggers")
    if config.hydra.job.chdir:
        raise ConfigError("hydra.job.chdir=true: paths are relative to where calib is started; leave it out")
    values = plain(config)
    check_targets(values)
    settings = build(values, multirun)
    _check_folders(config, settings, multirun)
    try:
        check_stage(settings)
    except CalibError as error:  # damaged files, for one: in a sweep they are the failure of one job, when it runs
        if not multirun or isinstance(error, ConfigError):
            raise
    return settings


def _check_package(package: str | None, config: DictConfig) -> None:
    """Raise where there is no such part of the configuration to show; Hydra says so, too, with another status."""
    if package not in (None, "_global_") and OmegaConf.select(config, str(package)) is None:
        keys = [*known_keys(), *known_keys(hydra=True)]
        hint = suggest(str(package), keys, list_all=False)
        raise ConfigError(f"--package {package}: there is no such part of the configuration, or it is null.{hint}")


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "provider=.* is not available")  # of a package in hydra.searchpath
            config = compose("config", overrides=list(overrides), return_hydra_config=True)
    except Exception as error:  # Hydra passes on whatever its parts raise
        raise ConfigError(explain(error, overrides)) from None
    for group in OPTIONAL:
        if group in config:
            raise ConfigError(lacks_header(group, config, overrides))
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
    key = f"hydra.{'sweep' if multirun else 'run'}.dir"
    check_writable(key, Path(text_of(config, key)))
    if settings.analyze.export_config is not None:
        if settings.analyze.export_config.is_dir():
            raise ConfigError.bad_value("export_config", settings.analyze.export_config, "is a folder; name a file")
        check_writable("export_config", settings.analyze.export_config.parent)
