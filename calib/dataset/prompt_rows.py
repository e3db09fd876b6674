"""What the readers of prompt files share: rows, lines, the cleaning of a prompt, and errors."""

import re
from collections.abc import Sequence
from typing import TypeAlias

from calib.base.errors import MOST_NAMES, ConfigError, suggest
from calib.base.progress import readable_bytes

#: The default column or key.
COLUMN = "prompt"

#: Number of the line or item, and its value, which need not be text.
Row: TypeAlias = tuple[int, object]

#: The most that is read of a file, and of what is compressed in it: about a million prompts.
MOST_BYTES = 1 << 28

_KINDS = {dict: "an object", list: "a list", type(None): "null", bool: "true or false", bytes: "bytes"}
_MOST_CHARACTERS = 40
#: Escapes in JSON can spell characters that no encoding can represent.
_UNENCODABLE = re.compile("[\0\ud800-\udfff]")


def bad_file(path: str, allowed: str) -> ConfigError:
    """The error for a file that holds no prompts; ``allowed`` says where, and what to do."""
    return ConfigError.bad_value("prompts.path", path, allowed)


def too_large(path: str) -> ConfigError:
    """The error for a file with more than MOST_BYTES."""
    allowed = f"holds more than {readable_bytes(MOST_BYTES)}; save the prompts that you need in a file of their own"
    return bad_file(path, allowed)


def no_column(column: str, found: str, names: Sequence[str], hint: str = "") -> ConfigError:
    """The error for a column that is not ``found``; each of ``names`` can be named instead."""
    shown = ", ".join(map(quoted, names[:MOST_NAMES])) + (", …" if len(names) > MOST_NAMES else "")
    near = suggest(column, names, list_all=False) or " Name one, prompts.column=COLUMN."
    return ConfigError.bad_value("prompts.column", column, f"{found} {shown}{hint}.{near}")


def quoted(text: str) -> str:
    """``text`` in quotes for a message, shortened, on one line."""
    return repr(text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…")


def split_lines(text: str) -> list[str]:
    """The lines of a text; str.splitlines would also break at U+2028 and others that may be part of a prompt."""
    lines = re.split(r"\r\n|\r|\n", text)
    if not lines[-1]:
        lines.pop()
    return lines


def cleaned(path: str, place: str, value: object) -> str:
    """The prompt in ``value``: no white space at its ends, and one space for white space with a line break.

    Raises:
        ConfigError: the value, which is at ``place``, is not text or cannot be encoded.
    """
    if not isinstance(value, str):
        kind = _KINDS.get(type(value), "a number")
        raise bad_file(path, f"{place} is {kind}; a prompt must be text in quotes")
    if _UNENCODABLE.search(value):
        raise bad_file(path, f"{place} holds a NUL character or half a surrogate pair; remove it")
    return re.sub(r"\s+", lambda run: " " if "\n" in run[0] or "\r" in run[0] else run[0], value.strip())
