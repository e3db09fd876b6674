"""Rows of arrays kept on the host in a 16-bit type: in memory, or where that takes too much in files without a name."""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from calib.base.errors import CalibError
from calib.base.files import take_room

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


class Kept:
    """As many ``rows`` of arrays of the given shapes, without the axis of the rows.

    Args:
        dtype: the 16-bit type.
        folder: where to keep them, in files that are gone with this object or process; None: in memory.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], rows: int, dtype: mx.Dtype, folder: Path | None = None):
        self._dtype = dtype
        self._arrays = [_empty((rows, *shape), folder) for shape in shapes]

    def put(self, rows: slice | NDArray[np.intp], arrays: Sequence[mx.array], of: str) -> None:
        """Keep ``arrays`` as ``rows``; ``of`` names them for errors.

        Raises:
            CalibError: the 16-bit type cannot hold a number.
        """
        halves = [array.astype(self._dtype) for array in arrays]
        finite = mx.stack([mx.isfinite(half).all() for half in halves]).all()
        bits = [half.view(mx.uint16) for half in halves]
        mx.eval(finite, bits)
        if not finite.item():
            kind = str(self._dtype).rpartition(".")[2]
            raise CalibError(f"{of}: passes on numbers that {kind} cannot hold; model.dtype=bfloat16 may do")
        for kept, own in zip(self._arrays, bits, strict=True):
            kept[rows] = np.array(own)

    def get(self, rows: slice | NDArray[np.intp]) -> list[mx.array]:
        """These rows of all arrays, in float32; lazy."""
        found = (mx.array(np.ascontiguousarray(kept[rows])) for kept in self._arrays)
        return [array.view(self._dtype).astype(mx.float32) for array in found]


def bytes_of(shapes: Sequence[tuple[int, ...]], rows: int) -> int:
    """What :class:`Kept` takes for such rows."""
    return 2 * rows * sum(math.prod(shape) for shape in shapes)


def _empty(shape: tuple[int, ...], folder: Path | None) -> NDArray[np.uint16]:
    if folder is None:
        return np.empty(shape, np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder) as file:  # without a name once it is mapped, so that no kill leaves it behind
        take_room(file, 2 * math.prod(shape))
        file.truncate(2 * math.prod(shape))
        return np.memmap(file, np.uint16, "r+", shape=shape)
