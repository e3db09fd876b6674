"""The command line: ``calib [stage] [overrides]``, and commands with ordinary arguments.

Each command imports what it needs: help, the version and commands on files start without MLX and Hydra.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import calib
from calib.base import interrupts
from calib.base.encoding import print_any_text
from calib.base.errors import CalibError, ConfigError, in_a_line, suggest
from calib.stages import Stage

#: Module and function of each command with ordinary arguments: it takes the arguments after its name and returns the
#: exit status.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "verify": ("calib.cli.files", "verify_command"),
    "rebuild-manifest": ("calib.cli.files", "rebuild_manifest_command"),
    "merge": ("calib.cli.files", "merge_command"),
    "convergence": ("calib.cli.files", "convergence_command"),
    "compare": ("calib.cli.compare", "compare_command"),
    "doctor": ("calib.cli.doctor", "doctor_command"),
}


def split_arguments(arguments: Sequence[str]) -> tuple[Stage | None, list[str]]:
    """The stage, if the first argument names one, and the other arguments."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "+", "~")):
        return None, list(arguments)
    known = [stage.value for stage in Stage]
    if arguments[0] not in known:
        raise ConfigError(f"{arguments[0]}: unknown stage.{suggest(arguments[0], [*known, *COMMANDS])}")
    return Stage(arguments[0]), list(arguments[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line ``arguments``, by default that of this process, and exit.

    Exit status: 0, 2 for a bad configuration, 1 for other errors, 130 if interrupted, 143 if terminated, 129 if the
    terminal was closed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    interrupts.install()
    print_any_text()
    try:
        sys.exit(_run(given))
    except BrokenPipeError:  # `calib compare … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0 if given[:1] == ["compare"] else 1)
    except (CalibError, OSError) as error:
        print(f"calib: {in_a_line(error)}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, CalibError) else 1)
    except KeyboardInterrupt as error:
        goes_on = "" if given[:1] in (["compare"], ["doctor"]) else "the same command goes on from what is finished"
        print("; ".join(filter(None, ["calib: interrupted", str(error) or goes_on])), file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, interrupts.Terminated) else 130)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        module, name = COMMANDS[arguments[0]]
        status: int = getattr(importlib.import_module(module), name)(arguments[1:])
        return status
    stage, rest = split_arguments(arguments)
    if {"--help", "-h"} & set(rest):
        from calib.cli.help import help_text

        print(help_text(stage), end="")
        return 0
    if "--version" in rest:
        print(f"calib {calib.__version__}")
        return 0
    from calib.cli.launch import launch

    return launch(stage, rest)
