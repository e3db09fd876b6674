"""Activation ranges as ``timestep_config.json`` holds them: {layer: {from_step: […], low: […], high: […]}}."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calib.analysis.ranges import StepRanges
from calib.errors import CalibError


def to_json(ranges: Mapping[str, StepRanges]) -> dict[str, dict[str, list[float]]]:
    """The entry ``activation_ranges``."""
    return {name: {key: list(values) for key, values in asdict(layer).items()} for name, layer in ranges.items()}


def from_json(document: Any, path: Path, num_steps: int) -> dict[str, StepRanges]:
    """What :func:`to_json` made of the ranges of a trajectory of ``num_steps``; ``document`` was read from ``path``.

    Raises:
        CalibError: it is damaged; one line names the file, the layer and what is wrong.
    """
    if not isinstance(document, dict):
        raise CalibError(f"{path}: activation_ranges must be an object of layer names; calib analyze writes it")
    found = {}
    for name, entry in document.items():
        try:
            found[name] = _layer_of(entry, num_steps)
        except ValueError as error:
            raise CalibError(f"{path}: activation_ranges of {name!r}: {error}; calib analyze writes them") from None
    return found


def _layer_of(entry: Any, num_steps: int) -> StepRanges:
    if not isinstance(entry, dict):
        raise ValueError("must be an object")
    lists: list[Any] = [entry.get(key) for key in ("from_step", "low", "high")]
    if not all(isinstance(values, list) for values in lists):
        raise ValueError("must have lists from_step, low and high")
    lengths = [len(values) for values in lists]
    if len(set(lengths)) > 1:
        raise ValueError(f"from_step, low and high have {lengths[0]}, {lengths[1]} and {lengths[2]} entries")
    steps, low, high = lists
    _check_steps(steps, num_steps)
    for key, values in (("low", low), ("high", high)):
        for value in values:
            if not _is_finite(value):
                raise ValueError(f"{key} holds {value!r}, not a finite number")
    for step, least, most in zip(steps, low, high, strict=True):
        if least > most:
            raise ValueError(f"low {least} is above high {most} at step {step}")
    return StepRanges(tuple(steps), tuple(map(float, low)), tuple(map(float, high)))


def _check_steps(steps: list[Any], num_steps: int) -> None:
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"from_step holds {step!r}, not a step index")
    if steps != sorted(set(steps)):
        raise ValueError(f"from_step does not ascend: {steps}")
    if not steps or steps[0] != 0:
        raise ValueError(f"from_step must begin with 0: {steps}")
    if steps[-1] >= num_steps:
        raise ValueError(f"from_step holds {steps[-1]}, where the last of {num_steps} steps is {num_steps - 1}")


def _is_finite(value: Any) -> bool:
    # Compared as it is: JSON has integers that are too large for a float.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max
