"""What a sweep has once for all of its jobs, and Hydra therefore ignores in the configuration of a job."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.base.errors import ConfigError, first_line
from calib.base.values import at_least
from calib.cli.explain import option_file
from calib.cli.overrides import is_basic

from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

#: Parts of Hydra's configuration that are the sweep's. Its mode is too, which -m sets for all.
PARTS = ("launcher", "sweeper", "callbacks", "hydra_logging", "sweep.dir")


def check_parts(config: DictConfig) -> None:
    """Raise where a sweep could not be started: without a launcher or a sweeper, or with one that is not installed."""
    for part in ("launcher", "sweeper"):
        option = config.hydra.runtime.choices.get(f"hydra/{part}")
        target = None if OmegaConf.is_missing(config.hydra, part) else config.hydra[part].get("_target_")
        if target not in Plugins.instance().class_name_to_class:
            allowed = f"{target} is no {part} that is installed; leave it out, or name another"
            raise ConfigError.bad_value(f"hydra/{part}", option, allowed)
    batch = config.hydra.sweeper.get("max_batch_size")
    if is_basic(config) and batch is not None:
        at_least("hydra.sweeper.max_batch_size", batch, 1)


def check_same(
    whole: DictConfig,
    job: DictConfig,
    overrides: Sequence[str],
    swept: Sequence[str],
    composed: Callable[[Sequence[str]], DictConfig],
) -> None:
    """Raise where the ``job`` of ``overrides`` sets what is the sweep's, by an option that varies from job to job.

    Args:
        whole: what all jobs have in common; Hydra takes the sweep's from there.
        swept: keys that vary.
        composed: composes overrides.
    """
    different = [part for part in PARTS if _raw(whole, part) != _raw(job, part)]
    if not different:
        return
    part = different[0]
    fixed = [o for o in overrides if _key(o) not in swept]
    varying = [o for o in overrides if _key(o) in swept]
    alone = varying[0]
    for override in varying if len(varying) > 1 else ():
        try:
            if _raw(composed([*fixed, override]), part) == _raw(job, part):
                alone = override
                break
        except ConfigError:  # with another of them it can be composed
            continue
    what, value = _named(part, whole, job)
    setting = what if value is None else f"{what}={value}"
    instead = "" if value is None else f"give {setting} for all on the command line instead, or "
    raise ConfigError(
        f"{option_file(alone, overrides)}: sets {setting}, which is one for the whole sweep and cannot vary with "
        f"{_key(alone)}; {instead}run {alone} by itself"
    )


def folder_of(job: DictConfig, swept: Sequence[str], sweep: Path | None) -> tuple[Path, Path]:
    """The folders of the sweep and of one ``job``; raises where it is not in ``sweep``, that of the jobs before."""
    own = Path(text_of(job, "hydra.sweep.dir"))
    if sweep is not None and own != sweep:
        raw = _raw(job, "sweep.dir")
        raise ConfigError(
            f"hydra.sweep.dir={raw}: is one folder for the whole sweep and cannot depend on {' or '.join(swept)}; "
            "hydra.sweep.subdir names the folders of the jobs"
        )
    name = Path(text_of(job, "hydra.sweep.subdir"))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise ConfigError.bad_value("hydra.sweep.subdir", name, "must be a folder within the sweep's; leave it out")
    return own, own / name


def text_of(config: DictConfig, key: str) -> str:
    """The value of a folder's ``key``, which must not be empty."""
    try:
        value = str(OmegaConf.select(config, key, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {first_line(error)}") from None
    if not value.strip():
        raise ConfigError(f"{key}: is empty; name a folder, or leave it out")
    return value


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _raw(config: DictConfig, part: str) -> Any:
    """A part of Hydra's configuration as it was written, interpolations unresolved."""
    group, _, key = part.partition(".")
    if OmegaConf.is_missing(config.hydra, group):
        return None
    node: Any = OmegaConf.to_container(config.hydra[group], resolve=False)
    return node[key] if key else node


def _named(part: str, whole: DictConfig, job: DictConfig) -> tuple[str, Any]:
    """The key within ``part`` that differs, and its value in the job: the option, if that is another."""
    option = job.hydra.runtime.choices.get(f"hydra/{part}")
    if option != whole.hydra.runtime.choices.get(f"hydra/{part}"):
        return f"hydra/{part}", option
    key, here, there = f"hydra.{part}", _raw(job, part), _raw(whole, part)
    while isinstance(here, Mapping) and isinstance(there, Mapping):
        name = next(n for n in [*here, *there] if here.get(n, _LACKS) != there.get(n, _LACKS))
        key, here, there = f"{key}.{name}", here.get(name), there.get(name)
    return key, None if isinstance(here, Mapping | list) else here


_LACKS = object()
