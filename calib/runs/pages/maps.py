"""Makes the parts of a page that show every layer at every step, as heat maps."""

from typing import Any

from calib.analysis.steps import StepPlan
from calib.runs.pages.heat import heat_map
from calib.runs.pages.layers import Ranges, bits_by_step, short_names
from calib.runs.pages.page import embedded, trusted
from calib.runs.pages.parts import Part

import numpy as np


def _heat_part(name: str, title: str, note: str, ranges: Ranges, values: Any, label: str, logarithmic: bool) -> Part:
    figure = heat_map(short_names(ranges.layers), ranges.steps, values, label, logarithmic)
    rounded = [[None if not np.isfinite(v) else float(f"{v:.3g}") for v in row] for row in values]
    data = embedded({"rows": ranges.layers, "steps": ranges.steps, "values": rounded})
    return Part(name, title, note, trusted(figure), data)


def range_part(ranges: Ranges) -> Part:
    """Return the map of the widths of ranges."""
    note = "How wide each layer's input is, largest minus smallest value, on a logarithmic scale. (+n): n more read it."
    return _heat_part("range", "Range", note, ranges, ranges.widths, "width of the range", True)


def drift_part(ranges: Ranges) -> Part:
    """Return the map of widths relative to each layer's widest."""
    note = "The same, each layer relative to its widest step: what one range for all steps would miss."
    return _heat_part("drift", "Drift", note, ranges, ranges.drift, "share of the layer's widest range", False)


def bits_part(steps: StepPlan) -> list[Part]:
    """Return the map of the bits of inputs, where they follow the step."""
    if not steps.step_bits:
        return []
    bits = bits_by_step(steps)
    note = "How many bits the plan gives each layer's input at each step, within its average. (+n): n more read it."
    return [_heat_part("input-bits", "Bits of inputs by step", note, bits, bits.widths, "bits", False)]
