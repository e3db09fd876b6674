"""Find functions that the configuration names by ``_target_``, and bind parameters; nothing is called here."""

import inspect
import math
import pkgutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from calib.base.errors import ConfigError, suggest
from calib.base.option import ONE_VALUE, Option, innermost, is_of_calib, said
from calib.base.values import check

HEURISTICS = ("range", "cv", "uniform", "sqnr", "mse", "sensitivity", "allocate")
#: Modules of options in calib 0.1.0, and where they are now.
MOVED = {
    "calib.prompts.": "calib.dataset.prompts.",
    "calib.timesteps.": "calib.dataset.timesteps.",
    "calib.subsets.": "calib.dataset.subsets.",
    **{f"calib.analysis.{name}.": f"calib.analysis.heuristics.{name}." for name in HEURISTICS},
}
#: Names of functions that many options share; such an option is called by its module.
_COMMON = ("plan_layer", "plan_layers", "quantize", "load")


def current_place(target: str) -> str:
    """The import path of today for one of calib 0.1.0; any other as it is."""
    return next((now + target[len(was) :] for was, now in MOVED.items() if target.startswith(was)), target)


def former_place(target: str) -> str:
    """The inverse of :func:`current_place`."""
    return next((was + target[len(now) :] for was, now in MOVED.items() if target.startswith(now)), target)


def short_name(target: str) -> str:
    """The name by which an option of calib's is chosen, from the import path of its function."""
    module, _, name = target.rpartition(".")
    return module.rpartition(".")[2] if name in _COMMON else name


def target_of(key: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that ``node['_target_']`` names; raises where there is no such function written in Python."""
    target = node.get("_target_")
    try:
        function: Callable[..., Any] = pkgutil.resolve_name(current_place(str(target)))
        inspect.signature(function), get_type_hints(function, include_extras=True)
        if inspect.isbuiltin(function):
            raise TypeError("it is built in")
    except ConfigError:  # of a package that is missing
        raise
    except (Exception, SystemExit) as error:  # its module may raise anything while it is imported
        raise ConfigError.bad_value(f"{key}._target_", target, f"names no function ({said(error)})") from error
    return function


def bind_target(
    key: str,
    node: Mapping[str, Any],
    given: Sequence[str] = (),
    optional: Sequence[str] = (),
    returns: tuple[type, ...] = (),
) -> "partial[Any]":
    """The function that ``node['_target_']`` names, with the node's other entries bound; see :func:`bound`.

    It must say nothing else of what it returns than ``returns``.
    """
    function, target = target_of(key, node), str(node["_target_"])
    check_returns(f"{key}._target_={target}", function, returns)
    values = {name: value for name, value in node.items() if name != "_target_"}
    return bound(key, target, function, values, given, optional)


def bound(
    key: str,
    target: str,
    function: Callable[..., Any],
    values: Mapping[str, Any],
    given: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> "partial[Any]":
    """``function``, the option ``target`` of the group ``key``, with ``values`` bound as checked parameters.

    Args:
        given: parameters that the caller will supply, all of which the function must have.
        optional: parameters that the caller will supply where the function has them.
    """
    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
    takes = {name: p for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if not takes_any and set(given) - set(takes):
        names = [n + " by position alone" * (p.kind is p.POSITIONAL_ONLY) for n, p in signature.parameters.items()]
        must = f"must take {' and '.join(given)}; this one takes {', '.join(names) or 'nothing'}"
        raise ConfigError.bad_value(f"{key}._target_", target, must)
    supplied, parameters = (*given, *optional), {}
    for name, value in values.items():
        if name not in takes or name in supplied:
            known = [n for n in takes if n not in supplied]
            raise ConfigError(f"{key}.{name}: no parameter of {target}.{suggest(name, known)}")
        parameters[name] = check(f"{key}.{name}", value, hints.get(name, Any))
    for name, p in signature.parameters.items():
        variable = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.default is p.empty and not variable and name not in (*parameters, *supplied):
            raise ConfigError(f"{key}.{name}: missing; {target} needs it")
    return partial(function, **parameters)


def check_returns(named: str, function: Callable[..., Any], kinds: tuple[type, ...]) -> None:
    """Raise where ``function``, the option ``named``, says itself that it returns none of ``kinds``; none: anything."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{named}: is asynchronous; name an ordinary function")
    hint = function if isinstance(function, type) else get_type_hints(function).get("return", Any)
    if hint is Any and inspect.isgeneratorfunction(function):
        hint = Iterator
    if kinds and not _may_be(hint, kinds):
        must = " or ".join("several values" if kind is Iterable else kind.__name__ for kind in kinds)
        says = hint.__name__ if isinstance(hint, type) else hint
        raise ConfigError(f"{named}: must return {must}; it says that it returns {says}")


def _may_be(hint: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value with the annotation ``hint`` may be one of ``kinds``; True where that cannot be known."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _may_be(get_args(hint)[0], kinds)
    if origin in (Union, types.UnionType):
        return any(_may_be(one, kinds) for one in get_args(hint))
    own = origin or hint
    if own is Any or not isinstance(own, type):
        return True
    try:
        return any(
            issubclass(kind, own) or (issubclass(own, kind) and not (kind is Iterable and issubclass(own, ONE_VALUE)))
            for kind in kinds
        )
    except TypeError:  # a protocol
        return True


def described(function: Callable[..., Any]) -> dict[str, Any]:
    """A function and its parameters as files record them: one of calib's by its short name, others by import path."""
    own, around = innermost(function), function.function if isinstance(function, Option) else function
    path = f"{own.__module__}.{getattr(own, '__qualname__', type(own).__qualname__)}"
    parameters = around.keywords if isinstance(around, partial) else {}
    return {"name": short_name(path) if is_of_calib(own) else path, "parameters": _plain(parameters)}


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
