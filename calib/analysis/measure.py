"""Measure sensitivities: the error of the model's output when a single layer is quantized.

S = mean over steps of ‖v - v_q‖² / ‖v‖² (docs/METHODS.md). Results are cached in ``cache_dir`` layer by layer, by the
content they depend on, so that an interrupted measurement continues and later budgets need no measurement.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.states import identity_of
from calib.activations.taps import TapPoint, TapSelection, tap_points
from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.run_trials import TrialRunner
from calib.analysis.sensitivities import INPUT_BITS, Of, Sensitivities
from calib.analysis.trials import Task, Trial, TrialCache
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.files import remove_abandoned, short_hash
from calib.base.locks import locked
from calib.base.progress import say
from calib.base.versions import numerics_of
from calib.dataset.timesteps import phase_bounds
from calib.models.architecture import Architecture
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from mlx import nn

#: Bit-widths at which the input of a layer is tried: fewer than gradients tell of, as each takes forwards of its own.
TRIED_BITS = (4, 6, 8)


def quantizable(layer: nn.Module) -> list[int]:
    """Group sizes with which MLX can quantize the layer's weights; empty for a layer that is not linear."""
    if not isinstance(layer, nn.Linear):
        return []
    return [size for size in GROUP_SIZES if layer.weight.shape[-1] % size == 0]


def measure(
    model: Callable[[], DiffusionModel],
    layers: Mapping[str, nn.Module],
    points: Sequence[TapPoint],
    states: StoredStates,
    input_ranges: Mapping[str, tuple[float, float]],
    cache_dir: Path,
    group_sizes: Sequence[int] = GROUP_SIZES,
    made_by: tuple[str, str] | None = None,
) -> Sensitivities:
    """Sensitivities of all of ``layers``, measured where they are not cached.

    Args:
        model: loads the model; called only if something is not cached.
        layers: linear layers by canonical name, of the model or of one of the same shapes without weights.
        points: taps; the input of a tap is quantized for all of its layers at once.
        input_ranges: full range of the input of each tap, by the tap's name.
        made_by: fingerprint and text encoders of the model; None: those in the dataset's manifest, which older
            datasets lack.

    Raises:
        CalibError: states are missing or damaged, or an output is not finite, or zero at full precision.
    """
    sizes = {name: [size for size in quantizable(layer) if size in group_sizes] for name, layer in layers.items()}
    trials = {name: [Trial(*pair) for pair in product(WEIGHT_BITS, own)] for name, own in sizes.items() if own}
    manifest = states.manifest
    described = identity(states, made_by or (str(manifest.fingerprint), str(manifest.text_encoders)))
    known = TrialCache(cache_dir / "sensitivity" / f"{short_hash(described, digits=16)}.json", described)
    waiting = f"waiting for the process that measures the same sensitivities ({known.path})"
    with locked(known.path.with_suffix(".lock"), lambda: say(waiting)):
        remove_abandoned(known.path.parent)  # what a killed process was writing
        known.load()
        todo = _todo(known, trials, points, input_ranges)
        if todo:
            states.check()
            TrialRunner(model(), states, known).run(todo)
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
        taps={point.name: point.names for point in points},
    )


def sensitivities(
    model: Callable[[], DiffusionModel],
    architecture: Architecture,
    layers: Mapping[str, LayerSummary],
    states: StoredStates,
    cache_dir: Path,
    group_sizes: Sequence[int] = GROUP_SIZES,
) -> Sensitivities:
    """:func:`measure` for the layers with statistics, with inputs quantized over their full observed range.

    Args:
        architecture: the model's, or one of the same shapes without weights.
        layers: statistics by layer name.
    """
    points = observed_points(architecture, layers)
    ranges = {point.name: (layers[point.name].minimum, layers[point.name].maximum) for point in points}
    own = {name: layer for name, layer in architecture.layers().items() if name in layers}
    return measure(model, own, points, states, ranges, cache_dir, group_sizes, drawn_by(states, model))


def observed_points(architecture: Architecture, layers: Collection[str]) -> list[TapPoint]:
    """The taps of linear layers, less the layers that are not among ``layers``."""
    points = []
    for point in tap_points(architecture, TapSelection()):
        if names := [name for name in point.names if name in layers]:
            points.append(TapPoint(names[0], point.kind, tuple(names[1:])))
    return points


def drawn_by(states: StoredStates, model: Callable[[], DiffusionModel]) -> tuple[str, str]:
    """Fingerprint and text encoders of the model that drew the dataset; ``model``'s where an older one lacks them."""
    manifest = states.manifest
    if manifest.fingerprint is None:
        return model().fingerprint, model().text_encoders
    return manifest.fingerprint, str(manifest.text_encoders)


def placeholder_sensitivities(
    architecture: Architecture,
    names: Collection[str],
    num_steps: int,
    group_sizes: Sequence[int],
    of: Of = Of.OUTPUT,
) -> tuple[dict[str, LayerSummary], Sensitivities]:
    """Made-up statistics and sensitivities with the shapes that a measurement of ``names`` would have.

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
    inputs = {name: {b: np.full(len(steps), 4.0**-b) for b in INPUT_BITS} for name in every}
    return dict.fromkeys(every, PROBE), Sensitivities(steps, num_steps, weights, inputs, shapes, of)


_INPUT_TRIALS = [Trial(bits) for bits in TRIED_BITS]


def _input_key(point: TapPoint, ranges: Mapping[str, tuple[float, float]]) -> str | None:
    """Cache key of a tap's input: its layers and the range that it is quantized over; None where not measured."""
    if point.kind == "block" or point.name not in ranges:
        return None
    low, high = ranges[point.name]
    return f"{' '.join(point.names)} [{low:.6g}, {high:.6g}]"


def identity(states: StoredStates, made_by: tuple[str, str]) -> dict[str, Any]:
    """Everything but the layer that a measurement depends on, JSON-able."""
    manifest = states.manifest
    return {
        "version": 2,  # of the procedure
        "fingerprint": made_by[0],
        "text_encoders": made_by[1],
        "cfg_weight": manifest.cfg_weight,
        "steps": list(states.steps),
        "timesteps": [f"{manifest.timesteps[step]:.9g}" for step in states.steps],
        "images": [identity_of(states.data_dir, manifest.images[i]) for i in states.images],
        "device": mx.default_device().type.name,
        "mlx": numerics_of(manifest.versions),
    }


def _todo(
    known: TrialCache,
    trials: Mapping[str, list[Trial]],
    points: Sequence[TapPoint],
    ranges: Mapping[str, tuple[float, float]],
) -> list[Task]:
    """The trials that are not cached, as tasks."""
    tasks = []
    for name, own in trials.items():
        if missing := known.missing("weights", name, own):
            tasks.append(Task("weights", name, (name,), missing))
    for point in points:
        key = _input_key(point, ranges)
        if key is not None and (missing := known.missing("inputs", key, _INPUT_TRIALS)):
            tasks.append(Task("inputs", key, point.names, missing, ranges[point.name]))
    return tasks
