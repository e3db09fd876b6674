"""Files of safetensors as bytes: what a header says, and tensors copied from one file into several, without MLX.

A file is the length of its header in 8 bytes, the header in JSON, and the tensors' bytes. Nothing is held but a piece.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from calib.base.errors import CalibError

#: What is copied at a time, in bytes.
PIECE = 8 << 20
_LENGTH = 8
#: The longest header that the format allows.
_MOST_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its type by the format's name, and where its bytes begin and end in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, in the order of their bytes; a CalibError where it is none, or was cut."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if length > min(size, _MOST_HEADER):
                raise ValueError
            document = json.loads(file.read(length))
        first, found = _LENGTH + length, {}
        for name, entry in document.items():
            if name != "__metadata__":
                start, end = (first + int(offset) for offset in entry["data_offsets"])
                if not first <= start <= end:
                    raise ValueError
                found[name] = Tensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CalibError(f"{path}: not a readable safetensors file; copy it again") from None
    if (whole := max((tensor.end for tensor in found.values()), default=first)) > size:
        raise CalibError(f"{path}: was cut, it has {size} of {whole} bytes; copy it again")
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def in_shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """``tensors`` in their order, in parts of at most ``most`` bytes; a larger one stands alone."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def write(
    path: Path,
    source: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    advance: Callable[[int], object],
) -> None:
    """Write ``tensors`` of the file ``source`` into a new file, synced; ``advance`` is told of bytes written."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    text += b" " * (-len(text) % _LENGTH)  # so that tensors lie at multiples of 8
    with open(path, "xb") as file, open(source, "rb") as given:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        copy(given, file, ((tensor.start, tensor.nbytes) for tensor in tensors.values()), advance)
        _synced(file)


def copy_file(path: Path, source: Path, advance: Callable[[int], object]) -> None:
    """Copy a file, synced; ``advance`` is told of bytes written."""
    with open(path, "xb") as file, open(source, "rb") as given:
        copy(given, file, [(0, os.fstat(given.fileno()).st_size)], advance)
        _synced(file)


def copy(given: BinaryIO, file: BinaryIO, places: Iterable[tuple[int, int]], advance: Callable[[int], object]) -> None:
    """Copy bytes of ``given``, by their first and number, to where ``file`` stands."""
    for start, left in places:
        given.seek(start)
        while left:
            piece = given.read(min(PIECE, left))
            if not piece:
                raise CalibError(f"{given.name}: was cut while it was read; run the same command again")
            file.write(piece)
            left -= len(piece)
            advance(len(piece))


def _synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
