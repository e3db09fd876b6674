"""Pictures in folders: listed, matched by name, and read as eight bits a channel or refused in one line."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from calib.base.errors import CalibError, reason_of
from calib.base.locks import open_regular
from calib.base.progress import counted
from calib.dataset.images import PNG, open_picture, upright

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

READABLE = (".png", ".jpg", ".jpeg", ".webp")
#: Of pictures that are refused; any other file in a folder is left alone.
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".jxl", ".tif", ".tiff")
#: Where a PNG states its bits a channel.
DEPTH_AT = 24


@dataclass(frozen=True)
class Picture:
    """A picture, (height, width, 3) of eight bits; ``grey``: the file has one channel, which stands for all three."""

    pixels: NDArray[np.uint8]
    grey: bool


def pictures_in(folder: Path) -> dict[str, Path]:
    """Pictures directly in ``folder``, by name without ending, in the order of their names; hidden files are left out.

    Raises:
        CalibError: there is none, or one of another format, or two of one name, or a link that leads nowhere.
    """
    try:
        files = sorted(e.name for e in os.scandir(folder) if not (e.name.startswith(".") or e.is_dir()))
    except OSError as error:
        raise CalibError(f"{folder}: cannot be read as a folder of pictures ({error.strerror})") from None
    found: dict[str, Path] = {}
    for path in (folder / name for name in files):
        if path.suffix.lower() in OTHERS:
            raise CalibError(f"{path}: pictures are read as PNG, JPEG or WebP; convert it, or move it elsewhere")
        if path.suffix.lower() not in READABLE:
            continue
        if not path.is_file():
            kind = "a link that leads nowhere" if path.is_symlink() else "no regular file"
            raise CalibError(f"{path}: is {kind}; remove it, or put the picture in its place")
        if path.stem in found:
            raise CalibError(f"{path}: {found[path.stem].name} has the same name; leave one of them")
        found[path.stem] = path
    if not found:
        raise CalibError(f"{folder}: no picture in it (PNG, JPEG or WebP); folders below it are not searched")
    return found


def matched(a: Path, b: Path) -> dict[str, tuple[Path, Path]]:
    """Pairs of pictures of one name, endings apart, in the folders ``a`` and ``b``.

    Raises:
        CalibError: a picture has none of its name in the other folder.
    """
    first, second = pictures_in(a), pictures_in(b)
    alone = [(folder, own.keys() - other.keys()) for folder, own, other in ((a, first, second), (b, second, first))]
    if any(names for _, names in alone):
        counts = f"{counted(len(first), 'picture')} and {len(second)}, {len(first.keys() & second.keys())} of one name"
        where = "; ".join(f"only in {folder}: {_few(names)}" for folder, names in alone if names)
        raise CalibError(f"{a} and {b}: {counts}. {where}; each needs its like in the other folder, by name")
    return {name: (path, second[name]) for name, path in first.items()}


def _few(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def read_picture(path: Path) -> Picture:
    """Read a picture as it is seen, turned as its EXIF says; grey counts as three equal channels.

    The alpha channel of an opaque one is left out.

    Raises:
        CalibError: it is damaged, animated, transparent, CMYK, or of more than eight bits a channel.
    """
    with _opened(path) as picture:
        if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            raise CalibError(f"{path}: has transparent pixels; put it on a background")
        return Picture(np.asarray(upright(picture).convert("RGB")), picture.mode in ("1", "L", "LA"))


def check_pictures(folder: Path) -> int:
    """The number of pictures in ``folder``; raises for the first that is of another kind, as far as its head tells."""
    paths = pictures_in(folder).values()
    for path in paths:
        with _opened(path):
            pass
    return len(paths)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture that can be compared; raises a CalibError where it cannot, or cannot be read in the context."""
    try:
        with open_regular(path) as file:
            start = file.read(DEPTH_AT + 1)
        with open_picture(path) as picture:
            if refused := _refused(picture, start):
                raise CalibError(f"{path}: {refused}")
            yield picture
    except CalibError:
        raise
    except UnidentifiedImageError:
        raise CalibError(f"{path}: {'is no PNG, JPEG or WebP picture' if start else 'is empty'}") from None
    except Exception as error:  # readers of damaged files raise what they like
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise CalibError(f"{path}: cannot be read as a PNG, JPEG or WebP picture ({reason})") from None


def _refused(picture: Image.Image, start: bytes) -> str:
    """Why a picture of another kind cannot be compared; '' where it can."""
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a JPEG with others behind what is seen
        return f"is animated ({getattr(picture, 'n_frames', 0)} frames); save the one to compare"
    # Pillow reads colours of 16 bits as 8 without a word.
    if picture.mode.startswith(("I", "F")) or (start.startswith(PNG) and start[DEPTH_AT:] == b"\x10"):
        return "has 16 bits a channel; convert it to 8, as the figures are of pictures as they are shown"
    if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        return f"is {picture.mode}, which has no one conversion to RGB; convert it"
    return ""
