"""Measure sensitivities: quantize one layer, replay stored states from that layer's block on, compare the outputs.

METHODS: S = mean over steps of ‖v - v_q‖² / ‖v‖². What was measured is kept in ``cache_dir`` by content, layer by
layer, so that an interrupted measurement goes on, and every later budget is instant.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from calib.activations.batches import Batch, StoredStates, by_parts, timesteps_of_rows
from calib.activations.replay import shared_cores
from calib.activations.states import identity_of
from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.grid import Grid
from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.plan import GROUP_SIZES, WEIGHT_BITS
from calib.analysis.sensitivities import Sensitivities
from calib.analysis.trials import Trial, TrialCache
from calib.base.device import on_gpu
from calib.base.errors import CalibError
from calib.base.files import locked, short_hash
from calib.base.progress import Progress, say
from calib.base.versions import versions
from calib.dataset.timesteps import phase_bounds
from calib.models.architecture import Architecture, Resumable
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map
from numpy.typing import NDArray

#: Bits at which the input of a layer is tried.
ACTIVATION_BITS = (4, 6, 8)


def quantizable(layer: nn.Module) -> list[int]:
    """Group sizes with which MLX can quantize the layer's weights; none for what is not linear."""
    if not isinstance(layer, nn.Linear):
        return []
    return [size for size in GROUP_SIZES if layer.weight.shape[-1] % size == 0]


def rounded(weight: mx.array, bits: int, group_size: int) -> mx.array:
    """``weight`` as MLX's affine rounding leaves it, with 16-bit scales and biases, in its own type; lazy."""
    half = weight.dtype if weight.dtype != mx.float32 else mx.float16
    packed, scales, biases = mx.quantize(weight.astype(half), group_size=group_size, bits=bits)
    kept = (scales.astype(weight.dtype), biases.astype(weight.dtype))
    restored: mx.array = mx.dequantize(packed, *kept, group_size=group_size, bits=bits)
    return restored


def measure(
    model: Callable[[], DiffusionModel],
    layers: Mapping[str, nn.Module],
    points: Sequence[TapPoint],
    states: StoredStates,
    input_ranges: Mapping[str, tuple[float, float]],
    cache_dir: Path,
    group_sizes: Sequence[int] = GROUP_SIZES,
    drawn_by: tuple[str, str] | None = None,
) -> Sensitivities:
    """Sensitivities of all of ``layers``, from the cache where they are known.

    Args:
        model: loads the model; called only if something is missing.
        layers: linear layers by canonical name, of the model or of one of its shape without weights.
        points: taps; layers of one tap read one array, which is quantized for all of them at once.
        input_ranges: full range of the input of each tap, by its name.
        drawn_by: fingerprint and text encoders of the model; None: as the dataset says, which an older one does not.
    """
    sizes = {name: [size for size in quantizable(layer) if size in group_sizes] for name, layer in layers.items()}
    trials = {name: [Trial(*pair) for pair in product(WEIGHT_BITS, own)] for name, own in sizes.items() if own}
    manifest = states.manifest
    identity = _identity(states, drawn_by or (str(manifest.fingerprint), str(manifest.text_encoders)))
    known = TrialCache(cache_dir / "sensitivity" / f"{short_hash(identity, digits=16)}.json", identity)
    waiting = f"waiting for the process that measures the same sensitivities ({known.path})"
    with locked(known.path.with_suffix(".lock"), lambda: say(waiting)):
        known.load()
        todo = _todo(known, trials, points, input_ranges)
        if todo:
            states.check()
            _Measuring(model(), states, known).run(todo)
    return Sensitivities(
        steps=tuple(states.steps),
        num_steps=states.manifest.num_steps,
        weights={
            name: {(t.bits, t.group_size or 0): np.array(known.found["weights"][name][t.key]) for t in own}
            for name, own in trials.items()
        },
        activations={
            name: {t.bits: np.array(known.found["inputs"][key][t.key]) for t in _INPUT_TRIALS}
            for point in points
            if (key := _input_key(point, input_ranges)) is not None
            for name in point.names
        },
        shapes={name: (layers[name].weight.shape[0], layers[name].weight.shape[-1]) for name in trials},
    )


def sensitivities(
    model: Callable[[], DiffusionModel],
    architecture: Architecture,
    layers: Mapping[str, LayerSummary],
    states: StoredStates,
    cache_dir: Path,
    group_sizes: Sequence[int] = GROUP_SIZES,
) -> Sensitivities:
    """:func:`measure` of the layers that statistics have: inputs over the full range that was seen.

    Args:
        architecture: the model's, or one of its shape without weights.
    """
    points = []
    for point in tap_points(architecture, TapSelection()):
        if names := [name for name in point.names if name in layers]:
            points.append(TapPoint(names[0], point.kind, tuple(names[1:])))
    drawn_by = None if states.manifest.fingerprint else (model().fingerprint, model().text_encoders)
    ranges = {point.name: (layers[point.name].minimum, layers[point.name].maximum) for point in points}
    own = {name: layer for name, layer in architecture.layers().items() if name in layers}
    return measure(model, own, points, states, ranges, cache_dir, group_sizes, drawn_by)


def pretended(
    architecture: Architecture, names: Collection[str], num_steps: int, group_sizes: Sequence[int]
) -> tuple[dict[str, LayerSummary], Sensitivities]:
    """Layers and sensitivities that nobody measured, of the shapes that a measurement of ``names`` would have.

    For trying a heuristic before anything is loaded.
    """
    every = {name: layer for name, layer in architecture.layers().items() if name in names and quantizable(layer)}
    steps = tuple(first for first, _ in phase_bounds(num_steps).values())
    weights = {
        name: {
            (b, g): np.full(len(steps), 4.0**-b) for b in WEIGHT_BITS for g in quantizable(layer) if g in group_sizes
        }
        for name, layer in every.items()
    }
    shapes = {name: (layer.weight.shape[0], layer.weight.shape[-1]) for name, layer in every.items()}
    return dict.fromkeys(every, PROBE), Sensitivities(steps, num_steps, weights, {}, shapes)


_INPUT_TRIALS = [Trial(bits) for bits in ACTIVATION_BITS]


def _input_key(point: TapPoint, ranges: Mapping[str, tuple[float, float]]) -> str | None:
    """The layers of a tap and the range their input is quantized over: others are another measurement."""
    if point.kind == "block" or point.name not in ranges:
        return None
    low, high = ranges[point.name]
    return f"{' '.join(point.names)} [{low:.6g}, {high:.6g}]"


def _identity(states: StoredStates, drawn_by: tuple[str, str]) -> dict[str, Any]:
    """What a measurement follows from, besides the layer."""
    manifest = states.manifest
    return {
        "version": 1,  # of the way of measuring
        "fingerprint": drawn_by[0],
        "text_encoders": drawn_by[1],
        "cfg_weight": manifest.cfg_weight,
        "steps": list(states.steps),
        "timesteps": [f"{manifest.timesteps[step]:.9g}" for step in states.steps],
        "images": [identity_of(states.data_dir, manifest.images[i]) for i in states.images],
        "device": mx.default_device().type.name,
        "mlx": versions()["mlx"],
    }


@dataclass(frozen=True)
class _Task:
    """Trials of one layer's weights, or of the input of one tap; ``block`` is where its effect begins."""

    kind: str
    key: str
    names: tuple[str, ...]
    trials: list[Trial]
    range: tuple[float, float] = (0.0, 0.0)


def _todo(
    known: TrialCache,
    trials: Mapping[str, list[Trial]],
    points: Sequence[TapPoint],
    ranges: Mapping[str, tuple[float, float]],
) -> list[_Task]:
    tasks = []
    for name, own in trials.items():
        if missing := known.missing("weights", name, own):
            tasks.append(_Task("weights", name, (name,), missing))
    for point in points:
        key = _input_key(point, ranges)
        if key is not None and (missing := known.missing("inputs", key, _INPUT_TRIALS)):
            tasks.append(_Task("inputs", key, point.names, missing, ranges[point.name]))
    return tasks


class _Measuring:
    """Trials of one model on states that stay in memory, block after block."""

    def __init__(self, model: DiffusionModel, states: StoredStates, known: TrialCache):
        self._model, self._states, self._known = model, states, known
        self._layers = model.architecture.layers()
        # Rows of any steps side by side: a forward of many rows is cheaper than many forwards.
        size = plan_memory(model, states.manifest.cfg_weight > 0).batch_size
        self._batches = [batch() for batch in states.batches(model, size, mixed=True)]
        self._outputs: list[Any] = [None] * len(self._batches)  # None: a forward from the beginning
        self._block = -1  # the block whose outputs are kept

    def run(self, tasks: Sequence[_Task]) -> None:
        """Measure, the layers in the order of the network; each layer's results are kept as they come."""
        architecture = self._model.architecture

        def begins(task: _Task) -> int:
            blocks = {architecture.block_of(name) for name in task.names}
            # Embedders reach all blocks; so does what layers of several blocks read, as MMDiT's adaLN layers do.
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
                    with self._tried(task, trial):
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
            mx.eval(error)  # two forwards at once would need the memory of two
        return error

    def _relative(
        self, errors: NDArray[np.float64], energy: NDArray[np.float64], task: _Task, trial: Trial
    ) -> list[float]:
        """S at each step; raises where the output is not finite, or zero at full precision."""
        for step, error, whole in zip(self._states.steps, errors, energy, strict=True):
            if not (np.isfinite(error) and np.isfinite(whole) and whole > 0):
                what = f"{task.key} at {trial.key.replace('x', ' bits in groups of ')}"
                raise CalibError(
                    f"sensitivity of {what}, step {step}: the model's output is not finite, or zero at full precision; "
                    "another model.dtype may do, or other states"
                )
        found: list[float] = (errors / energy).tolist()
        return found

    def _by_step(self, energies: Sequence[mx.array]) -> NDArray[np.float64]:
        """The sums at each step of what every row has."""
        mx.eval(list(energies))
        total = dict.fromkeys(self._states.steps, 0.0)
        for batch, values in zip(self._batches, energies, strict=True):
            for step, value in zip(batch.steps, batch.of_states(np.array(values, np.float64)), strict=True):
                total[step] += value
        return np.array(list(total.values()))

    @contextmanager
    def _tried(self, task: _Task, trial: Trial) -> Iterator[None]:
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
        """Have the outputs of ``block`` of every batch in place of those of an earlier one."""
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
            # Both parts' outputs are kept; the forward behind them is never evaluated.
            self._forward(batch, output, lazily=True)
        mx.eval(kept)
        return tree_map(lambda *parts: None if parts[0] is None else mx.concatenate(list(parts)), *kept)

    def _forward(self, batch: Batch, output: Any, lazily: bool = False) -> mx.array:
        """The output v of a batch, (rows, …), begun after the block that gave ``output``."""
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
