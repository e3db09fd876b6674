"""One line for a configuration that Hydra cannot compose: the file or the key, and what is possible."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from calib.base.errors import first_line, in_a_line, suggest
from calib.cli.conf import CONF, groups
from calib.cli.launchers import missing_launcher
from calib.cli.overrides import FILE, SEARCH_PATH, parse

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

#: Overrides that calib adds, or that only say where to look.
_OWN = (f"{SEARCH_PATH}=", "swept=")
#: Groups of which no option need be chosen.
OPTIONAL = ("experiment", "hparams_search")
#: Groups whose options name a function; what is not given has the function's own default.
FUNCTIONS = ("model", "prompts", "timestep_schedule", "subset", "analysis", "ranges", "quantizer")
#: The line that makes an option set keys of the whole configuration.
GLOBAL = "# @package _global_"


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """The line for ``error``, which Hydra raised while it composed ``overrides``."""
    shown = " ".join(o for o in overrides if not o.startswith(_OWN)) or "the configuration"
    own = list(_own_files(overrides))
    files = ", ".join(map(_short, own)) or shown
    match error:
        case yaml.MarkedYAMLError(problem_mark=mark) if mark is not None:
            return f"{_short(Path(mark.name))}: line {mark.line + 1}: not valid YAML ({error.problem})"
        case yaml.reader.ReaderError():
            return f"{_short(Path(error.name))}: not valid YAML ({error.reason}, position {error.position})"
        case UnicodeDecodeError():
            bad = next((file for folder in _folders(overrides) for file in _not_utf8(folder)), None)
            return f"{_short(bad) if bad else files}: not UTF-8; save it as UTF-8"
        case RecursionError():
            return f"{files}: its defaults lead back to itself; an option cannot choose another of its own group"
        case UserWarning():
            return f"{SEARCH_PATH}: {first_line(error).removeprefix('provider=').partition(', path=')[2]}"
        case HydraException() | OmegaConfBaseException() | ValueError():
            cause = f": {first_line(error.__cause__)}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
            return _of_hydra(str(error).strip(), overrides, files, cause)
    return f"{shown}: not possible ({in_a_line(error)})"


def _of_hydra(message: str, overrides: Sequence[str], files: str, cause: str) -> str:
    """Hydra's ``message`` in one line.

    Args:
        files: what to name where the message names nothing.
        cause: OmegaConf's message about a value.
    """
    where = ""
    if match := re.match(r"In '?([^:'\n]+)'?: ", message):
        message = message[match.end() :]
        file = _file_of(match[1], overrides)
        where = f"{_short(file)}: " if file is not None and CONF not in file.parents else ""
    lines = message.splitlines() or [cause.removeprefix(": ") or "not possible"]
    if match := re.match(r"Could not (?:find|load) '(.+)'", message):
        asked = match[1] in [name for o in overrides for name in _chosen(o)]
        return f"{'' if asked or '=' in files else f'{files}: '}{_no_option(match[1], overrides)}"
    if match := re.match(r"Could not override '(.+?)'\.(?: No match in the defaults list)?", message):
        if where:
            return f"{where}override of {match[1]}: {_no_group(match[1])}"
        return _no_key(match[1], overrides)
    if match := re.match(r"Error merging override (\S+)", message):
        return f"{match[1]}: not possible{cause}"
    if re.match(r"\S+ raised while composing config:", message) and len(lines) > 1:
        return f"{where or f'{files}: '}{lines[1]}"
    if match := re.match(r"Could not append to config\. An item is already at '(.+)'", message):
        return f"+{match[1]}: there is such a key; leave out the +"
    if match := re.match(r"force-add of config groups is not supported: '\+\+(.+)'", message):
        return f"++{match[1]}: is an option of a group; leave out the ++"
    if match := re.match(r"Multiple values for (\S+)\.", message):
        added = next((o for o in overrides if o.startswith(f"+{match[1]}=")), None)
        if added:
            return f"{added}: one option of a group; leave out the +"
        return f"{files}: chooses a second option of {match[1]}; write 'override /{match[1]}: …' in its defaults"
    if message.startswith("Config group override must be"):
        return _no_name(parse(overrides), lines[0])
    return f"{where or f'{files}: '}{lines[0]}"


def _chosen(override: str) -> list[str]:
    """What an override chooses, should it be one of a group: the group and the option, with a slash, or several."""
    key, _, value = override.lstrip("+").partition("=")
    return [f"{key}/{name.strip()}" for name in value.strip("[]").split(",")]


def several(override: Override) -> str | None:
    """The line for an override that gives several options to a group of one; None where it does not."""
    key, value = override.key_or_group, override.value()
    listed = [one for one in (value.list if isinstance(value, ChoiceSweep) else [value]) if isinstance(one, list)]
    if not listed or key in OPTIONAL or not options(key):
        return None
    names = ",".join(map(str, listed[0]))
    instead = "name one" if override.is_hydra_override() else f"to sweep over them: -m {key}={names}"
    return f"{override.input_line}: one option of this group is needed; {instead}"


def _no_option(path: str, overrides: Sequence[str]) -> str:
    """The line for a group's option that is not there; ``path`` is both, with slashes."""
    chosen = [o.partition("=") for o in overrides]
    group, option = next(((g, o) for g, _, o in chosen if f"{g}/{o}" == path), path.rpartition("/")[::2])
    group = group.lstrip("+")
    if group == "hydra/launcher":
        return f"{group}={option}: no such launcher.{missing_launcher(option)}"
    inside = option.rpartition("/")[0]
    known = [f"{inside}/{name}" if inside else name for name in options(f"{group}/{inside}".rstrip("/"), overrides)]
    folders = _folders(overrides)
    if any((folder / f"{path}.yml").is_file() for folder in folders):
        return f"{group}={option}: the name of its file must end in .yaml, not .yml"
    lacking = [folder for folder in folders if not (folder / group).is_dir()]
    hint = f" {_short(lacking[0])} has no folder {group}/." if lacking and len(lacking) == len(folders) else ""
    return f"{group}={option}: no such option.{suggest(option, known)}{hint}"


def _no_key(key: str, overrides: Sequence[str]) -> str:
    """The line for an override of a key that is not there, with who takes it, or the nearest name."""
    given = next((o for o in overrides if o.lstrip("+~").partition("=")[0] == key), key)
    known = groups(_folders(overrides))
    if key in known:
        return f"{given}: is a group; {key}=OPTION chooses {' or '.join(known[key])}, {key}.KEY=value sets a key"
    if "/" in key:
        return f"{given}: no such group.{suggest(key, known)}"
    hydra = key.startswith("hydra.")
    group = key.rpartition(".")[0].replace("hydra.", "hydra/", 1)
    chosen = [o for o in overrides if o.startswith(SEARCH_PATH) or o.partition("=")[0] in (*known, group)]
    found = known_keys(chosen, hydra)
    if group in known or group in ("hydra/launcher", "hydra/sweeper"):
        parameters = [k for k in found if k.startswith(f"{key.rpartition('.')[0]}.") and not k.endswith("_target_")]
        takes = ", ".join(parameters) or "no parameters"
        others = [o for o in options(group, overrides) if key in known_keys([*chosen, f"{group}={o}"], hydra)]
        named = " or ".join(f"{group}={option}" for option in others)
        hint = f" {named} takes it." if others else suggest(key, parameters, list_all=False)
        return f"{given}: the chosen {group} takes {takes}.{hint}"
    return f"{given}: no such key.{suggest(key, found, list_all=not hydra)}"


def _no_group(key: str) -> str:
    """The hint for a defaults list that overrides what is no group."""
    name = key.partition("@")[0].rpartition("/")[2]
    if name in groups():
        return f"groups are named from the top, 'override /{name}: …'"
    return f"no such group.{suggest(name, groups())}"


def _no_name(overrides: Sequence[Override], otherwise: str) -> str:
    """The line for a group that is given something else than the name of an option."""
    for override in overrides:
        known = options(override.key_or_group)
        if known and not override.is_sweep_override() and not isinstance(override.value(), str | list):
            none = f" Leave it out for none, or ~{override.key_or_group}" if override.key_or_group in OPTIONAL else ""
            return f"{override.input_line}: names no option.{suggest('', known)}{none}"
    return otherwise


def not_removed(override: Override) -> str:
    """The line for an override ``~key``, which is refused."""
    key = override.key_or_group
    if known := options(key):
        return f"{override.input_line}: one option of this group is needed; choose with {key}=….{suggest('', known)}"
    if key not in known_keys(hydra=key.startswith("hydra.")):
        return f"{override.input_line}: no such key.{suggest(key, known_keys(), list_all=False)}"
    return f"{override.input_line}: a key cannot be removed; leave it out for its default, or set it ({key}=VALUE)"


def lacks_header(group: str, config: DictConfig, overrides: Sequence[str]) -> str:
    """The line for a chosen option of ``group`` whose keys were not put at the top of the configuration."""
    option = config.hydra.runtime.choices.get(group)
    file = _file_of(f"{group}/{option}", overrides)
    named = _short(file) if file is not None else f"{group}={option}"
    if file is not None and file.read_bytes().startswith(b"\xef\xbb\xbf"):
        return f"{named}: begins with a byte order mark, which hides its first line; save it as UTF-8 without one"
    return f"{named}: its first line must be '{GLOBAL}', so that it sets keys of the whole configuration"


def options(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """Names of the options of ``group``, those of the folders that ``overrides`` make Hydra search among them."""
    search = [o for o in overrides if o.startswith(f"{SEARCH_PATH}=")]
    found: list[str] = GlobalHydra.instance().config_loader().get_group_options(group, overrides=search)
    return found


def known_keys(choices: Sequence[str] = (), hydra: bool = False) -> list[str]:
    """Every dotted key of the configuration with the given group choices, and every group; or of Hydra's own part.

    None where those choices cannot be composed.
    """

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        found = []
        for name, value in node.items():
            found += [f"{prefix}{name}", *walk(value, f"{prefix}{name}.")]
        return found

    try:
        config = compose("config", overrides=list(choices), return_hydra_config=hydra)
    except Exception:  # it is about another fault that a line is asked for
        return []
    if hydra:
        return walk(OmegaConf.to_container(config.hydra), "hydra.")
    return [key for key in [*walk(OmegaConf.to_container(config), ""), *groups()] if not key.endswith("_target_")]


def option_file(override: str, overrides: Sequence[str]) -> str:
    """The file of the option that ``override`` chooses, for people; the override where there is none."""
    file = _file_of("/".join(override.lstrip("+").split("=", 1)), overrides)
    return override if file is None else _short(file)


def _folders(overrides: Sequence[str]) -> list[Path]:
    """Folders of configuration of the user's own."""
    search = [o for o in overrides if o.startswith(f"{SEARCH_PATH}=")]
    places = [str(place) for o in parse(search) for place in o.value()]  # type: ignore[union-attr]
    return [Path(place.removeprefix(FILE)) for place in places if place.startswith(FILE)]


def _file_of(path: str, overrides: Sequence[str]) -> Path | None:
    """The file of the configuration ``path``, group and option; calib's own come first, as in Hydra."""
    files = (folder / f"{path}.yaml" for folder in (CONF, *_folders(overrides)))
    return next((file for file in files if file.is_file()), None)


def _own_files(overrides: Sequence[str]) -> Iterator[Path]:
    """The user's own files among the options that ``overrides`` choose."""
    for override in overrides:
        group, _, option = override.lstrip("+").partition("=")
        file = _file_of(f"{group}/{option}", overrides)
        if file is not None and CONF not in file.parents:
            yield file


def _not_utf8(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*.yaml")):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield file


def _short(path: Path) -> str:
    """``path`` relative to the working folder, where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
