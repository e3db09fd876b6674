"""Read prompts from a file: .txt, .csv, .tsv, .json or .jsonl, in UTF-8 or in UTF-16 with a byte order mark.

White space at both ends of a prompt is removed, and white space with a line break becomes one space, as text encoders
would do anyway. Everything else is kept as written.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from calib.base.errors import MOST_NAMES, ConfigError, suggest
from calib.base.progress import note

#: The default column or key.
COLUMN = "prompt"

FORMATS = "a .txt file with one prompt a line, or a .csv, .tsv, .json or .jsonl file with a column or key of prompts"

#: Number of the line or item, and its value, which need not be text.
Row = tuple[int, object]

_MOST_NUMBERS = 5
_MOST_CHARACTERS = 40


def read(path: str, column: str) -> list[str]:
    """The prompts of a file; the number of empty prompts left out is reported on stderr.

    Raises:
        ConfigError: the file cannot be read, or holds something that is no prompt.
    """
    if not path:
        raise ConfigError(f"prompts.path is not set: name a text file, prompts.path=FILE: {FORMATS}")
    suffix = Path(path).suffix.lower()
    file = _regular_file(path)
    if suffix not in READERS:
        raise ConfigError.bad_value("prompts.path", path, f"{suffix} files are not read; name {FORMATS}")
    unit = "item" if suffix == ".json" else "line"
    prompts, empty = [], []
    for number, value in READERS[suffix](path, _text(path, file), column):
        prompt = _prompt(path, f"{unit} {number}", value)
        if prompt:
            prompts.append(prompt)
        else:
            empty.append(number)
    if not prompts:
        raise ConfigError.bad_value("prompts.path", path, "holds no prompts; it needs at least one that is not empty")
    if empty:
        count = "1 empty prompt is" if len(empty) == 1 else f"{len(empty)} empty prompts are"
        numbers = ", ".join(map(str, empty[:_MOST_NUMBERS])) + (", …" if len(empty) > _MOST_NUMBERS else "")
        note(f"prompts.path={path}: {count} left out ({unit}{'s' if len(empty) > 1 else ''} {numbers})")
    return prompts


def quoted(text: str) -> str:
    """``text`` in quotes for a message, shortened, on one line."""
    return repr(text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…")


def _regular_file(path: str) -> Path:
    """The regular file at ``path``; a pipe is rejected, as a configuration is built more than once."""
    try:
        file = Path(path).expanduser()
        file.stat()
    except (OSError, RuntimeError, ValueError) as error:  # also '~nobody', and a NUL in the name
        raise _unreadable(path, error) from None
    if file.is_dir():
        raise ConfigError.bad_value("prompts.path", path, f"cannot be read (it is a folder); name {FORMATS}")
    if not file.is_file():
        raise ConfigError.bad_value("prompts.path", path, "cannot be read twice; save the prompts to a file first")
    return file


def _unreadable(path: str, error: Exception) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ConfigError.bad_value("prompts.path", path, f"cannot be read ({reason}); name {FORMATS}")


def _text(path: str, file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    data = data.removeprefix(codecs.BOM_UTF8)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = "UTF-16 as its first bytes say" if wide else f"UTF-8 (byte 0x{data[error.start]:02x} in line {line})"
        raise ConfigError.bad_value("prompts.path", path, f"is not {found}; save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError.bad_value("prompts.path", path, f"line {line} holds a NUL character; save it as UTF-8 text")
    return text


def _prompt(path: str, place: str, value: object) -> str:
    if not isinstance(value, str):
        kind = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}.get(
            type(value), "a number"
        )
        raise ConfigError.bad_value("prompts.path", path, f"{place} is {kind}; a prompt must be text in quotes")
    # Escapes in JSON can spell characters that no encoding can represent.
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        allowed = f"{place} holds a NUL character or half a surrogate pair; remove it"
        raise ConfigError.bad_value("prompts.path", path, allowed)
    return re.sub(r"\s+", lambda run: " " if "\n" in run[0] or "\r" in run[0] else run[0], value.strip())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines; str.splitlines would also break at U+2028 and others that may be part of a prompt."""
    lines = re.split(r"\r\n|\r|\n", text)
    if not lines[-1]:
        lines.pop()
    return enumerate(lines, start=1)


def _read_txt(path: str, text: str, column: str) -> Iterator[Row]:
    if column != COLUMN:
        raise ConfigError.bad_value("prompts.column", column, f"{path} has no columns, it is read as one prompt a line")
    yield from _lines(text)


def _read_csv(path: str, text: str, column: str, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            if header is None and row:
                header = [_prompt(path, f"line {line}", name) for name in row]
                position = _position(path, column, header)
            elif header is not None and row and len(row) != len(header):
                allowed = f"line {line} has {len(row)} cells, the header has {len(header)}; quote a cell that"
                allowed += f" contains a {'comma' if delimiter == ',' else 'tab'}"
                raise ConfigError.bad_value("prompts.path", path, allowed)
            elif header is not None:
                yield line, row[position] if row else ""
            line = rows.line_num + 1
    except csv.Error as error:
        allowed = f"line {line}: {error}; close a quoted cell, and double quotes inside one"
        raise ConfigError.bad_value("prompts.path", path, allowed) from None


def _read_tsv(path: str, text: str, column: str) -> Iterator[Row]:
    return _read_csv(path, text, column, delimiter="\t")


def _position(path: str, column: str, header: list[str]) -> int:
    if column not in header:
        raise _no_column(column, f"{path} has", "column", header, " (its first line must name them)")
    if header.count(column) > 1:
        raise ConfigError.bad_value("prompts.column", column, f"{path} has {header.count(column)} columns of this name")
    return header.index(column)


def _no_column(column: str, where: str, word: str, names: list[str], hint: str = "") -> ConfigError:
    shown = ", ".join(quoted(name) for name in names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
    found = f"{word}{'s' if len(names) > 1 else ''} {shown}" if names else f"no {word}s"
    near = suggest(column, names, list_all=False) or f" Name one, prompts.column={word.upper()}."
    return ConfigError.bad_value("prompts.column", column, f"{where} {found}{hint}.{near}")


def _read_jsonl(path: str, text: str, column: str) -> Iterator[Row]:
    for number, line in _lines(text):
        value = _json(path, line, number) if line.strip() else ""
        yield number, _member(f"{path}, line {number},", value, column)


def _read_json(path: str, text: str, column: str) -> Iterator[Row]:
    value = _json(path, text, 1) if text.strip() else []
    if isinstance(value, dict):
        named = [value[key] for key in (column, "prompts") if isinstance(value.get(key), list)]
        if not named:
            raise _no_column(column, f"{path} has no list of this name, or 'prompts'; it has", "key", list(value))
        value = named[0]
    if not isinstance(value, list):
        allowed = "must hold a list of texts, or of objects with the key prompts.column"
        raise ConfigError.bad_value("prompts.path", path, allowed)
    for number, item in enumerate(value, start=1):
        yield number, _member(f"{path}, item {number},", item, column)


def _json(path: str, text: str, line: int) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        allowed = f"line {line + error.lineno - 1} is not JSON ({error.msg} at column {error.colno})"
        allowed += "; a .json file holds one list, a .jsonl file one value a line"
        raise ConfigError.bad_value("prompts.path", path, allowed) from None
    except (ValueError, RecursionError):
        allowed = "holds a number too long or lists nested too deep; a prompt must be text in quotes"
        raise ConfigError.bad_value("prompts.path", path, allowed) from None
    return value


def _member(where: str, value: object, column: str) -> object:
    """The prompt in one JSON value: the value itself, or an object's entry ``column``."""
    if not isinstance(value, dict):
        return value
    if column not in value:
        raise _no_column(column, f"{where} has", "key", list(value))
    found: object = value[column]
    return found


READERS: dict[str, Callable[[str, str, str], Iterator[Row]]] = {
    "": _read_txt,
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}
