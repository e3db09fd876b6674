"""End the work in order on Ctrl-C, SIGTERM and a closed terminal; what is finished is kept."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send some time before they kill, or SIGHUP, sent when the terminal is closed."""

    def __init__(self, signum: int):
        super().__init__()
        self.exit_status = 128 + signum


#: Time after a signal in which others are ignored: they must not interrupt the orderly end that it began.
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
    """Handle the signals in this process from now on; those that it was started to ignore stay ignored."""
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and jobs put into the background
            signal.signal(number, _interrupt)


def check() -> None:
    """Raise the last interruption again, in case it was lost: C code prints or drops exceptions of its callbacks."""
    if _received:
        raise _received[-1]


@contextmanager
def in_threads() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that, interrupted, finishes the work at hand and drops what still waits."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
