"""Text beyond ASCII in any locale: names of files, and what is printed."""

import io
import os
import sys
import unicodedata
from collections.abc import Sequence

#: Categories of characters that would break a line or a terminal: controls, separators of lines, lone surrogates.
BREAKING = ("Cc", "Zl", "Zp", "Cs")


def ensure_utf8_names() -> None:
    """Start this process again in Python's UTF-8 mode where it takes names of files for ASCII.

    Python does so in the locale C unless UTF-8 mode is forbidden (``PYTHONUTF8=0``). No name beyond ASCII could then be
    opened that a configuration or a file of calib's spells out.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONUTF8": "1"})


def print_any_text() -> None:
    """Let stdout and stderr write what they cannot encode as escapes: a job must not end for a letter in a message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_documents() -> None:
    """Let stdout write UTF-8 from now on, for documents that are to be read by others."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def printable(text: str) -> str:
    """``text`` in one line, whoever wrote it: breaks, controls of terminals and what is no letter become escapes."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in BREAKING else c for c in text)


def aligned(rows: Sequence[Sequence[str]], sides: str = "") -> list[str]:
    """Rows of a table as lines; ``sides`` has ``>`` for each of the first columns that is aligned to the right."""
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(widths, sides.ljust(len(widths), "<"), strict=True))
    lines = (zip(row, columns, strict=True) for row in rows)
    return ["  ".join(f"{text:{side}{width}}" for text, (width, side) in line).rstrip() for line in lines]
