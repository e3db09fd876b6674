"""The errors calib ends with: one clear line, no traceback."""

import difflib
from collections.abc import Iterable

MOST_NAMES = 20


class CalibError(Exception):
    """Something the user can mend; ``str(error)`` is one line that says what and how. Exit status 1."""

    exit_status = 1


class ConfigError(CalibError):
    """A bad key or value, found before any work started. Exit status 2."""

    exit_status = 2

    @classmethod
    def bad_value(cls, key: str, value: object, allowed: str) -> "ConfigError":
        """``key=value`` is not possible; ``allowed`` says what is."""
        return cls(f"{key}={value}: {allowed}")


def in_a_line(error: BaseException, path: object = "files") -> str:
    """What went wrong, for people, in one line; ``path`` is what an OSError concerns that names no file.

    What can be mended is said without the name of a class.
    """
    if isinstance(error, CalibError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or path}: {error.strerror or error}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def lacks_or_garbles(where: object, error: BaseException, again: str) -> CalibError:
    """The error for a document that a reader stumbled over at ``error``; ``again`` says what writes it anew."""
    return CalibError(f"{where}: lacks or garbles {error}; {again}")


def suggest(name: str, known: Iterable[str], list_all: bool = True) -> str:
    """' Did you mean …?' with the nearest known names; where none is near, all of them or nothing."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    if not list_all:
        return ""
    shown = ", ".join(known[:MOST_NAMES]) + (", …" if len(known) > MOST_NAMES else "")
    return f" Known: {shown}." if known else ""
