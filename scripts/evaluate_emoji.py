"""Measure the shipped emoji model against its training images. No GPU needed: 8 minutes on two cores.

Data: as in train_emoji.py (the npm package emoji-datasource-google 16.0.0, unpacked)::

    python scripts/evaluate_emoji.py --data package [--pictures sheet.png]

Two figures are printed:

* **VAE**: PSNR of encoding and decoding every training image (the latent's mean, no noise; peak 1, images over
  white), as the mean of the images' PSNR and as the PSNR of the error pooled over all of them.
* **Retrieval**: 200 names, the first of ``RandomState(0).permutation`` over the training names, are drawn with
  50 Euler steps, CFG 3 and seed = position in that list. A name counts as found where the training image nearest to
  the drawn one (L2 over all pixels) is the named one. Different emoji with the same name or with the same pixels (some
  flags) cannot be told apart and count as one; the figure without that allowance for equal pixels is printed too.

``--ambiguous`` draws, in place of the list, the names that are also a short name of another emoji.
``--thumbnails`` writes the small reference images that tests/test_emoji.py compares with.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import calib  # noqa: F401  (loads the BLAS before MLX)
from calib.dataset.generate import trajectory
from calib.dataset.settings import SamplerSettings
from calib.models import emoji
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from PIL import Image
from train_emoji import read_emoji

NUM_NAMES, NUM_STEPS, CFG_WEIGHT = 200, 50, 3.0
TEST_NAMES, TEST_THUMBNAILS, THUMBNAIL_SIZE = 6, 64, 16


@dataclass(frozen=True)
class Retrieval:
    """Outcome for one drawn name: indices into the training images, root mean square distances in [0, 1]."""

    named: int
    nearest: int
    distance_named: float
    distance_nearest: float


def evaluation_indices(count: int, total: int) -> list[int]:
    """The fixed list: which training emoji are drawn, in the order of their seeds."""
    chosen: list[int] = np.random.RandomState(0).permutation(total)[:count].tolist()
    return chosen


def ambiguous_indices(groups: list[list[str]]) -> list[int]:
    """Emoji whose Unicode name is also a short name of another, differently named one: trained on two pictures."""
    return [
        index
        for index, (name, *_) in enumerate(groups)
        if any(name in aliases for other, *aliases in groups if other != name)
    ]


def progress(label: str, done: int, total: int, start: float) -> None:
    spent = time.time() - start
    print(f"{label} {done}/{total}, {spent:.0f} s, {spent / done * (total - done):.0f} s left", flush=True)


def vae_errors(model: DiffusionModel, images: np.ndarray, batch: int) -> np.ndarray:
    """Mean squared error of each image (n,) after encoding and decoding; images (n, 64, 64, 3) in [0, 1]."""
    encoder, errors, start = emoji.load_encoder(), [], time.time()
    for i in range(0, len(images), batch):
        truth = mx.array(images[i : i + batch])
        mean, _ = mx.split(encoder(2 * truth - 1), 2, axis=-1)
        decoded = mx.clip(model.decode_latents(mean) / 2 + 0.5, 0, 1)
        errors.append(np.array(mx.mean((decoded - truth) ** 2, axis=(1, 2, 3))))
        if i // batch % 10 == 9:
            progress("vae", i + len(truth), len(images), start)
    return np.concatenate(errors)


def psnr(error: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio, dB, of mean squared errors of images in [0, 1]."""
    return -10 * np.log10(error)


def draw(model: DiffusionModel, names: list[str], seeds: list[int]) -> np.ndarray:
    """Images (n, 64, 64, 3) in [0, 1] of ``names``, drawn as one batch."""
    *_, final = trajectory(model, names, seeds, SamplerSettings(num_steps=NUM_STEPS, cfg_weight=CFG_WEIGHT))
    return np.array(model.decode(final.x))


def draw_all(model: DiffusionModel, names: list[str], batch: int) -> np.ndarray:
    parts, start = [], time.time()
    for i in range(0, len(names), batch):
        part = names[i : i + batch]
        parts.append(draw(model, part, list(range(i, i + len(part)))))
        progress("drawn", i + len(part), len(names), start)
    return np.concatenate(parts)


def pixel_distances(drawn: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Root mean square distance of every drawn image to every training image, (drawn, images)."""
    a, b = drawn.reshape(len(drawn), -1).astype(np.float64), images.reshape(len(images), -1)
    return np.stack([np.sqrt(np.mean((b - row) ** 2, axis=1)) for row in a])


def retrieve(drawn: np.ndarray, images: np.ndarray, indices: list[int]) -> list[Retrieval]:
    results = []
    for row, named in zip(pixel_distances(drawn, images), indices, strict=True):
        nearest = int(row.argmin())
        results.append(Retrieval(named, nearest, float(row[named]), float(row[nearest])))
    return results


def report(results: list[Retrieval], images: np.ndarray, names: list[str]) -> None:
    same_pixels = [r for r in results if r.named != r.nearest and np.array_equal(images[r.named], images[r.nearest])]
    same_name = [r for r in results if r.named != r.nearest and names[r.named] == names[r.nearest]]
    missed = [r for r in results if r.named != r.nearest and r not in same_pixels and r not in same_name]
    total, found = len(results), len(results) - len(missed)
    print(f"retrieval: {found} of {total} = {100 * found / total:.1f}% nearest to the emoji named", flush=True)
    print(f"  of these {len(same_pixels)} had the same pixels under another name, {len(same_name)} the same name")
    print(f"  without allowance for equal pixels: {100 * (found - len(same_pixels)) / total:.1f}%")
    print(f"  distance to the named image (rms): median {np.median([r.distance_named for r in results]):.4f}")
    for r in missed:
        print(
            f"  missed: '{names[r.named]}' (rms {r.distance_named:.4f}), "
            f"nearest '{names[r.nearest]}' (rms {r.distance_nearest:.4f})"
        )
    for r in same_pixels:
        print(f"  same pixels: '{names[r.named]}' and '{names[r.nearest]}'")


def write_sheet(path: Path, drawn: np.ndarray, truth: np.ndarray, columns: int = 20, scale: int = 1) -> None:
    """A contact sheet: rows of drawn images, the training image of the same name under each."""
    cell = drawn.shape[1] * scale + 4
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (2 * cell + 8)), "gainsboro")
    for i, pair in enumerate(zip(drawn, truth, strict=True)):
        left, top = i % columns * cell + 2, i // columns * (2 * cell + 8) + 2
        for j, picture in enumerate(pair):
            tile = Image.fromarray(np.round(255 * picture).astype(np.uint8))
            size = (tile.width * scale, tile.height * scale)
            sheet.paste(tile.resize(size, Image.Resampling.NEAREST), (left, top + j * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"{path}: {len(drawn)} drawn images, the training image under each")


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Block means, (n, size, size, 3), of images (n, height, width, 3)."""
    n, height, width, channels = images.shape
    blocks: np.ndarray = images.reshape(n, size, height // size, size, width // size, channels).mean(axis=(2, 4))
    return blocks


def write_thumbnails(path: Path, images: np.ndarray, names: list[str]) -> None:
    """Thumbnails of the first names of the list and, as distractors, of the emoji that look most like them."""
    chosen = evaluation_indices(TEST_NAMES, len(images))
    rivals = np.argsort(pixel_distances(images[chosen], images), axis=1, kind="stable")
    for index in rivals.T.flatten().tolist():
        same = any(names[index] == names[i] or np.array_equal(images[index], images[i]) for i in chosen)
        if not same and len(chosen) < TEST_THUMBNAILS:
            chosen.append(index)
    thumbnails = np.round(255 * shrink(images[chosen], THUMBNAIL_SIZE)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, thumbnails=thumbnails, names=np.array([names[i] for i in chosen]), drawn=TEST_NAMES)
    print(f"{path}: {len(chosen)} thumbnails, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with emoji.json and img/google/64")
    parser.add_argument("--names", type=int, default=NUM_NAMES, help="how many names of the fixed list to draw")
    parser.add_argument("--ambiguous", action="store_true", help="draw the names that stand for two emoji instead")
    parser.add_argument("--batch", type=int, default=20, help="images drawn at once")
    parser.add_argument("--pictures", type=Path, help="write a contact sheet (PNG) of the first 100 drawn images")
    parser.add_argument("--thumbnails", type=Path, help="write the tests' reference images (npz) and stop")
    args = parser.parse_args()
    data, groups = read_emoji(args.data)
    images, names = (data + 1) / 2, [group[0] for group in groups]
    assert names == emoji.training_names(), "the data are not those that the model was trained on"
    if args.thumbnails:
        write_thumbnails(args.thumbnails, images, names)
        return
    model = emoji.load()
    indices = ambiguous_indices(groups) if args.ambiguous else evaluation_indices(args.names, len(images))
    drawn = draw_all(model, [names[i] for i in indices], args.batch)
    results = retrieve(drawn, images, indices)
    if args.pictures:
        write_sheet(args.pictures, drawn[:100], images[indices[:100]])
    report(results, images, names)
    if args.ambiguous:
        return
    errors = vae_errors(model, images, args.batch)
    print(f"VAE over {len(images)} images: PSNR {psnr(errors).mean():.2f} dB (mean of the images),", end=" ")
    print(
        f"{psnr(errors.mean()):.2f} dB (pooled error); lowest {psnr(errors.max()):.2f} dB, '{names[errors.argmax()]}'"
    )


if __name__ == "__main__":
    main()
