"""Figures of a run's page, each from plain numbers to an ``<svg>`` element."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calib.report.svg import GRID, INK, MUTED, SEQUENCE, SERIES, new_figure, styled, svg_of

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Layers in a heat map that are named one by one; of more every so many is.
MOST_NAMED = 70
WIDTH = 9.8


@dataclass(frozen=True)
class Curve:
    """A mean with its interval at each step, all (steps,)."""

    label: str
    steps: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None


def error_chart(name: str, curves: Sequence[Curve]) -> str:
    """Relative output error against step, on a logarithmic axis."""
    from matplotlib.ticker import MaxNLocator

    with styled():
        figure = new_figure(WIDTH, 3.4)
        axes = figure.subplots()
        axes.set_yscale("log")
        for number, curve in enumerate(curves):
            colour = SERIES[number % len(SERIES)]
            shown = curve.mean > 0
            axes.plot(curve.steps[shown], curve.mean[shown], "o-", color=colour, lw=1.6, ms=3.5, label=curve.label)
            if curve.low is not None and curve.high is not None:
                low = np.where(curve.low > 0, curve.low, curve.mean / 10)
                axes.fill_between(curve.steps, low, curve.high, where=shown.tolist(), color=colour, alpha=0.18, lw=0)
        axes.set_xlabel("denoising step (0: pure noise)")
        axes.set_ylabel("relative output error ‖v − v_q‖² / ‖v‖²")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.legend(loc="best", fontsize=8)
        return svg_of(figure, name, "Relative output error against denoising step")


def heat_map(name: str, rows: Sequence[str], steps: Sequence[int], values: NDArray[np.float64], label: str) -> str:
    """``values`` (rows, steps) as colours; NaN is left empty. The page reads single values out on hovering."""
    step = 1 if len(rows) <= MOST_NAMED else -(-len(rows) // MOST_NAMED)
    with styled():
        figure = new_figure(WIDTH, max(1.6, 0.9 + 0.135 * min(len(rows), MOST_NAMED)))
        axes = figure.subplots()
        axes.grid(False)
        image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="none", cmap="viridis")
        axes.set_yticks(range(0, len(rows), step), [_short(rows[i]) for i in range(0, len(rows), step)], fontsize=7)
        axes.set_xticks(range(len(steps)), [str(s) for s in steps], fontsize=7)
        if len(steps) > 20:
            axes.set_xticks(range(0, len(steps), 5), [str(s) for s in steps[::5]], fontsize=7)
        axes.tick_params(length=0)
        axes.set_xlabel("denoising step")
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 2.4 / figure.get_figheight()), pad=0.02, aspect=14)
        bar.set_label(label)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
        return svg_of(figure, name, label)


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


def histogram_charts(name: str, shapes: Sequence[Shape]) -> str:
    """Small multiples: a panel for each layer, a line for each step, the clip marked."""
    columns = 3
    rows = -(-len(shapes) // columns)
    with styled():
        figure = new_figure(WIDTH, 0.5 + 2.0 * rows)
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
        figure.supxlabel("input of the layer (dashed: where the plan cuts)", fontsize=8, color=MUTED)
        figure.supylabel("share of values", fontsize=8, color=MUTED)
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), fontsize=8, handlelength=1.4
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


def _name(axes: "Axes", dots: Sequence[Dot], most: int) -> None:
    """Label the marked dots, then the highest, where no label stands already."""
    taken: list[NDArray[np.float64]] = []
    for dot in sorted(dots, key=lambda d: (not d.marked, -d.y)):
        place = axes.transData.transform((dot.x, dot.y))
        near = any(abs(place[1] - other[1]) < 12 and abs(place[0] - other[0]) < 190 for other in taken)
        if len(taken) < most and not near:
            taken.append(place)
            axes.annotate(dot.label, (dot.x, dot.y), (6, 4), textcoords="offset points", fontsize=7.5, color=INK)


def scatter(
    name: str,
    dots: Sequence[Dot],
    axes_labels: tuple[str, str],
    series: Mapping[int, str],
    named: int = 5,
    front: Sequence[tuple[float, float]] = (),
    logarithmic: tuple[bool, bool] = (True, True),
) -> str:
    """Dots with tooltips, of each series a colour; the ``named`` highest are labelled, the ``front`` is a line."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    with styled():
        figure = new_figure(WIDTH, 3.8)
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
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        axes.margins(x=0.12, y=0.12)
        _name(axes, dots, named)
        for key, title in series.items():
            axes.plot([], [], "o", color=SERIES[key % len(SERIES)], ms=6, label=title)
        if series:
            axes.legend(fontsize=8, ncols=min(len(series), 6), loc="lower left", bbox_to_anchor=(0, 1.0), borderpad=0)
        axes.grid(color=GRID, which="major")
        return svg_of(figure, name, f"{axes_labels[1]} against {axes_labels[0]}", tips)
