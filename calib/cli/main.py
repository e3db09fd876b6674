"""The command line: ``calib [stage] [overrides]``, and commands with ordinary arguments.

Each command imports what it needs: help, the version and commands on files start without MLX and Hydra.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from calib.base import VERSION, interrupts
from calib.base.encoding import print_any_text
from calib.base.errors import CalibError, in_a_line, text_of
from calib.cli.commands import FOLDERS, command_of, unknown_word
from calib.stages import Stage


def split_arguments(arguments: Sequence[str]) -> tuple[Stage | None, list[str]]:
    """The stage, if the first argument names one, and the other arguments."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "+", "~")):
        return None, list(arguments)
    if arguments[0] not in {stage.value for stage in Stage}:
        raise unknown_word(arguments[0])
    return Stage(arguments[0]), list(arguments[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line ``arguments``, by default that of this process, and exit.

    Exit status: 0, 2 for a bad configuration, 1 for other errors, 130 if interrupted, 143 if terminated, 129 if the
    terminal was closed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    interrupts.install()
    print_any_text()
    try:
        sys.exit(_run(given))
    except BrokenPipeError:  # `calib compare … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0 if given[:1] == ["compare"] or command_of(given) == FOLDERS else 1)
    except (CalibError, OSError) as error:
        if full and error.__cause__ is not None:  # what a function of the user's own raised
            traceback.print_exception(error.__cause__)
        print(f"calib: {in_a_line(error)}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, CalibError) else 1)
    except KeyboardInterrupt as error:
        makes_nothing = given[:1] in (["compare"], ["doctor"]) or command_of(given) == FOLDERS
        goes_on = "" if makes_nothing else "the same command goes on from what is finished"
        print("; ".join(filter(None, ["calib: interrupted", text_of(error) or goes_on])), file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, interrupts.Terminated) else 130)


def _run(arguments: list[str]) -> int:
    if (command := command_of(arguments)) is not None:
        module, name = command
        status: int = getattr(importlib.import_module(module), name)(arguments[1:])
        return status
    stage, rest = split_arguments(arguments)
    if {"--help", "-h"} & set(rest):
        from calib.cli.help import help_text

        print(help_text(stage), end="")
        return 0
    if "--version" in rest:
        print(f"calib {VERSION}")
        return 0
    from calib.cli.launch import launch

    return launch(stage, rest)
