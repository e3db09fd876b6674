"""Makes heat maps: a picture that the browser stretches to the page, and texts around it that keep their size."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

from calib.runs.pages.scales import plain, ticks

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Rows that are named one by one; of more every so many is.
MOST_NAMED = 70
#: Steps that are named: on a wide page, on a phone.
MOST_STEPS, FEW_STEPS = 24, 6
#: Colours of the scale's gradient, values marked on it.
STOPS, MOST_MARKS = 12, 6


def heat_map(
    rows: Sequence[str], steps: Sequence[int], values: NDArray[np.float64], label: str, logarithmic: bool = False
) -> str:
    """Return ``values``, (rows, steps), as colours; NaN is left empty. The page shows single values on hovering."""
    shown = np.isfinite(values) & (values > (0 if logarithmic else -math.inf))
    ends = (float(values[shown].min()), float(values[shown].max())) if shown.any() else (0.0, 0.0)
    colours = _colours(_share(np.where(shown, values, np.nan), ends, logarithmic))
    every = -(-len(rows) // MOST_NAMED)
    names = "".join(
        f'<span style="flex-grow:{min(every, len(rows) - place)}">{escape(rows[place])}</span>'
        for place in range(0, len(rows), every)
    )
    return (
        f'<div class="heat" role="img" aria-label="{escape(label)}" style="--rows:{len(rows) / every:.3g}">'
        f"{_scale(label, ends, logarithmic) if shown.any() else ''}"
        f'<div class="names">{names}</div><img src="{_picture(colours)}" alt="">'
        f'<div class="steps">{_step_names(steps)}</div><p class="sub">denoising step</p></div>'
    )


def _share(values: NDArray[np.float64], ends: tuple[float, float], logarithmic: bool) -> NDArray[np.float64]:
    """Return where ``values`` lie between the ends, 0 … 1; the middle for all if the ends are one."""
    (low, high), values = (np.log(ends), np.log(values)) if logarithmic and ends[1] > 0 else (ends, values)
    return (values - low) / (high - low) if high > low else np.where(np.isnan(values), np.nan, 0.5)


def _colours(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the RGBA of shares; NaN is transparent."""
    from matplotlib import colormaps

    found: NDArray[np.uint8] = colormaps["viridis"](np.nan_to_num(shares), bytes=True)
    found[..., 3] = np.where(np.isnan(shares), 0, 255)
    return found


def _picture(colours: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(colours).save(out, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _scale(label: str, ends: tuple[float, float], logarithmic: bool) -> str:
    """Return the bar that shows which colour is which value, values marked below it."""
    stops = ",".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b, _ in _colours(np.linspace(0, 1, STOPS)))
    marked = ticks(*ends, logarithmic, MOST_MARKS) if ends[1] > ends[0] else [ends[0]]
    places = _share(np.array(marked), ends, logarithmic)
    spans = [f'<span style="left:{at:.1%}">{plain(value)}</span>' for value, at in zip(marked, places, strict=True)]
    bar = f'<div class="bar" style="background:linear-gradient(to right,{stops})"></div>'
    title = f'<span class="sub">{escape(label)}</span>'
    return f'<div class="scale">{title}{bar}<div class="marks">{"".join(spans)}</div></div>'


def _step_names(steps: Sequence[int]) -> str:
    """Return names of columns, centred below them; the class ``more`` marks those that a phone leaves out."""
    spans = []
    often, seldom = (_stride(len(steps), most) for most in (MOST_STEPS, FEW_STEPS))
    seldom = -(-seldom // often) * often
    for place in range(0, len(steps), often):
        kind = "" if place % seldom == 0 else ' class="more"'
        spans.append(f'<span{kind} style="left:{(place + 0.5) / len(steps):.1%}">{steps[place]}</span>')
    return "".join(spans)


def _stride(count: int, most: int) -> int:
    """Return the least of 1, 2, 5, 10 … that divides ``count`` into at most ``most`` parts."""
    return next((size for size in (1, 2, 5, 10, 20, 50, 100, 200) if count <= most * size), count)
