"""Sensitivities from gradients: every layer, bit-width and group size at once, of the picture or of the output.

To first order a change ΔW of a layer's weights changes the picture by J ΔW, and with G = Jᵀ r for random r the expected
⟨G, ΔW⟩² is the squared norm of that. Rounding errors of different weights hardly correlate, so the diagonal,
Σ E[G²] ΔW², says as much with far less variance: a Fisher information (docs/METHODS.md). One backward pass serves all
options. What a pass found is cached, so that an interrupted measurement goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

from calib.activations.batches import StoredStates
from calib.activations.step import prompt_of
from calib.activations.taps import TapPoint
from calib.analysis.adjoint import Adjoint, Probe
from calib.analysis.layers import LayerSummary
from calib.analysis.measure import drawn_by, identity, observed_points, quantizable
from calib.analysis.passes import Pass, check_complete, of_output, of_typical, reach_of
from calib.analysis.ranges import StepRanges, ranges_to_json
from calib.analysis.sensitivities import INPUT_BITS, Of, Sensitivities
from calib.analysis.sweep import Room, rooms
from calib.analysis.tables import Table, read_table, reducing, shares_of, tables_of, write_table
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.device import on_gpu
from calib.base.errors import CalibError
from calib.base.files import read_json, remove_abandoned, short_hash, write_json
from calib.base.locks import locked
from calib.base.progress import Progress, note, readable_bytes, say
from calib.models.architecture import Architecture
from calib.models.backward_memory import BackwardPlan, plan_backward, streamed_backward
from calib.models.memory import device_memory, nbytes
from calib.models.model import DiffusionModel
from calib.models.parallel import shared_cores

import mlx.core as mx
import numpy as np
from mlx import nn

#: Version of the procedure.
VERSION = 3
#: Beside what was found: why the decoder cannot be differentiated.
UNDECODABLE = "undecodable.json"


@dataclass(frozen=True)
class _Work:
    """What is measured: options of linear layers and inputs at taps, on states; ``load`` loads the model."""

    load: Callable[[], DiffusionModel]
    layers: Mapping[str, nn.Module]
    options: Sequence[tuple[str, int, int]]
    points: Sequence[TapPoint]
    ranges: Mapping[str, StepRanges]
    states: StoredStates
    plan: BackwardPlan

    def check(self) -> None:
        """Raise where a state is missing or damaged, the finished latents among them."""
        states = replace(self.states, steps=[*self.states.steps, self.states.manifest.num_steps])
        states.check()

    def side_by_side(self, of: Of) -> int:
        """Number of passes at once: on a CPU as many as fit, each with gradients and their sum in float32."""
        if of is Of.OUTPUT or self.plan.by_parts or on_gpu():
            return 1
        each = 2 * 4 * sum(int(layer.weight.size) for layer in self.layers.values())
        return max(1, min(self.plan.batch_size, 1 + (device_memory() - self.plan.nbytes) // each))

    def adjoint(self, model: DiffusionModel, shares: Sequence[mx.array] | None = None) -> Adjoint:
        """Passes of ``model``; of a streamed one gradients are reduced to errors, layer by layer, with ``shares``."""
        own = model.architecture.layers()
        layers = {name: own[name] for name in self.layers}
        reduce = None if shares is None or model.streamed is None else reducing(layers, self.options, shares)
        more = (lambda tap, step: self.ranges[tap].at(step), self.plan.by_parts, reduce)
        return Adjoint(model, self.states, layers, self.points, *more)


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

    Of the finished latent where they are to be of the picture and its decoder cannot be differentiated; a note says so.

    Args:
        model: loads the model; called only if something is not cached.
        architecture: the model's, or one of the same shapes without weights.
        layers: statistics by layer name.
        states: images, and the steps of an output; of a picture or latent all steps are used.
        probes: random directions for each image.
        input_ranges: ranges over which inputs are quantized, by layer; the full observed range where there is none.

    Raises:
        ConfigError: the dataset lacks states that a gradient of the picture needs.
        CalibError: states are missing or damaged, or a gradient is not finite.
    """
    manifest, model = states.manifest, cache(model)
    if of is not Of.OUTPUT:
        check_complete(states.data_dir, manifest, of)
        states = StoredStates(states.data_dir, manifest, states.images, range(manifest.num_steps))
    points = observed_points(architecture, layers)
    linear = {name: layer for name, layer in architecture.layers().items() if name in layers and quantizable(layer)}
    options = [(n, b, g) for n, x in linear.items() for b in WEIGHT_BITS for g in quantizable(x) if g in group_sizes]
    full = {p.name: StepRanges((0,), (layers[p.name].minimum,), (layers[p.name].maximum,)) for p in points}
    ranges = {name: (input_ranges or {}).get(name, own) for name, own in full.items()}
    plan = plan_backward(architecture, manifest.latent_shape, manifest.cfg_weight > 0, len(states.images))
    work = _Work(model, linear, options, points, ranges, states, plan)
    made_by = {
        **identity(states, drawn_by(states, model)),
        "procedure": ["gradients", VERSION],
        "options": [list(option) for option in options],
        "inputs": [[*point.names] for point in points],
        "input_bits": list(INPUT_BITS),
        "ranges": ranges_to_json(ranges),
    }
    folder = cache_dir / "gradients" / short_hash(made_by, digits=16)
    with locked(folder.with_suffix(".lock"), lambda: say(f"waiting for the process that measures the same ({folder})")):
        remove_abandoned(folder)  # what a killed process was writing
        of, tables = _found(work, folder, of, probes)
    doubt, found, named = None, list(tables.values()), list(dict.fromkeys(name for name, _, _ in options))
    importance = np.mean([table["outputs"] / (table["outputs"].max() or 1) for table in found], axis=0)
    if of is Of.OUTPUT:
        weights, inputs = of_output(tables, states.steps)
    else:
        weights, inputs, doubt = of_typical(found, options, states.steps)
    return Sensitivities(
        steps=tuple(states.steps),
        num_steps=manifest.num_steps,
        weights={name: {(b, g): weights[i] for i, (n, b, g) in enumerate(options) if n == name} for name in named},
        activations={
            name: {bits: inputs[i, :, j] for j, bits in enumerate(INPUT_BITS)}
            for i, point in enumerate(points)
            for name in point.names
        },
        shapes={name: (layer.weight.shape[0], layer.weight.shape[-1]) for name, layer in linear.items()},
        of=of,
        reach=None if of is Of.OUTPUT else reach_of([table["reach"] for table in found], manifest.sigmas),
        doubt=doubt,
        importance={} if of is Of.OUTPUT else dict(zip(named, importance, strict=True)),
        taps={point.name: point.names for point in points},
    )


def _found(work: _Work, folder: Path, of: Of, probes: int) -> tuple[Of, dict[Pass, Table]]:
    """What all passes found, run where they are not in ``folder``; and what it is of."""
    passes = _passes(work, of, probes)
    found = {each: table for each in passes if (table := read_table(folder / of / each.name)) is not None}
    todo = [each for each in passes if each not in found]
    why = _undecodable(work, folder) if of is Of.PICTURE and todo else None
    if why is not None:
        note(
            f"sensitivity.of=picture: the decoder cannot be differentiated ({why}): errors are those of the finished "
            "latent, and no PSNR is predicted"
        )
        return _found(work, folder, Of.LATENT, probes)
    for each, table in _run(work, folder, of, todo) if todo else ():
        found[each] = table
        write_table(folder / of / each.name, table)
    return of, {each: found[each] for each in passes}


def _loaded(work: _Work) -> DiffusionModel:
    """The model; a note says where gradients take more memory than there is."""
    model, less = work.load(), "model.stream=true takes less"
    needed = work.plan.nbytes
    if model.streamed is not None:
        manifest, less = work.states.manifest, "a smaller sampler.image_size takes less"
        needed = streamed_backward(model.streamed, manifest.latent_shape, manifest.cfg_weight > 0)
    if needed > (memory := device_memory()):
        of = f"gradients take about {readable_bytes(needed)}, of {readable_bytes(memory)}"
        note(f"{of}: this may be slow or killed; {less}")
    return model


def _undecodable(work: _Work, folder: Path) -> str | None:
    """Why pictures have no gradient, tried once; None where they have one."""
    path = folder / UNDECODABLE
    with suppress(CalibError, KeyError, TypeError):
        return str(read_json(path)["why"])
    work.check()
    why = work.adjoint(_loaded(work)).undecodable()
    if why is not None:
        write_json(path, {"why": why})
    return why


def _passes(work: _Work, of: Of, probes: int) -> list[Pass]:
    """Of a picture or latent an image at a time, as each has errors of its own size; of an output, as many as fit."""
    images, batch = list(work.states.images), work.plan.batch_size if of is Of.OUTPUT else 1
    batches = [tuple(images[i : i + batch]) for i in range(0, len(images), batch)]
    steps: list[int | None] = list(work.states.steps) if of is Of.OUTPUT else [None]
    return [Pass(block, probe, step) for probe in range(probes) for block in batches for step in steps]


def _run(work: _Work, folder: Path, of: Of, todo: Sequence[Pass]) -> Iterator[tuple[Pass, Table]]:
    """Run passes; each has random numbers of its own, whatever was run before."""
    work.check()
    states, manifest, model = work.states, work.states.manifest, _loaded(work)
    prompts = [[prompt_of(states.data_dir, manifest.images[i]) for i in each.images] for each in todo]
    keep_text = model.text_bytes + nbytes(model.decoder) + work.plan.nbytes <= device_memory()
    texts = model.encode_batches(prompts, manifest.cfg_weight, keep_text)
    keys = [mx.random.key(int(short_hash([list(p.images), p.probe, p.step]), 16)) for p in todo]
    probes: Iterator[Probe] = (Probe(p.images, key, text) for p, key, text in zip(todo, keys, texts, strict=True))
    swept, at_once = model.streamed is not None and of is not Of.OUTPUT, work.side_by_side(of)
    groups = [Room(len(todo[i : i + at_once])) for i in range(0, len(todo), at_once)]
    if swept:
        probes = iter(every := list(probes))
        instead = "choose a smaller sampler.image_size, or set sensitivity.of=output"
        groups = rooms([work.adjoint(model).kept_bytes(probe) for probe in every], folder, instead)
    layers = model.layers()
    shares = shares_of(layers, work.options)
    adjoint = work.adjoint(model, shares)
    units, left = 1 if of is Of.OUTPUT else adjoint.units(), iter(todo)
    with Progress("gradients", len(todo) * units, "part" if swept else "step") as progress:
        for room in groups:
            group, own = list(islice(left, room.passes)), list(islice(probes, room.passes))
            if swept:
                progress.say(room.describe())
            side_by_side = 1 if swept else len(group)
            with shared_cores(side_by_side, side_by_side):
                if group[0].step is not None:
                    found = [adjoint.of_output(group[0].step, own[0])]
                    progress.advance()
                else:
                    found = adjoint.carried(of, own, progress.advance, room.kept())
                tables = tables_of(found, layers, work.options, shares)
            yield from zip(group, tables, strict=True)
