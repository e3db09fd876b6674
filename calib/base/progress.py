"""Progress of long work: a bar with rate and time left on a terminal, else plain lines."""

import sys
import time
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from calib.base import interrupts

if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_INTERVAL_SECONDS = 10.0


class Progress:
    """Counts ``total`` units of work; use as a context and call :meth:`advance`.

    Shows nothing of work that ends within ``delay`` seconds.
    """

    def __init__(self, label: str, total: int, unit: str, delay: float = 0.0):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self._now, self._delay = label, delay
        self._start = time.monotonic()
        self._last_line = self._start
        self._bar = _bar(label, total, unit, delay) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is None and not self._delay:
            self._print(self.label, counted(self.total, self.unit))
        return self

    def describe(self, now: str) -> None:
        """Show ``now``, what is being done, beside the bar or in the next line."""
        self._now = f"{self.label} {now}"
        if self._bar is not None:
            self._bar.set_description(self._now)

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(f"{self.label}: {text}", file=sys.stderr)
        else:
            self._print(self.label, text)

    def advance(self, amount: int = 1) -> None:
        """Count ``amount`` units as done; raises an interruption that was lost, as long work passes here often."""
        interrupts.check()
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_SECONDS and self.done < self.total:
            self._last_line = now
            rate = self.done / (now - self._start)
            left = (self.total - self.done) / rate
            share = f"{100 * self.done // self.total}% ({self.done}/{self.total})"
            self._print(self._now, f"{share}, {rate:.3g} {self.unit}s/s, {readable_duration(left)} left")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and time.monotonic() - self._start >= self._delay:
            self._print(self.label, f"{counted(self.done, self.unit)} in {time.monotonic() - self._start:.1f} s")

    def _print(self, label: str, text: str) -> None:
        print(f"{label}: {text}", file=sys.stderr, flush=True)


def _bar(label: str, total: int, unit: str, delay: float) -> "tqdm[Any]":
    from tqdm import tqdm  # only a terminal needs it

    return tqdm(total=total, desc=label, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr, delay=delay)


def counted(number: int, unit: str) -> str:
    """'1 image', '2 images'."""
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def readable_bytes(count: float) -> str:
    """``count`` bytes in the largest fitting decimal unit."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.0f} {units[0]}" if units[0] == "bytes" or count >= 100 else f"{count:.1f} {units[0]}"


def readable_duration(seconds: float) -> str:
    """``seconds`` for people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def say(text: str) -> None:
    """Print a line for the user on stderr."""
    print(text, file=sys.stderr, flush=True)


@cache
def note(text: str) -> None:
    """Print a note for the user on stderr, once a process, as a configuration is built more than once."""
    print(f"calib: note: {text}", file=sys.stderr, flush=True)
