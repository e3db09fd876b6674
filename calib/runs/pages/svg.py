"""Matplotlib's figures as SVG inside a page: in its colours, light or dark, with text that stays text, and tooltips."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colours that stand for the page's own: it has two sets of them. None occurs in a figure by itself.
INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0101", "#0a0102", "#0a0103", "#0a0104", "#0a0105", "#0a0106", "#0a0107", "#0a0108")
#: Early to late.
SEQUENCE = ("#0b0101", "#0b0102", "#0b0103", "#0b0104", "#0b0105")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"} | {
    colour: f"{name}-{number}"
    for name, colours in (("series", SERIES), ("step", SEQUENCE))
    for number, colour in enumerate(colours)
}
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "calib",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def styled() -> Iterator[None]:
    """Within the context figures are drawn in the page's style."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, dict(_STYLE))):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, of its own: no display is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: "Figure", name: str, label: str, tips: Mapping[str, str] | None = None) -> str:
    """``figure`` as an ``<svg>`` element.

    Args:
        name: makes the ids in it its own; a page has one namespace.
        label: what it shows, for those who cannot see it.
        tips: tooltips by gid of the artist.
    """
    with io.StringIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for gid, tip in (tips or {}).items():
        opening = f'<g id="{name}-{gid}">'
        text = text.replace(opening, f"{opening}<title>{escape(tip)}</title>", 1)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    style = f"width:{float(width) * 4 / 3:.0f}px;aspect-ratio:{float(width):.0f}/{float(height):.0f}"
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" style="{style}" ', 1).strip()
