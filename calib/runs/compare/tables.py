"""A comparison as text for the terminal, CSV, JSON and Markdown."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from calib.base.progress import counted
from calib.runs.compare.columns import Column, metric_of
from calib.runs.compare.comparison import Comparison
from calib.runs.record import RunRecord
from calib.runs.standing import RunState

BEST, FRONT = "*", "◆"
#: What the first mark means.
BEST_IS = "best of its column, or not to be told from it"
BY = "measures by 95% intervals, paired by prompt where each prompt's value is stored"
#: Number of metrics that take precedence over settings where there is no room for both.
_FIRST = 3
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def heading(column: Column) -> str:
    """A column's title with its unit and an arrow to the better side."""
    arrow = {"higher": " ↑", "lower": " ↓"}.get(column.better or "", "")
    unit = f" ({column.unit})" if column.unit and column.unit not in column.title else ""
    return f"{column.title}{unit}{arrow}"


def cell(comparison: Comparison, run: RunRecord, column: Column) -> str:
    """A run's entry: the value, its difference to the baseline, and a mark on the best."""
    text = column.text(comparison.value(run, column))
    delta = comparison.delta(run, column)
    if delta is not None and comparison.baseline is not None and run.path != comparison.baseline.path:
        text += f" ({column.text(delta, signed=True)})"
    return text + (BEST if run.name in comparison.best.get(column.key, ()) else "")


def terminal_table(comparison: Comparison, width: int, colour: bool = False) -> str:
    """The table, with as many columns as fit into ``width`` characters, and a legend.

    Names that would leave no room for metrics stand on lines of their own.
    """
    done = [run for run in comparison.runs if run.state is RunState.COMPLETE]
    others = [run for run in comparison.runs if run.state is not RunState.COMPLETE]
    columns, left_out, folded = _layout(comparison, done, width)
    lines = []
    if done:
        rows = [["", "run", *map(heading, columns)]]
        for run in done:
            mark = FRONT if run.name in comparison.pareto else " "
            rows.append([mark, run.name, *(cell(comparison, run, column) for column in columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[1] = len(rows[0][1]) if folded else widths[1]
        right = [False, False, *(column.kind == "metric" for column in columns)]
        for number, row in enumerate(rows):
            if folded and number > 0:
                lines.append(f"{row[0]}  {row[1]}")
                row[:2] = ["", ""]
            line = "  ".join(
                f"{text:>{w}}" if r else f"{text:<{w}}" for text, w, r in zip(row, widths, right, strict=True)
            )
            lines.append(_styled(line.rstrip(), _BOLD if number == 0 else "", colour))
    if others:
        lines += ["", f"Not complete: {counted(len(others), 'run')}"]
        lines += [f"  {run.state:10}  {run.name}  {_styled(run.why, _DIM, colour)}".rstrip() for run in others]
    lines += ["", *legend(comparison)]
    if left_out:
        more = ", ".join(column.title for column in left_out)
        lines.append(f"left out, as the terminal is too narrow: {more}; --csv, --json and --html have them")
    return "\n".join(lines) + "\n"


def _styled(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_PLAIN}" if colour and style and text else text


def _layout(comparison: Comparison, runs: Sequence[RunRecord], width: int) -> tuple[list[Column], list[Column], bool]:
    """Columns that fit, those that do not, and whether names stand on lines of their own, which may save columns."""
    head = len(f"{FRONT}  run")
    beside = _fitting(comparison, runs, width, head - 3 + max((len(run.name) for run in runs), default=3))
    apart = _fitting(comparison, runs, width, head)
    lost = [sum(not _named(column, runs) for column in left_out) for _, left_out in (beside, apart)]
    return (*apart, True) if lost[1] < lost[0] else (*beside, False)


def _named(column: Column, runs: Sequence[RunRecord]) -> bool:
    """Whether the runs' names contain a setting, as those of a sweep do."""
    return column.kind == "config" and all(f"{column.key}=" in run.name for run in runs)


def _fitting(
    comparison: Comparison, runs: Sequence[RunRecord], width: int, named: int
) -> tuple[list[Column], list[Column]]:
    """Columns that fit beside ``named`` characters, and the others.

    The first to be left out are settings that the names contain, then the last metrics, then other settings, then the
    first metrics.
    """
    figures = [column for column in comparison.columns if column.kind == "metric"]
    settings = [column for column in comparison.columns if column.kind == "config"]
    in_names, others = ([c for c in settings if _named(c, runs) == whether] for whether in (True, False))
    going = [*reversed(in_names), *reversed(figures[_FIRST:]), *reversed(others), *reversed(figures[:_FIRST])]
    space = {c.key: 2 + max(len(heading(c)), *(len(cell(comparison, r, c)) for r in runs)) for c in going if runs}
    gone: list[Column] = []
    while runs and len(going) > 1 and named + sum(space[column.key] for column in going) > width:
        gone.append(going.pop(0))
    return [c for c in comparison.columns if c in going], [c for c in comparison.columns if c in gone]


def legend(comparison: Comparison) -> list[str]:
    """The meaning of the marks, and the notes."""
    x, y = (metric_of(key).title for key in comparison.pareto_axes)
    lines = []
    if any(comparison.best.values()):
        lines.append(f"{BEST} {BEST_IS} ({BY})")
    if comparison.undecided:
        lines.append(f"no mark, as no run can be told from the best: {', '.join(comparison.undecided)}")
    if comparison.pareto:
        lines.append(
            f"{FRONT} Pareto-optimal: by its figures no run here is as good in both {x} and {y}, and better in one"
        )
    if comparison.baseline is not None:
        lines.append(f"(±) difference to {comparison.baseline.name}")
    return [*lines, *(f"note: {note}" for note in comparison.notes)]


def csv_text(comparison: Comparison) -> str:
    """CSV with raw keys and full precision; the last column is the error."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [column.key for column in comparison.columns]
    deltas = [f"{c.key}_delta" for c in comparison.columns if comparison.baseline is not None and c.kind == "metric"]
    writer.writerow(["run", "state", "pareto", *keys, *deltas, "path", "error"])
    for run in comparison.runs:
        row = _row(comparison, run)
        values = [row[key] for key in ("run", "state", "pareto")]
        values += [row["values"][key] for key in keys] + [row["deltas"].get(d.removesuffix("_delta")) for d in deltas]
        writer.writerow(["" if value is None else value for value in [*values, row["path"], row["error"]]])
    return out.getvalue()


def _row(comparison: Comparison, run: RunRecord) -> dict[str, Any]:
    deltas = {c.key: comparison.delta(run, c) for c in comparison.columns if c.kind == "metric"}
    return {
        "run": run.name,
        "path": str(run.path),
        "state": run.state.value,
        "error": run.why or None,
        "pareto": run.name in comparison.pareto,
        "values": {column.key: comparison.value(run, column) for column in comparison.columns},
        "deltas": {key: delta for key, delta in deltas.items() if delta is not None},
    }


def json_text(comparison: Comparison) -> str:
    """One JSON document: columns with units, and a row for each run with all its settings and metrics."""
    document = {
        "columns": [
            {"key": c.key, "title": c.title, "unit": c.raw_unit, "kind": c.kind, "better": c.better}
            for c in comparison.columns
        ],
        "baseline": None if comparison.baseline is None else comparison.baseline.name,
        "pareto_axes": list(comparison.pareto_axes),
        "best": {key: sorted(names) for key, names in comparison.best.items()},
        "runs": [
            {**_row(comparison, run), "config": dict(run.config), "metrics": dict(run.metrics)}
            for run in comparison.runs
        ],
        "notes": list(comparison.notes),
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def markdown_text(comparison: Comparison) -> str:
    """A table in Markdown, for a pull request or a notebook."""
    head = ["", "run", "state", *map(heading, comparison.columns)]
    lines = [_markdown_row(head)]
    lines.append("|" + "|".join("---:" if c == "metric" else "---" for c in ["", "", "", *_kinds(comparison)]) + "|")
    for run in comparison.runs:
        mark = FRONT if run.name in comparison.pareto else ""
        state = run.state.value if run.state is RunState.COMPLETE else f"{run.state.value}: {run.why}"
        lines.append(_markdown_row([mark, run.name, state, *(cell(comparison, run, c) for c in comparison.columns)]))
    return "\n".join([*lines, "", *(f"- {_escaped(line)}" for line in legend(comparison))]) + "\n"


def _kinds(comparison: Comparison) -> list[str]:
    return [column.kind for column in comparison.columns]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("\n", " ").replace("<", "&lt;")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"
