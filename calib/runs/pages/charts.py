"""Draws the charts of the pages from plain numbers: one SVG for every width of page, the legend beside it in HTML."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal, NamedTuple

from calib.runs.pages.scales import limits
from calib.runs.pages.svg import (
    CHART_LETTERS,
    INK,
    MUTED,
    PANEL_LETTERS,
    SEQUENCE,
    SERIES,
    new_axes,
    set_axis,
    styled,
    svg_of,
    variable,
)

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Units across and down: of a chart, which a phone shows at two thirds, and of one of many panels.
CHART, PANEL = (480, 270), (300, 140)
#: Characters of a dot's label: half of a chart holds them.
LONGEST_LABEL = 27
#: Units: how wide a letter of a chart is on average, how high a line.
LETTER, LINE = 0.55 * CHART_LETTERS, 1.2 * CHART_LETTERS
#: Units from a dot to its label: to the label's nearer end, to its middle.
ASIDE, ABOVE = 7, 9
#: Steps whose values are marked; of more the dots would touch on a phone.
MOST_MARKED = 25
#: Dots that a label may hide, unless its own is marked.
MOST_HIDDEN = 1


@dataclass(frozen=True)
class Curve:
    """A mean with its interval at each step, all (steps,)."""

    label: str
    steps: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None


def error_chart(name: str, curves: Sequence[Curve]) -> str:
    """Draw the relative output error against the step."""
    return step_chart(
        name, curves, "relative output error ‖Δv‖² / ‖v‖²", "Relative output error against denoising step"
    )


def step_chart(name: str, curves: Sequence[Curve], up: str, label: str) -> str:
    """Draw ``curves`` over the steps, on a logarithmic axis called ``up``; ``label`` is for those who cannot see it."""
    with styled(CHART_LETTERS):
        axes = _chart_axes(up, "denoising step (0: pure noise)")
        size = 2.0 if max(len(curve.steps) for curve in curves) <= MOST_MARKED else 0.0
        coinciding = any(_coincide(one, other) for one, other in itertools.combinations(curves, 2))
        seen = [curve.mean for curve in curves]
        for number, curve in enumerate(curves):
            colour, shown = SERIES[number % len(SERIES)], curve.mean > 0
            # Where curves coincide the lower ones still show beside the upper ones.
            thick = 1.5 + (0.5 * (len(curves) - 1 - number) if coinciding else 0)
            axes.plot(curve.steps[shown], curve.mean[shown], "o-", color=colour, lw=thick, ms=size and thick + size)
            if curve.low is not None and curve.high is not None:
                low = np.where(curve.low > 0, curve.low, curve.mean / 10)
                axes.fill_between(curve.steps, low, curve.high, where=shown.tolist(), color=colour, alpha=0.18, lw=0)
                seen += [low, curve.high]
        set_axis(axes, "y", limits(seen, True, 0.05), True, 6)
        first, last = min(curve.steps.min() for curve in curves), max(curve.steps.max() for curve in curves)
        count = max(1, int(last - first))
        set_axis(axes, "x", (first - 0.03 * count, first + 1.03 * count), False, min(10, count + 1))
        svg = svg_of(axes, name, label)
    return _beside(svg, legend([(SERIES[i % len(SERIES)], curve.label) for i, curve in enumerate(curves)]))


def _coincide(one: Curve, other: Curve) -> bool:
    """Whether two curves lie on one another to the eye."""
    return np.array_equal(one.steps, other.steps) and np.allclose(one.mean, other.mean, rtol=0.08, atol=0)


def _chart_axes(up: str, across: str) -> "Axes":
    """Return the axes of a chart, ``up`` written over them: beside them it would take a phone's width."""
    axes = new_axes(CHART, left=54, bottom=40, top=26, right=10)
    axes.set_xlabel(across, labelpad=2)
    axes.figure.text(0, 1 - 2 / CHART[1], up, va="top", color=MUTED)
    return axes


def _beside(svg: str, key: str) -> str:
    return f'<div class="chart">{svg}{key}</div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return a list of labels, each with its colour; INK stands for a dashed line."""
    marks = [("dashed" if colour == INK else "dot", variable(colour), escape(label)) for colour, label in entries]
    items = [f'<li><i class="{kind}" style="--own:{colour}"></i>{label}</li>' for kind, colour, label in marks]
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


@dataclass(frozen=True)
class Shape:
    """How the inputs of a layer are distributed at some steps, and where the plan cuts them.

    Attributes:
        edges: (bins + 1,); shares: by step, (bins,), of all values.
        clip: low and high of the plan's range; None where it has none.
    """

    layer: str
    why: str
    edges: NDArray[np.float64]
    shares: Mapping[int, NDArray[np.float64]]
    clip: tuple[float, float] | None


def histogram_charts(name: str, shapes: Sequence[Shape]) -> str:
    """Draw a panel for each layer with a line for each step; the plan's clip is marked."""
    lines = {f"step {step}": colour for shape in shapes for step, colour in _colours(shape).items()}
    entries = [(colour, label) for label, colour in lines.items()]
    entries += [(INK, "the plan's clip")] if any(shape.clip for shape in shapes) else []
    with styled(PANEL_LETTERS):
        panels = [
            f'<div class="panel"><p>{escape(shape.layer)}<br><span class="sub">{escape(shape.why)}</span></p>'
            f"{_histogram(f'{name}{number}', shape)}</div>"
            for number, shape in enumerate(shapes)
        ]
    return f'{legend(entries)}<div class="panels">{"".join(panels)}</div>'


def _colours(shape: Shape) -> dict[int, str]:
    last = max(1, len(shape.shares) - 1)
    return {step: SEQUENCE[number * (len(SEQUENCE) - 1) // last] for number, step in enumerate(shape.shares)}


def _histogram(name: str, shape: Shape) -> str:
    axes = new_axes(PANEL, left=38, bottom=20, top=8, right=12)
    centres = (shape.edges[1:] + shape.edges[:-1]) / 2
    for step, colour in _colours(shape).items():
        shares = shape.shares[step]
        axes.plot(centres, np.where(shares > 0, shares, np.nan), color=colour, lw=1.2, drawstyle="steps-mid")
    for place in shape.clip or ():
        axes.axvline(place, color=INK, lw=1, ls=(0, (3, 2)))
    set_axis(axes, "x", limits([centres, np.array(shape.clip or ())], False, 0.04), False, 5)
    set_axis(axes, "y", limits(shape.shares.values(), True, 0.05), True, 5)
    return svg_of(axes, name, f"Histograms of the input of {shape.layer} at several steps")


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot, with its tooltip; ``series`` chooses the colour."""

    label: str
    x: float
    y: float
    series: int
    tip: str
    marked: bool = False


def scatter(
    name: str,
    dots: Sequence[Dot],
    axes_labels: tuple[str, str],
    series: Mapping[int, str],
    named: int = 5,
    front: Sequence[tuple[float, float]] = (),
    logarithmic: tuple[bool, bool] = (True, True),
) -> str:
    """Draw dots with tooltips, coloured by series; up to ``named`` are labelled, and a line joins the ``front``."""
    kinds = sorted({(dot.marked, dot.series) for dot in dots})
    groups = {f"dots{number}": [d for d in dots if (d.marked, d.series) == kind] for number, kind in enumerate(kinds)}
    with styled(CHART_LETTERS):
        axes = _chart_axes(axes_labels[1], axes_labels[0])
        for gid, own in groups.items():
            ring = {"mec": INK, "mew": 1.4} if own[0].marked else {"alpha": 0.85, "mew": 0}
            colour = SERIES[own[0].series % len(SERIES)]
            axes.plot([d.x for d in own], [d.y for d in own], "o", ms=6.5, color=colour, gid=gid, **ring)
        if front:
            axes.step(*zip(*sorted(front), strict=True), where="post", color=MUTED, lw=1, ls=(0, (4, 2)), zorder=0)
        for which, values, scale in zip("xy", ([d.x for d in dots], [d.y for d in dots]), logarithmic, strict=True):
            set_axis(axes, which, limits([np.array(values)], scale, 0.12), scale, 6)
        _name(axes, dots, named)
        tips = {gid: [dot.tip for dot in own] for gid, own in groups.items()}
        svg = svg_of(axes, name, f"{axes_labels[1]} against {axes_labels[0]}", tips)
    return _beside(svg, legend([(SERIES[key % len(SERIES)], title) for key, title in series.items()]))


class _Place(NamedTuple):
    """Where a label may stand, in units: its ends, its middle, and which end is next to the dot."""

    left: float
    right: float
    middle: float
    align: Literal["left", "right"]

    def meets(self, other: "_Place") -> bool:
        """Whether the labels would touch."""
        apart = self.left > other.right + LETTER or other.left > self.right + LETTER
        return abs(self.middle - other.middle) < LINE and not apart

    def hides(self, points: NDArray[np.float64]) -> int:
        """How many of ``points``, (n, 2), the label would hide."""
        x, y = points.T
        return int(((x > self.left - 3) & (x < self.right + 3) & (abs(y - self.middle) < LINE / 2 + 1)).sum())


def _corners(point: NDArray[np.float64], wide: float) -> Iterator[_Place]:
    """Yield the places of a label at a dot: above and below, to its right and to its left."""
    x, y = point
    for rise in (ABOVE, -ABOVE):
        yield _Place(x + ASIDE, x + ASIDE + wide, y + rise, "left")
        yield _Place(x - ASIDE - wide, x - ASIDE, y + rise, "right")


def _name(axes: "Axes", dots: Sequence[Dot], most: int) -> None:
    """Label the marked dots, then the highest, each at the corner that hides the fewest dots and no other label."""
    ends, points = axes.get_window_extent(), axes.transData.transform([(dot.x, dot.y) for dot in dots])
    taken: list[_Place] = []
    for number in sorted(range(len(dots)), key=lambda i: (not dots[i].marked, -dots[i].y)):
        if len(taken) == most:
            break
        text = dots[number].label
        label = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
        corners = _corners(points[number], LETTER * len(label))
        inside = [corner for corner in corners if ends.x0 <= corner.left and corner.right <= ends.x1]
        free = [corner for corner in inside if not any(corner.meets(other) for other in taken)]
        best = min(free, key=lambda corner: corner.hides(points), default=None)
        if best is None or (best.hides(points) > MOST_HIDDEN and not dots[number].marked):
            continue
        x = best.left if best.align == "left" else best.right
        axes.figure.text(x / CHART[0], best.middle / CHART[1], label, ha=best.align, va="center", color=INK)
        taken.append(best)
