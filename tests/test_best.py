"""The best of a column: marked with all that cannot be told from it, and not at all where that is every run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calib.base.layout import DETAILS
from calib.evaluation.metrics import bootstrap_difference
from calib.runs.compare.comparison import compare
from calib.runs.compare.tables import json_text, markdown_text, terminal_table
from calib.runs.pages.comparison import comparison_page
from calib.runs.record import RunRecord
from calib.runs.standing import RunState

import numpy as np
import pytest

PROMPTS = 24
#: What is hard and easy in every run, far more than runs differ by.
HARD = 30 + 4 * np.random.RandomState(0).randn(PROMPTS)


@dataclass(frozen=True)
class Run:
    """What a run has of a measure: values by prompt, perhaps lost since; the interval of their mean."""

    values: Sequence[float]
    first: int = 0
    lost: bool = False
    ends: tuple[float, float] | None = None


def shifted(by: float, count: int = PROMPTS, seed: int = 0) -> Run:
    """Values of hard and easy prompts, shifted, with a little noise of the run's own."""
    return Run((HARD[:count] + by + 0.1 * np.random.RandomState(seed).randn(count)).tolist())


def figures(mean: float, *ends: float) -> Run:
    """A run of which the figures alone are left."""
    return Run([mean], lost=True, ends=(ends[0], ends[1]) if ends else None)


def written(folder: Path, name: str, run: Run, key: str, sign: int) -> RunRecord:
    """A run directory with that of ``run`` which the best is told by."""
    measure, slash, category = key.partition("/")
    values = [sign * value for value in run.values]
    ends = {} if run.ends is None else dict(zip(("low", "high"), sorted(sign * end for end in run.ends), strict=True))
    metrics = {key: float(np.mean(values)), "quantized_bytes": 5e6, "evaluate_seconds": float(len(name))}
    metrics |= {f"{measure}_{end}{slash}{category}": value for end, value in ends.items()}
    if not run.lost:
        flat, more = [0.5] * len(values), {}
        if slash:  # another category has the opposite order, and is as many
            values, flat, more = [*values, *(-own for own in values)], 2 * flat, {"categories": {"names": []}}
            more["categories"]["names"] = [category] * len(run.values) + ["other"] * len(run.values)
        own = {"psnr": flat, "ssim": flat, "steps": [0], "error": [[0.1]] * len(flat), "further": {measure: values}}
        prompts = [f"prompt {run.first + number}" for number in range(len(values))]
        (folder / name).mkdir()
        (folder / name / DETAILS).write_text(json.dumps({"quantized": own, "prompts": prompts, **more}))
    return RunRecord(folder / name, name, RunState.COMPLETE, metrics=metrics)


#: Runs of a measure whose higher values are better, and those that are marked.
CASES: Mapping[str, tuple[Mapping[str, Run], set[str]]] = {
    "far apart": ({"a": shifted(0), "b": shifted(9, seed=1)}, {"b"}),
    "apart in pairs alone": ({"a": shifted(0), "b": shifted(0.3, seed=1), "c": shifted(0.3, seed=2)}, {"b", "c"}),
    "not apart": ({"a": shifted(0), "b": shifted(0.01, seed=1)}, set()),
    "equal": ({"a": shifted(0), "b": shifted(0)}, set()),
    "equal, and a worse one": ({"a": shifted(0), "b": shifted(0), "c": shifted(-1, seed=1)}, {"a", "b"}),
    "too few prompts": ({"a": shifted(0, 7), "b": shifted(9, 7, seed=1)}, set()),
    "enough prompts": ({"a": shifted(0, 8), "b": shifted(9, 8, seed=1)}, {"b"}),
    "enough in common": ({"a": shifted(0, 12), "b": shifted(9, seed=1)}, {"b"}),
    "better by easier prompts alone": ({"a": shifted(0, 12), "b": shifted(0.3, seed=1)}, set()),
    "other prompts": (
        {"a": replace(shifted(0), ends=(28.0, 32.0)), "b": replace(shifted(9), first=900, ends=(37.0, 41.0))},
        {"b"},
    ),
    "other prompts, intervals that meet": (
        {"a": replace(shifted(0), ends=(28.0, 32.0)), "b": replace(shifted(1), first=900, ends=(29.0, 33.0))},
        set(),
    ),
    "lost values": ({"a": figures(30, 29, 31), "b": figures(40, 39, 41), "c": figures(40.5, 40, 42)}, {"b", "c"}),
    "values of one": ({"a": figures(30, 29, 31), "b": replace(shifted(9), ends=(37.0, 41.0))}, {"b"}),
    "few values of one": ({"a": figures(30, 29, 31), "b": replace(shifted(9, 7), ends=(37.0, 41.0))}, set()),
    "intervals that meet": ({"a": figures(30, 20, 41), "b": figures(42, 40, 44)}, set()),
    "no intervals": ({"a": figures(30), "b": figures(40)}, set()),
    "one alone": ({"a": shifted(0)}, set()),
}
KEYS = {"clip_similarity": 1, "lpips_effnet": -1, "lpips_effnet/Animals": -1}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("case", CASES)
def test_marked_are_the_best_and_what_cannot_be_told_from_it(tmp_path: Path, case: str, key: str) -> None:
    runs, expected = CASES[case]
    found = compare([written(tmp_path, name, run, key, KEYS[key]) for name, run in runs.items()], every=True)
    assert found.best[key] == expected
    differ = len({tuple(run.values) for run in runs.values()}) > 1
    assert (len(found.undecided) == 1) == (differ and not expected and "/" not in key)


@pytest.mark.parametrize("seed", range(5))
def test_they_are_those_that_the_paired_bootstrap_says(tmp_path: Path, seed: int) -> None:
    rng = np.random.RandomState(seed)
    runs = {name: shifted(0.06 * rng.randn(), seed=int(rng.randint(1000))) for name in "abcdef"}
    values = {name: np.array(run.values) for name, run in runs.items()}
    first = max(values, key=lambda name: values[name].mean())
    expected = {name for name in values if bootstrap_difference(values[first], values[name]).low <= 0}
    found = compare([written(tmp_path, name, run, "clip_score", 1) for name, run in runs.items()])
    assert found.best["clip_score"] == (expected if len(expected) < len(runs) else set()) and first in expected


#: Measures of sets, and what is counted or timed: ends of two intervals, and which are marked.
OTHERS: Mapping[str, tuple[str, Sequence[Run], list[bool]]] = {
    "sets apart": ("kid_effnet", [figures(0.3, 0.2, 0.4), figures(1, 0.9, 1.1)], [True, False]),
    "sets that meet": ("kid_effnet", [figures(0.3, 0.2, 0.4), figures(1, -9, 11)], [False, False]),
    "shares": ("recall", [figures(0.3, 0.2, 0.4), figures(0.9, 0.8, 1)], [False, True]),
    "bits": ("average_weight_bits", [figures(4.5), figures(4.51)], [True, False]),
    "equal bits": ("average_weight_bits", [figures(4.5), figures(4.5)], [False, False]),
    "seconds": ("quantize_seconds", [figures(1), figures(100)], [False, False]),
    "memory": ("quantize_peak_bytes", [figures(1), figures(100)], [False, False]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_of_sets_intervals_decide_and_what_is_counted_is_as_it_is(tmp_path: Path, case: str) -> None:
    key, own, expected = OTHERS[case]
    runs = [written(tmp_path, name, run, key, 1) for name, run in zip("ab", own, strict=True)]
    best = compare(runs, every=True).best[key]
    assert [run.name in best for run in runs] == expected


#: Sound values, and categories that are none.
DAMAGED = json.dumps(
    {
        "quantized": {"psnr": [1], "ssim": [1], "steps": [0], "error": [[0.1]], "further": {"clip_score": [1]}},
        "prompts": ["a"],
        "categories": {"names": 3},
    }
)


@pytest.mark.parametrize("harm", ["", "[]", "{", '{"quantized": {}}', DAMAGED, '{"quantized": 3, "prompts": 3}'])
def test_damaged_values_by_prompt_are_as_lost_ones(tmp_path: Path, harm: str) -> None:
    runs = [
        written(tmp_path, name, replace(shifted(9 * (name == "b")), ends=(0.0, 50.0)), "clip_score", 1) for name in "ab"
    ]
    assert compare(runs).best["clip_score"] == {"b"}
    (tmp_path / "a" / DETAILS).write_text(harm)
    assert compare(runs).best["clip_score"] == set()


def test_every_form_says_what_the_mark_means(tmp_path: Path) -> None:
    own = {"a": shifted(0), "b": shifted(0.3, seed=1), "c": shifted(0.3, seed=2)}
    runs = [written(tmp_path, name, run, "clip_score", 1) for name, run in own.items()]
    runs = [replace(run, metrics={**run.metrics, "ssim": 0.9 + 0.01 * number}) for number, run in enumerate(runs)]
    found = compare(runs)
    marked = "best of its column, or not to be told from it (measures by 95% intervals, paired by prompt where"
    unsaid = "no mark, as no run can be told from the best: SSIM"
    lines = terminal_table(found, 200).splitlines()
    assert [line.count("*") for line in lines[1:4]] == [0, 1, 1]
    for text in ("\n".join(lines), markdown_text(found), comparison_page(found, tmp_path)):
        assert f"* {marked}" in text.replace("\\", "") and unsaid in text
    assert json.loads(json_text(found))["best"]["clip_score"] == ["b", "c"]
