"""The words that may follow ``calib``: a stage, or a command with ordinary arguments."""

import shlex
from collections.abc import Mapping, Sequence

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
SETTINGS = "A setting is written key=value, without spaces"
WORDS = (*(stage.value for stage in Stage), *COMMANDS)


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
