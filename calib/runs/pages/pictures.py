"""Embeds pictures in a page as data: small ones as they are, large ones made smaller."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.base.layout import FULL_PICTURES, QUANTIZED_PICTURES
from calib.dataset.images import open_picture, upright
from calib.evaluation.categories import Categories
from calib.runs.compare.columns import metric_of

from PIL import Image

#: Longer side, in pixels, above which a picture is made smaller; up to the second it is kept lossless.
LARGEST, LOSSLESS = 512, 160
#: Pictures that a page shows at most.
MOST = 16


@dataclass(frozen=True)
class Pair:
    """One prompt: its picture at full precision and quantized, as ``data:`` addresses; figures for people."""

    prompt: str
    full: str
    quantized: str
    figures: str
    size: tuple[int, int]


def data_address(path: Path) -> tuple[str, tuple[int, int]]:
    """Return a ``data:`` address that holds a picture, and the size of what it holds in pixels."""
    with open_picture(path) as opened:
        image = upright(opened).convert("RGB")
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
    full = sorted((run / FULL_PICTURES).glob("[0-9]*.png"), key=lambda path: (len(path.name), path.name))
    return [
        (path, run / QUANTIZED_PICTURES / path.name) for path in full if (run / QUANTIZED_PICTURES / path.name).exists()
    ]


def decibels(psnrs: Sequence[float | None], number: int) -> str:
    """Return the PSNR of a picture for people: 'equal' for None, which stands for infinity; '' if it is not known."""
    if number >= len(psnrs):
        return ""
    value = psnrs[number]
    return "equal" if value is None else f"{value:.1f} dB"


def figures(details: Mapping[str, Any], number: int) -> str:
    """Return what a picture's measures are, from ``evaluation.json``: its PSNR, and further ones where there are."""
    own = details["quantized"]
    shown = [decibels(own["psnr"], number)]
    for name, values in own.get("further", {}).items():
        if number < len(values):
            shown.append(f"{metric_of(name).title} {metric_of(name).form.format(values[number])}")
    return ", ".join(part for part in shown if part)


def pairs(run: Path, details: Mapping[str, Any], categories: Categories | None) -> list[Pair]:
    """Return the first :data:`MOST` pictures of a run; where they have categories the worst, each with its own."""
    files, prompts, shown = pictures_of(run), details["prompts"], []
    order = range(len(files)) if categories is None else categories.order
    for number in [place for place in order if place < len(files)][:MOST]:
        one, size = data_address(files[number][0])
        other, _ = data_address(files[number][1])
        prompt = prompts[number] if number < len(prompts) else ""
        name = "" if categories is None else f"{categories.names[number]}: "
        shown.append(Pair(prompt, one, other, name + figures(details, number), size))
    return shown
