"""Which runs are the best by a metric: the one with the best figure, and all that cannot be told from it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.layout import DETAILS
from calib.evaluation.titles import TITLES
from calib.runs.compare.columns import metric_of
from calib.runs.record import RunRecord

#: Settings on which measures of sets depend: biases go with the number of pictures.
OF_SETS = ("evaluation.num_images", "evaluation.reference")
#: A picture of an evaluation: its prompt, and how many of the same prompt come before.
Picture = tuple[str, int]
#: Values of a measure of pairs, by picture.
Values = Mapping[Picture, float]


class Ranking:
    """The best of some runs, by one metric after the other; what their evaluations store by prompt is read once."""

    def __init__(self, runs: Sequence[RunRecord]):
        self._runs = runs
        self._stored: dict[Path, Mapping[str, Values]] = {}

    def best(self, key: str) -> frozenset[str]:
        """Names of the best by the metric ``key``, with all that cannot be told from it; none where these are all.

        What is counted, as sizes are, is what it is. Values of pairs are told apart where the 95% interval of the
        difference, paired by prompt, leaves out 0; those of sets, or without values by prompt, where intervals are
        apart.
        """
        values = {run.name: run.metrics[key] for run in self._runs if key in run.metrics}
        if len(set(values.values())) < 2:
            return frozenset()
        metric = metric_of(key)
        best = max(values.values()) if metric.better == "higher" else min(values.values())
        if metric.counted:
            return frozenset(name for name, value in values.items() if value == best)
        first = next(run for run in self._runs if values.get(run.name) == best)
        worse = self._worse(first, [run for run in self._runs if run.name in values and run is not first], key)
        return frozenset(values) - worse if worse else frozenset()

    def _worse(self, first: RunRecord, others: Sequence[RunRecord], key: str) -> set[str]:
        """Names of those that ``first``, the best by its figure, is better than."""
        from calib.evaluation.metrics import FEW_PROMPTS, bootstrap_columns  # NumPy, which the rest does without

        import numpy as np

        sign = 1 if metric_of(key).better == "higher" else -1
        own, worse = self._values(first, key), set[str]()
        paired: dict[tuple[Picture, ...], dict[str, list[float]]] = {}
        for run in others:
            its = self._values(run, key)
            common = tuple(picture for picture in own if picture in its)
            if len(common) >= FEW_PROMPTS:
                paired.setdefault(common, {})[run.name] = [sign * (own[place] - its[place]) for place in common]
            elif not any(0 < len(values) < FEW_PROMPTS for values in (own, its)) and _are_apart(first, run, key):
                worse.add(run.name)
        for ahead in paired.values():
            intervals = bootstrap_columns(np.array(list(ahead.values())).T)
            worse |= {name for name, interval in zip(ahead, intervals, strict=True) if interval.low > 0}
        return worse

    def _values(self, run: RunRecord, key: str) -> Values:
        """What the run's evaluation has of each picture, for ``psnr/Animals`` of those in the category."""
        if (title := TITLES.get(key.partition("/")[0])) is None or title.of_sets:
            return {}
        if run.path not in self._stored:
            self._stored[run.path] = _stored(run.path)
        return self._stored[run.path].get(key, {})


def _stored(path: Path) -> Mapping[str, Values]:
    """Values by key and picture of the evaluation in ``path``; none where there is none, or it is damaged."""
    from calib.evaluation.metrics import Fidelity

    try:
        document = read_json(path / DETAILS)
        found = {name: own.tolist() for name, own in Fidelity.from_json(document["quantized"]).values().items()}
        prompts = list(map(str, document["prompts"]))
        categories = list(map(str, document.get("categories", {}).get("names", ())))
    except (CalibError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    before, pictures = Counter[str](), []
    for prompt in prompts:
        pictures.append((prompt, before[prompt]))
        before[prompt] += 1
    by_key: dict[str, dict[Picture, float]] = {}
    for measure, values in found.items():
        by_key[measure] = dict(zip(pictures, values, strict=False))
        for picture, value, category in zip(pictures, values, categories, strict=False):
            by_key.setdefault(f"{measure}/{category}", {})[picture] = value
    return by_key


def _are_apart(first: RunRecord, other: RunRecord, key: str) -> bool:
    """Whether the intervals of both are known and have nothing in common; never of different sets of pictures."""
    measure, slash, category = key.partition("/")
    of_sets = measure in TITLES and TITLES[measure].of_sets
    if of_sets and any(first.config.get(setting) != other.config.get(setting) for setting in OF_SETS):
        return False
    low, high = (f"{measure}_{end}{slash}{category}" for end in ("low", "high"))
    if not all(end in run.metrics for end in (low, high) for run in (first, other)):
        return False
    return first.metrics[low] > other.metrics[high] or first.metrics[high] < other.metrics[low]
