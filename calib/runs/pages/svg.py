"""Turns Matplotlib's figures into SVG inside a page: in the page's colours, with text that stays text, and tooltips.

A figure is drawn once, for every width of page: it scales with its place, and style.css sets the size of its letters
by the width of the page. It is therefore laid out for letters of the largest size, a phone's, and smaller ones need
less room than they have. Places are fixed in advance; measuring texts would take longer than drawing.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, cast

from calib.runs.pages.scales import plain, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Units of a figure are points of Matplotlib's, at so many an inch: pixels where the figure is shown at its own size.
UNITS = 72
#: Letters at their largest, in units: of charts, on a phone; of panels, everywhere.
CHART_LETTERS, PANEL_LETTERS = 13.5, 10.0
#: Colours that stand for the page's own: it has two sets of them. None occurs in a figure by itself.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0a0101", "#0a0102", "#0a0103", "#0a0104", "#0a0105", "#0a0106", "#0a0107", "#0a0108")
#: Early to late.
SEQUENCE = ("#0b0101", "#0b0102", "#0b0103", "#0b0104", "#0b0105")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {
    colour: f"{name}-{number}"
    for name, colours in (("series", SERIES), ("step", SEQUENCE))
    for number, colour in enumerate(colours)
}
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "calib",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def styled(letters: float) -> Iterator[None]:
    """Draw figures within the context in the page's style, with letters of that size in units."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, {**_STYLE, "font.size": letters, **_sized(letters)})):
        yield


def _sized(letters: float) -> dict[str, Any]:
    sizes = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "axes.labelsize"), letters)
    return sizes | dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0)


def new_axes(size: tuple[float, float], left: float, bottom: float, top: float, right: float) -> "Axes":
    """Return the axes of a new figure; the size, and the margins for texts, are in units."""
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width / UNITS, height / UNITS), dpi=UNITS)
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def set_axis(axes: "Axes", which: str, ends: tuple[float, float], logarithmic: bool, most: int) -> None:
    """Let the axis ``which``, x or y, run between ``ends``, and mark at most ``most`` round values on it."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log" if logarithmic else "linear", f"{which}lim": ends})
    marked = ticks(*ends, logarithmic, most)
    axis.set_major_locator(FixedLocator(marked))
    axis.set_major_formatter(FixedFormatter([plain(value) for value in marked]))
    axis.set_minor_locator(NullLocator())


def variable(colour: str) -> str:
    """Return the page's own colour that ``colour`` stands for, as CSS writes it."""
    return f"var(--{_VARIABLES[colour]})"


def svg_of(axes: "Axes", name: str, label: str, tips: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the figure of ``axes`` as an ``<svg>`` element.

    Args:
        name: makes the ids in it its own; a page has one namespace.
        label: what it shows, for those who cannot see it.
        tips: tooltips of the markers of a line, by the line's gid.
    """
    figure = cast("Figure", axes.figure)  # of new_axes, so no subfigure
    with io.StringIO() as out:
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=metadata)
        text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for gid, own in (tips or {}).items():
        text = _with_tips(text, gid, own)
    for colour in _VARIABLES:
        text = text.replace(colour, variable(colour))
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()


def _with_tips(text: str, gid: str, tips: Sequence[str]) -> str:
    """Return ``text`` with tooltips in the markers of the line ``gid``, in their order."""
    start = text.index(f'<g id="{gid}">')
    before, line = text[:start], text[start:]
    head, *markers = re.split(r"(?=<use )", line, maxsplit=len(tips))
    titled = [m.replace("/>", f"><title>{escape(tip)}</title></use>", 1) for m, tip in zip(markers, tips, strict=True)]
    return "".join([before, head, *titled])
