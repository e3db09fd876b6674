"""Bits of inputs at each step: the least error within an average over all numbers that layers read.

An input is an array that one or more layers read, and errors of inputs and steps add up (docs/METHODS.md §9), so bits
for every input in every group of steps are a multiple-choice knapsack, solved exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from calib.analysis.knapsack import solve
from calib.analysis.layers import LayerSummary
from calib.analysis.plan import UNQUANTIZED
from calib.analysis.ranges import StepRanges
from calib.analysis.sensitivities import INPUT_BITS, Sensitivities, decibels, error_text
from calib.base.errors import CalibError, ConfigError

import numpy as np
from numpy.typing import NDArray

#: Bit-widths to choose from; 16: not quantized.
CHOICES = (4, 5, 6, 7, 8, 10, 12, UNQUANTIZED)


@dataclass(frozen=True)
class InputBits:
    """The optimum within a budget.

    Attributes:
        by_layer: bits at each step, (num_steps,), of each layer whose input was measured.
        error: Σ over inputs of the mean over the steps, in the unit of the sensitivities.
        average: bits of a number that a layer reads, over all inputs and steps.
    """

    by_layer: dict[str, tuple[int, ...]]
    error: float
    average: float


def allocate_inputs(
    layers: Mapping[str, LayerSummary],
    sensitivities: Sensitivities,
    average: float,
    choices: Sequence[int] = CHOICES,
    step_groups: int | None = None,
) -> InputBits:
    """Choose bits of every input in every group of steps, with the least error within ``average``.

    The average is over the numbers that layers read: an input counts by its size, at every step, and once however many
    layers read it. A measured step stands for the steps nearest to it.

    Args:
        layers: statistics, by which an input's size is known.
        choices: bit-widths to choose from; those below 8 that were not measured are left out.
        step_groups: number of groups of consecutive measured steps, as equal as can be, with the same bits each; None:
            as many as there are measured steps.

    Raises:
        ConfigError: the budget is below the fewest bits or above the most, or another value is impossible.
        CalibError: no input was measured, or not at these bit-widths.
    """
    bits = _checked(sensitivities, average, choices, step_groups)
    inputs, spans = sensitivities.inputs(), _spans(sensitivities)
    numbers = np.array([layers[name].num_samples for name in inputs], dtype=np.int64)
    numbers //= np.gcd.reduce(numbers) or 1
    groups = np.array_split(np.arange(len(spans)), min(step_groups or len(spans), len(spans)))
    cost, size = [], []
    for name, count in zip(inputs, numbers.tolist(), strict=True):
        errors = np.stack([_errors(sensitivities.activations[name], b) for b in bits], axis=1)  # (steps, choices)
        weighted = errors * (spans / sensitivities.num_steps)[:, None]
        cost += [weighted[group].sum(axis=0) for group in groups]
        size += [count * int(spans[group].sum()) * np.array(bits, dtype=np.int64) for group in groups]
    read = int(numbers.sum()) * sensitivities.num_steps
    choice = solve(cost, size, math.floor(Fraction(str(average)) * read))
    chosen = np.array(bits)[np.array(choice).reshape(len(inputs), len(groups))]
    lengths = [int(spans[group].sum()) for group in groups]
    by_step = [tuple(row) for row in np.repeat(chosen, lengths, axis=1).tolist()]
    return InputBits(
        {name: own for names, own in zip(inputs.values(), by_step, strict=True) for name in names},
        math.fsum(own[i] for own, i in zip(cost, choice, strict=True)),
        sum(int(own[i]) for own, i in zip(size, choice, strict=True)) / read,
    )


def over_ranges(
    sensitivities: Sensitivities, measured: Mapping[str, StepRanges], wanted: Mapping[str, StepRanges]
) -> Sensitivities:
    """``sensitivities`` with inputs over the ranges ``wanted`` in place of those they were ``measured`` over, by layer.

    An error grows with the square of the range's width; what a narrower range cuts off is not counted.
    """
    steps = sensitivities.steps
    factors = {}
    for name in sensitivities.activations:
        before, after = (np.array([_width(*ranges[name].at(s)) for s in steps]) for ranges in (measured, wanted))
        factors[name] = np.divide(after, before, out=np.ones(len(steps)), where=before > 0) ** 2
    scaled = {
        name: {bits: errors * factors[name] for bits, errors in own.items()}
        for name, own in sensitivities.activations.items()
    }
    return replace(sensitivities, activations=scaled)


def _width(low: float, high: float) -> float:
    """The width of a grid, which has zero on it."""
    return max(high, 0.0) - min(low, 0.0)


def input_error(sensitivities: Sensitivities, bits: Mapping[str, int]) -> float | None:
    """Σ over inputs of the error with ``bits`` by layer, the same at all steps; None where it is not known.

    An input that several layers read counts once, at the fewest of their bits.
    """
    if not sensitivities.activations:
        return None
    errors = []
    for name, names in sensitivities.inputs().items():
        least = min(bits[n] for n in names)
        if not _known(sensitivities.activations[name], least):
            return None
        errors.append(float(_errors(sensitivities.activations[name], least).mean()))
    return math.fsum(errors)


def input_notes(
    layers: Mapping[str, LayerSummary],
    sensitivities: Sensitivities,
    found: InputBits,
    average: float,
    choices: Sequence[int] = CHOICES,
) -> list[str]:
    """Notes on the optimum within ``average``, and on what bits that follow the step gain."""
    every = [bits for own in found.by_layer.values() for bits in own]
    picture = sensitivities.of_picture
    notes = [
        f"inputs have {found.average:.3f} bits on average, {min(every)} to {max(every)}, over the numbers that layers "
        f"read at all steps: {error_text(found.error, picture)} of them alone, to first order, which promises too much "
        "of coarse inputs",
        "bits of inputs are those of this budget; phase_bits has no effect",
    ]
    if any(len(set(own)) > 1 for own in found.by_layer.values()):
        same = allocate_inputs(layers, sensitivities, average, choices, 1)
        lost = f", {decibels(same.error) - decibels(found.error):+.2f} dB" if picture and found.error else ""
        notes.insert(1, f"the same average with bits by layer alone: {error_text(same.error, picture)}{lost}")
    return notes


def _checked(
    sensitivities: Sensitivities, average: float, choices: Sequence[int], step_groups: int | None
) -> list[int]:
    """The bit-widths that can be chosen, ascending; raises where there are none, or a value is impossible."""
    key, lowest = "analysis.activation_choices", min(INPUT_BITS)
    if not choices or not all(lowest <= bits <= UNQUANTIZED for bits in choices):
        raise ConfigError.bad_value(key, list(choices), f"must be some of {lowest} to {UNQUANTIZED}")
    if step_groups is not None and step_groups < 1:
        raise ConfigError.bad_value("analysis.step_groups", step_groups, "must be 1 or more, or null for every step")
    measured = sensitivities.activations.values()
    bits = [b for b in sorted(set(choices)) if all(_known(own, b) for own in measured)]
    if not measured or not bits:
        raise CalibError(f"no error of inputs was measured at bits from which these follow: {list(choices)}")
    if not bits[0] <= average <= bits[-1]:
        allowed = f"must be {bits[0]} to {bits[-1]}, the fewest and the most bits to choose from"
        raise ConfigError.bad_value("analysis.average_activation_bits", average, allowed)
    return bits


def _known(measured: Mapping[int, NDArray[np.float64]], bits: int) -> bool:
    return bits in measured or bits == UNQUANTIZED or (bool(measured) and bits > max(measured))


def _errors(measured: Mapping[int, NDArray[np.float64]], bits: int) -> NDArray[np.float64]:
    """Errors at each measured step: as measured, and beyond by the square of the grid's distance."""
    finest = max(measured)
    if bits == UNQUANTIZED:
        return np.zeros_like(measured[finest])
    if bits in measured:
        return measured[bits]
    finer: NDArray[np.float64] = measured[finest] * ((2**finest - 1) / (2**bits - 1)) ** 2
    return finer


def _spans(sensitivities: Sensitivities) -> NDArray[np.int64]:
    """The number of steps that each measured step stands for: those nearest to it, (steps,)."""
    steps = sensitivities.steps
    borders = [0, *((a + b + 1) // 2 for a, b in pairwise(steps)), sensitivities.num_steps]
    return np.diff(borders)
