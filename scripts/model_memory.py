"""Print how large mflux's transformers are, by their real shapes: in bfloat16, at mflux's 4 bits, at calib's 4.5.

    python scripts/model_memory.py

Nothing is downloaded or computed. mflux's 4 bits are those of ``-q 4``: in groups of 64 with a scale and a bias each,
of all layers that its predicate takes, and as it takes them. calib's are the average of all linear layers, scales and
biases counted, as in ``analysis.average_bits=4.5``; the rest has 16 bits.
"""

import importlib
from pathlib import Path

from calib.models.model import weights

import mlx.core as mx
from mflux.models.common.weights.loading.weight_applier import WeightApplier
from mlx import nn
from omegaconf import OmegaConf

#: Options of ``model``; those of mflux's modules count.
OPTIONS = Path(__file__).parents[1] / "conf" / "model"
BITS, GROUP_SIZE, AVERAGE_BITS = 4, 64, 4.5


def in_16_bits(module: nn.Module) -> int:
    """Bytes of all weights, floats in 16 bits."""
    return sum(w.nbytes if w.dtype == mx.uint32 else 2 * w.size for w in weights(module).values())


def main() -> None:
    print("| | linear layers | parameters | bfloat16 | mflux, 4 bits | calib, 4.5 bits |")
    print("|---|---|---|---|---|---|")
    for option in sorted(OPTIONS.glob("*.yaml")):
        module = str(OmegaConf.load(option)["_target_"]).rpartition(".")[0]
        if not module.startswith("calib.models.mflux."):
            continue
        family = importlib.import_module(module).FAMILY
        architecture = family.skeleton("a model", "nobody/nothing")
        network, layers = architecture.module, architecture.layers()
        of_layers = sum(int(layer.weight.size) for layer in layers.values())
        parameters, plain = sum(w.size for w in weights(network).values()), in_16_bits(network)
        planned = plain - 2 * of_layers + AVERAGE_BITS / 8 * of_layers
        predicate = WeightApplier._predicate_with_bits(family.definition.quantization_predicate, BITS)
        nn.quantize(network, GROUP_SIZE, BITS, class_predicate=predicate)
        sizes = " | ".join(f"{size / 1e9:.2f} GB" for size in (plain, in_16_bits(network), planned))
        print(f"| `{option.stem}` | {len(layers)} | {parameters / 1e9:.2f} B | {sizes} |")


if __name__ == "__main__":
    main()
