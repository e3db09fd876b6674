"""The errors calib ends with, one clear line each and no traceback, and any error as one line."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from calib.base.encoding import printable

MOST_NAMES = 20


class CalibError(Exception):
    """An error that the user can fix; ``str(error)`` is one line with cause and remedy. Exit status 1."""

    exit_status = 1


class Unsettled(CalibError):
    """A file cannot be judged now: another program writes to it, or the system lacks something. It is not damaged.

    Attributes:
        advice: the reason and the remedy, without the file's name.
    """

    def __init__(self, path: object, advice: str):
        super().__init__(path, advice)  # as pickle makes it again
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.advice}"


class ConfigError(CalibError):
    """A bad key or value, found before any work starts. Exit status 2."""

    exit_status = 2

    @classmethod
    def bad_value(cls, key: str, value: object, allowed: str) -> "ConfigError":
        """Reject ``key=value``; ``allowed`` names what is possible instead."""
        return cls(f"{key}={value}: {allowed}")


def in_a_line(error: BaseException, path: object = "files") -> str:
    """One line about any error, with the name of its class only where the user cannot fix it.

    ``path`` names what an OSError without a file name is about.
    """
    if isinstance(error, CalibError):
        return printable(text_of(error) or type(error).__name__)
    if isinstance(error, OSError):
        return printable(f"{error.filename or path}: {error.strerror or reason_of(error)}")
    return " ".join(f"{type(error).__name__}: {text_of(error)}".split())


def text_of(error: BaseException) -> str:
    """An error's message; nothing where its class cannot make one."""
    try:
        return str(error)
    except Exception:
        return ""


def reason_of(error: BaseException) -> str:
    """A library's message in one line, to stand in a line that names the file; its class where it has no message."""
    return " ".join(text_of(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's message, where only that is about the cause; its class where it has none."""
    lines = text_of(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def lacks_or_garbles(path: object, error: BaseException, again: str, part: str = "") -> CalibError:
    """The error for a document that raised ``error`` while it was read.

    ``part`` names the damaged entry; ``again`` is the command that writes the document anew.
    """
    return CalibError(f"{path}: {part}{' ' if part else ''}lacks or garbles {error}; {again}")


def check_format(where: object, document: object, wanted: str, readable: Sequence[int], again: str) -> None:
    """Raise unless ``document`` states the format ``wanted`` in one of the versions ``readable``.

    ``where`` names the file; ``again`` is the remedy.
    """
    if not isinstance(document, Mapping) or document.get("format") != wanted:
        raise CalibError(f"{where}: not a {wanted} file; {again}")
    version = document.get("format_version")
    if version not in readable:
        known = " and ".join(map(str, readable))
        raise CalibError(f"{where}: has format version {version}, this calib reads {known}; {again}")


def suggest(name: object, known: Iterable[str], list_all: bool = True) -> str:
    """' Did you mean …?' with the nearest known names; where none is near, all of them or nothing."""
    known = sorted(set(known))
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    if not list_all:
        return ""
    shown = ", ".join(known[:MOST_NAMES]) + (", …" if len(known) > MOST_NAMES else "")
    return f" Known: {shown}." if known else ""
