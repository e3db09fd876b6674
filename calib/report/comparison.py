"""The page of a comparison: the table, what is best for its bytes, errors and pictures side by side."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.errors import CalibError
from calib.files import read_json
from calib.progress import counted
from calib.report.charts import Dot, error_chart, scatter
from calib.report.page import render, trusted
from calib.report.parts import Part, curve_of
from calib.report.pictures import LOSSLESS, data_address, pictures_of
from calib.runs.columns import Column, Metric, metric_of
from calib.runs.comparison import Comparison
from calib.runs.layout import DETAILS, REPORT
from calib.runs.record import RunRecord, State
from calib.runs.tables import heading, legend

#: Curves in one figure, runs and prompts in the grid of pictures.
MOST_CURVES, MOST_RUNS, MOST_PROMPTS = 8, 8, 6


def comparison_page(comparison: Comparison, folder: Path) -> str:
    """The page; links to the runs' own reports are relative to ``folder``, where the page will lie."""
    done = [run for run in comparison.runs if run.state is State.COMPLETE]
    measured = _measured(comparison, done)
    columns = [{"heading": heading(column), "kind": column.kind} for column in comparison.columns]
    rows, small = _pictures(measured)
    return render(
        "comparison.html",
        title=f"Comparison of {counted(len(comparison.runs), 'run')}",
        facts=_facts(comparison),
        notes=comparison.notes,
        baseline=comparison.baseline.name if comparison.baseline else "",
        columns=columns,
        rows=[_row(comparison, run, folder) for run in done],
        others=[run for run in comparison.runs if run.state is not State.COMPLETE],
        legend=legend(comparison),
        parts=[*_front(comparison, done), *_errors(measured)],
        pictures=rows,
        picture_columns=["full precision", *(run.name for run, _ in measured[:MOST_RUNS])],
        picture_note=_picture_note(measured),
        small=small,
        command=_command(),
    )


def _command() -> str:
    """What was typed; the sweep's own additions are left out."""
    return shlex.join(["calib", *(w for w in sys.argv[1:] if w != "--" and not w.startswith("swept="))])


def _facts(comparison: Comparison) -> list[str]:
    states = {state: sum(run.state is state for run in comparison.runs) for state in State}
    told = [f"{count} {state.value}" for state, count in states.items() if count]
    models = dict.fromkeys(str(run.config["model.name"]) for run in comparison.runs if "model.name" in run.config)
    return [*told, *models]


def _row(comparison: Comparison, run: RunRecord, folder: Path) -> dict[str, Any]:
    page = run.path / REPORT
    return {
        "name": run.name,
        "front": run.name in comparison.pareto,
        "link": Path(os.path.relpath(page.resolve(), folder)).as_posix() if page.exists() else "",
        "cells": [_cell(comparison, run, column) for column in comparison.columns],
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


def _measured(comparison: Comparison, done: Sequence[RunRecord]) -> list[tuple[RunRecord, Mapping[str, Any]]]:
    """Complete runs with an evaluation, the Pareto-optimal ones first where not all can be shown."""
    found = []
    for run in done:
        try:
            document = read_json(run.path / DETAILS)
            curve_of(document["quantized"], run.name, intervals=False)
            found.append((run, document))
        except (CalibError, KeyError, TypeError, ValueError):
            continue
    if len(found) > MOST_CURVES:
        found.sort(key=lambda item: item[0].name not in comparison.pareto)
    return found


def _front(comparison: Comparison, done: Sequence[RunRecord]) -> list[Part]:
    x, y = comparison.pareto_axes
    there = [run for run in done if x in run.metrics and y in run.metrics]
    if len(there) < 2:
        return []
    across, up = metric_of(x), metric_of(y)

    def place(run: RunRecord) -> tuple[float, float]:
        return run.metrics[x] * across.scale, run.metrics[y] * up.scale

    dots = [
        Dot(
            label=run.name,
            x=place(run)[0],
            y=place(run)[1],
            series=0,
            tip=": ".join([run.name, ", ".join(_told(m, v) for m, v in zip((across, up), place(run), strict=True))]),
            marked=run.name in comparison.pareto,
        )
        for run in there
    ]
    labels = (_axis(across.title, across.unit), _axis(up.title, up.unit))
    logarithmic = y == "output_error" and all(place(run)[1] > 0 for run in there)
    svg = scatter(
        "front",
        dots,
        labels,
        {},
        named=8,
        front=[place(run) for run in there if run.name in comparison.pareto],
        logarithmic=(False, logarithmic),
    )
    note = "Ringed: no other run is better in both. Hover a dot for its figures."
    return [Part("front", f"{up.title[:1].upper()}{up.title[1:]} against {across.title}", note, trusted(svg))]


def _told(metric: Metric, value: float) -> str:
    return f"{metric.form.format(value)} {metric.unit}".strip()


def _axis(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def _errors(measured: Sequence[tuple[RunRecord, Mapping[str, Any]]]) -> list[Part]:
    if not measured:
        return []
    curves = [curve_of(document["quantized"], run.name, intervals=False) for run, document in measured[:MOST_CURVES]]
    note = "The model's output on the same states, mean over prompts."
    if len(measured) > MOST_CURVES:
        note += f" {MOST_CURVES} of {len(measured)} runs, the Pareto-optimal first."
    return [Part("errors", "Error against step", note, trusted(error_chart("errors", curves)))]


def _picture_note(measured: Sequence[tuple[RunRecord, Mapping[str, Any]]]) -> str:
    more = f" {MOST_RUNS} of {len(measured)} runs, the Pareto-optimal first." if len(measured) > MOST_RUNS else ""
    return f"The same prompts and seeds, drawn by each run's model.{more}"


def _pictures(measured: Sequence[tuple[RunRecord, Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], bool]:
    """Rows of the grid: the prompts of the first run, each with its picture at full precision and of every run.

    A run whose prompts are others has none in a row that is not its own.
    """
    shown = [(list(document["prompts"]), pictures_of(run.path)) for run, document in measured[:MOST_RUNS]]
    prompts, own = next((entry for entry in shown if entry[1]), ([], []))
    rows, small = [], True
    for number in range(min(MOST_PROMPTS, len(own))):
        full, size = data_address(own[number][0])
        small = small and max(size) <= LOSSLESS
        addresses = [full]
        for its, pictures in shown:
            same = number < len(pictures) and its[number : number + 1] == prompts[number : number + 1]
            addresses.append(data_address(pictures[number][1])[0] if same else "")
        rows.append({"prompt": prompts[number], "addresses": addresses})
    return rows, small
