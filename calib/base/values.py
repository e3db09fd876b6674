"""Check untyped configuration values against annotations of parameters and of a dataclass's fields."""

import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from calib.base.errors import ConfigError, suggest

T = TypeVar("T")

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class AtLeast:
    """The least allowed value of a number, in an annotation: ``Annotated[int, AtLeast(1)]``."""

    least: float


@dataclass(frozen=True)
class AtMost:
    """The largest allowed value of a number, in an annotation."""

    most: float


def check(key: str, value: Any, annotation: Any) -> Any:
    """Convert ``value`` to the type ``annotation``; raises a :class:`ConfigError` that names ``key`` if it is none."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        found = check(key, value, inner)
        for bound in extras:
            if isinstance(bound, AtLeast) and found is not None:
                at_least(key, found, bound.least)
            if isinstance(bound, AtMost) and found is not None and found > bound.most:
                raise ConfigError.bad_value(key, found, f"must be {bound.most} or less")
        return found
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(annotation):
            return None
        *others, last = (a for a in get_args(annotation) if a is not type(None))
        for other in others:
            with suppress(ConfigError):
                return check(key, value, other)
        return check(key, value, last)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return build_dataclass(key, value, annotation)
    if annotation is Path:
        if not check(key, value, str):
            raise ConfigError(f"{key}: is empty; name a path, or leave it out")
        return Path(value).expanduser()
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        known = [member.value for member in annotation]
        if value not in known:
            raise ConfigError(
                f"{key}={value}: must be one of {', '.join(known)}.{suggest(str(value), known, list_all=False)}"
            )
        return annotation(value)
    if (origin or annotation) in (list, tuple, Sequence):
        inner = next(iter(get_args(annotation)), Any)
        if isinstance(value, str) and inner is str:
            value = [value]
        if not isinstance(value, list | tuple):
            raise ConfigError.bad_value(key, value, f"must be a list, e.g. {key}=[…]")
        return tuple(check(key, item, inner) for item in value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if annotation in (int, float, str, bool):
        if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
            raise ConfigError.bad_value(key, value, f"must be {_WORDS[annotation]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError.bad_value(key, value, "must be finite")
    return value


def at_least(key: str, value: float, low: float) -> None:
    """Raise where ``value`` is below ``low``."""
    if value < low:
        raise ConfigError.bad_value(key, value, f"must be {low} or more")


def group(key: str, node: Any) -> Mapping[str, Any]:
    """Return ``node``; raises unless it is a group of keys."""
    if not isinstance(node, Mapping):
        raise ConfigError.bad_value(key, node, f"must be a group of keys, e.g. {key}.key=value")
    return node


def build_dataclass(key: str, node: Any, kind: type[T]) -> T:
    """Build a dataclass of type ``kind`` from the group ``node``; fields without an entry keep their defaults."""
    hints = get_type_hints(kind, include_extras=True)
    for name in group(key, node):
        if name not in hints:
            raise ConfigError(f"{key}.{name}: no such key.{suggest(name, hints)}")
    return kind(**{name: check(f"{key}.{name}", value, hints[name]) for name, value in node.items()})
