"""A plan: bits and clipping for every layer, and why. The content of ``quantization_config.json``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from calib.analysis.layers import LayerSummary

import numpy as np

#: A heuristic, its parameters bound: the one thing a new option of ``analysis`` has to supply.
Heuristic = Callable[[LayerSummary], "LayerPlan"]

NO_CLIP = (0.0, 100.0)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets.

    Attributes:
        clip_percentile: activation percentiles at which the range is cut, if ``use_percentile_clipping``.
        reason: what decided, in a few words for people: 'large range', 'narrow range' …
        sensitive: needs careful handling; aggressive: may have 4 bits or fewer.
    """

    weight_bits: int
    activation_bits: int
    clip_percentile: tuple[float, float] = NO_CLIP
    reason: str = ""
    sensitive: bool = False
    aggressive: bool = False

    @property
    def clips(self) -> bool:
        return self.clip_percentile != NO_CLIP

    def to_json(self) -> dict[str, Any]:
        return {
            "suggested_weight_bits": self.weight_bits,
            "suggested_activation_bits": self.activation_bits,
            "use_percentile_clipping": self.clips,
            "clip_percentile": list(self.clip_percentile),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Plan:
    """Layer plans by name, and what stands out in the statistics."""

    layers: dict[str, LayerPlan]
    outlier_layers: dict[str, float] = field(default_factory=dict)
    outlier_channels: dict[str, list[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {name: layer.to_json() for name, layer in self.layers.items()}

    def metrics(self) -> dict[str, float]:
        """Flat numbers for ``metrics.json``."""
        count = len(self.layers)
        return {
            "layers": count,
            "mean_weight_bits": sum(layer.weight_bits for layer in self.layers.values()) / count,
            "mean_activation_bits": sum(layer.activation_bits for layer in self.layers.values()) / count,
            "sensitive_layers": sum(layer.sensitive for layer in self.layers.values()),
            "aggressive_layers": sum(layer.aggressive for layer in self.layers.values()),
            "outlier_layers": len(self.outlier_layers),
            "outlier_channels": sum(map(len, self.outlier_channels.values())),
        }


def make_plan(layers: Mapping[str, LayerSummary], heuristic: Heuristic) -> Plan:
    """Apply ``heuristic`` to every layer and name the outliers."""
    return Plan(
        {name: heuristic(layer) for name, layer in layers.items()},
        outlier_layers(layers),
        {name: channels for name, layer in layers.items() if (channels := outlier_channels(layer))},
    )


def outlier_channels(layer: LayerSummary, factor: float = 2.5) -> list[int]:
    """Channels whose range exceeds ``factor`` times the layer's median channel range (this project's origin)."""
    if layer.channel_range is None or not len(layer.channel_range):
        return []
    limit = factor * float(np.median(layer.channel_range))
    return [int(i) for i in np.flatnonzero(layer.channel_range > limit)] if limit > 0 else []


def outlier_layers(layers: Mapping[str, LayerSummary], threshold: float = 50.0) -> dict[str, float]:
    """Layers with heavy tails: kurtosis of the pooled histogram above ``threshold`` (a normal distribution has 3)."""
    return {
        name: layer.kurtosis
        for name, layer in layers.items()
        if layer.kurtosis is not None and layer.kurtosis > threshold
    }


def phase_bits(layers: Mapping[str, LayerSummary], heuristic: Heuristic) -> dict[str, dict[str, int]]:
    """Activation bits of every layer in each phase: the heuristic on that phase's statistics alone."""
    phases = dict.fromkeys(phase for layer in layers.values() for phase in layer.phases)
    return {
        phase: {name: heuristic(layer.phases[phase]).activation_bits for name, layer in layers.items()}
        for phase in phases
    }
