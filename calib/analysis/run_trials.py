"""Run trials: quantize one layer's weights or one tap's input, replay stored states, and compare the outputs.

A forward pass starts after the block before the quantized layer, where the architecture is
:class:`~calib.models.architecture.Resumable`: outputs of that block are kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from calib.activations.batches import Batch, StoredStates, timesteps_of_rows
from calib.activations.taps import TapPoint, tapped
from calib.analysis.grid import Grid
from calib.analysis.trials import Task, Trial, TrialCache
from calib.base.device import on_gpu
from calib.base.errors import CalibError
from calib.base.progress import Progress
from calib.models.architecture import Architecture, Resumable
from calib.models.grids import searched
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel
from calib.models.packed import half_of
from calib.models.parallel import by_parts, shared_cores
from calib.models.streamed import BY_GRADIENTS, refuse_streamed

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray


def rounded(weight: mx.array, bits: int, group_size: int) -> mx.array:
    """``weight`` rounded on searched grids with 16-bit scales and biases, as quantizers do, and dequantized."""
    half = half_of(weight.dtype)
    return searched(weight, bits, group_size, half, rounds=2, each_end=False).dequantize(weight.dtype)


class TrialRunner:
    """Runs trials of one model on states that stay in memory, block by block."""

    def __init__(self, model: DiffusionModel, states: StoredStates, known: TrialCache):
        refuse_streamed(model.architecture, "sensitivities by trials (sensitivity.method=trials)", BY_GRADIENTS)
        self._model, self._states, self._known = model, states, known
        self._layers = model.architecture.layers()
        # Rows of several steps in one batch: one forward pass of many rows is cheaper than many.
        size = plan_memory(model, states.manifest.cfg_weight > 0).batch_size
        self._batches = [batch() for batch in states.batches(model, size, mixed=True)]
        self._outputs: list[Any] = [None] * len(self._batches)  # None: forward passes start at the beginning
        self._block = -1  # the block whose outputs are kept

    def run(self, tasks: Sequence[Task]) -> None:
        """Run ``tasks`` in network order; the results of each are cached as soon as they are complete."""
        architecture = self._model.architecture

        def begins(task: Task) -> int:
            blocks = {architecture.block_of(name) for name in task.names}
            # Embedders affect all blocks, and so does an input that layers of several blocks share, as MMDiT's adaLN's.
            first = blocks.pop() if len(blocks) == 1 and isinstance(architecture, Resumable) else None
            return -1 if first is None else first

        total = sum(len(task.trials) for task in tasks)
        rows = max(len(batch.x) for batch in self._batches)
        with Progress("measure sensitivities", total, "trial") as progress, shared_cores(rows):
            reference = [self._forward(batch, None) for batch in self._batches]
            energy = self._by_step([_energies(v) for v in reference])
            for task in sorted(tasks, key=begins):
                self._advance(max(begins(task), 0) - 1)
                results = {}
                for trial in task.trials:
                    with self._quantized(task, trial):
                        errors = [
                            self._error(batch, output, v)
                            for batch, output, v in zip(self._batches, self._outputs, reference, strict=True)
                        ]
                    results[trial.key] = self._relative(self._by_step(errors), energy, task, trial)
                    progress.advance()
                self._known.add(task.kind, task.key, results)

    def _error(self, batch: Batch, output: Any, v: mx.array) -> mx.array:
        error = _energies(self._forward(batch, output) - v)
        if on_gpu():
            mx.eval(error)  # two forward passes at once would need the memory of two
        return error

    def _relative(
        self, errors: NDArray[np.float64], energy: NDArray[np.float64], task: Task, trial: Trial
    ) -> list[float]:
        """S at each step; raises where an output is not finite, or zero at full precision."""
        for step, error, whole in zip(self._states.steps, errors, energy, strict=True):
            if not (np.isfinite(error) and np.isfinite(whole) and whole > 0):
                what = f"{task.key} at {trial.key.replace('x', ' bits in groups of ')}"
                wider = "" if self._model.dtype == mx.float32 else "model.dtype=float32 may do, or "
                raise CalibError(
                    f"sensitivity of {what}, step {step}: the model's output is not finite, or zero at full precision; "
                    f"{wider}other states may do"
                )
        found: list[float] = (errors / energy).tolist()
        return found

    def _by_step(self, energies: Sequence[mx.array]) -> NDArray[np.float64]:
        """Sums of the rows' ``energies`` at each step, (steps,)."""
        mx.eval(list(energies))
        total = dict.fromkeys(self._states.steps, 0.0)
        for batch, values in zip(self._batches, energies, strict=True):
            for step, value in zip(batch.steps, batch.of_states(np.array(values, np.float64)), strict=True):
                total[step] += value
        return np.array(list(total.values()))

    @contextmanager
    def _quantized(self, task: Task, trial: Trial) -> Iterator[None]:
        """Quantize the weights or the input of ``task`` within the context."""
        if trial.group_size is None:
            grid = Grid.over(*task.range, trial.bits)
            apart = [TapPoint(name, "") for name in task.names]
            with tapped(self._model.architecture, apart, lambda _, x: grid.apply_mx(x)):
                yield
            return
        layer = self._layers[task.names[0]]
        own = layer.weight
        try:
            layer.weight = rounded(own, trial.bits, trial.group_size)
            mx.eval(layer.weight)
            yield
        finally:
            layer.weight = own

    def _advance(self, block: int) -> None:
        """Compute the outputs of ``block`` for every batch from those of the earlier block that are kept."""
        while self._block < block:
            self._outputs = [
                self._next(batch, output) for batch, output in zip(self._batches, self._outputs, strict=True)
            ]
            self._block += 1

    def _next(self, batch: Batch, output: Any) -> Any:
        architecture = self._model.architecture
        assert isinstance(architecture, Resumable)
        kept: list[Any] = []
        with architecture.keeping(self._block + 1, kept.append):
            # The outputs of all parts are kept; the rest of the forward pass is never evaluated.
            self._forward(batch, output, lazily=True)
        mx.eval(kept)
        return tree_map(lambda *parts: None if parts[0] is None else mx.concatenate(list(parts)), *kept)

    def _forward(self, batch: Batch, output: Any, lazily: bool = False) -> mx.array:
        """The output v of a batch, (rows, …), by a forward pass started after the block whose output is ``output``."""
        compute = partial(self._part, batch, output)
        return by_parts(len(batch.x), compute, lazily).astype(mx.float32)

    def _part(self, batch: Batch, output: Any, part: slice) -> mx.array:
        architecture: Architecture = self._model.architecture
        rows, text, times = batch.x[part], batch.text[part], timesteps_of_rows(batch, part)
        if output is None:
            return architecture.velocity(rows, text, times)
        assert isinstance(architecture, Resumable)
        own = tree_map(lambda array: None if array is None else array[part], output)
        return architecture.velocity_after(self._block, own, rows, text, times)


def _energies(x: mx.array) -> mx.array:
    """Σx² of each row in float32, (rows,); lazy."""
    return mx.sum(mx.square(x.astype(mx.float32)), axis=tuple(range(1, x.ndim)))
