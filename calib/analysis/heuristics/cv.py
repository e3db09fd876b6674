"""Heuristic ``cv``: bits by the coefficient of variation, and by the drift of the range over the denoising steps.

Activations of diffusion models change with the denoising step (PTQ4DM, arXiv 2211.15736; Q-Diffusion, arXiv
2302.04304), and a range that is wide enough for all steps gives most of them a coarser grid. Rule and thresholds are
this project's own.
"""

import math

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import DEFAULT_WEIGHT_BITS, LayerPlan
from calib.base.errors import ConfigError
from calib.base.values import at_least


def plan_layer(layer: LayerSummary, variation: float = 30.0, drift: float = 0.2) -> LayerPlan:
    """4 activation bits, 2 more where std/|mean| > ``variation``, 2 more where the drift exceeds ``drift``.

    The drift is (max - min) / max of p99 - p01 over the steps: 0 where all are alike. It is unknown, and counts as 0,
    for a single phase and for a ``layer_statistics.json``. The mean of many layers is close to 0, and std/|mean| then
    shows how close. No clipping; 8-bit weights.
    """
    at_least("analysis.variation", variation, 0)
    if not 0 <= drift <= 1:
        raise ConfigError.bad_value("analysis.drift", drift, "must be 0 to 1, a part of the largest range")
    ratio = layer.std / abs(layer.mean) if layer.mean else math.inf if layer.std else 0.0
    drifted = central_range_drift(layer)
    found = {"high variation": ratio > variation, "drifting range": drifted is not None and drifted > drift}
    bits = 4 + 2 * sum(found.values())
    return LayerPlan(
        DEFAULT_WEIGHT_BITS,
        bits,
        reason=", ".join(reason for reason, holds in found.items() if holds) or "steady",
        sensitive=bits == 8,
        aggressive=bits <= 4,
        figure=f"std/|mean| {ratio:.3g}" + (f", drift {drifted:.2f}" if drifted is not None else ""),
    )


def central_range_drift(layer: LayerSummary) -> float | None:
    """(max - min) / max of p99 - p01 over the steps; None where fewer than two steps are known."""
    ranges = [step["p99"] - step["p01"] for step in layer.steps.values()]
    known = [width for width in ranges if math.isfinite(width)]
    if len(known) < 2:
        return None
    return (max(known) - min(known)) / max(known) if max(known) > 0 else 0.0
