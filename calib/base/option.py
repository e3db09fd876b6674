"""Call functions that the configuration names: what one may not return, or raises, ends in one clear line."""

import inspect
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from calib.base.errors import CalibError, ConfigError, reason_of
from calib.base.progress import note

T = TypeVar("T")

#: What can be gone through, but does not stand for several values.
ONE_VALUE = (str, bytes, Mapping)
#: The most values that are taken from what a function returns, which may be a generator without an end.
MOST_VALUES = 10_000_000
#: Errors that a correct function may raise on made-up input, which is all alike and small.
NOT_CONCLUSIVE = (ArithmeticError, LookupError, ValueError)
LONGEST_MESSAGE = 200


class Unfit(Exception):
    """A function returned what it may not; the message says what that was."""


class Raised(ConfigError):
    """A function of the user's own raised ``__cause__``."""


@dataclass(frozen=True)
class Option(Generic[T]):
    """A function with its parameters bound, and what it must return; called like the function.

    Attributes:
        named: the option, for errors: 'ranges._target_=mine.rule'.
        given: names of the parameters that callers supply, in the order in which they may be supplied without a name.
        must: what it must return, for people.
        read: makes that of what the function returned, and of what it was given; raises :class:`Unfit`.
    """

    named: str
    function: Callable[..., Any]
    given: tuple[str, ...]
    must: str
    read: Callable[..., T]

    def __call__(self, *values: Any, **given: Any) -> T:
        given |= dict(zip(self.given, values, strict=False))
        try:
            return self.read(self.function(**given), **given)
        except Unfit as unfit:
            raise ConfigError(f"{self.named}: must return {self.must}; {unfit}") from None
        except CalibError:
            raise
        except (Exception, SystemExit) as error:
            own = innermost(self.function)
            if is_of_calib(own):
                raise
            raised = f"raised {said(error)}{_place(error, own)}"
            raise Raised(f"{self.named}: {raised}; it must return {self.must}") from error


def innermost(function: Any) -> Any:
    """The function itself, without what is bound or wrapped around it."""
    while isinstance(function, Option | partial):
        function = function.func if isinstance(function, partial) else function.function
    return inspect.unwrap(function)


def is_of_calib(function: Any) -> bool:
    """Whether a function is one of calib's own."""
    return str(getattr(function, "__module__", "")).partition(".")[0] == "calib"


def said(error: BaseException) -> str:
    """An error's class and message in one line."""
    text = reason_of(error)
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


def _place(error: BaseException, function: Any) -> str:
    """' (file:line)' of the innermost call in the file of ``function``; '' where it has none."""
    code = getattr(function, "__code__", None)
    file = code.co_filename if code is not None else getattr(inspect.getmodule(function), "__file__", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = frames[-1].lineno if frames else getattr(code, "co_firstlineno", None)
    if file is None or line is None:
        return ""
    path = Path(file)
    return f" ({path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line})"


@contextmanager
def on_trial() -> Iterator[None]:
    """Try a function on made-up input: errors that real input may not cause become a note."""
    try:
        yield
    except (Raised, *NOT_CONCLUSIVE) as error:
        if not isinstance(error.__cause__ or error, NOT_CONCLUSIVE):
            raise
        note(f"{error} (on made-up statistics; if it does so on real ones, the job ends there)")


def several(found: Any) -> list[Any]:
    """The values in a list, tuple, range, set, generator or array; raises :class:`Unfit` for anything else."""
    if isinstance(found, ONE_VALUE) or not isinstance(found, Iterable):
        raise Unfit(f"returned {kind_of(found)}")
    values = found.tolist() if hasattr(found, "tolist") else list(islice(found, MOST_VALUES + 1))
    if not isinstance(values, list):
        raise Unfit(f"returned one {kind_of(values)} in a {kind_of(found)}")
    if len(values) > MOST_VALUES:
        raise Unfit(f"returned a {kind_of(found)} of more than {MOST_VALUES:,} values")
    return values


def whole_number(value: Any, what: str) -> int:
    """An integer of Python's or of a library's; for anything else raises :class:`Unfit`, which begins with ``what``."""
    try:
        if type(value).__name__ not in ("bool", "bool_"):
            return operator.index(value)
    except TypeError:
        pass
    raise Unfit(f"{what}{in_short(value)}, no integer")


def kind_of(found: object) -> str:
    """What kind of value a function returned, for people."""
    return "None" if found is None else type(found).__name__


def in_short(value: object) -> str:
    """A value for people, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
