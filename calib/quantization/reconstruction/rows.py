"""The calibration states as rows that a transformer's parts are run on, in any order, some images held out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from calib.base.errors import CalibError
from calib.base.progress import counted
from calib.models.architecture import Conditioning, Divisible
from calib.quantization.quantizer import QuantizerInput
from calib.quantization.reconstruction.kept import Kept, bytes_of
from calib.quantization.scratch import folder_for

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Numbers of rows.
Rows: TypeAlias = NDArray[np.intp]
#: The most rows that are run at once where nothing is trained.
AT_ONCE = 32
#: What is kept of a part at once: what it reads, of the full model and of the quantized one, and what it passes on.
COPIES = 3


@dataclass(frozen=True)
class States:
    """All rows; with guidance a state has two.

    Attributes:
        steps: the step index of each row, (rows,).
        times: its timestep, (rows,).
        x: the latents.
        text: the arrays of the conditioning, one of which is ``like``, and the number of tokens of each row, (rows,),
            where texts differ in it.
        seen, held: the rows of the images to train on, and of those held out.
        dtype: the 16-bit type in which rows are kept.
        folder: where they and what parts pass on are kept; None: in memory.
        at_once: rows that are run at once where nothing is trained.
    """

    steps: NDArray[np.intp]
    times: NDArray[np.float32]
    x: Kept
    text: Kept
    like: Conditioning
    lengths: NDArray[np.intp] | None
    seen: Rows
    held: Rows
    dtype: mx.Dtype
    folder: Path | None
    at_once: int

    @classmethod
    def of(cls, work: QuantizerInput, held_out: float, memory: float) -> "States":
        """Read the states of ``work``, hold out that share of the images, and keep rows on disk beyond ``memory``.

        Raises:
            CalibError: there are too few images, or too little room on disk.
        """
        batches = list(work.batches())
        steps, images = (
            np.concatenate([np.tile(getattr(b, of), len(b.x) // len(b.steps)) for b in batches]).astype(np.intp)
            for of in ("steps", "images")
        )
        times = [np.broadcast_to(np.array(b.timesteps.astype(mx.float32)), len(b.x)) for b in batches]
        known = list(dict.fromkeys(images.tolist()))
        count = max(1, round(held_out * len(known)))
        if count >= len(known):
            given = f"of {counted(len(known), 'calibration image')} {count} would be held out, and none be left"
            raise CalibError(f"{given}: the best iterate is chosen by them; raise calibration.images and num_images")
        out = np.isin(images, known[-count:])
        longest = max(b.text.tokens.shape[1] for b in batches)
        texts = [b.text.padded(longest) for b in batches]
        folder = _folder(work, batches[0].x, texts[0], times[0], len(images), memory)
        x = Kept([batches[0].x.shape[1:]], len(images), work.dtype, folder)
        text = Kept([array.shape[1:] for array in texts[0].arrays()], len(images), work.dtype, folder)
        lengths = [length for own in texts for length in own.lengths or ()]
        first = 0
        for batch, own in zip(batches, texts, strict=True):
            rows = slice(first, first := first + len(batch.x))
            x.put(rows, [batch.x], "the states")
            text.put(rows, own.arrays(), "the encoded prompts")
        seen, held = np.flatnonzero(~out), np.flatnonzero(out)
        at_once = min(AT_ONCE, len(batches[0].x))
        of_rows = np.array(lengths, np.intp) if lengths else None
        more = (seen, held, work.dtype, folder, at_once)
        return cls(steps, np.concatenate(times), x, text, texts[0], of_rows, *more)

    @property
    def all(self) -> Rows:
        return np.arange(len(self.steps))

    def batches(self, rows: Rows) -> Iterator[Rows]:
        """Yield ``rows``, as many at a time as are run at once."""
        for first in range(0, len(rows), self.at_once):
            yield rows[first : first + self.at_once]

    def arguments(self, rows: Rows) -> tuple[Conditioning, mx.array, tuple[int, ...]]:
        """The arguments of :meth:`Divisible.parts` for ``rows``."""
        (x,), arrays = self.x.get(rows), self.text.get(rows)
        times = mx.array(self.times[rows])
        mx.eval(times)
        lengths = None if self.lengths is None else tuple(self.lengths[rows].tolist())
        return self.like.of_arrays(arrays, lengths), times, x.shape

    def kept(self, arrays: Sequence[mx.array]) -> Kept:
        """Room for arrays like these, whatever their number of rows, of all rows."""
        return Kept([array.shape[1:] for array in arrays], len(self.steps), self.dtype, self.folder)


def _folder(
    work: QuantizerInput, x: mx.array, text: Conditioning, times: NDArray[np.float32], rows: int, memory: float
) -> Path | None:
    """None where what parts read and pass on stays within ``memory``, else a folder that has the room."""
    assert isinstance(work.architecture, Divisible)
    read = bytes_of([array.shape[1:] for array in (x, *text.arrays())], rows)
    passed, most = [x[:1]], 0
    for part in work.architecture.parts(text[:1], mx.array(times[:1]), passed[0].shape):
        passed = part(passed)  # nothing is computed: for the shapes
        most = max(most, bytes_of([array.shape[1:] for array in passed], rows))
    if (total := COPIES * most + read) <= memory:
        return None
    why = f"more than quantizer.memory_gb={memory / 1e9:g}"
    return folder_for(total, "what blocks read and pass on", why, work.scratch)
