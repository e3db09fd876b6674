"""A recipe: bits and group size of each layer by its module path, as JSON that other converters can read."""

from collections.abc import Mapping
from typing import Any

from calib.analysis.plan import LayerPlan
from calib.analysis.sensitivities import alone_psnr
from calib.base import VERSION
from calib.models.families import paths_of
from calib.quantization.model import QuantizedModel

FORMAT, FORMAT_VERSION = "calib-recipe", 1


def recipe_of(quantized: QuantizedModel, plan: Mapping[str, LayerPlan], repository: str | None) -> dict[str, Any]:
    """The recipe of a quantized model, JSON-able; rules for activations and copies for phases are not in it.

    Args:
        plan: what the model was made by, for what was predicted of single layers.
        repository: of the hub, which the model's weights came from.
    """
    about, size = quantized.about, quantized.size()
    layers = {}
    for name, packed in quantized.layers.items():
        alone = alone_psnr(plan[name]) if name in plan else None
        entry = {"bits": packed.bits, "group_size": packed.group_size, "name": name}
        layers[quantized.paths[name]] = entry if alone is None else {**entry, "alone_psnr": alone}
    predicted = about.get("predicted_weights_psnr")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "producer": f"calib {VERSION}",
        "model": about.get("model"),
        "repository": repository,
        "fingerprint": about.get("fingerprint"),
        "paths": paths_of(about),
        "mode": "affine",
        "average_weight_bits": size.average_bits,
        **({} if predicted is None else {"predicted_psnr": predicted}),
        "layers": layers,
    }
