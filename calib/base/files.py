"""Read and write files; what is written is whole or absent, whatever interrupts."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from calib.base.errors import CalibError, ConfigError, reason_of
from calib.base.locks import is_locked, open_regular, refuse_unsettled, settled

TEMPORARY_SUFFIX = ".tmp"
#: The largest text that is read, in bytes: those that calib writes have kilobytes, but for manifests.
MOST_TEXT = 1 << 26


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


#: Read once: reading it sets it for an instant, which another thread's new file must not meet.
UMASK = _umask()


@contextmanager
def replacing(path: Path, lock: bool = True, beside: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which is synced and renamed to ``path`` unless the body raises.

    The temporary file is locked while its writer lives; an unlocked one was left by a killed process. Not so without
    ``lock``, for a writer in a folder that is its own, and whose library may lock the file.

    Args:
        beside: a path of the same file system, beside which the temporary one is made instead.
        sync: False for files whose readers find what a power cut leaves of them, and do without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = _new_temporary(beside or path, lock)
    try:
        try:
            yield temporary
            if sync:
                _sync(handle)
            temporary.chmod(0o666 & ~UMASK)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)  # with its lock, which readers of the finished file would meet
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        if error.filename in (str(temporary), None):
            error.filename = str(path)
        raise


def _new_temporary(path: Path, lock: bool) -> tuple[int, Path]:
    """Create a temporary file and lock it; again, if another process removes it before the lock is held."""
    while True:
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
        except OSError as error:
            error.filename = str(path)
            raise
        if lock:
            with suppress(OSError):  # a file system without locks: nothing is cleaned there either
                fcntl.flock(handle, fcntl.LOCK_EX)
        if not lock or os.path.exists(name):
            return handle, Path(name)
        os.close(handle)


def _sync(handle: int) -> None:
    """Write a file's data to the disk itself; macOS' fsync stops at the drive's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not supported by network file systems
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; file systems that refuse to do not need it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def abandoned_temporaries(folder: Path) -> list[Path]:
    """Temporary files directly in ``folder`` whose writer has died; none where the file system has no locks."""
    found = sorted(folder.glob(f".*{TEMPORARY_SUFFIX}"))
    return [path for path in found if not is_locked(path, without_locks=True)]


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files directly in ``folder`` whose writer has died.

    A file is removed while its lock is held, so that a writer that has just created it notices and creates another.
    """
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _existing(folder: Path) -> Path:
    """``folder``, or its nearest parent that exists."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def check_writable(key: str, folder: Path) -> None:
    """Raise a ConfigError unless ``folder``, the value of ``key``, can be written to or created; leaves no trace."""
    try:
        for link in (folder.absolute(), *folder.absolute().parents):
            if link.is_symlink() and not link.exists():
                found = f"{link} is a link to {os.readlink(link)}, which is not there"
                raise ConfigError.bad_value(key, folder, f"{found}; make or mount that, or choose another folder")
        probe = _existing(folder) / f".calib-probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        allowed = f"cannot be written ({error.strerror}); choose another folder"
        raise ConfigError.bad_value(key, folder, allowed) from None


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where ``folder`` is or would be created."""
    return shutil.disk_usage(_existing(folder)).free


def device_of(folder: Path) -> int:
    """The file system where ``folder`` is or would be created."""
    return _existing(folder).stat().st_dev


def take_room(file: IO[bytes], nbytes: int) -> None:
    """Reserve ``nbytes`` for ``file``, which is open for writing; raises OSError (ENOSPC) where the disk lacks them.

    For files written by a library that a full disk would crash. macOS cannot reserve; there the room is only checked.
    """
    if free_bytes(Path(file.name).parent) < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all.

    Bytes of a file's name that are not UTF-8, lone surrogates to Python, become escapes, which JSON reads back.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as strict JSON (no NaN), whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The text in ``path``, UTF-8, a byte-order mark left out.

    Raises:
        CalibError: the file is missing, cannot be read, or has more than ``most`` bytes.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise CalibError(f"{path}: has more than {most >> 20} MiB, too many for such a file")
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise CalibError(f"{path}: no such file") from None
    except OSError as error:
        refuse_unsettled(path, error)
        raise CalibError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """The JSON value in ``path``; raises a CalibError where the file is missing, damaged, or over ``most`` bytes."""
    try:
        return json.loads(read_text(path, most))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in thousands
        raise CalibError(f"{path}: not valid JSON ({reason_of(error)[:80]})") from None


def read_edited_json(path: Path) -> Any:
    """The JSON value in a file that people edit: comments, whose keys begin with _, are left out.

    Raises:
        CalibError: the file is missing or damaged, or an object has a key twice, of which only one could count.
    """
    twice: dict[int, str] = {}

    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = {key: value for key, value in pairs if not key.startswith("_") or key == "_target_"}
        names = [key for key, _ in pairs if key in found]
        if len(names) > len(found):
            twice[id(found)] = next(key for key in names if names.count(key) > 1)
        for key, value in found.items():
            if id(value) in twice:
                raise CalibError(f"{path}: {key!r} has {twice[id(value)]!r} twice; keep one of them")
        return found

    try:
        document = json.loads(read_text(path), object_pairs_hook=read)
    except (ValueError, RecursionError) as error:
        raise CalibError(f"{path}: not valid JSON ({reason_of(error)[:80]})") from None
    if id(document) in twice:
        raise CalibError(f"{path}: has {twice[id(document)]!r} twice; keep one of them")
    return document


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """Yield a name of an existing file for a library that takes none but UTF-8."""
    if str(path).encode(errors="replace").decode() == str(path):
        yield str(path)
    else:  # only Linux has such names
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"


def checksum(path: Path) -> str:
    """SHA-256 of a finished file, as 'sha256:<hex>'; raises Unsettled while another program writes to it."""
    with settled(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def content_of(path: Path) -> str:
    """The checksum of a file, read once in a process while the file stays the same."""
    found = path.stat()
    return _checksum_of(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@cache
def _checksum_of(path: Path, version: tuple[int, ...]) -> str:
    return checksum(path)


def short_hash(value: Any, digits: int = 8) -> str:
    """Hash of a value that JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]
