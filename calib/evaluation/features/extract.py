"""Features of pictures, and perceptual distances of pairs, by EfficientNet-Lite0; both kept by content."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from calib.base.device import device_kind
from calib.evaluation.features.efficientnet import FEATURES, SIZE, EfficientNetLite0
from calib.evaluation.features.store import Pixels, Store, in_blocks, key_of
from calib.evaluation.features.weights import SHA256, read_weights, weights_file
from calib.models.parallel import by_parts, shared_cores

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Of how pictures are prepared and what is made of them; another one makes what is kept useless.
VERSION = 1
#: Added to lengths of vectors, as in LPIPS.
TINY = 1e-10


def prepared(pixels: Pixels) -> NDArray[np.float32]:
    """A picture as the network takes it: 224×224 by bicubic interpolation, less 127 over 128.

    The whole picture, whatever its sides. Interpolation is Pillow's: of floating-point channels, with a filter as wide
    as the reduction asks for, and overshoot cut off.
    """
    channels = [Image.fromarray(pixels[..., i].astype(np.float32)) for i in range(3)]
    resized = [np.asarray(channel.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for channel in channels]
    found: NDArray[np.float32] = (np.clip(np.stack(resized, axis=-1), 0, 255) - 127) / 128
    return found.astype(np.float32)


class EfficientNetFeatures:
    """What EfficientNet-Lite0 sees in pictures of eight bits, (height, width, 3) each.

    Attributes:
        content: what its weights and its procedure are.
    """

    content = f"{SHA256[:16]}-{VERSION}"

    def __init__(self, cache_dir: Path):
        weights_file()  # raises where the package is missing, before anything is computed
        # By device, as NVIDIA's round the factors of products to TF32.
        self._store = Store(cache_dir / "features" / f"efficientnet_lite0-{SHA256[:8]}-{VERSION}-{device_kind()}")

    @cached_property
    def _network(self) -> EfficientNetLite0:
        return EfficientNetLite0(read_weights())

    def vectors(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """Pooled features after the last convolution, (pictures, 1280)."""
        keys = [key_of(picture) for picture in pictures]
        found = self._store.made(dict(zip(keys, pictures, strict=True)), FEATURES, self._vectors)
        return np.stack([found[key] for key in keys])

    def distances(self, pairs: Sequence[tuple[Pixels, Pixels]]) -> NDArray[np.float64]:
        """Perceptual distance of every pair, 0 where its pictures are equal; see :func:`perceptual`."""
        by_key = {(key_of(a), key_of(b)): (a, b) for a, b in pairs}
        known = {key: found for key in by_key if (found := self._store.get(_key_of_pair(*key), 1)) is not None}
        for chosen in in_blocks([key for key in by_key if key not in known]):
            computed = self._compared([by_key[key] for key in chosen])
            for key, row in zip(chosen, computed, strict=True):
                known[key] = row[:1]
                self._store.put(_key_of_pair(*key), row[:1])
                # Features come with it, and sets of the same pictures are often compared, too.
                self._store.put(key[0], row[1 : 1 + FEATURES])
                self._store.put(key[1], row[1 + FEATURES :])
        return np.array([float(known[key_of(a), key_of(b)][0]) for a, b in pairs])

    def _vectors(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        x = np.stack([prepared(picture) for picture in pictures])
        with shared_cores(len(x)):
            return np.array(by_parts(len(x), lambda part: self._network(mx.array(x[part]))[0]))

    def _compared(self, pairs: Sequence[tuple[Pixels, Pixels]]) -> NDArray[np.float32]:
        """A row for each pair: distance, features of the one, features of the other."""
        x, y = (np.stack([prepared(pair[side]) for pair in pairs]) for side in (0, 1))

        def compared(part: slice) -> mx.array:
            (first, a), (second, b) = self._network(mx.array(x[part])), self._network(mx.array(y[part]))
            return mx.concatenate([perceptual(a, b)[:, None], first, second], axis=1)

        with shared_cores(len(x)):
            return np.array(by_parts(len(x), compared))


def perceptual(a: Sequence[mx.array], b: Sequence[mx.array]) -> mx.array:
    """Distance of two pictures each by their maps at some stages, (channels, pictures, height, width): (pictures,).

    As LPIPS (arXiv 1801.03924, eq. 1) without its trained weights: vectors over channels are scaled to unit length; the
    sum of their squared differences, averaged over places and summed over stages. From 0, of equal pictures, to 4 a
    stage.
    """
    total = mx.zeros(a[0].shape[1])
    for x, y in zip(a, b, strict=True):
        total += mx.mean(mx.sum(mx.square(_unit(x) - _unit(y)), axis=0), axis=(1, 2))
    return total


def _unit(x: mx.array) -> mx.array:
    return x / (mx.sqrt(mx.sum(mx.square(x), axis=0, keepdims=True)) + TINY)


def _key_of_pair(a: str, b: str) -> str:
    return hashlib.sha256(f"{a} {b}".encode()).hexdigest()
