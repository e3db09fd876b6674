"""Checks and notes before a long job starts."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from calib.base.errors import CalibError
from calib.base.files import check_writable, free_bytes
from calib.base.progress import counted, note, readable_bytes, readable_duration, say
from calib.dataset.images import FOLDERS, bytes_per_image
from calib.dataset.manifest import Manifest
from calib.models.model import DiffusionModel


def numbers(first: int, last: int) -> str:
    """'7' or '7–9'."""
    return str(first) if first == last else f"{first}–{last}"


def check_folders(data_dir: Path) -> None:
    """Raise where a folder of the dataset cannot be written to or created; one may be a link to another disk."""
    check_writable("data_dir", data_dir)
    for folder in (data_dir / name for name in FOLDERS):
        if folder.is_symlink() or folder.exists():
            check_writable("data_dir", folder)


def check_disk(
    data_dir: Path, manifest: Manifest, image_size: tuple[int, ...], todo: Sequence[int], announce: bool = False
) -> None:
    """Raise where the disk cannot hold the images ``todo``; with ``announce``, report the space they will take."""
    each = bytes_per_image(manifest, image_size)
    needed, free = readable_bytes(each * len(todo)), readable_bytes(free_bytes(data_dir))
    images = counted(len(todo), "image")
    if each * len(todo) > free_bytes(data_dir):
        raise CalibError(
            f"{data_dir}: {images} may take up to {needed}, {free} are free; make room, ask for fewer images "
            "(num_images), or keep fewer states (dataset.steps=schedule)"
        )
    if announce:
        batches = f"{images} to do in batches of {manifest.batch_size}"
        say(f"generate: {batches}, up to {needed} ({readable_bytes(each)} each); {free} free in {data_dir}")


def note_long_prompts(model: DiffusionModel, prompts: Sequence[str], todo: Sequence[int]) -> None:
    """Report prompts that the text encoder will truncate."""
    limit = model.max_prompt_tokens
    cut = [i for i in todo if model.token_count(prompts[i % len(prompts)]) > limit]
    if cut:
        first = ", ".join(str(i) for i in cut[:5]) + (", …" if len(cut) > 5 else "")
        note(f"{len(cut)} prompts are longer than {limit} tokens and are cut by the text encoder (images {first})")


def time_left(seconds: float, images_done: int, blocks: int, images: int) -> str:
    """Time per image and time left, for people, after the first of ``blocks`` blocks took ``seconds``."""
    left = seconds * (blocks - 1)
    end = datetime.now() + timedelta(seconds=left)
    return (
        f"{seconds / images_done:.2g} s an image; about {readable_duration(left)} for the other "
        f"{images - images_done}, until {end:%a %H:%M}"
    )
