"""Batches of stored states with encoded prompts, for forward passes of the transformer outside of sampling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from calib.activations.states import check_states, read_states
from calib.activations.step import prompt_of
from calib.dataset.manifest import Manifest
from calib.models.architecture import Conditioning
from calib.models.model import DiffusionModel
from calib.models.parallel import parts_of

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """A batch of states: with guidance all conditional rows first, then as many unconditional rows.

    Attributes:
        images, steps: image id and step index of each state; with guidance there are two rows for each.
        x: (rows, height, width, channels) in the model's type.
        timesteps: (rows,), evaluated; of size 1 where all states are of one step.
    """

    images: tuple[int, ...]
    steps: tuple[int, ...]
    x: mx.array
    text: Conditioning
    timesteps: mx.array

    def of_states(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum ``values`` (rows,) over the guidance halves of each state, (states,)."""
        total: NDArray[np.float64] = values.reshape(-1, len(self.images)).sum(axis=0)
        return total


@dataclass(frozen=True)
class StoredStates:
    """States ``steps`` of ``images`` of a dataset.

    Attributes:
        others: further images that the run collected, whose states are not replayed.
    """

    data_dir: Path
    manifest: Manifest
    images: Sequence[int]
    steps: Sequence[int]
    others: Sequence[int] = ()

    def check(self) -> None:
        """Raise where a state is missing or damaged."""
        check_states(self.data_dir, self.manifest, self.images, self.steps)

    def batches(self, model: DiffusionModel, size: int, mixed: bool = False) -> list["LazyBatch"]:
        """Batches of at most ``size`` states, each of one step or, if ``mixed``, of any steps.

        A batch is read and its prompts encoded when it is called; of a streamed model they are encoded now, as it
        leaves no room for text encoders. Images are taken in blocks of ``size``.
        """
        if model.streamed is not None:
            model.hold([prompt_of(self.data_dir, self.manifest.images[i]) for i in self.images])
        found = []
        for first in range(0, len(self.images), size):
            block = self.images[first : first + size]
            pairs = [(image, step) for step in self.steps for image in block]
            each = size if mixed else len(block)
            found += [pairs[i : i + each] for i in range(0, len(pairs), each)]
        return [partial(self._batch, model, chosen) for chosen in found]

    def _batch(self, model: DiffusionModel, pairs: Sequence[tuple[int, int]]) -> Batch:
        images, steps = zip(*pairs, strict=True)
        manifest, guidance = self.manifest, self.manifest.cfg_weight > 0
        text = model.encode([prompt_of(self.data_dir, manifest.images[i]) for i in images], manifest.cfg_weight)
        x = mx.array(np.concatenate([read_states(self.data_dir, manifest, [i], step) for i, step in pairs]))
        rows = (mx.concatenate([x, x]) if guidance else x).astype(model.dtype)
        times = [manifest.timesteps[step] for step in steps] * (2 if guidance else 1)
        timesteps = mx.array(times[:1] if len(set(steps)) == 1 else times).astype(model.time_dtype)
        mx.eval(rows, timesteps)
        return Batch(images, steps, rows, text, timesteps)


#: A batch that is made when it is called.
LazyBatch: TypeAlias = Callable[[], Batch]


def timesteps_of_rows(batch: Batch, part: slice) -> mx.array:
    """The timesteps of the rows ``part``, evaluated."""
    if batch.timesteps.size == 1:
        return batch.timesteps
    chosen = batch.timesteps[part]
    return chosen if chosen.size > 1 else chosen.reshape(1)


def output_of(model: DiffusionModel, batch: Batch) -> mx.array:
    """The transformer's output v for a batch, (rows, height, width, channels); begun."""
    outputs = model.velocities(batch.x, batch.text, batch.timesteps, parts_of(len(batch.x)))
    mx.async_eval(outputs)
    return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]
