"""A plan: bits and clipping for every layer, with reasons. The content of ``quantization_config.json``.

It is written from here and read by :mod:`calib.analysis.plan_file`; neither imports MLX or h5py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calib.base.affine import DEFAULT_GROUP_SIZE, GROUP_SIZES, WEIGHT_BITS
from calib.base.files import short_hash

NO_CLIP = (0.0, 100.0)

#: Weight bits where a heuristic sets none.
DEFAULT_WEIGHT_BITS = 8
#: Activation bits that mean no quantization, as activations are 16-bit floats.
UNQUANTIZED = 16


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer.

    Attributes:
        clip_percentile: activation percentiles at which the range is clipped, if ``use_percentile_clipping``.
        reason: the reason in a few words for people: 'large range', 'narrow range' …
        sensitive: needs careful handling.
        aggressive: may have 4 bits or fewer.
        group_size: number of weights of a row that share a scale and a bias.
        figure: the number behind the reason, with its name: 'r = 12.4'.
        sensitivity: S of the layer's planned weights, mean ‖v - v_q‖² / ‖v‖² of the model's output; None: not measured.
        nbytes: bytes of the planned weights; None: not computed.
    """

    weight_bits: int
    activation_bits: int
    clip_percentile: tuple[float, float] = NO_CLIP
    reason: str = ""
    sensitive: bool = False
    aggressive: bool = False
    group_size: int = DEFAULT_GROUP_SIZE
    figure: str = ""
    sensitivity: float | None = None
    nbytes: int | None = None

    @property
    def clips(self) -> bool:
        return self.clip_percentile != NO_CLIP

    def to_json(self) -> dict[str, Any]:
        return {
            "suggested_weight_bits": self.weight_bits,
            "suggested_activation_bits": self.activation_bits,
            "use_percentile_clipping": self.clips,
            "clip_percentile": list(self.clip_percentile),
            "group_size": self.group_size,
            "reason": self.reason,
            "figure": self.figure,
            "sensitive": self.sensitive,
            "aggressive": self.aggressive,
            **({} if self.sensitivity is None else {"sensitivity": self.sensitivity}),
            **({} if self.nbytes is None else {"bytes": self.nbytes}),
        }


@dataclass(frozen=True)
class Plan:
    """Layer plans by name, and outliers in the statistics.

    Attributes:
        outlier_layers: kurtosis of layers with heavy tails.
        outlier_channels: by layer, channels of large range, with the ratio to the layer's median channel range.
        phase_weight_bits: weight bits by phase and layer, where they vary with the step; every copy is stored.
        notes: notes for people on the making of the plan, a line each.
        step_activation_bits: activation bits of a layer at every step, (num_steps,), where they follow it.
        predicted_psnr: PSNR of pictures by this plan, weights rounded to nearest, in dB, to first order; None: unknown.
        predicted_weights_psnr: the same with inputs left as they are.
    """

    layers: dict[str, LayerPlan]
    outlier_layers: dict[str, float] = field(default_factory=dict)
    outlier_channels: dict[str, dict[int, float]] = field(default_factory=dict)
    phase_weight_bits: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    predicted_psnr: float | None = None
    predicted_weights_psnr: float | None = None
    step_activation_bits: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def predicted(self) -> dict[str, float]:
        """What was predicted, by the keys of ``metrics.json``."""
        found = {"predicted_psnr": self.predicted_psnr, "predicted_weights_psnr": self.predicted_weights_psnr}
        return {key: psnr for key, psnr in found.items() if psnr is not None}

    def to_json(self) -> dict[str, Any]:
        found = {name: layer.to_json() for name, layer in self.layers.items()}
        for name, channels in self.outlier_channels.items():
            if name in found:
                found[name]["outlier_channels"] = list(channels)
        return found

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
            **self.predicted(),
        }


def fault_of(layer: LayerPlan) -> str | None:
    """The first fault that prevents MLX from running a layer's plan, for people; None where there is none."""
    low, high = layer.clip_percentile
    faults = {
        f"suggested_weight_bits={layer.weight_bits}: MLX quantizes weights to {WEIGHT_BITS}": layer.weight_bits
        in WEIGHT_BITS
        and type(layer.weight_bits) is int,
        f"group_size={layer.group_size}: MLX has groups of {GROUP_SIZES}": layer.group_size in GROUP_SIZES
        and type(layer.group_size) is int,
        f"suggested_activation_bits={layer.activation_bits}: must be 2 to 16": isinstance(layer.activation_bits, int)
        and 2 <= layer.activation_bits <= UNQUANTIZED,
        f"clip_percentile={[low, high]}: must ascend, from 0 to 100": 0 <= low < high <= 100,
    }
    return next((fault for fault, holds in faults.items() if not holds), None)


def weights_hash(layers: Mapping[str, LayerPlan]) -> str:
    """Hash of the parts of a plan that affect weights: layers, weight bits, groups."""
    return short_hash([[name, plan.weight_bits, plan.group_size] for name, plan in layers.items()])


def plan_hash(layers: Mapping[str, LayerPlan]) -> str:
    """Hash of the parts of a plan that affect activations: layers, activation bits, clipping."""
    return short_hash([[name, plan.activation_bits, list(plan.clip_percentile)] for name, plan in layers.items()])
