"""Sensitivities from gradients: every layer, bit-width and group size at once, of the picture or of the output.

To first order a change ΔW of a layer's weights changes the picture by J ΔW, and with G = Jᵀ r for random r the expected
⟨G, ΔW⟩² is the squared norm of that. Rounding errors of different weights hardly correlate, so the diagonal,
Σ E[G²] ΔW², says as much with far less variance: a Fisher information (docs/METHODS.md). One backward pass serves all
options. What a pass found is cached, so that an interrupted measurement goes on.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from zipfile import BadZipFile

from calib.activations.batches import StoredStates
from calib.activations.states import check_states
from calib.analysis.adjoint import Adjoint, Gradients, check_complete
from calib.analysis.layers import LayerSummary
from calib.analysis.measure import drawn_by, identity, observed_points, quantizable
from calib.analysis.ranges import StepRanges, ranges_to_json
from calib.analysis.run_trials import rounded
from calib.analysis.sensitivities import INPUT_BITS, Sensitivities
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.files import short_hash, write_bytes
from calib.base.locks import locked
from calib.base.progress import Progress, say
from calib.dataset.arrays import open_npz
from calib.models.architecture import Architecture
from calib.models.memory import backward_batch
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

#: Version of the procedure.
VERSION = 2


class Of(StrEnum):
    """What errors are measured in: the finished picture, or the transformer's output at single steps."""

    PICTURE = "picture"
    OUTPUT = "output"


@dataclass(frozen=True)
class _Pass:
    """One backward pass: images, the probe's number, and the step of an output."""

    images: tuple[int, ...]
    probe: int
    step: int | None

    @property
    def name(self) -> str:
        step = "" if self.step is None else f"_step{self.step}"
        return f"{short_hash(list(self.images))}_probe{self.probe}{step}.npz"


def gradient_sensitivities(
    model: Callable[[], DiffusionModel],
    architecture: Architecture,
    layers: Mapping[str, LayerSummary],
    states: StoredStates,
    cache_dir: Path,
    of: Of = Of.PICTURE,
    group_sizes: Sequence[int] = GROUP_SIZES,
    probes: int = 1,
    input_ranges: Mapping[str, StepRanges] | None = None,
) -> Sensitivities:
    """Sensitivities of all layers with statistics, and of their inputs.

    Args:
        model: loads the model; called only if something is not cached.
        architecture: the model's, or one of the same shapes without weights.
        layers: statistics by layer name.
        states: images, and the steps of an output; of a picture all steps are used.
        probes: random directions for each image.
        input_ranges: ranges over which inputs are quantized, by layer; the full observed range where there is none.

    Raises:
        ConfigError: the dataset lacks states that a gradient of the picture needs.
        CalibError: states are missing or damaged, or a gradient is not finite.
    """
    manifest = states.manifest
    if of is Of.PICTURE:
        check_complete(states.data_dir, manifest)
        states = StoredStates(states.data_dir, manifest, states.images, range(manifest.num_steps))
    points = observed_points(architecture, layers)
    linear = {name: layer for name, layer in architecture.layers().items() if name in layers and quantizable(layer)}
    options = [(n, b, g) for n, x in linear.items() for b in WEIGHT_BITS for g in quantizable(x) if g in group_sizes]
    full = {p.name: StepRanges((0,), (layers[p.name].minimum,), (layers[p.name].maximum,)) for p in points}
    ranges = {name: (input_ranges or {}).get(name, own) for name, own in full.items()}
    made_by = {
        **identity(states, drawn_by(states, model)),
        "procedure": ["gradients", VERSION, of.value],
        "options": [list(option) for option in options],
        "inputs": [[*point.names] for point in points],
        "input_bits": list(INPUT_BITS),
        "ranges": ranges_to_json(ranges),
    }
    folder = cache_dir / "gradients" / short_hash(made_by, digits=16)
    batch = backward_batch(architecture, manifest.latent_shape, manifest.cfg_weight > 0, len(states.images))
    passes = _passes(states, of, probes, batch)
    with locked(folder.with_suffix(".lock"), lambda: say(f"waiting for the process that measures the same ({folder})")):
        found = {work: _read(folder / work.name) for work in passes}
        if todo := [work for work, known in found.items() if known is None]:
            check_states(states.data_dir, manifest, states.images, [*states.steps, manifest.num_steps])
            loaded = model()
            own = {name: loaded.architecture.layers()[name] for name in linear}
            adjoint = Adjoint(loaded, states, own, points, lambda tap, step: ranges[tap].at(step))
            for work, gradients in _run(adjoint, todo, manifest.num_steps):
                found[work] = table = _table(gradients, own, options)
                _write(folder / work.name, table)
    tables = {work: table for work, table in found.items() if table is not None}
    weights, inputs = _averages(tables, states, of, probes)
    return Sensitivities(
        steps=tuple(states.steps),
        num_steps=manifest.num_steps,
        weights={
            name: {(b, g): weights[i] for i, (n, b, g) in enumerate(options) if n == name}
            for name in dict.fromkeys(name for name, _, _ in options)
        },
        activations={
            name: {bits: inputs[i, :, j] for j, bits in enumerate(INPUT_BITS)}
            for i, point in enumerate(points)
            for name in point.names
        },
        shapes={name: (layer.weight.shape[0], layer.weight.shape[-1]) for name, layer in linear.items()},
        of_picture=of is Of.PICTURE,
        reach=np.sum([table["reach"] for table in tables.values()], axis=0) if of is Of.PICTURE else None,
        taps={point.name: point.names for point in points},
    )


def _passes(states: StoredStates, of: Of, probes: int, batch: int) -> list[_Pass]:
    images = list(states.images)
    batches = [tuple(images[i : i + batch]) for i in range(0, len(images), batch)]
    steps: list[int | None] = [None] if of is Of.PICTURE else list(states.steps)
    return [_Pass(block, probe, step) for probe in range(probes) for block in batches for step in steps]


def _run(adjoint: Adjoint, todo: Sequence[_Pass], num_steps: int) -> Iterator[tuple[_Pass, Gradients]]:
    """Run passes; each has random numbers of its own, whatever was run before."""
    of_picture = todo[0].step is None
    with Progress("gradients", len(todo) * (num_steps if of_picture else 1), "step") as progress:
        for work in todo:
            key = mx.random.key(int(short_hash([list(work.images), work.probe, work.step]), 16))
            if work.step is None:
                yield work, adjoint.of_picture(work.images, key, progress.advance)
            else:
                yield work, adjoint.of_output(work.images, work.step, key)
                progress.advance()


def _table(
    found: Gradients, layers: Mapping[str, nn.Module], options: Sequence[tuple[str, int, int]]
) -> dict[str, NDArray[np.float64]]:
    """Σ G² ΔW² for each option, with the inputs' errors and the reach."""
    errors = []
    for name, bits, group_size in options:
        weight = layers[name].weight
        change = weight.astype(mx.float32) - rounded(weight, bits, group_size).astype(mx.float32)
        errors.append(((found.weights[name] * change) ** 2).sum())
        mx.eval(errors[-1])  # one rounded copy of a layer at a time
    inputs = np.stack(list(found.inputs.values()))
    return {"weights": np.array([e.item() for e in errors]), "inputs": inputs, "reach": found.reach}


def _averages(
    tables: Mapping[_Pass, Mapping[str, NDArray[np.float64]]], states: StoredStates, of: Of, probes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Errors by option and step, and by tap, step and bit-width; means over images and probes.

    Of a picture the steps' errors are those of all steps together, so that their mean is the picture's.
    """
    steps, images = len(states.steps), len(states.images)
    if of is Of.PICTURE:
        weights = sum(table["weights"] for table in tables.values()) / (images * probes)
        inputs = sum(table["inputs"] for table in tables.values()) / (images * probes)
        return np.repeat(np.asarray(weights)[:, None], steps, axis=1), np.asarray(inputs) * steps
    columns = []
    for step in states.steps:
        own = [(len(work.images), table) for work, table in tables.items() if work.step == step]
        total = sum(count for count, _ in own)
        columns.append([sum(n * table[key] for n, table in own) / total for key in ("weights", "inputs")])
    return (
        np.stack([np.asarray(weights) for weights, _ in columns], axis=1),
        np.concatenate([np.asarray(inputs) for _, inputs in columns], axis=1),
    )


def _read(path: Path) -> dict[str, NDArray[np.float64]] | None:
    """What a pass found; None where there is no sound file."""
    with suppress(OSError, ValueError, KeyError, BadZipFile), open_npz(path) as file:
        return {key: file[key] for key in ("weights", "inputs", "reach")}
    return None


def _write(path: Path, table: Mapping[str, NDArray[np.float64]]) -> None:
    content = io.BytesIO()
    np.savez(content, **table)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())
