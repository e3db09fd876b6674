"""How long the offline features of pictures take: the first time, from the cache, and beside perceptual distances.

    python scripts/benchmark_features.py [--pictures 1000] [--size 64]

Pictures are made up, smooth shapes with noise; files and decoding are not counted. Prints seconds of the clock and of
the processors, which do not depend on what else the machine does.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from calib.base.device import cores
from calib.evaluation.features.extract import EfficientNetFeatures

import mlx.core as mx
import numpy as np


def pictures(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:size, :size] / size
    found = []
    for _ in range(count):
        waves = [np.sin(2 * np.pi * (rng.randn() * 3 * x + rng.randn() * 3 * y + rng.rand())) for _ in range(3)]
        noisy = np.stack(waves, axis=-1) * 100 + 127 + rng.randn(size, size, 3) * 8
        found.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return found


def timed(what: str, count: int, work: Callable[[], object]) -> None:
    start, before = time.perf_counter(), time.process_time()
    work()
    took, used = time.perf_counter() - start, time.process_time() - before
    print(f"{what:44} {took:6.1f} s, {1000 * took / count:6.1f} ms each; {used:6.1f} s of processors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{given.pictures} pictures of {given.size} px, {mx.default_device()}, {cores()} processors, load {load:.1f}")
    one, other = (pictures(given.pictures, given.size, seed) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as name:
        timed("features", given.pictures, lambda: EfficientNetFeatures(Path(name)).vectors(one))
        timed("features, from the cache", given.pictures, lambda: EfficientNetFeatures(Path(name)).vectors(one))
        pairs = list(zip(one, other, strict=True))
        timed(
            "distances, and features of both", given.pictures, lambda: EfficientNetFeatures(Path(name)).distances(pairs)
        )
        timed("distances, from the cache", given.pictures, lambda: EfficientNetFeatures(Path(name)).distances(pairs))


if __name__ == "__main__":
    main()
