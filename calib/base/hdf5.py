"""Open HDF5 files, all of the package's, without HDF5's own locks.

HDF5_USE_FILE_LOCKING would override h5py's ``locking=False``, and with the locks of HDF5 a process cannot open a file
twice in different ways, as a notebook does. So HDF5 is given files that are open already, as :mod:`calib.base.locks`
opens them. Not for writing: an error or an interruption in Python below HDF5 would end the process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from calib.base.errors import CalibError
from calib.base.files import replacing
from calib.base.locks import NO_LOCKS

import h5py

LOCKING = "HDF5_USE_FILE_LOCKING"


def opened(file: IO[bytes]) -> h5py.File:
    """The HDF5 file in ``file``, for reading; to be closed before it."""
    return h5py.File(file, "r")


def in_memory() -> h5py.File:
    """A new file without a place on the disk; ``file.id.get_file_image()`` has its bytes once it is flushed."""
    return h5py.File("memory", "w", driver="core", backing_store=False)


@contextmanager
def writing(path: Path) -> Iterator[tuple[h5py.File, Path]]:
    """Yield a new file and its temporary path; it becomes ``path``, whole or not at all."""
    # HDF5 locks what it writes where the variable says so, and could not where the temporary file is locked already.
    with replacing(path, lock=False) as temporary:
        try:
            file = h5py.File(temporary, "w", locking=False)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            asked = f"{LOCKING}={os.environ.get(LOCKING)} asks for locks, which this file system does not have"
            raise CalibError(f"{path}: {asked}; unset it and run the same command again") from None
        with file:
            yield file, temporary
