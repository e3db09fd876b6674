"""Packed layers that a quantizer has finished, in files, so that the same work goes on after an interruption."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import remove_abandoned
from calib.models.packed import Packed
from calib.quantization import saved

import mlx.core as mx

#: Seconds of work that an interruption may cost; what takes less in all is never written.
EVERY = 60.0
#: The folder of all such work within a quantizer's own.
FOLDER = "layers"
ARRAYS = ("weight", "scales", "biases")


class Finished:
    """Layers in the order in which they are finished, and in files of a folder.

    Attributes:
        layers: those finished before an interruption and since, by name.
        rest: what else is to be kept, as JSON has it.

    Args:
        scratch: the quantizer's folder; None: nothing is kept.
        key: names the work, and all that it depends on beside what ``scratch`` stands for.
        rest: its value at the beginning.
    """

    def __init__(self, scratch: Path | None, key: str, rest: dict[str, Any]):
        self.layers: dict[str, Packed] = {}
        self.rest = rest
        self._folder = None if scratch is None else scratch / FOLDER / key
        self._new: list[str] = []
        self._parts, self._written = 0, time.monotonic()
        if self._folder is not None and self._folder.is_dir():
            remove_abandoned(self._folder)  # what a killed process was writing
            while self._read():
                pass
            for path in self._folder.glob("*.safetensors"):
                if path >= self._path():  # behind a damaged or lost one: of what is made again in other parts
                    path.unlink(missing_ok=True)

    def add(self, layers: Mapping[str, Packed]) -> None:
        """Add layers, evaluated; they are written if that was done a while ago."""
        self.layers.update(layers)
        self._new += layers
        if time.monotonic() - self._written >= EVERY:
            self._write()

    def close(self) -> None:
        """Write what is left, of work that took long enough to be written at all."""
        if self._parts and self._new:
            self._write()

    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._parts:04}.safetensors"

    def _write(self) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        new = {name: self.layers[name] for name in self._new}
        arrays = {f"{name}/{part}": getattr(packed, part) for name, packed in new.items() for part in ARRAYS}
        shapes = {name: [packed.bits, packed.group_size, packed.rotation] for name, packed in new.items()}
        saved.save(self._path(), arrays, {"layers": shapes, "rest": self.rest})
        self._new, self._parts, self._written = [], self._parts + 1, time.monotonic()

    def _read(self) -> bool:
        """Take over the next file; False where there is none, or it is damaged."""
        with suppress(CalibError, KeyError, TypeError, ValueError, RuntimeError):
            if self._path().is_file():
                arrays, held = saved.load(self._path())
                self.layers.update({name: _packed(arrays, name, *shape) for name, shape in held["layers"].items()})
                self.rest, self._parts = dict(held["rest"]), self._parts + 1
                return True
        return False


def _packed(arrays: Mapping[str, mx.array], name: str, bits: int, group_size: int, rotation: int) -> Packed:
    weight, scales, biases = (arrays[f"{name}/{part}"] for part in ARRAYS)
    return Packed(weight, scales, biases, bits, group_size, rotation)


def forget(scratch: Path) -> None:
    """Remove the files of a quantizer that is done; folders stay, as another process may write there."""
    for path in (scratch / FOLDER).glob("*/*.safetensors"):
        path.unlink(missing_ok=True)
