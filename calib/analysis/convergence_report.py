"""Report the results of :func:`calib.analysis.convergence.convergence`: a table, a JSON document, a plot."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.analysis.convergence import COVERAGE, Convergence, LayerConvergence, Quantity
from calib.base.errors import CalibError
from calib.base.files import replacing
from calib.base.progress import counted

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Quantities that the table and the plot show, with their definitions.
SHOWN = {Quantity.CENTRAL: "percentiles: central range, p99 - p01", Quantity.RANGE: "full range, max - min"}
#: Largest number of coloured layers in a panel of the plot; more would be indistinguishable.
MOST_NAMED = 6
#: Number of prompts below which a bootstrap underestimates the spread by more than 5%.
FEW_PROMPTS = 10


def convergence_text(found: Convergence, run: Path, layers: int) -> str:
    """The report as text: what was examined, a table per quantity of the ``layers`` worst, notes, the verdict."""
    source, count = found.source, len(found.source.images)
    prompts = ", each a prompt of its own" if source.prompts_unknown else f" of {_prompts(found)} prompts"
    inputs = len(found.layers)
    names = inputs + sum(len(layer.same_input) for layer in found.layers)
    head = f"{run}: {count} images{prompts}; {counted(len(source.steps), 'step')}; {counted(names, 'layer')}"
    lines = [
        head + (f" with {inputs} different inputs" if names > inputs else ""),
        f"How far the value from N images lies from that of all {count}, in % of it: on average, and at most in "
        f"{COVERAGE:.0%} of {found.draws:,} resamples.",
    ]
    worst = {quantity: found.worst(quantity)[:layers] for quantity in SHOWN}
    width = max(len(_label(layer)) for shown in worst.values() for layer in shown)
    for quantity, title in SHOWN.items():
        lines += ["", title, *_table(found, quantity, worst[quantity], width)]
    notes = [f"note: {note}" for note in _notes(found)]
    return "\n".join([*lines, "", *notes, *_verdicts(found)]) + "\n"


def _prompts(found: Convergence) -> int:
    return len(np.unique(found.source.prompts))


def _table(found: Convergence, quantity: Quantity, shown: Sequence[LayerConvergence], width: int) -> list[str]:
    rows = [("", "value", *("mean", f"{COVERAGE:.0%}") * len(found.counts))]
    for layer in shown:
        moved = [layer.movements[n][quantity] for n in found.counts]
        cells = [f"{100 * part:.1f}" for movement in moved for part in (movement.expected, movement.most)]
        rows.append((_label(layer), f"{layer.values[quantity]:.4g}", *cells))
    middle = [_median(found, quantity, n, kind) for n in found.counts for kind in ("expected", "most")]
    rows.append((f"median of {counted(len(found.layers), 'layer')}", "", *(f"{100 * part:.1f}" for part in middle)))
    width = max(width, len(rows[-1][0]))
    counts = "".join(f"{_count(found, n):>13}" for n in found.counts)
    lines = [f"{name:{width}}{value:>9}" + _pairs(cells) for name, value, *cells in rows]
    return [f"{'':{width + 9}}{counts}", *lines]


def _pairs(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{6 + (place + 1) % 2}}" for place, cell in enumerate(cells))


def _count(found: Convergence, count: int) -> str:
    return f"all {count}" if count == len(found.source.images) else f"N = {count}"


def _label(layer: LayerConvergence) -> str:
    return layer.name + (f" (+{len(layer.same_input)})" if layer.same_input else "")


def _median(found: Convergence, quantity: Quantity, count: int, kind: str) -> float:
    return float(np.median([getattr(layer.movements[count][quantity], kind) for layer in found.layers]))


def _notes(found: Convergence) -> list[str]:
    source = found.source
    notes = ["the full range only ever falls short: N images miss extremes, and none tells what more would show"]
    if any(layer.same_input for layer in found.layers):
        notes.append("(+n): so many further layers read the same array; they count once")
    if source.steps_left_out:
        steps = ", ".join(map(str, source.steps_left_out))
        notes.append(f"step {steps} is left out: the sampler never evaluates it")
    if source.prompts_unknown:
        notes.append(f"prompts are unknown: {source.prompts_unknown}")
    if _prompts(found) < FEW_PROMPTS:
        notes.append(f"{_prompts(found)} prompts are few: the true movement is larger than shown")
    if source.not_finite:
        name, images = max(source.not_finite.items(), key=lambda item: item[1])
        layers = counted(len(source.not_finite), "layer")
        notes.append(
            f"{layers} left out, without a finite value in some image at some step; most of all {name}, in "
            f"{counted(images, 'image')} (--json lists them)"
        )
    return notes


def _verdicts(found: Convergence) -> list[str]:
    count = len(found.source.images)
    lost = len(found.source.not_finite)
    beside = f" ({counted(lost, 'layer')} left out)" if lost else ""
    lines = []
    for quantity, name in ((Quantity.CENTRAL, "central range"), (Quantity.RANGE, "full range")):
        worst = found.worst(quantity)[0]
        lines.append(
            f"with {count} images the {name} of {COVERAGE:.0%} of layers{beside} moves by at most "
            f"{found.most_of_layers(quantity):.1%}; worst: {_label(worst)} {worst.most(quantity):.1%}"
        )
    return lines


def convergence_json(found: Convergence, run: Path, plot: Path) -> dict[str, Any]:
    """The full results of all layers, JSON-able; movements are fractions."""
    source = found.source
    return {
        "run": str(run),
        "images": len(source.images),
        "prompts": _prompts(found),
        "prompts_unknown": source.prompts_unknown or None,
        "steps": source.steps,
        "steps_left_out": source.steps_left_out,
        "counts": found.counts,
        "draws": found.draws,
        "seed": found.seed,
        "coverage": COVERAGE,
        "verdict": {
            quantity.value: {
                "most_of_layers": found.most_of_layers(quantity),
                "worst": found.worst(quantity)[0].name,
                "worst_most": found.worst(quantity)[0].most(quantity),
            }
            for quantity in SHOWN
        },
        "notes": _notes(found),
        "layers": {
            layer.name: {
                "same_input": layer.same_input,
                "values": layer.values,
                "movements": {
                    str(count): {quantity.value: asdict(movement) for quantity, movement in moved.items()}
                    for count, moved in layer.movements.items()
                },
            }
            for layer in found.layers
        },
        "not_finite": source.not_finite,
        "plot": str(plot),
    }


def write_plot(found: Convergence, path: Path, layers: int) -> None:
    """Write a PNG with a panel per quantity: movement against number of images, the ``layers`` worst named."""
    # Imported here, as it is slow; a Figure without pyplot needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(SHOWN))
    for axes, (quantity, title) in zip(panels, SHOWN.items(), strict=True):
        _draw_panel(axes, found, quantity, min(layers, MOST_NAMED))
        axes.set_title(title, loc="left", fontsize=11)
    count, prompts = len(found.source.images), _prompts(found)
    of_prompts = "" if found.source.prompts_unknown else f" of {prompts} prompts"
    figure.suptitle(f"How far statistics of layer inputs still move, {count} images{of_prompts}", fontsize=12)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        reason = error.strerror or error
        raise CalibError(f"{path}: the picture cannot be written ({reason}); --plot puts it elsewhere") from None


def _draw_panel(axes: "Axes", found: Convergence, quantity: Quantity, named: int) -> None:
    worst = found.worst(quantity)
    for layer in worst[named:]:
        axes.plot(
            found.counts, _curve(layer, found, quantity), ".-", color="0.8", linewidth=0.8, markersize=3, zorder=1
        )
    for number, layer in enumerate(worst[:named]):
        curve = _curve(layer, found, quantity)
        axes.plot(found.counts, curve, "o-", color=f"C{number}", markersize=4, label=_label(layer), zorder=2)
    middle = [100 * _median(found, quantity, n, "most") for n in found.counts]
    axes.plot(found.counts, middle, "ks--", markersize=4, label=f"median of {len(worst)} layers", zorder=3)
    if len(worst) > named:
        axes.plot([], [], ".-", color="0.8", linewidth=0.8, markersize=3, label=f"the other {len(worst) - named}")
    axes.set_xscale("log")
    axes.set_xlim(found.counts[0] / 1.15, found.counts[-1] * 1.15)
    axes.set_xticks(_apart(found.counts), [str(n) for n in _apart(found.counts)])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("number of images N (log scale)")
    axes.set_ylabel(f"movement, % of the value of all images\n({COVERAGE:.0%} of resamples stay below)")
    axes.grid(alpha=0.25)
    # Below the axes, as it would hide curves within.
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _curve(layer: LayerConvergence, found: Convergence, quantity: Quantity) -> list[float]:
    return [100 * layer.movements[n][quantity].most for n in found.counts]


def _apart(counts: Sequence[int]) -> list[int]:
    """The counts whose labels do not overlap on a log axis, including the last."""
    return [a for a, b in pairwise(counts) if b > 1.1 * a] + [counts[-1]]
