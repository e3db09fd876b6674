"""Read prompts from Parquet, where pyarrow happens to be installed."""

from collections.abc import Iterator
from typing import Any

from calib.base.errors import reason_of
from calib.dataset.prompt_json import first_step, prompts_in
from calib.dataset.prompt_rows import MOST_BYTES, Row, bad_file, no_column, too_large

#: Few, as dictionaries let a small file hold many copies of a long text.
_ROWS_AT_ONCE = 64


def read_parquet(path: str, content: bytes, column: str) -> Iterator[Row]:
    """The prompts of a column, numbered by rows; no other column is read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        allowed = "Parquet needs the package pyarrow, which is not installed; install it, or save the prompts as .csv"
        raise bad_file(path, allowed) from None
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        name = _column(path, column, file.schema_arrow)
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[name]):
            size += batch.nbytes
            if size > MOST_BYTES:
                raise too_large(path)
            rows += [{name: "" if value is None else value} for value in batch.column(0).to_pylist()]
    except (OSError, pyarrow.ArrowException) as error:
        raise bad_file(path, f"is not readable Parquet ({reason_of(error)}); fetch or save it again") from None
    yield from prompts_in(path, "row", list(enumerate(rows, start=1)), column)


def _column(path: str, column: str, schema: Any) -> str:
    """The column of the table in which the path ``column`` begins."""
    if found := first_step(dict.fromkeys(schema.names), column):
        return column.removesuffix(f".{found[1]}")
    if names := [name for field in schema for name in _paths_to_text(field.name, field.type)]:
        raise no_column(column, f"{path} has columns", names)
    raise bad_file(path, "has no column with texts")


def _paths_to_text(name: str, kind: Any) -> Iterator[str]:
    """Paths to texts and lists of them in a column of Arrow's type ``kind``."""
    if str(kind).startswith("struct"):
        for field in kind:
            yield from _paths_to_text(f"{name}.{field.name}", field.type)
    elif hasattr(kind, "value_type"):  # of lists, and of texts that are stored once each
        yield from _paths_to_text(name, kind.value_type)
    elif str(kind) in ("string", "large_string", "string_view"):
        yield name
