"""Ctrl-C, SIGTERM and a closed terminal end the work in order, with what is done kept and said."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it some time before they kill, or SIGHUP, when the terminal is closed."""

    def __init__(self, signum: int):
        super().__init__()
        self.exit_status = 128 + signum


#: Further signals are ignored for so long: they must not interrupt the orderly end that the first one began.
PATIENCE_SECONDS = 2.0

_received: list[KeyboardInterrupt] = []
_last = -PATIENCE_SECONDS


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _last
    if _received and time.monotonic() - _last < PATIENCE_SECONDS:
        return
    _last = time.monotonic()
    _received.append(KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum))
    raise _received[-1]


def install() -> None:
    """Handle the signals, from now on, in this process; those it was started to ignore stay ignored."""
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and jobs put into the background
            signal.signal(number, _interrupt)


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
