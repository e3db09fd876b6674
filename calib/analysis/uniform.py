"""Heuristic ``uniform``: the same bits everywhere, the baseline of every comparison."""

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import LayerPlan
from calib.errors import ConfigError

WEIGHT_BITS = (2, 3, 4, 5, 6, 8)


def plan_layer(layer: LayerSummary, weight_bits: int = 4, activation_bits: int = 8) -> LayerPlan:
    """``weight_bits`` and ``activation_bits`` for every layer, no clipping."""
    if weight_bits not in WEIGHT_BITS:
        raise ConfigError.bad_value("analysis.weight_bits", weight_bits, f"MLX quantizes weights to {WEIGHT_BITS} bits")
    if not 2 <= activation_bits <= 16:
        raise ConfigError.bad_value("analysis.activation_bits", activation_bits, "must be 2 to 16")
    return LayerPlan(
        weight_bits,
        activation_bits,
        reason="the same for all",
        sensitive=weight_bits == 8,
        aggressive=weight_bits <= 4,
    )
