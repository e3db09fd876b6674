"""Build a quantized model from a plan: check the plan against the transformer, run the quantizer, collect the rules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.reader import ActivationFile
from calib.analysis.measure import quantizable
from calib.analysis.observed import channel_extremes, channel_powers, observe, observed_ranges, plan_steps
from calib.analysis.plan import UNQUANTIZED, LayerPlan, Plan
from calib.analysis.ranges import RangeRule, StepRanges, static
from calib.analysis.rules import checked_rule
from calib.analysis.steps import StepPlan
from calib.base.affine import GROUP_SIZES
from calib.base.errors import CalibError, suggest
from calib.base.files import short_hash
from calib.base.layout import STEPS
from calib.base.targets import described
from calib.models.model import DiffusionModel, weights
from calib.models.packed import Packed, half_of
from calib.quantization import rtn
from calib.quantization.check import checked_quantizer, model_kept
from calib.quantization.checkpoint import origin_of
from calib.quantization.model import InputRule, QuantizedModel
from calib.quantization.quantizer import (
    ChannelRange,
    Quantized,
    Quantizer,
    QuantizerInput,
)
from calib.quantization.replays import Replays
from calib.quantization.texts import prompts_of

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

#: Of a quantized model's ``about``: hashes of the texts of images that its quantizer replayed, or drew.
SEEN = "seen_prompts"


def check_names(plan: Mapping[str, LayerPlan], known: Sequence[str], source: str) -> None:
    """Raise where a plan has layers that the model lacks; ``source`` names the plan."""
    if unknown := [name for name in plan if name not in known]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        hint = suggest(unknown[0], known, list_all=False)
        raise CalibError(f"{source}: the model has no layer {unknown[0]!r}{more}; is it another model's plan?{hint}")


def fitting(plan: Mapping[str, LayerPlan], layers: Mapping[str, nn.Module]) -> tuple[dict[str, LayerPlan], list[str]]:
    """Plans of the layers that MLX can quantize, with group sizes that divide their widths, and notes on exceptions."""
    found, notes = {}, []
    for name, layer in plan.items():
        module = layers.get(name)
        if not isinstance(module, nn.Linear):
            if module is not None:
                notes.append(f"{name} is no linear layer, MLX cannot quantize it; it stays at 16 bits")
            continue
        columns = module.weight.shape[-1]
        sizes = quantizable(module)
        if not sizes:
            notes.append(f"{name}: groups of {GROUP_SIZES} do not divide its {columns} columns; it stays at 16 bits")
            continue
        size = max((s for s in sizes if s <= layer.group_size), default=sizes[0])
        if size != layer.group_size:
            notes.append(f"{name}: groups of {layer.group_size} do not divide its {columns} columns; {size} instead")
        found[name] = replace(layer, group_size=size)
    return found, notes


@dataclass(frozen=True)
class Calibration:
    """Calibration data for a quantizer.

    Attributes:
        statistics: path of an ``activations.h5``, if there is one.
        rule: rule for ranges that vary with the step.
        states: returns the calibration set, called where a quantizer replays it; None where no run is known.
        scratch, prompts, home: see :class:`QuantizerInput`.
    """

    statistics: Path | None
    rule: RangeRule
    states: Callable[[], StoredStates] | None
    scratch: Path | None = None
    prompts: Callable[[], Sequence[str]] = lambda: ()
    home: Path | None = None


def quantize(
    model: DiffusionModel,
    plan: Plan,
    activations: Path,
    quantizer: Quantizer = rtn.quantize,
    ranges: RangeRule = static,
    states: StoredStates | None = None,
) -> tuple[QuantizedModel, list[str]]:
    """Quantize ``model`` by ``plan``, as ``calib quantize`` does; returns the quantized model, and notes for people.

    Args:
        activations: the ``activations.h5`` that the plan was made from.
        ranges: rule for activation ranges that vary with the step.
        states: calibration set, for quantizers that replay stored states.

    Raises:
        CalibError: the statistics lack a layer, or 16 bits cannot represent a weight.
    """
    steps = plan_steps(plan, observed_ranges(plan, activations), activations, ranges)
    source = Calibration(activations, ranges, None if states is None else lambda: states)
    made_by = {"quantizer": described(quantizer), "ranges": steps.rule}
    return quantize_layers(model, plan.layers, steps, quantizer, source, made_by)


def quantize_layers(
    model: DiffusionModel,
    plan: Mapping[str, LayerPlan],
    steps: StepPlan,
    quantizer: Quantizer,
    source: Calibration,
    made_by: Mapping[str, Any],
) -> tuple[QuantizedModel, list[str]]:
    """The quantized model, and notes for people; ``made_by`` is stored with the model."""
    layers = model.architecture.layers()
    chosen, notes = fitting(plan, layers)
    half = half_of(layers[model.architecture.input_layer].weight.dtype)
    linear = {name: layer for name, layer in layers.items() if name in chosen and isinstance(layer, nn.Linear)}

    def input_bits(name: str) -> tuple[int, ...]:
        return steps.bits_by_step(name, plan[name].activation_bits)

    replayed: list[StoredStates] = []

    def seen() -> StoredStates:
        assert source.states is not None
        replayed.append(source.states())
        return replayed[-1]

    states = None if source.states is None else seen
    replays = Replays(model, states, source.scratch)
    given = (replays, replays.batches, *_statistics(plan, source, steps), steps.importance.get)
    own = (input_bits, source.scratch, model, states, source.prompts, source.home)
    work = QuantizerInput(model.architecture, linear, {**plan, **chosen}, half, *given, *own)
    work = replace(work, release=replays.release)
    if model.streamed is not None:
        work = replace(work, layers=model.streamed.in_turn(linear), streamed=True)
    with model_kept(model) as changed:
        made = checked_quantizer(quantizer)(work)
        copies = _copies(chosen, steps, made.layers, quantizer, work)
    if changed:
        notes.append(f"the quantizer changed weights of the model itself ({changed[0]}, …); they were put back")
    # A plan may also name blocks, where their outputs were observed: they have no input to quantize.
    inputs, more = _inputs({name: layer for name, layer in plan.items() if name in layers}, steps, made)
    paths = {name: model.architecture.path(name) for name in made.layers}
    packed = {f"{path}.weight" for path in paths.values()}
    # Of a streamed model apart from those that it runs with, which would stay once they are read.
    parameters = weights(model.transformer) if model.streamed is None else model.streamed.fresh()
    rest = {}
    for path in weights(model.transformer):
        if path not in packed:
            rest[path] = made.weights.get(path, parameters.pop(path)).astype(half)
            mx.eval(rest[path])
    texts = {*made.drawn, *(text for of in replayed[:1] for text in prompts_of(of, of.images))}
    about = {**origin_of(model), **made_by, **({SEEN: sorted(map(short_hash, texts))} if texts else {})}
    quantized = QuantizedModel(made.layers, rest, inputs, steps.timesteps, paths, copies, steps.phases, about)
    mx.eval([[p.weight, p.scales, p.biases] for p in made.layers.values()])
    _check_finite(quantized, half)
    return quantized, [*notes, *made.notes, *more]


def _check_finite(quantized: QuantizedModel, half: mx.Dtype) -> None:
    """Raise where the 16-bit type cannot represent a weight."""

    def arrays() -> Iterator[tuple[str, list[mx.array]]]:
        yield from ((path, [array]) for path, array in quantized.weights.items())
        for name, layer in quantized.layers.items():
            # Both ends of every grid.
            yield name, [layer.scales, layer.biases, layer.biases + layer.scales * (2**layer.bits - 1)]

    for name, own in arrays():  # one after the other: together they would take memory once more
        if not all(mx.isfinite(array).all().item() for array in own):
            kind = str(half).rpartition(".")[2]
            remedy = "model.dtype=bfloat16 may do" if half == mx.float16 else "its checkpoint may be damaged"
            raise CalibError(f"{name}: holds weights that {kind} cannot; {remedy}")


def _inputs(plan: Mapping[str, LayerPlan], steps: StepPlan, made: Quantized) -> tuple[dict[str, InputRule], list[str]]:
    """Rules for layers whose input is quantized at some step, with the quantizer's ranges, else the plan's."""
    rules, missing, constant = {}, [], []
    for name, layer in plan.items():
        # Without steps the bits are those of the plan, whatever the step.
        bits = steps.bits_by_step(name, layer.activation_bits) or (layer.activation_bits,)
        divisors, shifts = made.divisors.get(name, ()), made.shifts.get(name, ())
        if all(b >= UNQUANTIZED for b in bits) and not divisors:
            continue
        ranges = made.ranges.get(name, steps.ranges.get(name))
        if ranges is None:
            missing.append(name)
        elif not any(ranges.low) and not any(ranges.high) and not divisors:  # weights were multiplied by them
            constant.append(name)
        else:
            rules[name] = InputRule(ranges, bits, divisors, shifts, made.rotations.get(name, 0))
    notes = []
    if missing:
        notes.append(f"{len(missing)} layers have no activation ranges (no {STEPS}): inputs stay as they are")
    if constant:
        notes.append(f"{', '.join(constant)}: the input is zero always; it stays as it is")
    return rules, notes


def _copies(
    chosen: Mapping[str, LayerPlan],
    steps: StepPlan,
    made: Mapping[str, Packed],
    quantizer: Quantizer,
    work: QuantizerInput,
) -> dict[str, dict[str, Packed]]:
    """Copies of weights, by phase and layer, where a phase has other bits than the plan."""
    copies = {}
    for phase, bits in steps.weight_bits.items():
        other = {name: b for name, b in bits.items() if name in made and b != chosen[name].weight_bits}
        if other:
            plan = {**work.plan, **{name: replace(chosen[name], weight_bits=b) for name, b in other.items()}}
            of_phase = {name: work.layers[name] for name in other}
            # Of weights alone: ranges of inputs would be thrown away.
            other_work = replace(work, plan=plan, layers=of_phase, input_bits=lambda _: (UNQUANTIZED,))
            copies[phase] = checked_quantizer(quantizer)(other_work).layers
    return copies


def _statistics(plan: Mapping[str, LayerPlan], source: Calibration, steps: StepPlan) -> tuple[Any, Any, Any]:
    """The functions ``channel_range``, ``ranges`` and ``channel_power`` of :class:`QuantizerInput`."""

    def channel_range(name: str) -> ChannelRange | None:
        if source.statistics is None:
            return None
        with ActivationFile(source.statistics) as file:
            return ChannelRange(*channel_extremes(file, name))

    def channel_power(name: str) -> NDArray[np.float64] | None:
        if source.statistics is None:
            return None
        with ActivationFile(source.statistics) as file:
            return channel_powers(file, name, steps.importance.get(name))

    def ranges(name: str, clip: tuple[float, float] | None, divisors: Any) -> StepRanges | None:
        if source.statistics is None:
            return None
        with ActivationFile(source.statistics) as file:
            return checked_rule(source.rule)(observe(file, name, clip or plan[name].clip_percentile, divisors))

    return channel_range, ranges, channel_power
