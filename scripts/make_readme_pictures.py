"""Draw the documents' pictures ``emoji.png``, ``ranges.png`` and ``quantized.png`` from a dataset and a run directory.

::

    calib num_images=24 data_dir=/tmp/readme hydra.run.dir=/tmp/readme_run \\
        analysis=allocate analysis.average_bits=4.5 quantizer=gptq ranges=per_step \\
        sensitivity.method=trials sensitivity.of=output
    python scripts/make_readme_pictures.py --data /tmp/readme --run /tmp/readme_run --out docs/images
"""

import argparse
import shutil
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
#: From the fewest bits to the most, and the colours of MLX's bit-widths.
BITS = (2, 3, 4, 5, 6, 8)
COLOURS = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#4292c6", "#08519c")


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
    """The width of the central 98% of each layer's input at each step, beside the bits of the weights that read it."""
    plan = read_json(run_dir / "quantization_config.json")
    readers: dict[str, list[str]] = {}
    with ActivationFile(run_dir / "activations.h5") as file:
        first: dict[str, str] = {}
        for name in reported_layers(file):
            # All adaLN layers read one array and would make one row of nine cells: they are left out.
            if not name.endswith(".adaln"):
                readers.setdefault(first.setdefault(file.same_data(name), name), []).append(name)
        widths = np.array(
            [[np.ptp(file.statistics(n, [s]).histogram.percentiles([1, 99])) for s in file.steps] for n in readers]
        )
        steps = file.steps
    bits = np.full((len(readers), max(map(len, readers.values()))), np.nan)
    for row, names in enumerate(readers.values()):
        bits[row, : len(names)] = [
            plan[name]["suggested_weight_bits"] if "bytes" in plan[name] else np.nan for name in names
        ]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.5, 8.2), width_ratios=(17, 2), layout="constrained", sharey=True
    )
    picture = left.imshow(widths, aspect="auto", cmap="viridis", norm=LogNorm())
    left.set_xticks(range(len(steps)), steps)
    labels = [name.replace(".q_proj", ".{q,k,v}_proj") if len(names) > 1 else name for name, names in readers.items()]
    left.set_yticks(range(len(readers)), labels, fontsize=8, family="monospace")
    left.set_xlabel("step index (0: pure noise, 50: finished)")
    left.set_title("Range of each layer's input, p99 - p01, over the denoising steps", fontsize=11, loc="left")
    edges = [bits - 0.5 for bits in BITS]
    right.imshow(bits, aspect="auto", cmap=ListedColormap(COLOURS), norm=BoundaryNorm([*edges, BITS[-1] + 0.5], 6))
    for row, column in np.argwhere(np.isfinite(bits)):
        value = int(bits[row, column])
        right.text(column, row, value, ha="center", va="center", fontsize=8, color="white" if value >= 6 else "black")
    right.set_xticks([])
    right.tick_params(left=False)
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
    shutil.copy(args.run / "images" / "pictures.png", args.out / "quantized.png")


if __name__ == "__main__":
    main()
