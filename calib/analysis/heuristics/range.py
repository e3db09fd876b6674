"""Heuristic ``range``: bits by the width of the central 98% of a layer's values.

The rule of the scripts that calib started from.
"""

import math

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import NO_CLIP, LayerPlan


def plan_layer(
    layer: LayerSummary,
    large: float = 10.0,
    medium: float = 5.0,
    variation: float = 0.5,
    clip_below: float = 0.9,
) -> LayerPlan:
    """The same weight and activation bits, from r = p99 - p01.

    8 bits where r > ``large``, 6 where r > ``medium``, else 4; two more, at most 8, where std / r > ``variation``.
    Clip to the 1st and 99th percentile where r / (max - min) < ``clip_below``.
    """
    r, full = layer.range, layer.maximum - layer.minimum
    bits = 8 if r > large else 6 if r > medium else 4
    # A constant layer has r = 0 and std = 0; std without range is a rare spike.
    varies = layer.std > variation * r and layer.std > 0
    if varies:
        bits = min(8, bits + 2)
    width = "large" if r > large else "medium" if r > medium else "narrow"
    reason = "high variation" if varies and r <= large else f"{width} range"
    clips = full > 0 and r / full < clip_below
    return LayerPlan(
        weight_bits=bits,
        activation_bits=bits,
        clip_percentile=(1.0, 99.0) if clips else NO_CLIP,
        reason=reason,
        sensitive=bits == 8,
        aggressive=bits <= 4,
        figure=f"r = {r:.3g}, std/r = {layer.std / r if r else math.inf:.2g}" if varies else f"r = {r:.3g}",
    )
