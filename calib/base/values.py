"""Check untyped configuration values against annotations of a function's parameters and a dataclass's fields."""

import inspect
import math
import pkgutil
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from calib.base.errors import ConfigError, suggest

T = TypeVar("T")

HEURISTICS = ("range", "cv", "uniform", "sqnr", "mse", "sensitivity", "allocate")

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
        inner = next(a for a in get_args(annotation) if a is not type(None))
        return check(key, value, inner)
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
    if origin in (list, tuple, Sequence):
        if isinstance(value, str) and get_args(annotation)[0] is str:
            value = [value]
        if not isinstance(value, list | tuple):
            raise ConfigError.bad_value(key, value, f"must be a list, e.g. {key}=[…]")
        return tuple(check(key, item, get_args(annotation)[0]) for item in value)
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


#: Modules of options in calib 0.1.0, and where they are now.
MOVED = {
    "calib.prompts.": "calib.dataset.prompts.",
    "calib.timesteps.": "calib.dataset.timesteps.",
    "calib.subsets.": "calib.dataset.subsets.",
    **{f"calib.analysis.{name}.": f"calib.analysis.heuristics.{name}." for name in HEURISTICS},
}


def current_place(target: str) -> str:
    """The import path of today for one of calib 0.1.0; any other as it is."""
    return next((now + target[len(was) :] for was, now in MOVED.items() if target.startswith(was)), target)


def former_place(target: str) -> str:
    """The inverse of :func:`current_place`."""
    return next((was + target[len(now) :] for was, now in MOVED.items() if target.startswith(now)), target)


def target_of(key: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that ``node['_target_']`` names; raises where there is no such function."""
    target = node.get("_target_")
    try:
        function: Callable[..., Any] = pkgutil.resolve_name(current_place(str(target)))
        inspect.signature(function), get_type_hints(function, include_extras=True)
    except (ImportError, AttributeError, NameError, ValueError, TypeError) as error:
        raise ConfigError.bad_value(f"{key}._target_", target, f"names no function ({error})") from None
    return function


def bind_target(
    key: str, node: Mapping[str, Any], given: Sequence[str] = (), optional: Sequence[str] = ()
) -> Callable[..., Any]:
    """The function that ``node['_target_']`` names, with the node's other entries bound as checked parameters.

    Args:
        given: parameters that the caller will supply, all of which the function must have.
        optional: parameters that the caller will supply where the function has them.
    """
    function, target = target_of(key, node), node.get("_target_")
    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    if not takes_any and set(given) - set(signature.parameters):
        takes = ", ".join(signature.parameters) or "nothing"
        must = f"must take {' and '.join(given)}; this one takes {takes}"
        raise ConfigError.bad_value(f"{key}._target_", target, must)
    supplied, parameters = (*given, *optional), {}
    for name, value in node.items():
        if name == "_target_":
            continue
        if name not in signature.parameters or name in supplied:
            known = [n for n in signature.parameters if n not in supplied]
            raise ConfigError(f"{key}.{name}: no parameter of {target}.{suggest(name, known)}")
        parameters[name] = check(f"{key}.{name}", value, hints.get(name, Any))
    for name, parameter in signature.parameters.items():
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variable and name not in (*parameters, *supplied):
            raise ConfigError(f"{key}.{name}: missing; {target} needs it")
    return partial(function, **parameters)


def build_dataclass(key: str, node: Any, kind: type[T]) -> T:
    """Build a dataclass of type ``kind`` from the group ``node``; fields without an entry keep their defaults."""
    hints = get_type_hints(kind, include_extras=True)
    for name in group(key, node):
        if name not in hints:
            raise ConfigError(f"{key}.{name}: no such key.{suggest(name, hints)}")
    return kind(**{name: check(f"{key}.{name}", value, hints[name]) for name, value in node.items()})
