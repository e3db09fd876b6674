"""The words that may follow ``calib``: a stage, or a command with ordinary arguments."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from calib.base.errors import ConfigError, suggest
from calib.stages import Stage

#: Module and function of each command with ordinary arguments: it takes the arguments after its name and returns the
#: exit status.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "verify": ("calib.cli.files", "verify_command"),
    "rebuild-manifest": ("calib.cli.files", "rebuild_manifest_command"),
    "merge": ("calib.cli.files", "merge_command"),
    "convergence": ("calib.cli.files", "convergence_command"),
    "export": ("calib.cli.export", "export_command"),
    "compare": ("calib.cli.compare", "compare_command"),
    "doctor": ("calib.cli.doctor", "doctor_command"),
}
#: ``calib evaluate`` with two folders for settings: likewise, and flags that only it has.
FOLDERS = ("calib.cli.evaluate", "folders_command")
FOLDERS_FLAGS = ("--cache-dir", "--html", "--json", "--metrics", "--worst")
SETTINGS = "A setting is written key=value, without spaces"
WORDS = (*(stage.value for stage in Stage), *COMMANDS)


def command_of(arguments: Sequence[str]) -> tuple[str, str] | None:
    """Module and function of the command that ``arguments`` name; None where they name a stage, or nothing known."""
    word, *rest = arguments or [""]
    if word == Stage.EVALUATE and names_folders(rest):
        return FOLDERS
    return COMMANDS.get(word)


def names_folders(arguments: Sequence[str]) -> bool:
    """Whether what follows ``evaluate`` names folders of pictures: by a flag of that command, or by what comes first.

    That is a folder, or one of two words of which neither is a flag or ``key=value``. A folder's name may have an =,
    as those of a sweep do: it counts as one where the next is a folder, too.
    """
    if any(argument.partition("=")[0] in FOLDERS_FLAGS for argument in arguments):
        return True
    first, second = (
        argument if not argument.startswith(("-", "+", "~")) else "" for argument in [*arguments, "", ""][:2]
    )
    if "=" in first:
        return Path(first).is_dir() and Path(second or ".").is_dir() and bool(second)
    return bool(first) and (Path(first).is_dir() or (bool(second) and "=" not in second))


def misplaced(word: str, others: Sequence[str]) -> ConfigError:
    """The error for a ``word`` among the arguments ``others`` that is neither a flag nor ``key=value``."""
    if word in WORDS:
        return ConfigError(f"{word}: comes first, one at a time: {shlex.join(['calib', word, *others])}")
    near = suggest(word, WORDS, list_all=False)
    return ConfigError(f"{word}: neither a flag nor a setting.{near} {SETTINGS}")


def unknown_word(word: str) -> ConfigError:
    """The error for a first ``word`` that is neither a stage nor a command."""
    near = suggest(word, WORDS, list_all=False)
    return ConfigError(f"{word}: unknown stage.{near or f'{suggest(word, WORDS)} {SETTINGS}'}")
