"""Locks of lock files and of finished files; they are the operating system's (``flock``) and die with their process.

A lock file is held by one process. A finished file is read under a shared lock, which HDF5 takes too, so that what
another program is changing is never taken for damaged: :class:`~calib.base.errors.Unsettled` says that it is in use.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from calib.base.errors import CalibError, Unsettled, reason_of
from calib.base.progress import note

#: A lock that stays held over so many attempts is held for longer than a test of it, or a file's renaming, takes.
ATTEMPTS, PAUSE_SECONDS = 5, 0.02
#: What ``flock`` says where the file system has no locks: many network file systems, unless mounted with them.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
#: Errors on reading a file that say nothing of its content. SMB answers EACCES or EAGAIN where others lock a file.
PASSING = (
    *(errno.EAGAIN, errno.EACCES, errno.EPERM, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, *NO_LOCKS),
)

AND_AGAIN = "and run the same command again"


def is_locked(path: Path, without_locks: bool = False) -> bool:
    """Whether a living process holds the lock of a file; True where that is unknown.

    ``without_locks`` is the answer where the file system has no locks.
    """
    try:
        with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return without_locks if error.errno in NO_LOCKS else True
    return False


def take_lock(file: IO[Any], wait: bool, alone: bool = True) -> bool:
    """Take the lock of the open lock file ``file``; False where another process holds it, unless ``wait``.

    Where the file system has no locks, a note says so and the work goes on, as most people start one process at a time;
    a CalibError is raised where others are expected, that is, unless ``alone``.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            error.filename = file.name
            raise
        place = Path(file.name)
        lacking = f"this file system has no locks ({error.strerror})"
        if not alone:
            raise CalibError(f"{place.parent}: {lacking}, which processes side by side need; choose another") from None
        note(
            f"{_mount_of(place)}: {lacking}, so that calib cannot tell whether another calib writes there; "
            "start one at a time"
        )
    return True


def _mount_of(path: Path) -> Path:
    """The folder at which the file system of ``path`` begins."""
    return next(folder for folder in path.absolute().parents if os.path.ismount(folder))


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path`` within the context; calls ``on_wait`` before waiting for another process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        if not take_lock(file, wait=False):
            on_wait()
            take_lock(file, wait=True)
        yield


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; raises OSError for what is none: a pipe may wait for ever, a device may have no end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        number = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        raise OSError(number, os.strerror(number) if stat.S_ISDIR(kind) else "Not a regular file", str(path))
    return os.fdopen(handle, "rb")


@contextmanager
def settled(path: Path) -> Iterator[BufferedReader]:
    """Open a finished file for reading, under a shared lock within the context.

    Raises:
        Unsettled: another program holds it open for writing, by the lock that HDF5 takes.
    """
    with open_regular(path) as file:
        if not _share(file):
            raise Unsettled(path, f"in use, another program holds it open for writing; close it there {AND_AGAIN}")
        yield file


def _share(file: IO[bytes]) -> bool:
    """Take a shared lock of ``file``; False where another process holds it alone, and not for a moment only."""
    for _ in range(ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(PAUSE_SECONDS)
            continue
        except OSError:  # a file system without locks
            pass
        return True
    return False


def refuse_unsettled(path: Path, error: BaseException | None = None) -> None:
    """Raise Unsettled where what is wrong with a file may pass, before it is called damaged.

    So it is while another program writes to ``path``, and where ``error``, raised while it was read, says nothing of
    its content.
    """
    if isinstance(error, Unsettled):
        raise error
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING):
        reason = error.strerror if isinstance(error, OSError) else None
        raise Unsettled(path, f"cannot be read now ({reason or reason_of(error)}); mend that {AND_AGAIN}") from None
    with suppress(OSError), settled(path):  # errors of opening: it is gone, or a folder; the caller says so
        pass
