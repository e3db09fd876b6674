"""Find prompts in JSON: in lists of texts or of objects, in objects keyed by id, and deeper.

A column is a key or a dotted path of keys, ``annotations.caption``. Lists on its way are gone through in order, so an
image with several captions gives several prompts; so are objects keyed by id, each of whose entries has the rest of
the path. A key without its path will do where only one place has it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from calib.base.errors import MOST_NAMES, ConfigError
from calib.dataset.prompt_rows import COLUMN, Row, bad_file, no_column, split_lines

#: Key of the list of prompts in a document that has none under the column's name.
LIST = "prompts"


def read_json(path: str, text: str, column: str) -> Iterator[Row]:
    """The prompts of a document, numbered by its items."""
    document = _parsed(path, text, 1) if text.strip() else []
    if isinstance(document, list):
        yield from prompts_in(path, "item", _numbered(document), column)
    elif isinstance(document, dict):
        items, inner, outer = _items(path, document, column)
        yield from prompts_in(path, "item", _numbered(items), column, inner, outer)
    else:
        raise bad_file(path, "must hold a list of texts, or objects with the key prompts.column")


def read_jsonl(path: str, text: str, column: str) -> Iterator[Row]:
    """The prompts of a file with one JSON value a line, numbered by lines; a blank line is an empty prompt."""
    lines = _numbered(split_lines(text))
    values = [(number, _parsed(path, line, number) if line.strip() else "") for number, line in lines]
    yield from prompts_in(path, "line", values, column)


def _parsed(path: str, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        allowed = f"line {line + error.lineno - 1} is not JSON ({error.msg} at column {error.colno})"
        raise bad_file(path, f"{allowed}; a .json file holds one value, a .jsonl file one a line") from None
    except (ValueError, RecursionError):
        allowed = "holds a number too long or lists nested too deep; a prompt must be text in quotes"
        raise bad_file(path, allowed) from None


def _numbered(values: Iterable[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(values, start=1))


def prompts_in(
    path: str, unit: str, items: Sequence[Row], given: str, inner: str | None = None, outer: str = ""
) -> Iterator[Row]:
    """The prompts in items that are texts, lists of texts, or objects.

    Args:
        unit: what the numbers of the items count.
        given: the configured column, within each item unless ``inner`` is.
        outer: what the path to a key of an item begins with.

    Raises:
        ConfigError: an object has no such key, or has it in several places.
    """
    column = given if inner is None else inner
    rows = [(number, entry) for number, item in items for entry in _flat([item])]
    objects = [entry for _, entry in rows if isinstance(entry, dict)]
    if objects and all(_under(entry, column) is None for entry in objects):
        if column == COLUMN and all(len(entry) == 1 and _are_texts(entry.values()) for entry in objects):
            rows = [(n, text) for n, entry in rows for text in _flat(_values(entry))]
        else:
            column = _place(path, objects, column, given, outer) + column
    for number, entry in rows:
        where = f"{path}, {unit} {number},"
        found = _under(entry, column) if isinstance(entry, dict) else [entry]
        if found is None:
            raise _missing(where, objects, given, outer)
        for value in found:
            if isinstance(value, dict):
                raise _missing(where, [value], given, f"{outer}{column}.")
            yield number, value


def _items(path: str, document: Mapping[str, Any], column: str) -> tuple[list[Any], str, str]:
    """The items of a document, the column within them, and what the path to a key of theirs begins with."""
    if found := _named(document, column):
        return found
    if isinstance(value := document.get(LIST), list | dict):
        return _values(value), column, ""
    if column == COLUMN and document and _are_texts(document.values()):
        return _values(document), column, ""
    found = _named(document, _place(path, document, column, column) + column)
    if found is None:
        raise _missing(path, [document], column)
    return found


def _named(node: Mapping[str, Any], column: str, outer: str = "") -> tuple[list[Any], str, str] | None:
    """The items that a path leads to, what is left of it within them, and the path to them; None without such items."""
    if (step := first_step(node, column)) is None:
        return None if _under(node, column) is None else (_values(node), column, outer)
    value, rest = step
    if not rest:
        return _values(value), column.rpartition(".")[2], f"{outer}{column}."
    outer += column.removesuffix(rest)
    if isinstance(value, dict):
        return _named(value, rest, outer)
    return (value, rest, outer) if isinstance(value, list) else None


def first_step(node: Mapping[str, Any], column: str) -> tuple[Any, str] | None:
    """The entry under the longest leading part of ``column`` that is a key, and the rest of the path."""
    parts = column.split(".")
    for length in range(len(parts), 0, -1):
        if (key := ".".join(parts[:length])) in node:
            return node[key], ".".join(parts[length:])
    return None


def _under(node: Any, column: str) -> list[Any] | None:
    """What a path leads to; None where it leads nowhere, or from any of several entries nowhere."""
    if isinstance(node, dict) and (step := first_step(node, column)) is not None:
        value, rest = step
        return _under(value, rest) if rest else _flat([value])
    if not isinstance(node, list) and not _keyed_by_id(node):
        return None
    found = [_under(entry, column) for entry in _values(node)]
    return None if None in found else _flat(found)


def _place(path: str, node: Any, column: str, given: str, outer: str = "") -> str:
    """The beginning of the only path in ``node`` that ends in ``column``, '' where there is none."""
    places = _places(node, column)
    if len(places) > 1:
        names = [f"{outer}{place}{column}" for place in places]
        raise no_column(given, f"{path} has it in several places:", names)
    return places[0] if places else ""


def _places(node: Any, column: str, beside: bool = False) -> list[str]:
    """The beginnings of all paths in ``node`` that end in ``column``, each with its last dot.

    An object by itself is no place: what is beside it might be meant, too.

    Args:
        beside: whether ``node`` is within a list, or an object keyed by id.
    """
    if not isinstance(node, list | dict):
        return []
    several = isinstance(node, list) or _keyed_by_id(node)
    if isinstance(node, dict) and (beside or several) and _under(node, column) is not None:
        return [""]
    found = [_places(entry, column, beside or several) for entry in _values(node)]
    if several:
        return list(dict.fromkeys(_flat(found)))
    return [f"{key}.{place}" for key, places in zip(node, found, strict=True) for place in places]


def _missing(where: str, objects: list[Any], column: str, outer: str = "") -> ConfigError:
    """The error for one of ``objects`` without the column; paths to their keys begin with ``outer``."""
    if names := _paths_to_text(objects):
        return no_column(column, f"{where} has text under", [outer + name for name in names])
    allowed = f"{where} has no text under it, and under no other key all objects have one; mend the file"
    return ConfigError.bad_value("prompts.column", column, allowed)


def _paths_to_text(node: Any) -> list[str]:
    """Paths that lead to text, from every one of several objects beside each other."""
    if isinstance(node, str):
        return [""]
    if isinstance(node, list):
        objects = [entry for entry in node if isinstance(entry, dict)]
        if not objects:
            return [""] * any(isinstance(entry, str) for entry in node)
        return _common(objects, [_paths_to_text(entry) for entry in objects[:MOST_NAMES]])
    if not isinstance(node, dict):
        return []
    found = [_paths_to_text(entry) for entry in node.values()]
    if _keyed_by_id(node) and (common := _common(_values(node), found[:MOST_NAMES])):
        return common
    return [f"{key}.{rest}".removesuffix(".") for key, rests in zip(node, found, strict=True) for rest in rests]


def _common(objects: list[Any], found: Iterable[list[str]]) -> list[str]:
    """Those of the paths ``found`` in some objects that lead somewhere in all of them."""
    return [path for path in dict.fromkeys(_flat(found)) if _under(objects, path) is not None]


def _keyed_by_id(node: Any) -> bool:
    """Whether ``node`` is an object of nothing but objects."""
    return isinstance(node, dict) and bool(node) and all(isinstance(entry, dict) for entry in node.values())


def _values(node: Any) -> list[Any]:
    """The entries of a list or an object; of anything else, itself."""
    return node if isinstance(node, list) else list(node.values()) if isinstance(node, dict) else [node]


def _flat(values: Iterable[Any]) -> list[Any]:
    """``values`` with the entries of each list among them in its place."""
    return [entry for value in values for entry in (value if isinstance(value, list) else [value])]


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in _flat(values))
