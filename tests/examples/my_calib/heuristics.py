"""Heuristics of my own."""

from collections.abc import Mapping

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.sensitivities import Sensitivities, usable_options


def by_tails(layer: LayerSummary, heavy: float = 4.0) -> LayerPlan:
    """8-bit weights and activations where extremes lie far beyond the central 98% of a layer's input, else 4 and 6."""
    reach = (layer.maximum - layer.minimum) / layer.range if layer.range else 1.0
    bits = (8, 8) if reach > heavy else (4, 6)
    return LayerPlan(*bits, reason="heavy tails" if reach > heavy else "light tails", figure=f"reach {reach:.1f}")


def widest(layers: Mapping[str, LayerSummary], share: float = 0.25) -> Plan:
    """8-bit weights for the ``share`` of the layers with the widest inputs, 4 for the others; nothing is measured."""
    wide = set(sorted(layers, key=lambda name: -layers[name].range)[: round(share * len(layers))])
    reasons = {True: "wide", False: "narrow"}
    plans = {name: LayerPlan(8 if name in wide else 4, 8, reason=reasons[name in wide]) for name in layers}
    return Plan(plans, notes=(f"8 bits for {len(wide)} of {len(layers)} layers",))


def fragile(layers: Mapping[str, LayerSummary], sensitivities: Sensitivities, share: float = 0.25) -> Plan:
    """8-bit weights for the ``share`` of the layers that 4 bits harm most, 4 for the others, in groups of 32."""
    options = usable_options(layers, sensitivities, weight_bits=(4,), group_sizes=(32,))
    harm = {name: float(own[4, 32].mean()) for name, own in options.items()}
    kept = set(sorted(harm, key=lambda name: -harm[name])[: round(share * len(harm))])
    kept |= layers.keys() - harm.keys()  # which MLX cannot quantize
    reasons = {True: "fragile", False: "robust"}
    return Plan({n: LayerPlan(8 if n in kept else 4, 8, group_size=32, reason=reasons[n in kept]) for n in layers})
