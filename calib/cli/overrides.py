"""Take a command line apart into Hydra's flags, overrides, and the jobs that lists of values stand for."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from calib.base.errors import ConfigError, first_line, suggest

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

#: Hydra's flags that show something and run no job.
SHOW_FLAGS = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc"}
CONFIG_DIR_FLAGS = ("--config-dir", "-cd")

_INTERPOLATION = r"\$\{[^}]*\}"
#: In a value: a text in quotes, or plain text up to what has a meaning in Hydra's grammar.
_TOKEN = re.compile(
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
    rf"""|(?:{_INTERPOLATION}|[^ \t,()\[\]{{}}:='"\\])(?:{_INTERPOLATION}|[^,()\[\]{{}}:='"\\])*"""
)
#: What plain text may not hold, by that grammar, besides interpolations.
_UNKNOWN = re.compile(r"[^\w/\-+.$%*@?| \t]", re.ASCII)


@dataclass(frozen=True)
class Arguments:
    """The parts of a command line: Hydra's flags, each followed by its value, overrides, folders of configuration."""

    flags: list[str]
    overrides: list[str]
    config_dirs: list[str]

    @property
    def multirun(self) -> bool:
        """Whether every combination of listed values is to be run."""
        return bool({"-m", "--multirun"} & set(self.flags))

    @property
    def shows(self) -> bool:
        """Whether something is only shown and no job run."""
        return bool(SHOW_FLAGS & set(self.flags))


def take_apart(arguments: Sequence[str]) -> Arguments:
    """Split a command line; flags may stand anywhere, as ``--flag value`` or ``--flag=value``; unknown ones raise."""
    takes_value = {o: a.nargs != 0 for a in get_args_parser()._actions for o in a.option_strings}
    found = Arguments([], [], [])
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            found.overrides.append(with_quotes(argument))
            continue
        if name not in takes_value:
            raise ConfigError(f"{argument}: no such flag.{suggest(name, takes_value, list_all=False)} See calib --help")
        found.flags.append(name)
        if takes_value[name]:
            if not equals and not rest:
                raise ConfigError(f"{name}: needs a value. See calib --help")
            found.flags.append(value if equals else rest.pop(0))
        if name in CONFIG_DIR_FLAGS:
            found.config_dirs.append(found.flags[-1])
    return found


def with_quotes(override: str) -> str:
    """``override`` with quotes around plain text that Hydra's grammar does not know: ``data_dir=~/Käse`` needs them.

    A leading ``~`` becomes the home folder, as in most shells: Hydra would make a folder of that name.
    """

    def quoted(token: re.Match[str]) -> str:
        text = token[0].rstrip(" \t")
        plain = token[1] or not _UNKNOWN.search(re.sub(_INTERPOLATION, "", text))
        return token[0] if plain else f"'{os.path.expanduser(text)}'{token[0][len(text) :]}"

    key, equals, value = override.partition("=")
    found = _TOKEN.sub(quoted, value)
    return override if found == value else key + equals + found.rstrip(" \t")


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar, where Hydra is initialized with the groups' options for glob(…)."""
    loader = GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else None
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create(loader).parse_overrides([override])
        except HydraException as error:
            raise ConfigError(f"{override}: not a valid override ({first_line(error)})") from None
    return parsed


def in_short(override: Override) -> str:
    """An override as Hydra passes it to a job, so that a name made from it is the job's own."""
    if override.is_delete() or override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def with_params(overrides: Sequence[str], keys: Sequence[str], config: DictConfig) -> list[str]:
    """``overrides`` of ``keys``, and what ``hparams_search`` sweeps in addition; the command line takes precedence."""
    params = config.hydra.sweeper.get("params") or {}
    return [*overrides, *(f"{key}={value}" for key, value in params.items() if key not in keys)]


def jobs_of(overrides: Sequence[Override], config: DictConfig) -> list[list[str]]:
    """The jobs that Hydra's own sweeper will run; for another sweeper one job, of the fixed overrides."""
    if not str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        return [[o.input_line or "" for o in overrides if not o.is_sweep_override()]]
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            allowed = "is a range without steps; name values, or use range(…), or another hydra/sweeper"
            raise ConfigError(f"{override.input_line}: {allowed}")
    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    return jobs
