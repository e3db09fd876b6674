"""Taking a command line apart: Hydra's flags, overrides, and the jobs that lists of values make."""

from collections.abc import Sequence
from dataclasses import dataclass

from calib.base.errors import ConfigError, suggest

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


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart: Hydra's flags, each with its value, and the overrides."""

    flags: list[str]
    overrides: list[str]
    config_dirs: list[str]

    @property
    def multirun(self) -> bool:
        """Whether every combination of listed values is to run."""
        return bool({"-m", "--multirun"} & set(self.flags))

    @property
    def shows(self) -> bool:
        """Whether something is only to be shown, and no job run."""
        return bool(SHOW_FLAGS & set(self.flags))


def take_apart(arguments: Sequence[str]) -> Arguments:
    """Flags may stand anywhere, as ``--flag value`` or ``--flag=value``; an unknown one is an error."""
    takes_value = {o: a.nargs != 0 for a in get_args_parser()._actions for o in a.option_strings}
    found = Arguments([], [], [])
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            found.overrides.append(argument)
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


def parse(overrides: Sequence[str]) -> list[Override]:
    """Overrides by Hydra's grammar; within a context that knows the groups, as glob(…) asks for their options."""
    loader = GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else None
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create(loader).parse_overrides([override])
        except HydraException as error:
            raise ConfigError(f"{override}: not a valid override ({first_line(error)})") from None
    return parsed


def first_line(error: BaseException) -> str:
    """An error's message up to its first line break, or its class."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def in_short(override: Override) -> str:
    """An override as Hydra passes it to a job, so that a name made before is that of the job."""
    if override.is_delete() or override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def with_params(overrides: Sequence[str], keys: Sequence[str], config: DictConfig) -> list[str]:
    """``overrides``, of ``keys``, and what ``hparams_search`` sweeps besides; the command line has the last word."""
    params = config.hydra.sweeper.get("params") or {}
    return [*overrides, *(f"{key}={value}" for key, value in params.items() if key not in keys)]


def jobs_of(overrides: Sequence[Override], config: DictConfig) -> list[list[str]]:
    """The jobs that Hydra's own sweeper will run; of another sweeper only it knows: one job, of what is fixed."""
    if not str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        return [[o.input_line or "" for o in overrides if not o.is_sweep_override()]]
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            allowed = "is a range without steps; name values, or use range(…), or another hydra/sweeper"
            raise ConfigError(f"{override.input_line}: {allowed}")
    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    return jobs
