"""Draw the README's two pictures from a dataset and a run directory.

::

    calib num_images=24 data_dir=/tmp/readme hydra.run.dir=/tmp/readme_run
    python scripts/make_readme_pictures.py --data /tmp/readme --run /tmp/readme_run --out docs/images
"""

import argparse
from pathlib import Path

from calib.activations.reader import ActivationFile
from calib.analysis.layers import reported_layers
from calib.base.files import read_json
from calib.dataset.load import load_manifest

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from PIL import Image

COLUMNS, TILE, GAP = 12, 72, 6


def emoji_grid(data_dir: Path, out: Path) -> None:
    """Generated pictures side by side, in the order of their ids."""
    entries = list(load_manifest(data_dir).images.values())
    rows = -(-len(entries) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) - GAP, rows * (TILE + GAP) - GAP), "white")
    for i, entry in enumerate(entries):
        picture = Image.open(data_dir / entry.filename).resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(picture, (i % COLUMNS * (TILE + GAP), i // COLUMNS * (TILE + GAP)))
    sheet.save(out, optimize=True)


def range_map(run_dir: Path, out: Path) -> None:
    """The width of the central 98% of every layer's input at every step, beside the bits that ``range`` suggests."""
    plan = read_json(run_dir / "quantization_config.json")
    with ActivationFile(run_dir / "activations.h5") as file:
        # One row for each distinct input: layers that share one (q, k, v; all adaLN) differ in nothing here.
        names = [n for n in reported_layers(file) if not n.endswith((".k_proj", ".v_proj"))]
        names = [n for n in names if not n.endswith(".adaln") or n == "mm_block_0.image.adaln"]
        widths = np.array(
            [[np.ptp(file.statistics(n, [s]).histogram.percentiles([1, 99])) for s in file.steps] for n in names]
        )
        steps = file.steps
    bits = np.array([[plan[name]["suggested_activation_bits"]] for name in names])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.5, 8.2), width_ratios=(17, 1), layout="constrained", sharey=True
    )
    picture = left.imshow(widths, aspect="auto", cmap="viridis", norm=LogNorm())
    left.set_xticks(range(len(steps)), steps)
    left.set_yticks(range(len(names)), names, fontsize=8, family="monospace")
    left.set_xlabel("step index (0: pure noise, 50: finished)")
    left.set_title("Range of each layer's input, p99 - p01, over the denoising steps", fontsize=11, loc="left")
    colours = ListedColormap(["#c6dbef", "#6baed6", "#08519c"])
    right.imshow(bits, aspect="auto", cmap=colours, norm=BoundaryNorm([3, 5, 7, 9], 3))
    for row, value in enumerate(bits[:, 0]):
        right.text(0, row, value, ha="center", va="center", fontsize=8, color="white" if value == 8 else "black")
    right.set_xticks([])
    right.set_title("bits", fontsize=11)
    figure.colorbar(picture, ax=[left, right], location="bottom", shrink=0.5, aspect=40, label="range (log scale)")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    emoji_grid(args.data, args.out / "emoji.png")
    range_map(args.run, args.out / "ranges.png")


if __name__ == "__main__":
    main()
