"""Embeds pictures in a page as data: small ones as they are, large ones made smaller."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.base.layout import FULL_PICTURES, QUANTIZED_PICTURES
from calib.dataset.images import open_picture

from PIL import Image

#: Longer side, in pixels, above which a picture is made smaller; up to the second it is kept lossless.
LARGEST, LOSSLESS = 512, 160
#: Pictures that a page shows at most.
MOST = 16


@dataclass(frozen=True)
class Pair:
    """One prompt: its picture at full precision and quantized, as ``data:`` addresses; dB and SSIM where known."""

    prompt: str
    full: str
    quantized: str
    psnr: str
    size: tuple[int, int]


def data_address(path: Path) -> tuple[str, tuple[int, int]]:
    """Return a ``data:`` address that holds a picture, and the size of what it holds in pixels."""
    with open_picture(path) as opened:
        image = opened.convert("RGB")
    out = io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(out, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(out, format="WEBP", quality=90)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", image.size


def pictures_of(run: Path) -> list[tuple[Path, Path]]:
    """Return the files of a run's pictures, full precision and quantized, in the order of the prompts."""
    full = sorted((run / FULL_PICTURES).glob("[0-9]*.png"))
    return [
        (path, run / QUANTIZED_PICTURES / path.name) for path in full if (run / QUANTIZED_PICTURES / path.name).exists()
    ]


def decibels(psnrs: Sequence[float | None], number: int) -> str:
    """Return the PSNR of a picture for people: 'equal' for None, which stands for infinity; '' if it is not known."""
    if number >= len(psnrs):
        return ""
    value = psnrs[number]
    return "equal" if value is None else f"{value:.1f} dB"


def pairs(run: Path, prompts: list[str], psnrs: list[float | None]) -> list[Pair]:
    """Return the first :data:`MOST` pictures of a run."""
    shown = []
    for number, (full, quantized) in enumerate(pictures_of(run)[:MOST]):
        one, size = data_address(full)
        other, _ = data_address(quantized)
        prompt = prompts[number] if number < len(prompts) else ""
        shown.append(Pair(prompt, one, other, decibels(psnrs, number), size))
    return shown
