"""Arrays kept by key: in memory, or where that takes too much in a file without a name."""

import errno
import math
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

from calib.base.files import free_bytes

import mlx.core as mx
import numpy as np


class Kept:
    """Lists of float32 arrays by key.

    Args:
        nbytes: bytes of all that will be kept in ``folder``.
        folder: where to keep them, in a file that is gone with this object, or with the process, however it ends; None:
            in memory.

    Raises:
        OSError: the disk lacks the room.
    """

    def __init__(self, nbytes: int = 0, folder: Path | None = None):
        self._arrays: dict[Hashable, list[mx.array]] = {}
        self._places: dict[Hashable, tuple[int, list[tuple[int, ...]]]] = {}
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
        """Keep ``arrays``, evaluated, in float32."""
        if self._file is None:
            self._arrays[key] = list(arrays)
            return
        self._places[key] = (self._end, [array.shape for array in arrays])
        self._file.seek(self._end)
        for array in arrays:
            view = np.array(array).reshape(-1).view(np.uint8).data
            while len(view):
                view = view[self._file.write(view) :]
        self._end = self._file.tell()

    def get(self, key: Hashable) -> list[mx.array]:
        """What was kept by that key."""
        if self._file is None:
            return self._arrays[key]
        start, shapes = self._places[key]
        self._file.seek(start)
        found = []
        for shape in shapes:
            values = np.empty(math.prod(shape), np.float32)
            view = values.view(np.uint8).data
            while len(view):
                view = view[self._file.readinto(view) :]
            found.append(mx.array(values).reshape(shape))
        return found
