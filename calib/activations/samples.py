"""Activations stored for later reconstruction: some rows of every image, or all, in 16 bits per value.

While a step is collected they are written to one file beside its statistics after each forward pass, so that memory
stays constant; a table in the step's header has the offset and checksum of each tap's rows. A row is a token of one
image in one guidance half. Rows are in the order of the blocks; within a block all conditional images, then all
unconditional ones; within an image by ascending token.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from calib.activations.bits import DTYPES
from calib.base.errors import CalibError
from calib.base.files import replacing
from calib.base.seeds import generator
from calib.dataset.store import StateDtype

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


class Samples(StrEnum):
    """Selection of rows to store: none, some of each image, or all."""

    NONE = "none"
    ROWS = "rows"
    ALL = "all"


@lru_cache(maxsize=100_000)
def _drawn(count: int, seed: int, image_id: int, step: int, tokens: int) -> NDArray[np.int32]:
    if count == tokens:
        return np.arange(tokens, dtype=np.int32)
    order = generator("seed", seed, image_id, step, tokens).permutation(tokens)
    return np.sort(order[:count]).astype(np.int32)


@dataclass(frozen=True)
class SampleSettings:
    """Selection of rows to store, their number per image and guidance half, and their type; None: the model's."""

    kind: Samples = Samples.NONE
    rows_per_image: int = 2
    dtype: StateDtype | None = None

    def rows(self, tokens: int) -> int:
        """Number of rows per image and guidance half at a layer of ``tokens`` tokens."""
        if self.kind is Samples.NONE:
            return 0
        return tokens if self.kind is Samples.ALL else min(self.rows_per_image, tokens)

    def stored(self, dtype: str) -> str:
        """The type in which activations of type ``dtype`` are stored."""
        return self.dtype.value if self.dtype is not None else "bfloat16" if dtype == "bfloat16" else "float16"

    def tokens(self, seed: int, image_id: int, step: int, tokens: int) -> NDArray[np.int32]:
        """Tokens to store of one image at one step, ascending; the same at every layer of ``tokens`` tokens."""
        return _drawn(self.rows(tokens), seed, image_id, step, tokens)


class SampleWriter:
    """Writes the rows of one step to the file ``path``, whole or not at all.

    Attributes:
        table: by tap the rows' type, the layer's number of tokens, and segments of (offset, rows, checksum).
    """

    def __init__(self, path: Path, settings: SampleSettings, seed: int, step: int):
        self._path, self._settings, self._seed, self._step = path, settings, seed, step
        self._stack = ExitStack()
        temporary = self._stack.enter_context(replacing(path))
        self._file: IO[bytes] = self._stack.enter_context(temporary.open("wb"))
        self._waiting: list[tuple[str, int, mx.array, mx.array]] = []
        self._forward: list[tuple[str, int, mx.array, mx.array]] = []
        self.table: dict[str, Any] = {}

    def take(self, name: str, x: mx.array, images: Sequence[int]) -> mx.array:
        """Select rows of the activation ``x`` (rows, …, channels) of ``images``; lazy.

        Returns ``x`` with a dependency on the selected rows.
        """
        rows = x.reshape(len(images), -1, x.shape[-1])
        tokens = rows.shape[1]
        kept = np.stack([self._settings.tokens(self._seed, i, self._step, tokens) for i in images])
        chosen = rows if kept.shape[1] == tokens else mx.take_along_axis(rows, mx.array(kept)[..., None], axis=1)
        stored = self._settings.stored(DTYPES[x.dtype])
        packed = chosen.astype(mx.bfloat16 if stored == "bfloat16" else mx.float16)
        lost = mx.any(mx.isinf(packed) & mx.isfinite(chosen))
        self.table.setdefault(name, {"dtype": stored, "tokens": tokens, "segments": []})
        self._forward.append((name, x.shape[-1], mx.contiguous(packed).view(mx.uint16), lost))
        tied: mx.array = mx.depends([x], [self._forward[-1][2], lost])[0]
        return tied

    def end_forward(self) -> list[mx.array]:
        """Arrays to evaluate with the forward pass whose graph is complete."""
        return [value for *_, packed, lost in self._forward for value in (packed, lost)]

    def settle(self) -> None:
        """Write the rows of the previous forward pass; called while a forward pass is computed."""
        self._write()
        self._waiting, self._forward = self._forward, []

    def _write(self) -> None:
        for name, channels, packed, lost in self._waiting:
            if lost.item():
                raise CalibError(
                    f"storage.dtype={self.table[name]['dtype']}: activations at {name} exceed its range at step "
                    f"{self._step}; use storage.dtype=bfloat16"
                )
            content = np.array(packed).tobytes()
            rows = len(content) // (2 * channels)
            self.table[name]["segments"].append((self._file.tell(), rows, zlib.crc32(content)))
            try:
                self._file.write(content)
            except OSError as error:
                error.filename = str(self._path)
                raise
        self._waiting = []

    def finish(self) -> dict[str, Any]:
        """Write the remaining rows and rename the file to ``path``; returns the table."""
        self._write()
        self._stack.close()
        return self.table

    def abandon(self, error: BaseException) -> None:
        """Remove the temporary file after ``error``."""
        self._stack.__exit__(type(error), error, error.__traceback__)


def read_rows(path: Path, entry: Mapping[str, Any], channels: int) -> Iterator[NDArray[np.uint16]]:
    """Yield one tap's rows by segment, (rows, channels) bit patterns; raises ValueError where the file is damaged."""
    with open(path, "rb") as file:
        for offset, rows, checksum in entry["segments"]:
            file.seek(offset)
            content = file.read(2 * rows * channels)
            if zlib.crc32(content) != checksum:
                raise ValueError("is damaged")
            yield np.frombuffer(content, np.uint16).reshape(rows, channels)


def shifted(table: Mapping[str, Any], by: int) -> dict[str, Any]:
    """``table`` with all offsets increased by ``by`` bytes."""
    return {
        name: {**entry, "segments": [(offset + by, rows, crc) for offset, rows, crc in entry["segments"]]}
        for name, entry in table.items()
    }


def joined(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One table with the segments of several, in their order."""
    return {
        name: {**entry, "segments": [segment for table in tables for segment in table[name]["segments"]]}
        for name, entry in tables[0].items()
    }


@dataclass(frozen=True)
class RowIdentity:
    """Image id and guidance half (0 conditional, 1 unconditional) of each row of a layer, (rows,)."""

    image: NDArray[np.int64]
    half: NDArray[np.uint8]

    @classmethod
    def of(cls, blocks: Sequence[Sequence[int]], halves: int, each: int) -> "RowIdentity":
        """The identity of rows of ``blocks`` of image ids, with ``each`` rows per image and half."""
        pairs = [(image, half) for block in blocks for half in range(halves) for image in block for _ in range(each)]
        table = np.array(pairs, np.int64).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1].astype(np.uint8))
