"""Make a folder whole or not at all, whatever interrupts; what a killed process left is removed by the next."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from calib.base.errors import CalibError, ConfigError
from calib.base.files import check_writable, sync_folder
from calib.base.locks import take_lock


def check_new(key: str, into: Path) -> None:
    """Raise a ConfigError unless ``into``, the value of ``key``, is a new folder that can be made, or an empty one."""
    if into.is_symlink() or (into.exists() and (not into.is_dir() or any(into.iterdir()))):
        raise ConfigError(f"{into}: is not an empty folder; name a new one")
    if into.exists() and (into.samefile(Path.cwd()) or os.path.ismount(into)):
        raise ConfigError(f"{into}: cannot be replaced where it is; name a new folder in it")
    check_writable(key, into.absolute().parent)


@contextmanager
def new_folder(into: Path) -> Iterator[Path]:
    """Yield a folder beside ``into``, which takes its place unless the body raises; its name says whose it is.

    Raises:
        CalibError: another process is making the same folder.
    """
    into = into.absolute()
    made = into.parent / f".{into.name}.calib-new"
    above = [folder for folder in into.parents if not folder.exists()]
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with _held(made.with_suffix(".calib-lock"), into):
            shutil.rmtree(made, ignore_errors=True)  # of a killed process
            made.mkdir()
            try:
                yield made
                for place, _, _ in os.walk(made):
                    sync_folder(Path(place))
                made.replace(into)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        sync_folder(into.parent)
    except BaseException as error:
        for folder in above:
            with suppress(OSError):  # not empty: not this process' alone
                folder.rmdir()
        if isinstance(error, OSError):
            named = str(error.filename or made)
            error.filename = named.replace(str(made), str(into), 1)
        raise


@contextmanager
def _held(path: Path, into: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for the folder ``into``; the file is gone afterwards."""
    file = _locked_file(path, into)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held
        file.close()


def _locked_file(path: Path, into: Path) -> IO[str]:
    """The lock file, locked; again, where its holder has removed it meanwhile."""
    while True:
        file = open(path, "w")  # noqa: SIM115 - it is closed by the caller
        if not take_lock(file, wait=False):
            file.close()
            raise CalibError(f"{into}: another process is making this folder")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()
