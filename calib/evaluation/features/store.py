"""Keeps vectors of numbers by content, a small file each: what was computed of a picture once is read from then on."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from calib.base.files import TEMPORARY_SUFFIX
from calib.base.locks import open_regular

import numpy as np
from numpy.typing import NDArray

DIGEST = hashlib.sha256().digest_size


def key_of(pixels: NDArray[np.uint8]) -> str:
    """The key of a picture of eight bits."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


class Store:
    """Vectors of float32 in ``folder``, by the hexadecimal hash of what they are of."""

    def __init__(self, folder: Path):
        self._folder = folder

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

    def put(self, key: str, vector: NDArray[np.float32]) -> None:
        """Keep a vector; one that cannot be written is computed again another time.

        Files are not synced, which would take longer than computing: what a power cut leaves is found by its checksum.
        """
        values, path = vector.astype("<f4").tobytes(), self._path(key)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{key}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
            try:
                with open(handle, "wb") as file:
                    file.write(hashlib.sha256(values).digest() + values)
                os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key[2:]
