"""Read arrays from files that anyone may have written: what they take is compared with the file's size first.

A header of a few bytes may announce terabytes, and a compressed file may hold a thousand times its size.
"""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from calib.base.locks import open_regular

import h5py
import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

#: Arrays may take this many times their file's size, and so many bytes besides: counts, for one, compress well.
TIMES, BESIDES = 4, 1 << 26

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def most_bytes(path: Path) -> int:
    """Bytes that arrays of the file ``path`` may take in memory; raises OSError where it is no file to be opened."""
    with open_regular(path):
        return TIMES * path.stat().st_size + BESIDES


def contents(dataset: h5py.Dataset, most: int) -> NDArray[Any]:
    """All of a dataset of numbers; see :func:`check_dataset`."""
    check_dataset(dataset, most)
    values: NDArray[Any] = dataset[:]
    return values


def check_dataset(dataset: h5py.Dataset, most: int) -> None:
    """Raise ValueError where reading ``dataset`` takes more than ``most`` bytes, or it holds no numbers."""
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if dataset.dtype.kind not in "biuf" or max(dataset.nbytes, chunk) > most:
        raise ValueError(f"{dataset.name} announces {dataset.dtype} of shape {dataset.shape}, too much for its file")


def read_npy(path: Path) -> NDArray[Any]:
    """The array in a ``.npy`` file; raises ValueError where the file is not of the size that its header announces."""
    with open_regular(path) as file:
        _check_header(file, os.fstat(file.fileno()).st_size)
        file.seek(0)
        values: NDArray[Any] = np.load(file, allow_pickle=False)
    return values


@contextmanager
def open_npz(file: Path | IO[bytes]) -> Iterator[NpzFile]:
    """Open an ``.npz`` file whose arrays may all be read; raises ValueError where they take too much memory."""
    with open_regular(file) if isinstance(file, Path) else file as opened:
        most = TIMES * opened.seek(0, os.SEEK_END) + BESIDES
        with zipfile.ZipFile(opened) as archive:
            if (held := sum(member.file_size for member in archive.infolist())) > most:
                raise ValueError(f"unpacks to {held:,} bytes")
            for member in archive.infolist():
                with archive.open(member) as one:
                    _check_header(one, member.file_size)
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as found:
            yield found


def _check_header(file: IO[bytes], size: int) -> None:
    """Raise ValueError unless the header of an array announces what the rest of ``size`` bytes holds."""
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"is of version {version} of NumPy's format")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"announces {dtype} of shape {shape}, which it does not hold")
