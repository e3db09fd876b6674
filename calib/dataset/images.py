"""Write the files of one image: its states, its final latent, its picture."""

import json
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from calib.base.files import checksum, write_bytes
from calib.base.locks import open_regular
from calib.dataset.manifest import ImageEntry, Manifest
from calib.dataset.store import SAMPLES, StateDtype, StorageFormat, UnstorableLatents, write_trajectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

IMAGES, LATENTS = "images", "latents"
FOLDERS = (SAMPLES, LATENTS, IMAGES)
NAMED_BY_ID = re.compile(r"(\d{4,})(?:_\d{3,})?\.(?:png|npy|npz|h5)")

#: Upper bounds of bytes besides the values: settings stored in each file, HDF5's tables (14.7 kB for 51 states), zip's.
HDF5_OVERHEAD, NPZ_OVERHEAD, PNG_OVERHEAD = 18_000, 2_000, 8_000
DISK_BLOCK = 4096
#: 8192 × 8192, which take 200 MB.
MOST_PIXELS = 1 << 26
PNG = b"\x89PNG\r\n\x1a\n"


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture; raises ValueError where it has more pixels than any that is drawn.

    Other formats are left out: PIL has old decoders, and starts Ghostscript for PostScript.
    """
    with open_regular(path) as file:
        start = file.read(24)
        if start.startswith(PNG) and len(start) == 24 and math.prod(struct.unpack(">II", start[16:])) > MOST_PIXELS:
            raise ValueError(f"announces more than {MOST_PIXELS:,} pixels")
        file.seek(0)
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
            if math.prod(picture.size) > MOST_PIXELS:
                raise ValueError(f"announces more than {MOST_PIXELS:,} pixels")
            yield picture


def upright(picture: Image.Image) -> Image.Image:
    """A picture as it is seen: turned as its EXIF says; as it is stored where that says nothing, or is damaged."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # of damaged EXIF; pixels that cannot be read are found by who reads them next
        return picture


DREW_NAN = "the model drew NaN or infinity"


@dataclass(frozen=True)
class DrawnImage:
    """One drawn image, on the host.

    Attributes:
        states: (stored states, height, width, channels), packed as the manifest's dtype.
        latent: (height, width, channels), the finished latent after ``process_out``.
        picture: (height, width, 3) in [0, 1].
    """

    image_id: int
    prompt: str
    seed: int
    states: NDArray[Any]
    latent: NDArray[Any]
    picture: NDArray[Any]


def image_ids(data_dir: Path) -> list[int]:
    """Ids of images that have any file in ``data_dir``."""
    paths = [path for folder in FOLDERS for path in (data_dir / folder).glob("*")]
    return sorted({int(match[1]) for path in paths if (match := NAMED_BY_ID.fullmatch(path.name))})


def write_image(data_dir: Path, manifest: Manifest, image: DrawnImage) -> ImageEntry:
    """Write all files of ``image``, each whole or not at all; returns its entry in the manifest.

    Raises:
        UnstorableLatents: latents or pixels are not finite, or latents exceed the range of their stored type.
    """
    facts: dict[str, Any] = {
        "image_id": image.image_id,
        "prompt": image.prompt,
        "seed": image.seed,
        "cfg_weight": manifest.cfg_weight,
        "num_steps": manifest.num_steps,
    }
    described = {**facts, "model": manifest.model, "fingerprint": manifest.fingerprint}
    if not (np.isfinite(image.latent).all() and np.isfinite(image.picture).all()):
        raise UnstorableLatents(DREW_NAN)
    samples = write_trajectory(data_dir, image.image_id, image.states, manifest, described)
    picture, latent = f"{IMAGES}/{image.image_id:04d}.png", f"{LATENTS}/{image.image_id:04d}.npy"
    text = {**described, "dataset": json.dumps(manifest.settings(), ensure_ascii=False)}
    write_bytes(data_dir / picture, _png(image.picture, text))
    archive = BytesIO()
    np.save(archive, image.latent)
    write_bytes(data_dir / latent, archive.getvalue())
    sums = {name: checksum(data_dir / name) for name in (picture, latent, *samples)}
    return ImageEntry(**facts, filename=picture, latent_filename=latent, samples=samples, checksums=sums)


def _png(picture: NDArray[Any], text: dict[str, Any]) -> bytes:
    """``picture`` as a PNG, with its metadata in text chunks."""
    info = PngInfo()
    for name, value in text.items():
        info.add_itxt(name, str(value))
    file = BytesIO()
    # Truncated, not rounded, as in DiffusionKit: the same seed gives the same pixels.
    Image.fromarray((picture * 255).astype(np.uint8)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def bytes_per_image(manifest: Manifest, image_size: tuple[int, ...]) -> int:
    """Upper bound of an image's bytes on disk, from shapes and types; a picture counts as uncompressed."""
    latent, states = int(np.prod(manifest.latent_shape)), len(manifest.steps)
    state = latent * StateDtype(manifest.dtype).bytes
    if manifest.storage == StorageFormat.HDF5:
        samples = [states * state + HDF5_OVERHEAD]
    else:
        samples = [state + NPZ_OVERHEAD] * states
    picture = 3 * image_size[0] * image_size[1] + PNG_OVERHEAD
    return sum(-(-size // DISK_BLOCK) * DISK_BLOCK for size in (*samples, 4 * latent + NPZ_OVERHEAD, picture))
