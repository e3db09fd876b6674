"""Read prompts from a file: text, a table, JSON or Parquet, as it is or compressed by gzip.

Text is UTF-8, or UTF-16 with a byte order mark. White space at both ends of a prompt is removed, and white space with a
line break becomes one space, as text encoders would do anyway. Everything else is kept as written.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from calib.base.errors import ConfigError, reason_of
from calib.base.progress import note
from calib.dataset.prompt_json import read_json, read_jsonl
from calib.dataset.prompt_parquet import read_parquet
from calib.dataset.prompt_rows import COLUMN, MOST_BYTES, Row, bad_file, cleaned, split_lines, too_large
from calib.dataset.prompt_tables import read_table

FORMATS = (
    "a .txt file with one prompt a line, or a .csv, .tsv, .json, .jsonl or .parquet file with a column or key of"
    " prompts; gzip may have compressed it (.csv.gz)"
)

_GZIP = b"\x1f\x8b"
_MOST_NUMBERS = 5


def read(path: str, column: str) -> list[str]:
    """The prompts of a file; the number of empty prompts left out is reported on stderr.

    Raises:
        ConfigError: the file cannot be read, or holds something that is no prompt.
    """
    return [prompt for _, prompt in _numbered(path, column)]


def categories(path: str, column: str, by: str) -> list[str]:
    """What the column ``by`` has for each of the prompts that :func:`read` finds in ``column``; '' for an empty cell.

    Raises:
        ConfigError: there is no such column, or not one value in it for a prompt.
    """
    prompts, values = _numbered(path, column), dict[str, list[object]]()
    try:
        for place, value in _rows(path, by):
            values.setdefault(place, []).append(value)
    except ConfigError as error:  # readers name the key of the column that they know
        raise ConfigError(str(error).replace("prompts.column", "evaluation.by")) from None
    return [_category(path, by, place, values.get(place, [])) for place, _ in prompts]


def _category(path: str, by: str, place: str, values: list[object]) -> str:
    """The one value of a prompt as text, be it a number."""
    texts = {cleaned(path, place, "" if v is None else v if isinstance(v, str | dict) else str(v)) for v in values}
    if len(texts) != 1:
        allowed = f"{path}, {place}, has {len(texts) or 'nothing'} there; each prompt needs one"
        raise ConfigError.bad_value("evaluation.by", by, allowed)
    return texts.pop()


def _numbered(path: str, column: str) -> list[tuple[str, str]]:
    """The prompts, each after the place of its row: 'line 7'."""
    prompts, empty = [], []
    for place, value in _rows(path, column):
        prompt = cleaned(path, place, value)
        if prompt:
            prompts.append((place, prompt))
        else:
            empty.append(place)
    if not prompts:
        raise bad_file(path, "holds no prompts; it needs at least one that is not empty")
    if empty:
        count = "1 empty prompt is" if len(empty) == 1 else f"{len(empty)} empty prompts are"
        unit, numbers = empty[0].split()[0], ", ".join(place.split()[1] for place in empty[:_MOST_NUMBERS])
        numbers += ", …" if len(empty) > _MOST_NUMBERS else ""
        note(f"prompts.path={path}: {count} left out ({unit}{'s' if len(empty) > 1 else ''} {numbers})")
    return prompts


def _rows(path: str, column: str) -> Iterator[tuple[str, object]]:
    """Place and value of all rows of a file's column."""
    if not path:
        raise ConfigError(f"prompts.path is not set: name a text file, prompts.path=FILE: {FORMATS}")
    file = _regular_file(path)
    compressed = file.suffix.lower() == ".gz"
    suffix = Path(file.stem if compressed else file.name).suffix.lower()
    if suffix not in READERS:
        raise bad_file(path, f"{suffix} files are not read; name {FORMATS}")
    unit = {".json": "item", ".parquet": "row"}.get(suffix, "line")
    try:
        for number, value in READERS[suffix](path, _content(path, file), column):
            yield f"{unit} {number}", value
    except RecursionError:
        raise bad_file(path, "holds lists nested too deep; a prompt must be text in quotes") from None


def _regular_file(path: str) -> Path:
    """The regular file at ``path``; a pipe is rejected, as a configuration is built more than once."""
    try:
        file = Path(path).expanduser()
        file.stat()
    except (OSError, RuntimeError, ValueError) as error:  # also '~nobody', and a NUL in the name
        raise _unreadable(path, error) from None
    if file.is_dir():
        raise bad_file(path, f"cannot be read (it is a folder); name {FORMATS}")
    if not file.is_file():
        raise bad_file(path, "cannot be read twice; save the prompts to a file first")
    return file


def _unreadable(path: str, error: Exception) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else error
    return bad_file(path, f"cannot be read ({reason}); name {FORMATS}")


def _content(path: str, file: Path) -> bytes:
    """What is in the file, unpacked where gzip has compressed it, whatever its name says."""
    try:
        size = file.stat().st_size
        content = file.read_bytes() if size <= MOST_BYTES else b""
    except OSError as error:
        raise _unreadable(path, error) from None
    if content.startswith(_GZIP):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
                content = packed.read(MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise bad_file(path, f"is damaged ({reason_of(error)}); fetch or compress it again") from None
        size = len(content)
    if size > MOST_BYTES:
        raise too_large(path)
    return content


def _text(path: str, content: bytes) -> str:
    content = content.removeprefix(codecs.BOM_UTF8)
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = "UTF-16 as its first bytes say" if wide else f"UTF-8 (byte 0x{content[error.start]:02x} in line {line})"
        raise bad_file(path, f"is not {found}; save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise bad_file(path, f"line {line} holds a NUL character; save it as UTF-8 text")
    return text


def _of_text(read: Callable[[str, str, str], Iterator[Row]]) -> Callable[[str, bytes, str], Iterator[Row]]:
    """A reader of a file's bytes, from one of its text."""
    return lambda path, content, column: read(path, _text(path, content), column)


def _read_txt(path: str, text: str, column: str) -> Iterator[Row]:
    if column != COLUMN:
        raise ConfigError.bad_value("prompts.column", column, f"{path} has no columns, it is read as one prompt a line")
    yield from enumerate(split_lines(text), start=1)


#: By the ending of a file's name, without .gz.
READERS: dict[str, Callable[[str, bytes, str], Iterator[Row]]] = {
    "": _of_text(_read_txt),
    ".txt": _of_text(_read_txt),
    ".csv": _of_text(partial(read_table, delimiter=",")),
    ".tsv": _of_text(partial(read_table, delimiter="\t")),
    ".json": _of_text(read_json),
    ".jsonl": _of_text(read_jsonl),
    ".parquet": read_parquet,
}
