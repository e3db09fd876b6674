"""Makes the page of a comparison: the table, what is best for its bytes, errors and pictures side by side."""

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.layout import DETAILS, PAGE
from calib.base.progress import counted
from calib.runs.compare.columns import Column, Metric, metric_of
from calib.runs.compare.comparison import Comparison
from calib.runs.compare.tables import BEST_IS, heading, legend
from calib.runs.pages.charts import Curve, Dot, error_chart, scatter
from calib.runs.pages.page import render, trusted
from calib.runs.pages.parts import Part, curve_of, labels
from calib.runs.pages.pictures import LOSSLESS, data_address, decibels, pictures_of
from calib.runs.record import RunRecord
from calib.runs.standing import RunState

#: Runs whose curves and pictures are shown, prompts in the grid of pictures, dots that are named.
MOST_RUNS, MOST_PROMPTS, MOST_NAMED = 8, 6, 6


def comparison_page(comparison: Comparison, folder: Path) -> str:
    """Return the page; its links to the runs' own pages are relative to ``folder``, where it will lie."""
    done = [run for run in comparison.runs if run.state is RunState.COMPLETE]
    names = dict(zip([run.name for run in done], labels([run.name for run in done]), strict=True))
    shown = _shown(comparison, done, names)
    columns = [{"heading": heading(column), "kind": column.kind} for column in _columns(comparison)]
    rows, small = _pictures(shown)
    return render(
        "comparison.html",
        title=f"Comparison of {counted(len(comparison.runs), 'run')}",
        facts=_facts(comparison),
        notes=comparison.notes,
        baseline=_baseline(comparison, names),
        columns=columns,
        rows=[_row(comparison, run, folder, names[run.name]) for run in done],
        others=[run for run in comparison.runs if run.state is not RunState.COMPLETE],
        legend=legend(comparison),
        best_is=BEST_IS,
        parts=[*_front(comparison, done, names), *_errors(shown)],
        pictures=rows,
        picture_columns=["full precision", *shown.labels],
        picture_note=f"The same prompts and seeds, drawn by each run's model.{shown.note}",
        small=small,
        command=_command(),
    )


def _columns(comparison: Comparison) -> list[Column]:
    """Return the columns, metrics first: what runs were asked their names say already."""
    return sorted(comparison.columns, key=lambda column: column.kind == "config")


def _command() -> str:
    """Return the command that was typed, without what a sweep adds to it."""
    return shlex.join(["calib", *(w for w in sys.argv[1:] if w != "--" and not w.startswith("swept="))])


def _facts(comparison: Comparison) -> list[str]:
    states = {state: sum(run.state is state for run in comparison.runs) for state in RunState}
    counts = [f"{count} {state.value}" for state, count in states.items() if count]
    models = dict.fromkeys(str(run.config["model.name"]) for run in comparison.runs if "model.name" in run.config)
    return [*counts, *models]


def _baseline(comparison: Comparison, names: Mapping[str, str]) -> str:
    base = comparison.baseline
    return "" if base is None else names.get(base.name, base.name)


def _row(comparison: Comparison, run: RunRecord, folder: Path, label: str) -> dict[str, Any]:
    page = run.path / PAGE
    return {
        "name": run.name,
        "label": label,
        "front": run.name in comparison.pareto,
        "link": quote(os.fsencode(os.path.relpath(page.resolve(), folder))) if page.exists() else "",
        "cells": [_cell(comparison, run, column) for column in _columns(comparison)],
    }


def _cell(comparison: Comparison, run: RunRecord, column: Column) -> dict[str, Any]:
    value, delta = comparison.value(run, column), comparison.delta(run, column)
    other = comparison.baseline is not None and run.path != comparison.baseline.path
    return {
        "text": column.text(value),
        "value": "" if value is None else value,
        "number": column.kind == "metric",
        "best": run.name in comparison.best.get(column.key, ()),
        "delta": column.text(delta, signed=True) if delta is not None and other else "",
    }


@dataclass(frozen=True)
class Shown:
    """Runs with an evaluation whose curves and pictures are shown, of ``whole`` that have one."""

    runs: tuple[tuple[RunRecord, Mapping[str, Any]], ...]
    labels: tuple[str, ...]
    whole: int

    @property
    def note(self) -> str:
        """Which are shown, where not all are."""
        if len(self.runs) == self.whole:
            return ""
        return f" {len(self.runs)} of {self.whole} runs: of the Pareto-optimal first, from the smallest to the largest."


def _shown(comparison: Comparison, done: Sequence[RunRecord], names: Mapping[str, str]) -> Shown:
    evaluated = []
    for run in done:
        try:
            document = read_json(run.path / DETAILS)
            curve_of(document["quantized"], run.name, intervals=False)
            evaluated.append((run, document))
        except (CalibError, KeyError, TypeError, ValueError):
            continue
    chosen = _chosen(comparison, [run for run, _ in evaluated])
    kept = tuple((run, document) for run, document in evaluated if run.name in chosen)
    return Shown(kept, tuple(names[run.name] for run, _ in kept), len(evaluated))


def _chosen(comparison: Comparison, runs: Sequence[RunRecord]) -> set[str]:
    """Return the names of the runs to show: of the front first, then of others, evenly from the smallest on."""
    size = comparison.pareto_axes[0]
    ordered = sorted(runs, key=lambda run: run.metrics.get(size, math.inf))
    front = [run.name for run in ordered if run.name in comparison.pareto]
    others = [run.name for run in ordered if run.name not in comparison.pareto]
    chosen = _spread(front, MOST_RUNS)
    return {*chosen, *_spread(others, MOST_RUNS - len(chosen))}


def _spread(names: Sequence[str], most: int) -> list[str]:
    """Return at most ``most`` of ``names``, evenly, the ends among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / max(1, most - 1))] for i in range(most)]


def _front(comparison: Comparison, done: Sequence[RunRecord], names: Mapping[str, str]) -> list[Part]:
    x, y = comparison.pareto_axes
    at: dict[tuple[float, float], list[RunRecord]] = {}
    across, up = metric_of(x), metric_of(y)
    for run in done:
        if x in run.metrics and y in run.metrics:
            at.setdefault((run.metrics[x] * across.scale, run.metrics[y] * up.scale), []).append(run)
    if sum(map(len, at.values())) < 2:
        return []
    dots, front = [], []
    for place, runs in at.items():
        label = " = ".join(names[run.name] for run in runs)
        marked = any(run.name in comparison.pareto for run in runs)
        tip = f"{label}: {', '.join(_with_unit(m, v) for m, v in zip((across, up), place, strict=True))}"
        dots.append(Dot(label, *place, series=0, tip=tip, marked=marked))
        front += [place] if marked else []
    titles = (_axis(across.title, across.unit), _axis(up.title, up.unit))
    scales = (False, y == "output_error" and all(value > 0 for _, value in at))
    figure = trusted(scatter("front", dots, titles, {}, MOST_NAMED, front, scales))
    note = "Ringed: no other run is as good in both, and better in one. Hover a dot for its figures."
    return [Part("front", f"{up.title[:1].upper()}{up.title[1:]} against {across.title}", note, figure)]


def _with_unit(metric: Metric, value: float) -> str:
    return f"{metric.form.format(value)} {metric.unit}".strip()


def _axis(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def _errors(shown: Shown) -> list[Part]:
    alike: dict[bytes, tuple[list[str], Curve]] = {}
    for (run, document), label in zip(shown.runs, shown.labels, strict=True):
        curve = curve_of(document["quantized"], run.name, intervals=False)
        alike.setdefault(curve.steps.tobytes() + curve.mean.tobytes(), ([], curve))[0].append(label)
    curves = [replace(curve, label=" = ".join(names)) for names, curve in alike.values()]
    if not curves:
        return []
    note = f"The model's output on the same states, mean over prompts.{shown.note}"
    return [Part("errors", "Error against step", note, trusted(error_chart("errors", curves)))]


def _pictures(shown: Shown) -> tuple[list[dict[str, Any]], bool]:
    """Return rows of the grid, each a prompt, its picture at full precision and every run's; and if all are small.

    Prompts are those of the first run that has pictures; a run with another prompt in its place has no picture there.
    """
    evaluated = [
        (list(document["prompts"]), pictures_of(run.path), document["quantized"].get("psnr") or [])
        for run, document in shown.runs
    ]
    prompts, own, _ = next((entry for entry in evaluated if entry[1]), ([], [], []))
    rows, small = [], True
    for number in range(min(MOST_PROMPTS, len(own))):
        full, size = data_address(own[number][0])
        small = small and max(size) <= LOSSLESS
        cells = [(full, "")]
        for its, pictures, psnrs in evaluated:
            same = number < len(pictures) and its[number : number + 1] == prompts[number : number + 1]
            address = data_address(pictures[number][1])[0] if same else ""
            cells.append((address, decibels(psnrs, number) if same else ""))
        rows.append({"prompt": prompts[number], "cells": cells})
    return rows, small
