"""Take a command line apart into Hydra's flags, overrides, and the jobs that lists of values stand for."""

import os
import re
from argparse import Action
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.base.errors import ConfigError, first_line, suggest
from calib.cli.commands import misplaced

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig

#: Hydra's flags that show something and run no job.
SHOW_FLAGS = ("--cfg", "--info", "--hydra-help")
CONFIG_DIR, SEARCH_PATH, FILE = "--config-dir", "hydra.searchpath", "file://"
#: Hydra's flags that are refused, and what there is in their place.
INSTEAD = {
    "--config-name": "calib has one primary configuration; put what differs into DIR/experiment/NAME.yaml, below a "
    "first line '# @package _global_', for calib --config-dir DIR experiment=NAME",
    "--config-path": "calib's own configuration stays where it is; --config-dir DIR adds a folder of yours",
    "--experimental-rerun": "reads a pickle, which can run anything; the command of a run, given again, runs it again",
    "--shell-completion": "is not offered; calib --help has all groups, calib --cfg job all keys",
}

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
    """The parts of a command line.

    Attributes:
        flags: Hydra's flags by their long names, each followed by its value, without ``--config-dir``.
        config_dirs: folders of configuration of the user's own.
    """

    flags: list[str]
    overrides: list[str]
    config_dirs: list[str]

    @property
    def multirun(self) -> bool:
        """Whether every combination of listed values is to be run."""
        return "--multirun" in self.flags

    @property
    def shows(self) -> bool:
        """Whether something is only shown and no job run."""
        return bool(set(SHOW_FLAGS) & set(self.flags))

    @property
    def package(self) -> str | None:
        """The part of the configuration to show; None for all of it."""
        return self.flags[self.flags.index("--package") + 1] if "--package" in self.flags else None


def take_apart(arguments: Sequence[str]) -> Arguments:
    """Split a command line; flags may stand anywhere, as ``--flag value`` or ``--flag=value``.

    Raises:
        ConfigError: a flag is unknown, has no or a wrong value or contradicts another, or a word is no override.
    """
    actions = {option: action for action in get_args_parser()._actions for option in action.option_strings}
    found = Arguments([], [], [])
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            if "=" not in argument and not argument.startswith("~"):
                raise misplaced(argument, [other for other in arguments if other != argument])
            found.overrides.append(with_quotes(argument))
            continue
        name, equals, value = argument.partition("=")
        if name not in actions:
            raise ConfigError(f"{argument}: no such flag.{suggest(name, actions, list_all=False)} See calib --help")
        flag = actions[name].option_strings[0]
        if flag in INSTEAD:
            shown = [argument, *(rest[:1] if actions[name].nargs != 0 and not equals else [])]
            raise ConfigError(f"{' '.join(shown)}: {INSTEAD[flag]}")
        if actions[name].nargs == 0:
            if equals:
                raise ConfigError(f"{argument}: {name} takes no value")
            found.flags.append(flag)
            continue
        value = value if equals else _value_of(actions[name], rest)
        _check_value(name, value, actions[name].choices)
        if flag == CONFIG_DIR:
            found.config_dirs.append(value)
        else:
            found.flags.extend([flag, value])
    _check_together(found.flags)
    return found


def _value_of(action: Action, rest: list[str]) -> str:
    """Take the value of a flag from what follows it; '' where there is none."""
    if action.nargs == "?" and (not rest or "=" in rest[0] or rest[0].startswith(("-", "~"))):
        return str(action.const)
    return rest.pop(0) if rest else ""


def _check_value(name: str, value: str, choices: Iterable[str] | None) -> None:
    known = list(choices or ())
    if not value:
        one_of = f", {', '.join(known)}" if known else ""
        raise ConfigError(f"{name}: needs a value{one_of}. See calib --help")
    if known and value not in known:
        hint = suggest(value, known, list_all=False)
        raise ConfigError(f"{name} {value}: must be one of {', '.join(known)}.{hint}")


def _check_together(flags: Sequence[str]) -> None:
    """Raise for flags that Hydra does not take together; of a sweep the first job is shown."""
    for pair in (("--run", "--multirun"), ("--run", "--cfg"), ("--run", "--info"), ("--cfg", "--info")):
        if set(pair) <= set(flags):
            raise ConfigError(f"{' and '.join(pair)}: one of them at a time")
    if "--cfg" not in flags and (useless := [flag for flag in ("--package", "--resolve") if flag in flags]):
        raise ConfigError(f"{useless[0]}: is for what --cfg job, hydra or all shows")


def with_search_path(folders: Sequence[str], overrides: Sequence[Override]) -> tuple[list[str], list[Override]]:
    """The override that makes Hydra search ``folders``, if there are any, and ``overrides`` without those of that key.

    Raises:
        ConfigError: a folder is not there.
    """
    others = [o for o in overrides if o.key_or_group != SEARCH_PATH]
    given = [(f"{CONFIG_DIR}={folder}", folder) for folder in folders]
    for override in overrides:
        if override.key_or_group == SEARCH_PATH:
            places = override.value()
            if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
                raise ConfigError(f"{override.input_line}: must be a list of folders, {SEARCH_PATH}=[…]")
            given += [(f"{SEARCH_PATH}={place}", str(place)) for place in places]
    found = []
    for named, place in given:
        path = place.removeprefix(FILE)
        if "://" not in path:
            if not Path(path).is_dir():
                what = "is a file, not a folder" if Path(path).exists() else "no such folder"
                raise ConfigError(f"{named}: {what}; name one that holds groups of your own, e.g. experiment/")
            place = f"{FILE}{Path(path).absolute()}"
        found.append(quoted(place))
    return [f"{SEARCH_PATH}=[{','.join(found)}]"] if found else [], others


def quoted(text: object) -> str:
    """``text`` as a value in Hydra's grammar, whatever characters it has."""
    return QuotedString(str(text), Quote.single).with_quotes()


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
            reason = first_line(error).partition(" expecting ")[0]
            raise ConfigError(f"{override}: not a valid override ({reason})") from None
        if not parsed[-1].key_or_group:
            raise ConfigError(f"{override}: not a valid override (it has no key)")
    return parsed


def in_short(override: Override) -> str:
    """An override as Hydra passes it to a job, so that a name made from it is the job's own."""
    if override.is_delete() or override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def as_list(override: Override) -> str:
    """The override as a list of one value.

    Hydra leaves lists out when it composes what the jobs of a sweep have in common, where an option that has this key
    may not be chosen yet.
    """
    if override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}=choice({override.get_value_element_as_str() or quoted('')})"


def with_params(overrides: Sequence[str], keys: Sequence[str], config: DictConfig) -> list[str]:
    """``overrides`` of ``keys``, and what ``hparams_search`` sweeps in addition; the command line takes precedence."""
    params = config.hydra.sweeper.get("params") or {}
    return [*overrides, *(f"{key}={value}" for key, value in params.items() if key not in keys)]


def jobs_of(overrides: Sequence[Override], config: DictConfig) -> list[list[str]]:
    """The jobs that Hydra's own sweeper will run; for another sweeper one job, of the fixed overrides."""
    if not is_basic(config):
        return [[o.input_line or "" for o in overrides if not o.is_sweep_override()]]
    for override in overrides:
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                allowed = "is a range without steps; name values, or use range(…), or another hydra/sweeper"
                raise ConfigError(f"{override.input_line}: {allowed}")
            try:
                some = next(override.sweep_string_iterator(), None)
            except ValueError as error:  # of range(…), whose step is 0
                raise ConfigError(f"{override.input_line}: gives no values ({first_line(error)})") from None
            if some is None:
                raise ConfigError(f"{override.input_line}: gives no values, and so no job")
    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    return jobs


def is_basic(config: DictConfig) -> bool:
    """Whether Hydra's own sweeper runs the jobs, which are known beforehand then."""
    return str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")
