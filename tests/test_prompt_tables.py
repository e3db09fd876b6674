"""Tables of prompts: what csv.writer writes comes back, and quotes that are text neither lose nor join a line."""

import csv
import io
import re
from contextlib import redirect_stderr
from pathlib import Path

from calib.base.errors import ConfigError
from calib.base.progress import note
from calib.dataset.prompt_tables import read_table
from calib.dataset.prompts import from_file

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

DELIMITERS = {"csv": ",", "tsv": "\t"}
#: Mostly what makes the difference, and any other text.
CELLS = st.text(st.sampled_from('"",\t\r\n a'), max_size=8) | st.text(st.characters(codec="utf-8"), max_size=8)
TABLES = st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=6))


def cells(text: str, column: str, delimiter: str) -> list[str]:
    """A column of a table, without white space around the cells."""
    return [str(value).strip() for _, value in read_table("table", text, column, delimiter)]


def without(characters: str, table: list[list[str]]) -> list[list[str]]:
    return [[cell.translate(dict.fromkeys(map(ord, characters))) for cell in row] for row in table]


def names_of(table: list[list[str]]) -> list[str]:
    return [f"c{i}" for i in range(len(table[0]))]


@pytest.mark.parametrize("delimiter", DELIMITERS.values(), ids=DELIMITERS)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("no", ["delimiter", "line break"])
@given(table=TABLES)
@example(table=[["a", '""', "x"], ['"\n"', '""\r\n', "\n"], ["", 'say "hi"', '"hi" to you']])
@example(table=[['"a\nb"', 'c,d\te"']])
def test_what_csv_writes_comes_back(no: str, quoting: int, delimiter: str, table: list[list[str]]) -> None:
    """But for cells with both: lines within them may look like lines of the table."""
    table = without(delimiter if no == "delimiter" else "\r\n", table)
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([names_of(table), *table])
    for i, name in enumerate(names_of(table)):
        assert cells(file.getvalue(), name, delimiter) == [row[i].strip() for row in table]


@pytest.mark.parametrize("delimiter", DELIMITERS.values(), ids=DELIMITERS)
@given(table=TABLES)
@example(table=[["a", '"\n"'], ["b,c\td", 'e\nf,g\th"']])
def test_what_does_not_come_back_is_reported(delimiter: str, table: list[list[str]]) -> None:
    """Cells with separators and line breaks, whose lines may look like lines of the table."""
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([names_of(table), *table])
    note.cache_clear()
    with redirect_stderr(io.StringIO()) as err:
        try:
            found = cells(file.getvalue(), "c0", delimiter)
        except ConfigError:
            return  # some lines are too short or too long
    assert ("all cells each" in err.getvalue()) != (found == [row[0].strip() for row in table])


@pytest.mark.parametrize("delimiter", DELIMITERS.values(), ids=DELIMITERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@given(table=TABLES.filter(lambda table: len(table[0]) > 1))
@example(table=[['"a', "x"], ['b"', "x"], ['"', '"'], ['"a', 'b"'], ['"whole"', '"'], ['""', '"""'], ['"a" b', '" "']])
def test_quotes_that_are_text_stay_where_they_are(delimiter: str, newline: str, table: list[list[str]]) -> None:
    """Nothing is quoted here: each line is a row, and a quote is undone only where it goes around a cell."""
    table = without(f"\r\n{delimiter}", table)
    text = newline.join(delimiter.join(row) for row in [names_of(table), *table])
    for i, name in enumerate(names_of(table)):
        expected = [row[i] for row in table]
        expected = [re.sub(r'^ *"((?:[^"]|"")*)" *$', lambda m: m[1].replace('""', '"'), cell) for cell in expected]
        assert cells(text, name, delimiter) == [cell.strip() for cell in expected]


@pytest.mark.parametrize("suffix", DELIMITERS)
@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        # Those of PartiPrompts
        (['"G I G G L E" painted in thick letters|Illustrations|'], ['"G I G G L E" painted in thick letters']),
        (['a dog saying "I see"|Animals|', "a cat|Animals|x"], ['a dog saying "I see"', "a cat"]),
        (['"never closed|A|', "a cat|B|"], ['"never closed', "a cat"]),
        (['"never closed|A|', 'an owl" in a tree|B|', "a cat|C|"], ['"never closed', 'an owl" in a tree', "a cat"]),
        (['"opens here|A|', 'and closes here"|B|', "a cat|C|"], ['"opens here', 'and closes here"', "a cat"]),
        (['"opens here|A|', "", 'and closes here"|B|'], ['"opens here', 'and closes here"']),
        (['"opens in one cell|closes in another"|'], ['"opens in one cell']),
        (['"whole"|"A"|""'], ["whole"]),
        (['"a ""word"" in quotes"|A|'], ['a "word" in quotes']),
        ([' "spaces around" | A|'], ["spaces around"]),
        (['"a|separator"|A|'], ["a|separator"]),
        (['"two', 'lines"|A|', '"three', "", 'lines|and"|A|x'], ["two lines", "three lines|and"]),
        (['a 12" record|A|', '"|A|', '""|A|', "a cat|A|"], ['a 12" record', '"', "a cat"]),
    ],
)
def test_rows_are_as_meant(tmp_path: Path, suffix: str, lines: list[str], prompts: list[str]) -> None:
    delimiter = DELIMITERS[suffix]
    path = tmp_path / f"table.{suffix}"
    path.write_text("\n".join(["Prompt|Category|Note", *lines, ""]).replace("|", delimiter), encoding="utf-8")
    assert from_file(str(path), "Prompt") == [prompt.replace("|", delimiter) for prompt in prompts]


def test_a_table_of_one_column_has_cells_over_lines(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('prompt\n"a cat\nasleep"\n"never closed\nan owl, " awake\n'.replace(", ", " "), encoding="utf-8")
    assert from_file(str(path)) == ["a cat asleep", '"never closed', 'an owl " awake']


def test_what_may_be_one_cell_or_lines_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"
    path.write_text('id,prompt\n1,"a cat\nasleep, awake"\n2,"x\ny"\n3,"b\nc, d"\n', encoding="utf-8")
    note.cache_clear()
    assert from_file(str(path)) == ['"a cat', 'awake"', "x y", '"b', 'd"']
    (line,) = capsys.readouterr().err.splitlines()
    assert f"prompts.path={path}: quotes open in line 2 and close in line 3 (and in 1 more places)" in line


def test_a_quote_that_is_never_closed_takes_no_second_look() -> None:
    """Twenty thousand lines, each of which might be read to the end of the file."""
    for first, line in (('"open\tx', "a\tb"), ('"open\tx', '""a\t"""b"" c'), ("a\tb", '"a\t"b'), ("a\tb", 'a"\t"b')):
        lines = ["id\tprompt", first, *[line] * 20_000]
        assert len(cells("\n".join(lines), "prompt", "\t")) == 20_001


@pytest.mark.parametrize("other", [";", "\t", ","])
def test_another_delimiter(other: str) -> None:
    """As spreadsheets write it in countries of the decimal comma; not where the name asked for holds it."""
    text = f'prompt{other}n\n"a{other} fox"{other}1\nan owl, white; or not{other}2\n'.replace(", white; or", " or")
    for delimiter in DELIMITERS.values():
        assert cells(text, "prompt", delimiter) == [f"a{other} fox", "an owl or not"]
    assert cells("a;b\nfox;1\n", "a;b", ",") == ["fox;1"]
