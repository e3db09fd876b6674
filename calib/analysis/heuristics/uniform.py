"""Heuristic ``uniform``: the same bits everywhere, the baseline of every comparison."""

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import UNQUANTIZED, LayerPlan
from calib.base.affine import DEFAULT_GROUP_SIZE, GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import ConfigError


def plan_layer(
    layer: LayerSummary, weight_bits: int = 4, activation_bits: int = 8, group_size: int = DEFAULT_GROUP_SIZE
) -> LayerPlan:
    """Assign ``weight_bits`` in groups of ``group_size`` and ``activation_bits`` to every layer, without clipping."""
    if weight_bits not in WEIGHT_BITS:
        raise ConfigError.bad_value("analysis.weight_bits", weight_bits, f"MLX quantizes weights to {WEIGHT_BITS} bits")
    if not 2 <= activation_bits <= UNQUANTIZED:
        raise ConfigError.bad_value("analysis.activation_bits", activation_bits, f"must be 2 to {UNQUANTIZED}")
    if group_size not in GROUP_SIZES:
        raise ConfigError.bad_value("analysis.group_size", group_size, f"MLX has groups of {GROUP_SIZES}")
    return LayerPlan(
        weight_bits,
        activation_bits,
        reason="the same for all",
        sensitive=weight_bits == 8,
        aggressive=weight_bits <= 4,
        group_size=group_size,
    )
