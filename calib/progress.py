"""Progress of long work: a bar with rate and time left on a terminal, plain lines where output is not one."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

PLAIN_INTERVAL_SECONDS = 10.0


class Progress:
    """Counts ``total`` units of work; use as a context and call :meth:`advance`."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self._start = time.monotonic()
        self._last_line = self._start
        self._bar = (
            tqdm(total=total, desc=label, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Self:
        if self._bar is None:
            self._print(f"{self.total} {self.unit}s")
        return self

    def advance(self, amount: int = 1) -> None:
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
            self._print(f"{share}, {rate:.3g} {self.unit}s/s, {left:.0f} s left")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print(f"{self.done} {self.unit}s in {time.monotonic() - self._start:.1f} s")

    def _print(self, text: str) -> None:
        print(f"{self.label}: {text}", file=sys.stderr, flush=True)
