"""Keeps vectors of numbers by content, a small file each: what was computed of a picture once is read from then on."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from calib.base.files import remove_abandoned, replacing
from calib.base.locks import open_regular
from calib.base.progress import Progress

import numpy as np
from numpy.typing import NDArray

DIGEST = hashlib.sha256().digest_size
#: Things that a processor, or a GPU, takes at once.
AT_ONCE, AT_ONCE_GPU = 4, 64
#: Of fewer things whoever asks shows the progress.
MANY = 64

Pixels = NDArray[np.uint8]
T = TypeVar("T")


def key_of(pixels: Pixels) -> str:
    """The hash of a picture."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def in_blocks(keys: Sequence[T]) -> list[Sequence[T]]:
    """``keys`` in as many as are computed at once."""
    from calib.base.device import cores, on_gpu  # MLX, which who wants names of measures alone does without

    size = AT_ONCE_GPU if on_gpu() else AT_ONCE * cores()
    return [keys[i : i + size] for i in range(0, len(keys), size)]


class Store:
    """Vectors of float32 in ``folder``, by the hexadecimal hash of what they are of."""

    def __init__(self, folder: Path):
        self._folder, self._cleaned = folder, False

    def get(self, key: str, length: int) -> NDArray[np.float32] | None:
        """The vector of ``length`` numbers; None where there is none, or its file is damaged."""
        try:
            with open_regular(self._path(key)) as file:
                content = file.read(DIGEST + 4 * length + 1)
        except OSError:
            return None
        digest, values = content[:DIGEST], content[DIGEST:]
        sound = len(values) == 4 * length and hashlib.sha256(values).digest() == digest
        return np.frombuffer(values, "<f4") if sound else None

    def made(
        self,
        items: Mapping[str, T],
        length: int,
        make: Callable[[Sequence[T]], NDArray[np.float32]],
        unit: str = "picture",
    ) -> dict[str, NDArray[np.float32]]:
        """The vector of each of ``items`` by its key; what is not kept yet is made, a block at a time, and kept."""
        known = {key: found for key in items if (found := self.get(key, length)) is not None}
        missing = [key for key in items if key not in known]
        many = len(missing) > MANY
        with Progress("features", len(missing), unit, delay=2) if many else nullcontext() as progress:
            for chosen in in_blocks(missing):
                for key, vector in zip(chosen, make([items[key] for key in chosen]), strict=True):
                    known[key] = vector
                    self.put(key, vector)
                if progress is not None:
                    progress.advance(len(chosen))
        return known

    def put(self, key: str, vector: NDArray[np.float32]) -> None:
        """Keep a vector; one that cannot be written is computed again another time.

        Files are not synced, which would take longer than computing: what a power cut leaves is found by its checksum.
        Temporary ones lie directly in the store's folder, where those of killed processes are removed once.
        """
        if not self._cleaned:
            remove_abandoned(self._folder)
            self._cleaned = True
        values = vector.astype("<f4").tobytes()
        with suppress(OSError), replacing(self._path(key), beside=self._folder / key, sync=False) as temporary:
            temporary.write_bytes(hashlib.sha256(values).digest() + values)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key[2:]
