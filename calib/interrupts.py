"""Ctrl-C and SIGTERM: both end the work in order, with what is done kept and said."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it some time before they kill."""


#: Further signals are ignored for so long: they must not interrupt the orderly end that the first one began.
PATIENCE_SECONDS = 2.0

_received: list[KeyboardInterrupt] = []
_last = -PATIENCE_SECONDS


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _last
    if _received and time.monotonic() - _last < PATIENCE_SECONDS:
        return
    _last = time.monotonic()
    _received.append(Terminated() if signum == signal.SIGTERM else KeyboardInterrupt())
    raise _received[-1]


def install() -> None:
    """Handle both signals, from now on, in this process."""
    _received.clear()
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def check() -> None:
    """Raise an interruption again if it got lost: an exception inside a callback of C code is printed or dropped."""
    if _received:
        raise _received[-1]


@contextmanager
def in_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool that, interrupted, ends with the work at hand and forgets what still waits."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
