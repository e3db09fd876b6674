"""Seconds and peak memory of ``calib export`` for a quantized Z-Image of its real shapes, with random values.

    python scripts/benchmark_export.py FOLDER

FOLDER, 4 GB and as much again for each format in turn, keeps the model for the next time.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from calib.base.progress import readable_bytes
from calib.models.mflux.zimage import FAMILY
from calib.models.model import weights
from calib.models.packed import Packed
from calib.quantization.checkpoint import save
from calib.quantization.model import QuantizedModel

import mlx.core as mx
from standin_mflux import ZIMAGE, small_zimage_sizes, write_zimage

BITS, GROUP_SIZE = 4, 64  # 4.5 bits a weight


def random_model() -> QuantizedModel:
    """A model of Z-Image's shapes; its integers, scales and the rest are random."""
    own = FAMILY.architecture({name: ZIMAGE.transformer[name] for name in FAMILY.sizes.values()})
    layers = {}
    for name, layer in own.layers().items():
        rows, columns = layer.weight.shape
        words = mx.random.randint(0, 1 << 31, (rows, columns * BITS // 32), mx.uint32)
        scales, biases = (
            (0.01 * mx.random.normal((rows, columns // GROUP_SIZE))).astype(mx.bfloat16) for _ in range(2)
        )
        layers[name] = Packed(words, scales, biases, BITS, GROUP_SIZE)
    paths = {name: own.path(name) for name in layers}
    packed = {f"{path}.weight" for path in paths.values()}
    rest = {path: weight.astype(mx.bfloat16) for path, weight in weights(own.module).items() if path not in packed}
    about = {"model": "zimage_turbo", "fingerprint": "0" * 16, **own.describe()}
    return QuantizedModel(layers, rest, {}, (), paths, about=about)


def build(folder: Path, base: Path) -> None:
    """Write the quantized model, and the other components, the text encoder a small one."""
    model = random_model()
    print(f"{model.size().quantized_values / 1e9:.2f} billion weights, {readable_bytes(model.size().nbytes)}")
    save(model, folder)
    write_zimage(base, small_zimage_sizes(1, 1))


def export(run: Path, base: Path, form: str, into: Path) -> tuple[float, int]:
    """Seconds and peak resident memory in bytes of one process."""
    command = [sys.executable, "-m", "calib", "export", str(run), "--format", form, "--into", str(into)]
    start = time.monotonic()
    process = subprocess.Popen([*command, "--base", str(base)] if form == "mflux" else command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{form}: ended with {status}")
    return time.monotonic() - start, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    run, base = given.folder / "run", given.folder / "base"
    if not base.exists():  # in a process of its own, whose memory those that are measured would inherit
        process = multiprocessing.get_context("spawn").Process(target=build, args=(run / "quantized", base))
        process.start()
        process.join()
    for form in ("mflux", "mlx", "recipe"):
        for _ in range(given.times):
            into = given.folder / form
            shutil.rmtree(into, ignore_errors=True)
            seconds, peak = export(run, base, form, into)
            size = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
            print(f"{form}: {readable_bytes(size)} in {seconds:.1f} s, peak memory {readable_bytes(peak)}", flush=True)


if __name__ == "__main__":
    main()
