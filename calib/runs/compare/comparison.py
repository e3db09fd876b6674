"""Compare runs: settings that differ, metrics, the best of each, the Pareto front."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calib.base.errors import ConfigError, suggest
from calib.runs.compare.best import Ranking
from calib.runs.compare.columns import METRICS, Column, metric_of
from calib.runs.compare.notes import models_of, notes_on, plain
from calib.runs.record import WITHOUT_EFFECT, RunRecord, Scalar
from calib.runs.standing import RunState

DEFAULT_PARETO = ("quantized_bytes", "output_error")
#: Keys of a run's configuration that are about the place of files and not about results.
HIDDEN = (*WITHOUT_EFFECT, "data_dir", "export_config", "hparams_search")
#: Entries of a run besides its settings and metrics.
_FACTS = ("name", "state", "stage", "start", "end", "error")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Comparison:
    """Runs and columns, in the order of the table.

    Attributes:
        best: by metric, names of the best run and of those that cannot be told from it; none where these are all.
        undecided: titles of the metrics in which runs differ, and none can be told from the best.
        pareto: names of the runs that no other one beats in both metrics ``pareto_axes``.
        notes: what a reader of the table must know.
    """

    runs: tuple[RunRecord, ...]
    columns: tuple[Column, ...]
    baseline: RunRecord | None = None
    best: Mapping[str, frozenset[str]] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()
    pareto: frozenset[str] = frozenset()
    pareto_axes: tuple[str, str] = DEFAULT_PARETO
    notes: tuple[str, ...] = ()

    def value(self, run: RunRecord, column: Column) -> Scalar:
        """The value of ``run`` in ``column``; None where it has none."""
        return value_of(run, column.key)

    def delta(self, run: RunRecord, column: Column) -> float | None:
        """Difference of ``run`` to the baseline; None where one of the two has no number."""
        if self.baseline is None or column.kind != "metric":
            return None
        own, base = run.metrics.get(column.key), self.baseline.metrics.get(column.key)
        return None if own is None or base is None else own - base


def value_of(run: RunRecord, key: str) -> Scalar:
    """A run's metric, setting, state or stage by key."""
    if key == "state":
        return run.state.value
    if key in _FACTS:
        found: Scalar = getattr(run, key)
        return found
    return run.metrics[key] if key in run.metrics else run.config.get(key)


def compare(
    runs: Sequence[RunRecord],
    *,
    where: Sequence[str] = (),
    sort: Sequence[str] = (),
    baseline: str | None = None,
    pareto: tuple[str, str] = DEFAULT_PARETO,
    every: bool = False,
) -> Comparison:
    """Compare ``runs``.

    Args:
        where: conditions such as 'psnr>30' or 'analysis=allocate'; runs that miss one are left out, but the baseline.
            A metric named by its key is in its own unit, as in JSON; by its title, 'size<5.5', in that of the table.
        sort: keys, with a leading '-' for descending; runs without a number come last.
        baseline: name or path of the run to which differences are shown.
        pareto: the two metrics of the front.
        every: show all metrics and every setting that differs.
    """
    known = sorted({key for run in runs for key in (*run.metrics, *run.config)} | set(_FACTS))
    base = None if baseline is None else _named(runs, baseline)
    axes = _axes(runs, pareto, known)
    met = [run for run in runs if all(_meets(run, condition, known) for condition in where)]
    if not met:
        raise ConfigError(f"--where {' '.join(where)}: none of the {len(runs)} runs is left")
    kept = [run for run in runs if run in met or run is base]
    ordered = _sorted(kept, sort, known)
    columns = (*_config_columns(ordered, every), *_metric_columns(ordered, every))
    # Metrics of different models cannot be ranked.
    ranked = [run for run in ordered if run.state is RunState.COMPLETE] if len(models_of(ordered)) <= 1 else []
    ranking = Ranking(ranked)
    best = {column.key: ranking.best(column.key) for column in columns if column.better}
    differing = [key for key in best if key in METRICS and len({run.metrics.get(key) for run in ranked} - {None}) > 1]
    front = pareto_front([(run.name, [_cost(run, key) for key in axes]) for run in ranked])
    return Comparison(
        runs=tuple(ordered),
        columns=columns,
        baseline=base,
        best=best,
        undecided=tuple(metric_of(key).title for key in differing if not best[key]),
        pareto=front,
        pareto_axes=axes,
        notes=tuple(notes_on(ordered, base)),
    )


def _key(wanted: str, known: Sequence[str], given: str) -> str:
    """The key that ``wanted``, from the option ``given``, names in upper or lower case, by itself or its title."""
    if wanted in known:
        return wanted
    for key in known:
        if wanted.casefold() in (key.casefold(), metric_of(key).title.casefold()):
            return key
    raise ConfigError(f"{given}: no such column in these runs.{suggest(wanted, known)}")


def _axes(runs: Sequence[RunRecord], wanted: tuple[str, str], known: Sequence[str]) -> tuple[str, str]:
    """The metrics of the front; the default ones may be missing, and then there is no front."""
    x, y = (key if key in DEFAULT_PARETO else _key(key, known, f"--pareto {','.join(wanted)}") for key in wanted)
    figures = {key for run in runs for key in run.metrics}
    for key in (x, y):
        if key not in DEFAULT_PARETO and (key not in figures or metric_of(key).better is None):
            ranked = ", ".join(sorted(figure for figure in figures if metric_of(figure).better))
            raise ConfigError(f"--pareto {','.join(wanted)}: {key} has no better side; these have one: {ranked}")
    return x, y


def _named(runs: Sequence[RunRecord], wanted: str) -> RunRecord:
    found = [run for run in runs if wanted in (run.name, str(run.path), run.path.name)]
    found = found or [run for run in runs if Path(wanted).resolve() == run.path.resolve()]
    found = found or [run for run in runs if run.name.startswith(wanted)]
    if len(found) != 1:
        what = "names no run" if not found else f"names {len(found)} runs"
        raise ConfigError(f"--baseline {wanted}: {what}.{suggest(wanted, [run.name for run in runs])}")
    return found[0]


def _meets(run: RunRecord, condition: str, known: Sequence[str]) -> bool:
    match = re.fullmatch(r"\s*([^<>=!]*[^<>=!\s])\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*", condition)
    if match is None:
        raise ConfigError(f"--where {condition}: is no condition; write e.g. 'psnr>30' or 'analysis=allocate'")
    given, sign, wanted = match.groups()
    key = _key(given, known, f"--where {condition}")
    value, number = value_of(run, key), _number(wanted)
    if number is not None and given.casefold() != key.casefold():
        number /= metric_of(key).scale  # by its title, in the unit that the table shows
    if number is not None and isinstance(value, int | float) and not isinstance(value, bool):
        return _OPERATORS[sign](value, number)
    if sign in ("=", "!="):
        return (plain(value) == wanted) == (sign == "=")
    if number is None:
        raise ConfigError(f"--where {condition}: {wanted!r} is no number; {sign} compares numbers")
    return False


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _sorted(runs: Sequence[RunRecord], sort: Sequence[str], known: Sequence[str]) -> list[RunRecord]:
    ordered = list(runs)
    for key in reversed(sort):
        ordered = _by(ordered, _key(key.removeprefix("-"), known, f"--sort {key}"), descending=key.startswith("-"))
    return sorted(ordered, key=lambda run: run.state is not RunState.COMPLETE)


def _by(runs: Sequence[RunRecord], key: str, descending: bool) -> list[RunRecord]:
    """Sort by ``key``: numbers before texts, runs without a value last, in either direction."""
    numbers, texts, rest = [], [], []
    for run in runs:
        value = value_of(run, key)
        if value is None:
            rest.append(run)
        elif isinstance(value, int | float):
            numbers.append((float(value), run))
        else:
            texts.append((value, run))
    ordered = [run for _, run in sorted(numbers, key=lambda item: item[0], reverse=descending)]
    return [*ordered, *(run for _, run in sorted(texts, key=lambda item: item[0], reverse=descending)), *rest]


def _config_columns(runs: Sequence[RunRecord], every: bool) -> list[Column]:
    """Columns of the settings that differ."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    shown = [key for key in keys if (every or key not in HIDDEN) and _differs(runs, key, every)]
    if not every and all(run.config.get("sampler") == run.config.get("model") for run in runs):
        shown = [key for key in shown if key != "sampler"]  # chosen with the model
    # Groups come first, and after them their parameters.
    return [Column(key, key, "", "config") for key in sorted(shown, key=lambda key: "." in key)]


def _differs(runs: Sequence[RunRecord], key: str, every: bool) -> bool:
    """Whether two runs have different values of a setting.

    Defaults of different options follow from the option, which has a column of its own: a group's parameter differs
    if two runs of one option have different values of it, or if the command line of a run set it.
    """
    if every or "." not in key or any(key in run.asked for run in runs):
        return len({plain(run.config[key]) if key in run.config else None for run in runs if run.config}) > 1
    group = key.partition(".")[0]
    values = {(run.config.get(group), plain(run.config[key])) for run in runs if key in run.config}
    return len(values) > len({option for option, _ in values})


def _metric_columns(runs: Sequence[RunRecord], every: bool) -> list[Column]:
    there = dict.fromkeys(key for run in runs for key in run.metrics)
    wanted = [key for key in METRICS if key in there]
    if every:
        wanted += [key for key in there if key not in METRICS]
    else:
        alike = ("images", "steps")  # shown where they differ
        wanted = [k for k in wanted if k not in alike or len({run.metrics.get(k) for run in runs} - {None}) > 1]
    columns = []
    for key in wanted:
        metric = metric_of(key)
        columns.append(Column(key, metric.title, metric.unit, "metric", metric.better))
    return columns


def _cost(run: RunRecord, key: str) -> float | None:
    value = run.metrics.get(key)
    return None if value is None else -value if metric_of(key).better == "higher" else value


def pareto_front(costs: Sequence[tuple[str, Sequence[float | None]]]) -> frozenset[str]:
    """Names of those that no other dominates, by costing at most as much in all and less in one; None takes no part."""
    whole = [(name, [c for c in own if c is not None]) for name, own in costs if None not in own]

    def beaten(own: Sequence[float]) -> bool:
        return any(
            all(o <= c for o, c in zip(other, own, strict=True)) and any(o < c for o, c in zip(other, own, strict=True))
            for _, other in whole
        )

    return frozenset(name for name, own in whole if not beaten(own))
