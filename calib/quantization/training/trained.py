"""The state of a training, saved so that an interrupted one goes on to the same bits."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.quantization import saved
from calib.quantization.training.trainable import Parameters

import mlx.core as mx
from mlx import optimizers

#: Updates over which the rate rises to its own.
WARM_UP = 10


def adam(rate: float, updates: int) -> optimizers.Adam:
    """Adam with a rate that rises for :data:`WARM_UP` updates, then falls to zero at the last of ``updates``."""
    rising = optimizers.linear_schedule(rate / WARM_UP, rate, WARM_UP)
    falling = optimizers.linear_schedule(rate, 0.0, max(1, updates - WARM_UP))
    # Gradients of single weights are far below Adam's usual eps.
    return optimizers.Adam(
        optimizers.join_schedules([rising, falling], [WARM_UP]), betas=[0.9, 0.99], eps=1e-15, bias_correction=True
    )


@dataclass
class Trained:
    """A training after ``updates`` updates.

    Attributes:
        now: parameters by layer; best: those of the highest held-out PSNR, with ``best_updates`` updates behind them.
        psnr: held-out PSNR by number of updates, dB; of 0 updates is that of the start.
        optimizer: Adam's state.
    """

    now: dict[str, Parameters]
    best: dict[str, Parameters]
    updates: int = 0
    best_updates: int = 0
    psnr: dict[int, float] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def measured(self, psnr: float) -> None:
        """Record the held-out PSNR of ``now``, which becomes the best where it is higher than any before."""
        if not self.psnr or psnr > self.psnr[self.best_updates]:
            self.best, self.best_updates = self.now, self.updates
        self.psnr[self.updates] = psnr

    def save(self, path: Path) -> None:
        """Write all of it to a file, whole or not at all."""
        arrays = {f"{which}/{path}": array for which, tree in self._trees().items() for path, array in _flat(tree)}
        rest = {"updates": self.updates, "best_updates": self.best_updates, "psnr": self.psnr}
        saved.save(path, arrays, rest)

    def _trees(self) -> dict[str, Any]:
        return {"now": self.now, "best": self.best, "optimizer": self.optimizer}

    @classmethod
    def load(cls, path: Path) -> "Trained | None":
        """Read what :meth:`save` wrote; None where it is missing or damaged."""
        with suppress(CalibError, KeyError, TypeError, ValueError, RuntimeError):
            if path.is_file():
                arrays, rest = saved.load(path)
                parts: dict[str, Any] = {}
                for place, array in arrays.items():
                    *folders, last = place.split("/")
                    inner = parts
                    for folder in folders:
                        inner = inner.setdefault(folder, {})
                    inner[last] = array
                psnr = {int(updates): value for updates, value in rest["psnr"].items()}
                counts = (rest["updates"], rest["best_updates"])
                return cls(parts["now"], parts["best"], *counts, psnr, parts["optimizer"])
        return None


def _flat(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, mx.array]]:
    """Arrays of nested dictionaries by path; names of layers hold dots, which MLX's own paths are split at."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value
