"""Arrays kept by key: in memory, or where that takes too much in a file without a name."""

import errno
import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from calib.base.files import free_bytes

import mlx.core as mx
import numpy as np

#: NumPy has no bfloat16: arrays pass as whole numbers of their size, in bytes. (In bytes MLX counts no more than 2³¹.)
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True)
class _Place:
    """Bytes of a file, from ``start`` on, and the arrays that they hold."""

    start: int
    nbytes: int
    arrays: Sequence[tuple[tuple[int, ...], mx.Dtype]]


class Kept:
    """Lists of arrays by key.

    Args:
        nbytes: bytes of all that will be kept in ``folder``.
        folder: where to keep them, in a file that is gone with this object, or with the process, however it ends; None:
            in memory.

    Raises:
        OSError: the disk lacks the room.
    """

    def __init__(self, nbytes: int = 0, folder: Path | None = None):
        self._arrays: dict[Hashable, list[mx.array]] = {}
        self._places: dict[Hashable, _Place] = {}
        self._end = 0
        self._file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if free_bytes(folder) < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            self._file = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (it lives as long as this object)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, nbytes)

    def put(self, key: Hashable, arrays: Sequence[mx.array]) -> None:
        """Keep ``arrays``, evaluated, in place of what was kept by that key."""
        if self._file is None:
            self._arrays[key] = list(arrays)
            return
        size, place = sum(array.nbytes for array in arrays), self._places.get(key, _Place(self._end, 0, ()))
        if size > place.nbytes:
            place = _Place(self._end, size, ())
            self._end += size
        self._places[key] = replace(place, arrays=[(array.shape, array.dtype) for array in arrays])
        self._file.seek(place.start)
        for array in arrays:
            view = np.array(array.reshape(-1).view(_BITS[array.dtype.size])).view(np.uint8).data
            while len(view):
                view = view[self._file.write(view) :]

    def get(self, key: Hashable) -> list[mx.array]:
        """What was kept by that key."""
        if self._file is None:
            return self._arrays[key]
        place, found = self._places[key], []
        self._file.seek(place.start)
        for shape, dtype in place.arrays:
            values = np.empty(math.prod(shape), np.dtype(f"u{dtype.size}"))
            view = values.view(np.uint8).data
            while len(view):
                view = view[self._file.readinto(view) :]
            found.append(mx.array(values).view(dtype).reshape(shape))
        return found
