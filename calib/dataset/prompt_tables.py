"""Read tables of prompts whose cells are separated by commas or tabs, and in which a quote may be text.

A cell is undone of its quotes only where it is wholly quoted: ``"…"`` between separators or ends of lines, quotes
inside it doubled. Any other quote is text. Quotes hold a separator or a line break only where that is needed: a line
that has as many cells as the header when every separator counts is read so, unless quotes give it as many; and lines
that have all cells each are lines of their own, quotes around them or not, which is reported. In a table of one column,
where any line would have all cells, a quoted cell goes over lines always.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator

from calib.base.errors import ConfigError
from calib.base.progress import counted, note
from calib.dataset.prompt_rows import Row, bad_file, cleaned, no_column, split_lines

_NAMES = {",": "comma", "\t": "tab", ";": "semicolon"}


def read_table(path: str, text: str, column: str, delimiter: str) -> Iterator[Row]:
    """The cells of a column, whose name is in the first line that is not blank.

    Cells may be parted by another delimiter, as spreadsheets of many countries do, where only that gives the column.
    """
    table = _Table(text, delimiter)
    line = next((i for i, each in enumerate(table.lines) if each.strip()), len(table.lines))
    if line == len(table.lines):
        return
    if table.alone(line).count(column) == 0:
        for other in _NAMES:
            if column in (parted := _Table(text, other)).alone(line):
                table, delimiter = parted, other
                break
    header, line = _header(path, table, line, column)
    position = header.index(column)
    while line < len(table.lines):
        cells, after = table.record(line, len(header))
        if len(cells) != len(header):
            found = f"line {line + 1} has {counted(len(cells), 'cell')}, the header has {len(header)}"
            remedy = f"quote a cell that contains a {_NAMES[delimiter]}, and double the quotes inside it"
            raise bad_file(path, f"{found}; {remedy}")
        yield line + 1, cells[position]
        line = after
    if table.torn:
        first, last = table.torn[0]
        places = f" (and in {len(table.torn) - 1} more places)" if len(table.torn) > 1 else ""
        note(
            f"prompts.path={path}: quotes open in line {first} and close in line {last}{places}, but these lines have"
            " all cells each: they are read one by one. Where they are one cell, write spaces for its line breaks"
        )


def _header(path: str, table: "_Table", line: int, column: str) -> tuple[list[str], int]:
    """The names of the columns, one of them ``column``, and the line after them."""
    header: list[str] = []
    for cells, after in ((table.alone(line), line + 1), table.across(line)):
        header = [cleaned(path, f"line {line + 1}", name) for name in cells]
        if header.count(column) == 1:
            return header, after
    if column in header:
        raise ConfigError.bad_value("prompts.column", column, f"{path} has {header.count(column)} columns of this name")
    hint = " (its first line must name them)"
    raise no_column(column, f"{path} has column{'s' if len(header) > 1 else ''}", header, hint)


class _Table:
    """The text of a table, which is taken apart line by line.

    Attributes:
        torn: numbers, from 1, of the first and last line of what is a quoted cell or lines of their own.
    """

    def __init__(self, text: str, delimiter: str):
        self._text, self._delimiter = text, delimiter
        self.lines = split_lines(text)
        ends = (match.end() for match in re.finditer(r"\r\n|\r|\n", text))
        self._starts = [0, *ends]
        self.torn: list[tuple[int, int]] = []
        # Possessive: what follows a quote that is never closed is read once.
        self._quoted = re.compile(rf' *"([^"]*+(?:""[^"]*+)*+)" *(?=[{delimiter}\r\n]|\Z)')
        self._plain = re.compile(rf"[^{delimiter}\r\n]*")

    def record(self, line: int, count: int) -> tuple[list[str], int]:
        """The cells of the record that begins at ``line``, ``count`` if it is sound, and the line after it."""
        if '"' in self.lines[line]:
            cells, after = self.across(line, count)
            if after > line + 1 and len(cells) == count:
                if count == 1 or any(len(self.alone(i, count)) != count for i in range(line, after)):
                    return cells, after
                self.torn.append((line + 1, after))
        return self.alone(line, count), line + 1

    def alone(self, line: int, count: int | None = None) -> list[str]:
        """The cells of a line by itself, ``count`` if any reading gives so many; a blank line has all, empty."""
        text = self.lines[line]
        if count is not None and not text.strip():
            return [""] * count
        cells, _ = self._cells(text, 0)
        if len(cells) != count == text.count(self._delimiter) + 1:
            return [self._cells(cell, 0)[0][0] for cell in text.split(self._delimiter)]
        return cells

    def across(self, line: int, most: int | None = None) -> tuple[list[str], int]:
        """The cells up to the first end of line outside quotes, ``most`` and one at most, and the line after them."""
        cells, end = self._cells(self._text, self._starts[line], most)
        return cells, bisect_right(self._starts, end)

    def _cells(self, text: str, start: int, most: int | None = None) -> tuple[list[str], int]:
        cells: list[str] = []
        while True:
            if match := self._quoted.match(text, start):
                cells.append(match[1].replace('""', '"'))
            else:
                match = self._plain.match(text, start)
                assert match is not None
                cells.append(match[0])
            start = match.end()
            if text[start : start + 1] != self._delimiter or len(cells) == (most or len(text)) + 1:
                return cells, start
            start += 1
