"""Heuristic ``sensitivity``: the fewest bits at which quantizing a layer alone has a small enough error."""

import math
from collections.abc import Mapping
from dataclasses import replace

from calib.analysis.input_bits import input_error
from calib.analysis.layers import LayerSummary
from calib.analysis.plan import DEFAULT_WEIGHT_BITS, UNQUANTIZED, LayerPlan, Plan
from calib.analysis.sensitivities import (
    KEPT_AT_16_BITS,
    Sensitivities,
    decibels,
    figure,
    judged,
    kept_note,
    option_bytes,
    predicted,
    reach_note,
    usable_options,
    with_inputs_note,
)
from calib.base.errors import ConfigError

import numpy as np
from numpy.typing import NDArray

#: The largest S of a layer where none is given. Sixty layers of the second leave pictures some 32 dB.
TOLERANCE_OF_OUTPUT, TOLERANCE_OF_PICTURE = 1e-4, 1e-5
#: Activation bits of a layer whose input was not measured.
DEFAULT_ACTIVATION_BITS = 8
#: Factor by which activations may exceed the tolerance at their best bit-width; beyond it they are not quantized.
MOST_MISSED = 10.0


def plan_layers(
    layers: Mapping[str, LayerSummary],
    sensitivities: Sensitivities,
    tolerance: float | None = None,
    activation_tolerance: float | None = None,
) -> Plan:
    """Choose for each layer the option of fewest bits, and then of the largest groups, with S ≤ ``tolerance``.

    That is the smallest option; where no option meets the tolerance, the one of least S. Activations get the fewest
    bits with S ≤ ``activation_tolerance`` (None: ``tolerance``); where no bit-width meets it, the one of least S, or 16
    (not quantized) where even that exceeds it by more than a factor of :data:`MOST_MISSED`. 8 bits where activations
    were not measured.

    Raises:
        ConfigError: a tolerance is not positive and finite.
        CalibError: sensitivities are missing or invalid.
    """
    picture = sensitivities.of_picture
    if tolerance is None:
        tolerance = TOLERANCE_OF_PICTURE if picture else TOLERANCE_OF_OUTPUT
    activation_tolerance = tolerance if activation_tolerance is None else activation_tolerance
    for key, value in {"tolerance": tolerance, "activation_tolerance": activation_tolerance}.items():
        if not 0 < value < math.inf:
            raise ConfigError.bad_value(f"analysis.{key}", value, "must be positive and finite")
    options = usable_options(layers, sensitivities)
    chosen = {name: _smallest(layer, tolerance) for name, layer in options.items()}
    s = {name: float(options[name][option].mean()) for name, option in chosen.items()}
    sizes = {name: option_bytes(sensitivities.shapes[name], *option) for name, option in chosen.items()}
    nbytes, weights = sum(sizes.values()), sum(math.prod(sensitivities.shapes[name]) for name in sizes)
    plans = {}
    for name in layers:
        bits = _activation_bits(sensitivities.activations.get(name, {}), activation_tolerance)
        if name in chosen:
            plan = _layer_plan(chosen[name], bits, s[name], tolerance, 8 * nbytes / weights, picture)
            plans[name] = replace(plan, nbytes=sizes[name])
        else:
            plans[name] = LayerPlan(DEFAULT_WEIGHT_BITS, bits, reason=KEPT_AT_16_BITS)
    error = math.fsum(s.values())
    notes = [
        *predicted(sensitivities, error, nbytes, weights),
        *kept_note(layers, sensitivities),
        *reach_note(sensitivities),
    ]
    if missed := sum(value > tolerance for value in s.values()):
        notes.append(f"no option has S ≤ {tolerance:g}, so they have their best: {missed} of {len(s)} layers")
    if left := sum(plan.activation_bits == UNQUANTIZED for plan in plans.values()):
        least = MOST_MISSED * activation_tolerance
        notes.append(
            f"activations are left as they are, with S > {least:g} at their best: {left} of {len(layers)} layers"
        )
    of_inputs = input_error(sensitivities, {name: plan.activation_bits for name, plan in plans.items()})
    notes[1:1] = with_inputs_note(error, of_inputs, picture)
    if not picture:
        return Plan(plans, notes=tuple(notes))
    whole, alone = decibels(error + (of_inputs or 0.0)), decibels(error)
    return Plan(plans, notes=tuple(notes), predicted_psnr=whole, predicted_weights_psnr=alone)


def _smallest(measured: Mapping[tuple[int, int], NDArray[np.float64]], tolerance: float) -> tuple[int, int]:
    """The smallest option that meets ``tolerance``, or the one of least S where none does."""
    s = {option: float(values.mean()) for option, values in measured.items()}
    order = sorted(s, key=lambda option: (option[0], -option[1]))
    return next((option for option in order if s[option] <= tolerance), min(order, key=s.__getitem__))


def _activation_bits(measured: Mapping[int, NDArray[np.float64]], tolerance: float) -> int:
    if not measured:
        return DEFAULT_ACTIVATION_BITS
    s = {bits: float(measured[bits].mean()) for bits in sorted(measured)}
    best = min(s, key=s.__getitem__)
    otherwise = best if s[best] <= MOST_MISSED * tolerance else UNQUANTIZED
    return next((bits for bits in s if s[bits] <= tolerance), otherwise)


def _layer_plan(
    option: tuple[int, int], activation_bits: int, s: float, tolerance: float, average: float, picture: bool
) -> LayerPlan:
    bits, group_size = option
    plan = LayerPlan(bits, activation_bits, group_size=group_size, figure=figure(s, picture), sensitivity=s)
    plan = judged(plan, average)
    if s > tolerance:
        return replace(plan, reason=f"fragile: no option has S ≤ {tolerance:g}", sensitive=True, aggressive=False)
    return replace(plan, reason=f"fragile: fewer bits have S > {tolerance:g}" if plan.sensitive else f"{bits} bits do")
