"""Heuristic ``sqnr``: the fewest bits whose quantization noise is a given ratio below the signal.

SQNR = 10 log10(Σx² / Σ(x - Q(x))²): of a layer's input, over the range where it is best, and of its weights, as
measured at collection. It ignores the effect of the layer on the model's output: assigning bits by SQNR alone is
reported to have worsened the FID of MixDQ (arXiv 2405.17873) from 31.65 to 37.35.
"""

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import DEFAULT_WEIGHT_BITS, LayerPlan
from calib.analysis.rounding import best_clip_of
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import ConfigError

ACTIVATION_BITS = (2, 3, 4, 5, 6, 8)


def plan_layer(layer: LayerSummary, target: float = 30.0, weight_target: float | None = None) -> LayerPlan:
    """The fewest activation bits whose SQNR, with the clip of least squared error, is ``target`` dB or more.

    Choices are 2, 3, 4, 5, 6 and 8; 8 where even 8 bits miss the target, which the reason reports. Weight bits are
    chosen alike by ``weight_target`` (None: ``target``); 8 where the weights' SQNR is not known. Needs
    ``activations.h5``.
    """
    wanted = target if weight_target is None else weight_target
    for key, value in {"target": target, "weight_target": wanted}.items():
        if not value > 0:
            raise ConfigError.bad_value(f"analysis.{key}", value, "must be more than 0 dB")
    for activation_bits in ACTIVATION_BITS:
        clip = best_clip_of(layer, activation_bits)
        if clip.sqnr >= target:
            break
    weight_bits = next((b for b in WEIGHT_BITS if layer.weight_sqnr.get(b, 0.0) >= wanted), DEFAULT_WEIGHT_BITS)
    weights = layer.weight_sqnr.get(weight_bits)
    misses = {
        "activations": not clip.sqnr >= target,
        "weights": weights is not None and weights < wanted,
    }
    # Weights of unknown SQNR have 8 bits to be safe, not because they need them.
    needed = max(activation_bits, weight_bits if weights is not None else 0)
    noise = "noisy" if needed == 8 else "some noise" if needed > 4 else "little noise"
    missed = " and ".join(what for what, holds in misses.items() if holds)
    return LayerPlan(
        weight_bits,
        activation_bits,
        clip.percentiles,
        reason=f"misses the target: {missed}" if missed else noise,
        sensitive=needed == 8,
        aggressive=max(activation_bits, weight_bits) <= 4,
        figure=f"SQNR {clip.sqnr:.1f} dB" + (f", weights {weights:.1f} dB" if weights is not None else ""),
    )
