"""Time and memory of sensitivities by gradients and of quantizer=fit, at SD3-medium's size with random weights.

    python scripts/benchmark_gradients.py                       # on a GPU
    python scripts/benchmark_gradients.py --latent 16 --steps 2 --images 1 --depth 2        # the same, in small

States are random numbers: what is measured takes as long whatever is in them.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from calib.activations.batches import StoredStates
from calib.analysis.gradients import gradient_sensitivities
from calib.analysis.layers import PROBE
from calib.analysis.measure import quantizable
from calib.analysis.sensitivities import Of
from calib.base.device import device_name
from calib.base.files import checksum
from calib.dataset.generate import planned_dataset
from calib.dataset.manifest import ImageEntry
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StateDtype, StorageFormat, write_trajectory
from calib.models.backward_memory import plan_backward
from calib.models.model import DiffusionModel
from calib.quantization.fit import fitted

import mlx.core as mx
import numpy as np
from benchmark_collect import whole_model


@contextmanager
def measured(label: str) -> Iterator[None]:
    mx.reset_peak_memory()
    start = time.perf_counter()
    yield
    print(f"| {label} | {time.perf_counter() - start:.1f} s | {mx.get_peak_memory() / 1e9:.1f} GB |", flush=True)


def random_states(folder: Path, model: DiffusionModel, images: int, num_steps: int) -> StoredStates:
    settings, rng = SamplerSettings(num_steps=num_steps, cfg_weight=5.0, batch_size=1), np.random.default_rng(0)
    manifest = planned_dataset(model, settings, 1, 0, StorageFormat.HDF5, StateDtype.BFLOAT16, None)
    for i in range(images):
        states = rng.standard_normal((num_steps + 1, *model.latent_shape), np.float32)
        samples = write_trajectory(folder, i, StateDtype.BFLOAT16.pack(mx.array(states)), manifest, {})
        checksums = {name: checksum(folder / name) for name in samples}
        manifest.images[i] = ImageEntry(i, f"prompt {i}", i, 5.0, num_steps, "", "", samples, checksums)
    return StoredStates(folder, manifest, range(images), range(num_steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", type=int, default=64, help="height and width of a latent")
    parser.add_argument("--depth", type=int, default=24, help="transformer blocks")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=28)
    given = parser.parse_args()
    model = whole_model(given.latent, given.depth)
    layers = {name: replace(PROBE, minimum=-8.0, maximum=8.0) for name in model.architecture.layers()}
    linear = {name: layer for name, layer in model.architecture.layers().items() if quantizable(layer)}
    plan = plan_backward(model.architecture, model.latent_shape, True, given.images)
    how = "block by block" if plan.by_parts else "in one piece"
    print(f"{device_name()}, {len(linear)} layers, {given.images} images of {given.steps} steps, passes {how}\n")
    print("| what | time | peak memory |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        states = random_states(Path(folder) / "dataset", model, given.images, given.steps)
        few = replace(states, images=states.images[:1], steps=[0])
        where = (lambda: model, model.architecture, layers)
        with measured("output, one image at one step (kernels compile)"):
            gradient_sensitivities(*where, few, Path(folder) / "warm", Of.OUTPUT)
        with measured("picture"):
            gradient_sensitivities(*where, states, Path(folder) / "cache", Of.PICTURE)
        with measured("fit, 4 bits in groups of 64"):
            for layer in linear.values():
                mx.eval(fitted(layer.weight, mx.ones(layer.weight.shape[1]), 4, 64, mx.bfloat16).weight)


if __name__ == "__main__":
    main()
