"""What pages say of runs: names in short, layers worth a histogram, which runs are shown."""

from pathlib import Path

from calib.dataset.sampling import State
from calib.runs.compare.comparison import compare
from calib.runs.pages.comparison import MOST_RUNS, _chosen, _spread
from calib.runs.pages.layers import CHOSEN, Ranges, chosen_layers
from calib.runs.pages.parts import labels
from calib.runs.record import RunRecord

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["analysis=range,seed=1-0123abcd", "analysis=sqnr,seed=1-4567cdef"], ["range", "sqnr"]),
        (["a.x=1,b=two", "a.x=1,b=true", "a.x=2,b=true"], ["x 1 · two", "x 1 · b true", "x 2 · b true"]),
        (["s/a=1-00000000", "t/b=1-00000000"], ["s/a=1", "t/b=1"]),
        (["a=1-00000000", "a=1-11111111"], ["a=1-00000000", "a=1-11111111"]),
        (["one-00000000", "one-11111111", "two-22222222"], ["one-00000000", "one-11111111", "two"]),
        (["a=1-00000000"], ["a=1"]),
        ([], []),
    ],
)
def test_names_are_shortened_to_what_differs(names: list[str], short: list[str]) -> None:
    assert labels(names) == short


NAMES = st.lists(st.text("ab=,-01", min_size=1, max_size=14), unique=True, max_size=6)


@given(names=NAMES)
def test_short_names_still_tell_runs_apart(names: list[str]) -> None:
    found = labels(names)
    assert len(found) == len(names) == len(set(found)) and all(found)


@given(count=st.integers(0, 40), most=st.integers(0, 10))
def test_a_spread_keeps_the_ends_and_the_order(count: int, most: int) -> None:
    names = [f"{i:02}" for i in range(count)]
    found = _spread(names, most)
    assert len(found) == min(count, most) == len(set(found)) and found == sorted(found)
    if most > 1 and count:
        assert found[0] == names[0] and found[-1] == names[-1]


def test_of_many_runs_the_best_is_shown_too() -> None:
    runs = [
        RunRecord(
            Path(str(i)),
            str(i),
            State.COMPLETE,
            metrics={"quantized_bytes": 1e6 * i, "output_error": 1 / i if i % 2 else 2.0},
        )
        for i in range(1, 30)
    ]
    chosen = _chosen(compare(runs), runs)
    assert len(chosen) == MOST_RUNS and {"1", "29"} <= chosen and all(int(name) % 2 for name in chosen)


def ranges(count: int) -> Ranges:
    widths = np.random.default_rng(0).uniform(1, 9, (count, 3))
    return Ranges([f"layer{i}" for i in range(count)], [0, 1, 2], widths, {})


def test_only_sensitive_layers_are_called_so() -> None:
    seen = ranges(20)
    assert "sensitive" not in [why for _, why in chosen_layers(seen, {f"layer{i}": {} for i in range(20)})]
    plan = {f"layer{i}": {"sensitive": i == 7} for i in range(20)}
    chosen = chosen_layers(seen, plan)
    assert [layer for layer, why in chosen if why == "sensitive"] == ["layer7"]
    assert len(chosen) == len({layer for layer, _ in chosen}) == CHOSEN
