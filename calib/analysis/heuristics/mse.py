"""Heuristic ``mse``: the same bits everywhere, with the clipping range of least error in each layer.

The grid search and the norm, 2.4, are those of Q-Diffusion's and TaQ-DiT's code (arXiv 2302.04304, 2411.14172).
"""

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import DEFAULT_WEIGHT_BITS, NO_CLIP, UNQUANTIZED, LayerPlan
from calib.analysis.rounding import best_clip_of
from calib.base.errors import ConfigError


def plan_layer(layer: LayerSummary, activation_bits: int = 8, norm: float = 2.4) -> LayerPlan:
    """The clip that minimises Σ|x - Q(x)|^``norm`` with ``activation_bits``; 8-bit weights.

    With 16 bits activations are not quantized, and not clipped. Needs ``activations.h5``.
    """
    if not 2 <= activation_bits <= UNQUANTIZED:
        raise ConfigError.bad_value("analysis.activation_bits", activation_bits, f"must be 2 to {UNQUANTIZED}")
    if not 1 <= norm <= 4:
        raise ConfigError.bad_value("analysis.norm", norm, "must be 1 to 4")
    if activation_bits == UNQUANTIZED:
        return LayerPlan(DEFAULT_WEIGHT_BITS, activation_bits, reason="activations as they are")
    clip = best_clip_of(layer, activation_bits, norm)
    return LayerPlan(
        DEFAULT_WEIGHT_BITS,
        activation_bits,
        clip.percentiles,
        reason="the full range costs least" if clip.percentiles == NO_CLIP else "clipped where it costs least",
        sensitive=activation_bits == 8,
        aggressive=activation_bits <= 4,
        figure=f"SQNR {clip.sqnr:.1f} dB",
    )
