"""Figures of a run's page, each from plain numbers to an ``<svg>`` element."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calib.runs.pages.svg import GRID, INK, MUTED, SEQUENCE, SERIES, new_figure, styled, svg_of

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: Layers in a heat map that are named one by one; of more every so many is.
MOST_NAMED = 70
#: Inches: across the page, and across a phone.
WIDTH, NARROW = 9.8, 3.6
#: Characters of a legend's label beyond which labels stand one below the other.
LONG_LABEL = 26


def for_both(name: str, draw: Callable[[str, float], str]) -> str:
    """What ``draw`` makes of a name and a width, for wide pages and for phones; the page shows the one that fits."""
    return f'<div class="wide">{draw(name, WIDTH)}</div><div class="narrow">{draw(f"{name}-narrow", NARROW)}</div>'


@dataclass(frozen=True)
class Curve:
    """A mean with its interval at each step, all (steps,)."""

    label: str
    steps: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None


def _coincide(one: Curve, other: Curve) -> bool:
    """Whether two curves lie on one another to the eye."""
    return np.array_equal(one.steps, other.steps) and np.allclose(one.mean, other.mean, rtol=0.08, atol=0)


def error_chart(name: str, curves: Sequence[Curve], width: float = WIDTH) -> str:
    """Relative output error against step, on a logarithmic axis; the legend below, where it hides no curve."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with styled():
        long = width < WIDTH or max(len(curve.label) for curve in curves) > LONG_LABEL
        columns = 1 if long else 4
        figure = new_figure(width, 3.2 + 0.18 * -(-len(curves) // columns))
        axes = figure.subplots()
        axes.set_yscale("log")
        coinciding = any(_coincide(one, other) for one, other in itertools.combinations(curves, 2))
        for number, curve in enumerate(curves):
            colour = SERIES[number % len(SERIES)]
            shown = curve.mean > 0
            # Where curves coincide the lower ones still show beside the upper ones.
            thick = 1.6 + (0.5 * (len(curves) - 1 - number) if coinciding else 0)
            axes.plot(
                curve.steps[shown],
                curve.mean[shown],
                "o-",
                color=colour,
                lw=thick,
                ms=thick + 2,
                label=curve.label,
            )
            if curve.low is not None and curve.high is not None:
                low = np.where(curve.low > 0, curve.low, curve.mean / 10)
                axes.fill_between(curve.steps, low, curve.high, where=shown.tolist(), color=colour, alpha=0.18, lw=0)
        axes.set_xlabel("denoising step (0: pure noise)")
        axes.set_ylabel("relative output error ‖Δv‖² / ‖v‖²")
        # Numbers as they are: powers of ten would be set as formulas, which takes longer than all the rest.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.legend(loc="outside lower left", fontsize=8, ncols=columns)
        return svg_of(figure, name, "Relative output error against denoising step")


def heat_map(
    name: str,
    rows: Sequence[str],
    steps: Sequence[int],
    values: NDArray[np.float64],
    label: str,
    logarithmic: bool = False,
    width: float = WIDTH,
) -> str:
    """``values`` (rows, steps) as colours; NaN is left empty. The page reads single values out on hovering."""
    from matplotlib.colors import LogNorm

    wide = width >= WIDTH
    norm = LogNorm() if logarithmic and (values > 0).any() else None
    step = 1 if len(rows) <= MOST_NAMED else -(-len(rows) // MOST_NAMED)
    with styled():
        figure = new_figure(width, max(1.6, 0.9 + 0.135 * min(len(rows), MOST_NAMED)) + (0 if wide else 0.5))
        axes = figure.subplots()
        axes.grid(False)
        shown = np.ma.masked_invalid(np.where(values > 0, values, np.nan) if norm else values)
        image = axes.imshow(shown, aspect="auto", interpolation="none", cmap="viridis", norm=norm)
        axes.set_yticks(
            range(0, len(rows), step), [_short(rows[i]) for i in range(0, len(rows), step)], fontsize=7 if wide else 6
        )
        axes.set_xticks(range(len(steps)), [str(s) for s in steps], fontsize=7)
        if len(steps) > (20 if wide else 10):
            axes.set_xticks(range(0, len(steps), 5), [str(s) for s in steps[::5]], fontsize=7)
        axes.tick_params(length=0)
        axes.set_xlabel("denoising step")
        place = {"shrink": min(1.0, 2.4 / figure.get_figheight()), "pad": 0.02} if wide else {"location": "top"}
        bar = figure.colorbar(image, ax=axes, aspect=14, **place)
        bar.set_label(label)
        if norm is not None:
            _plain_decades(bar.ax.yaxis if wide else bar.ax.xaxis)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
        return svg_of(figure, name, label)


def _plain_decades(axis: "Axis") -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10 …, written as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _short(layer: str) -> str:
    return layer.replace("mm_block_", "mm ").replace("unified_block_", "uni ")


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


def histogram_charts(name: str, shapes: Sequence[Shape], width: float = WIDTH) -> str:
    """Small multiples: a panel for each layer, a line for each step, the clip marked."""
    columns = 3 if width >= WIDTH else 1
    rows = -(-len(shapes) // columns)
    with styled():
        figure = new_figure(width, 0.5 + (2.0 if columns > 1 else 1.6) * rows)
        panels = figure.subplots(rows, columns, squeeze=False)
        handles = {}
        for panel, shape in zip(panels.flat, shapes, strict=False):
            panel.set_yscale("log")
            centres = (shape.edges[1:] + shape.edges[:-1]) / 2
            for number, (step, shares) in enumerate(shape.shares.items()):
                colour = SEQUENCE[number * (len(SEQUENCE) - 1) // max(1, len(shape.shares) - 1)]
                seen = np.where(shares > 0, shares, np.nan)
                (line,) = panel.plot(centres, seen, color=colour, lw=1.2, drawstyle="steps-mid")
                handles[f"step {step}"] = line
            if shape.clip is not None:
                for place in shape.clip:
                    panel.axvline(place, color=INK, lw=1, ls=(0, (3, 2)))
            panel.set_title(f"{shape.layer}\n{shape.why}", loc="left", fontsize=8)
            panel.tick_params(labelsize=7)
        for panel in panels.flat[len(shapes) :]:
            panel.set_visible(False)
        figure.supxlabel("input of the layer (dashed: the plan's clip)", fontsize=8, color=MUTED)
        figure.supylabel("share of values", fontsize=8, color=MUTED)
        ncols = len(handles) if columns > 1 else 3
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper left", ncols=ncols, fontsize=8, handlelength=1.4
        )
        return svg_of(figure, name, "Histograms of inputs of chosen layers at several steps")


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot, with its tooltip; ``series`` chooses the colour."""

    label: str
    x: float
    y: float
    series: int
    tip: str
    marked: bool = False


#: Of a label's letters in 7.5 points, at 100 dots an inch: how wide one is, how high a line.
LETTER, LINE = 5.6, 13


def _name(axes: "Axes", dots: Sequence[Dot], most: int) -> None:
    """Label the marked dots, then the highest, where no label stands already; to the left where the right ends."""
    axes.autoscale_view()  # places are near enough before the layout, which only makes room
    end = axes.get_window_extent().x1
    taken: list[tuple[float, float, float]] = []
    for dot in sorted(dots, key=lambda d: (not d.marked, -d.y)):
        x, y = axes.transData.transform((dot.x, dot.y))
        wide = LETTER * len(dot.label)
        left = x + 8 + wide > end
        start = x - 8 - wide if left else x + 8
        near = any(abs(y - other) < LINE and start < last and first < start + wide for first, last, other in taken)
        if len(taken) < most and not near:
            taken.append((start, start + wide, y))
            side, align = (-6, "right") if left else (6, "left")
            note = axes.annotate(
                dot.label,
                (dot.x, dot.y),
                (side, 4),
                textcoords="offset points",
                ha=align,
                fontsize=7.5,
                color=INK,
            )
            note.set_in_layout(False)


def scatter(
    name: str,
    dots: Sequence[Dot],
    axes_labels: tuple[str, str],
    series: Mapping[int, str],
    named: int = 5,
    front: Sequence[tuple[float, float]] = (),
    logarithmic: tuple[bool, bool] = (True, True),
    width: float = WIDTH,
) -> str:
    """Dots with tooltips, of each series a colour; the ``named`` highest are labelled, the ``front`` is a line."""
    with styled():
        figure = new_figure(width, 3.8)
        axes = figure.subplots()
        for set_scale, wanted in zip((axes.set_xscale, axes.set_yscale), logarithmic, strict=True):
            if wanted:
                set_scale("log")
        tips = {}
        for number, dot in enumerate(dots):
            (point,) = axes.plot(dot.x, dot.y, "o", color=SERIES[dot.series % len(SERIES)], ms=6.5, alpha=0.85, mew=0)
            if dot.marked:
                point.set(markeredgecolor=INK, markeredgewidth=1.4, alpha=1)
            point.set_gid(f"dot{number}")
            tips[f"dot{number}"] = dot.tip
        if front:
            x, y = zip(*sorted(front), strict=True)
            axes.step(x, y, where="post", color=MUTED, lw=1, ls=(0, (4, 2)), zorder=0)
        for axis, wanted in ((axes.xaxis, logarithmic[0]), (axes.yaxis, logarithmic[1])):
            if wanted:
                _plain_decades(axis)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        axes.margins(x=0.12, y=0.12)
        _name(axes, dots, named)
        for key, title in series.items():
            axes.plot([], [], "o", color=SERIES[key % len(SERIES)], ms=6, label=title)
        if series:
            axes.legend(
                fontsize=8,
                ncols=min(len(series), 6 if width >= WIDTH else 3),
                loc="lower left",
                bbox_to_anchor=(0, 1.0),
                borderpad=0,
            )
        axes.grid(color=GRID, which="major")
        return svg_of(figure, name, f"{axes_labels[1]} against {axes_labels[0]}", tips)
