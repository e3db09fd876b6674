"""The summary of a plan for people: ``analysis.txt``."""

from collections import Counter
from collections.abc import Callable

from calib.analysis.plan import LayerPlan, Plan

MOST_OUTLIERS = 10


def summary_text(plan: Plan) -> str:
    """The layer statistics summary."""
    count = len(plan.layers)
    lines = ["Layer Statistics Summary:", f"  Total layers: {count}", "  Suggested bit-widths:"]
    by_bits = Counter(layer.weight_bits for layer in plan.layers.values())
    for bits in sorted(by_bits, reverse=True):
        lines.append(f"    {bits}-bit: {by_bits[bits]} layers ({100 * by_bits[bits] / count:.0f}%)")
    lines.append("  Sensitive layers (need careful handling):")
    lines += _listed(plan, lambda layer: layer.sensitive, _needs)
    lines.append("  Layers suitable for aggressive quantization (≤4-bit):")
    lines += _listed(plan, lambda layer: layer.aggressive, _why)
    if plan.outlier_layers:
        lines.append("  Outlier layers (heavy tails):")
        worst = sorted(plan.outlier_layers.items(), key=lambda item: -item[1])
        lines += [f"    - {name} (kurtosis {kurtosis:.0f})" for name, kurtosis in worst[:MOST_OUTLIERS]]
    if plan.outlier_channels:
        channels = sum(map(len, plan.outlier_channels.values()))
        lines.append(f"  Outlier channels (range > 2.5 × median): {channels} in {len(plan.outlier_channels)} layers")
        distinct = {tuple(own.items()): name for name, own in reversed(plan.outlier_channels.items())}
        ordered = sorted(distinct.items(), key=lambda item: -max(factor for _, factor in item[0]))
        widest = [(name, dict(own)) for own, name in ordered]  # layers that read one array, by the first
        for name, own in widest[:MOST_OUTLIERS]:
            channel = max(own, key=lambda i: own[i])
            lines.append(f"    - {name} ({len(own)} channels, widest {channel}: {own[channel]:.1f} × median)")
    if any(layer.activation_bits != layer.weight_bits for layer in plan.layers.values()):
        activations = Counter(layer.activation_bits for layer in plan.layers.values())
        counts = ", ".join(f"{bits}-bit: {activations[bits]} layers" for bits in sorted(activations, reverse=True))
        lines.append(f"  Activations: {counts}")
    lines += [f"  {note}" for note in plan.notes]
    return "\n".join(lines) + "\n"


def _needs(layer: LayerPlan) -> str:
    return f"{_why(layer)}, needs {layer.weight_bits}-bit"


def _why(layer: LayerPlan) -> str:
    return f"{layer.reason}, {layer.figure}" if layer.figure else layer.reason


def _listed(plan: Plan, chosen: Callable[[LayerPlan], bool], note: Callable[[LayerPlan], str]) -> list[str]:
    found = [f"    - {name} ({note(layer)})" for name, layer in plan.layers.items() if chosen(layer)]
    return found or ["    - none"]
