"""Heuristic ``allocate``: bits for all layers at once, with the least predicted error within a budget.

Minimise Σ S[l, o] over layers l, with one option o = (bits, group size) each and Σ bytes within the budget
(docs/METHODS.md §4): an integer program, solved exactly (:mod:`calib.analysis.knapsack`), after MixDQ (arXiv
2405.17873) and HAWQ-V3 (arXiv 2011.10680). S is used as measured: an option that is larger and worse is never chosen.

``per_phase``: a layer may have different bits in each phase of the trajectory. It then has a copy for every bit-width
it uses, all with one group size, and every copy counts. With a layer's options as triples of bits for the early, the
middle and the late phase this is the same program. A second copy pays only where fewer bits give a smaller error in
some phase, by noise: else the copy of most bits, used in all phases, is smaller and no worse.

``average_activation_bits``: bits of inputs at each step are a second program (:mod:`calib.analysis.input_bits`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from calib.analysis.input_bits import CHOICES, InputBits, allocate_inputs, input_error, input_notes
from calib.analysis.knapsack import solve
from calib.analysis.layers import LayerSummary
from calib.analysis.options import Options, options_by_layer, phase_shares, weights_of
from calib.analysis.plan import DEFAULT_WEIGHT_BITS, UNQUANTIZED, LayerPlan, Plan
from calib.analysis.sensitivities import (
    KEPT_AT_16_BITS,
    Of,
    Sensitivities,
    decibels,
    error_text,
    figure,
    held_bits,
    judged,
    kept_note,
    option_bytes,
    predicted,
    reach_note,
    usable_options,
    with_inputs_note,
)
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import ConfigError

import numpy as np
from numpy.typing import NDArray

#: Bits per weight of uniform 4 bits in groups of 64.
DEFAULT_AVERAGE_BITS = 4.5
UNIFORM = (4, 64)
#: Distance in bits within which a layer counts as near the average.
NEAR_AVERAGE = 0.5


@dataclass(frozen=True)
class _Allocation:
    """The optimum within a budget: the index of each layer's option, Σ S and Σ bytes."""

    choice: dict[str, int]
    error: float
    nbytes: int
    of_picture: bool

    @classmethod
    def within(cls, budget: int, options: Mapping[str, Options], of_picture: bool) -> "_Allocation":
        choice = solve([o.cost for o in options.values()], [o.nbytes for o in options.values()], budget)
        pairs = list(zip(options.values(), choice, strict=True))
        error = math.fsum(o.cost[i] for o, i in pairs)
        return cls(dict(zip(options, choice, strict=True)), error, sum(int(o.nbytes[i]) for o, i in pairs), of_picture)


def plan_layers(
    layers: Mapping[str, LayerSummary],
    sensitivities: Sensitivities,
    average_bits: float | None = None,
    megabytes: float | None = None,
    activation_bits: int = 8,
    average_activation_bits: float | None = None,
    activation_choices: Sequence[int] = CHOICES,
    step_groups: int | None = None,
    per_phase: bool = False,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    group_sizes: Sequence[int] = GROUP_SIZES,
) -> Plan:
    """Choose bits and group size of every layer within a budget for all quantized layers together.

    Args:
        average_bits: the budget, 8 · bytes / weights, with scales, biases and copies counted; None: 4.5.
        megabytes: the budget in millions of bytes, instead.
        activation_bits: bits of every input at all steps, where ``average_activation_bits`` is None.
        average_activation_bits: the budget of inputs, bits of a number that a layer reads, see
            :func:`calib.analysis.input_bits.allocate_inputs`, as for ``activation_choices`` and ``step_groups``.
        weight_bits, group_sizes: the choices.

    Raises:
        ConfigError: the budget cannot be met, or another value is impossible.
        CalibError: sensitivities are missing or invalid.
    """
    _check(average_bits, megabytes, activation_bits, weight_bits, group_sizes)
    picture = sensitivities.of_picture
    if per_phase and sensitivities.of is not Of.OUTPUT:
        allowed = f"errors of the {sensitivities.of} are those of all steps together; set sensitivity.of=output"
        raise ConfigError.bad_value("analysis.per_phase", per_phase, allowed)
    measured = usable_options(layers, sensitivities, weight_bits, group_sizes)
    shares = phase_shares(sensitivities, per_phase)
    by_phase = np.stack(list(shares.values()))
    at_all_steps = by_phase.sum(axis=0)
    options = options_by_layer(measured, sensitivities, by_phase)
    budget = _budget(average_bits, megabytes, options)
    best = _Allocation.within(budget, options, picture)
    kept = {name: LayerPlan(DEFAULT_WEIGHT_BITS, activation_bits, reason=KEPT_AT_16_BITS) for name in layers}
    plan = Plan(kept | _layer_plans(options, best, activation_bits, tuple(shares), picture))
    of_inputs, input_lines = input_error(sensitivities, {n: p.activation_bits for n, p in plan.layers.items()}), []
    if average_activation_bits is not None:
        inputs = allocate_inputs(layers, sensitivities, average_activation_bits, activation_choices, step_groups)
        input_lines = input_notes(layers, sensitivities, inputs, average_activation_bits, activation_choices)
        plan, of_inputs = _with_inputs(plan, inputs), inputs.error
    if picture:
        whole = decibels(best.error + (of_inputs or 0.0))
        plan = replace(plan, predicted_psnr=whole, predicted_weights_psnr=decibels(best.error))
    notes = [
        *predicted(sensitivities, best.error, best.nbytes, weights_of(options)),
        *with_inputs_note(best.error, of_inputs, picture),
        *input_lines,
        *_budget_notes(options, best, budget),
        *_uniform_note(sensitivities, at_all_steps, best, budget),
        *kept_note(layers, sensitivities),
        *reach_note(sensitivities),
    ]
    if per_phase:
        plan = replace(plan, phase_weight_bits=_by_phase(options, best, tuple(shares)))
        one_copy = options_by_layer(measured, sensitivities, at_all_steps[None])
        notes.append(_copies_note(plan.phase_weight_bits, best, _Allocation.within(budget, one_copy, picture)))
    return replace(plan, notes=tuple(notes))


def _check(
    average_bits: float | None,
    megabytes: float | None,
    activation_bits: int,
    weight_bits: Sequence[int],
    group_sizes: Sequence[int],
) -> None:
    """Raise for values that are impossible whatever the sensitivities are."""
    if average_bits is not None and megabytes is not None:
        both = f"analysis.average_bits={average_bits} and analysis.megabytes={megabytes}"
        raise ConfigError(f"{both}: give one budget and leave the other null")
    if not 2 <= activation_bits <= UNQUANTIZED:
        raise ConfigError.bad_value("analysis.activation_bits", activation_bits, f"must be 2 to {UNQUANTIZED}")
    for key, chosen, known in (
        ("weight_bits", weight_bits, WEIGHT_BITS),
        ("group_sizes", group_sizes, GROUP_SIZES),
    ):
        if not chosen or not set(chosen) <= set(known):
            raise ConfigError.bad_value(f"analysis.{key}", list(chosen), f"must be some of {list(known)}, MLX's")


def _budget(average_bits: float | None, megabytes: float | None, options: Mapping[str, Options]) -> int:
    """The budget in bytes; numbers are exact as written: 4.3 bits are 43/10, not the nearest float."""
    if megabytes is None:
        key, value = "average_bits", DEFAULT_AVERAGE_BITS if average_bits is None else average_bits
        unit = Fraction(weights_of(options), 8)
    else:
        key, value, unit = "megabytes", megabytes, Fraction(10**6)
    least = sum(int(o.nbytes.min()) for o in options.values())
    if not 0 < value < math.inf or Fraction(str(value)) * unit < least:
        smallest = math.ceil(least / unit * 10**4) / 10**4
        raise ConfigError.bad_value(f"analysis.{key}", value, f"must be {smallest} or more, what the fewest bits take")
    return math.floor(Fraction(str(value)) * unit)


def _layer_plans(
    options: Mapping[str, Options], best: _Allocation, activation_bits: int, phases: Sequence[str], picture: bool
) -> dict[str, LayerPlan]:
    average = 8 * best.nbytes / weights_of(options)
    at_average = {name: o.cost_at(average) for name, o in options.items()}
    median = float(np.median(list(at_average.values())))
    plans = {}
    for name, i in best.choice.items():
        o = options[name]
        bits, group_size = [int(b) for b in o.bits[i]], int(o.group_size[i])
        reason = _reason(held_bits(max(bits), group_size) - average, at_average[name] < median)
        if len(set(bits)) > 1:
            reason += "; " + ", ".join(f"{phase} {b}" for phase, b in zip(phases, bits, strict=True)) + " bits"
        shown = figure(float(o.cost[i]), picture)
        plan = LayerPlan(max(bits), activation_bits, reason=reason, group_size=group_size, figure=shown)
        plan = replace(plan, sensitivity=float(o.cost[i]), nbytes=int(o.nbytes[i]))
        plans[name] = judged(plan, average)
    return plans


def _with_inputs(plan: Plan, inputs: InputBits) -> Plan:
    """``plan`` with bits of inputs that follow the step; each layer's own are their mean, rounded."""
    layers = {
        name: replace(layer, activation_bits=round(sum(inputs.by_layer[name]) / len(inputs.by_layer[name])))
        if name in inputs.by_layer
        else layer
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers, step_activation_bits=inputs.by_layer)


def _reason(above: float, harmless: bool) -> str:
    """The reason in words; a layer with a small error at average bits has more because they cost little."""
    if abs(above) < NEAR_AVERAGE:
        return "near the average"
    if above < 0:
        return f"robust: {-above:.1f} bits fewer than the average"
    return f"{'small layer' if harmless else 'fragile'}: {above:.1f} bits more than the average"


def _by_phase(options: Mapping[str, Options], best: _Allocation, phases: Sequence[str]) -> dict[str, dict[str, int]]:
    return {
        phase: {name: int(options[name].bits[i, column]) for name, i in best.choice.items()}
        for column, phase in enumerate(phases)
    }


# Notes


def _budget_notes(options: Mapping[str, Options], best: _Allocation, budget: int) -> list[str]:
    """Notes on whether the budget binds, and on the error with one bit more or less."""
    weights = weights_of(options)
    notes = []
    if all(o.cost[best.choice[name]] == o.cost.min() for name, o in options.items()):
        notes.append(
            f"the budget of {8 * budget / weights:.3f} bits is more than needed: every layer has its least error"
        )
    least = sum(int(o.nbytes.min()) for o in options.values())
    for words, there in (("more", budget + weights // 8), ("less", budget - weights // 8)):
        at = f"one bit {words} on average ({8 * there / weights:.3f})"
        if there < least:
            notes.append(f"{at} does not fit: the fewest bits take {8 * least / weights:.3f}")
        else:
            notes.append(f"{at}: {_compared(_Allocation.within(there, options, best.of_picture).error, best)}")
    return notes


def _compared(error: float, best: _Allocation) -> str:
    found = error_text(error, best.of_picture)
    if best.of_picture:
        return f"{found}, {decibels(error) - decibels(best.error):+.2f} dB" if error and best.error else found
    return found + (f", {error / best.error:.3g} times as much" if best.error > 0 else "")


def _uniform_note(
    sensitivities: Sensitivities, shares: NDArray[np.float64], best: _Allocation, budget: int
) -> list[str]:
    """A note on the error of 4 bits in groups of 64 everywhere, where all layers allow them."""
    if not all(UNIFORM in sensitivities.weights[name] for name in best.choice):
        return []
    nbytes = sum(option_bytes(sensitivities.shapes[name], *UNIFORM) for name in best.choice)
    if nbytes > budget:
        return ["uniform 4 bits in groups of 64 take more than this budget"]
    error = math.fsum(shares @ sensitivities.weights[name][UNIFORM] for name in best.choice)
    average = 8 * nbytes / sum(math.prod(sensitivities.shapes[name]) for name in best.choice)
    return [f"uniform 4 bits in groups of 64 ({average:.3f} on average): {_compared(error, best)}"]


def _copies_note(bits: Mapping[str, Mapping[str, int]], best: _Allocation, one_copy: _Allocation) -> str:
    several = sum(len({phase[name] for phase in bits.values()}) > 1 for name in best.choice)
    if not several:
        return "no layer holds more than one copy of its weights: in this budget, none would pay"
    held = f"more than one copy of the weights: {several} of {len(best.choice)} layers"
    return f"{held}; with one copy each in the same budget: {_compared(one_copy.error, best)}"
