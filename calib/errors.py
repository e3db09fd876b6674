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
