"""The exact solver behind budgets, against all choices tried and against dynamic programming."""

import ctypes
import itertools
import math
import os
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from calib.analysis import knapsack
from calib.base.errors import CalibError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from plans import (
    SHAPES,
    realistic,
)
from scipy import optimize


def by_trying(cost: Sequence[Sequence[int]], nbytes: Sequence[Sequence[int]], budget: int) -> int:
    """The least total cost of all choices that fit."""
    return min(
        sum(own[i] for own, i in zip(cost, choice, strict=True))
        for choice in itertools.product(*(range(len(own)) for own in cost))
        if sum(own[i] for own, i in zip(nbytes, choice, strict=True)) <= budget
    )


def check_solved(cost: Sequence[Sequence[int]], nbytes: Sequence[Sequence[int]], budget: int, scale: float) -> None:
    """``cost`` in whole numbers, so that what is best is beyond doubt; the solver sees them times ``scale``."""
    choice = knapsack.solve(
        [np.array(own, dtype=np.float64) * scale for own in cost], [np.array(own) for own in nbytes], budget
    )
    assert sum(own[i] for own, i in zip(nbytes, choice, strict=True)) <= budget
    assert sum(own[i] for own, i in zip(cost, choice, strict=True)) == by_trying(cost, nbytes, budget)


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], int, float]:
    largest_cost, largest_size = draw(st.sampled_from([(5, 5), (10**9, 9), (100, 10**9), (10**6, 10**4)]))
    unit = draw(st.sampled_from([1, 4, 3072]))
    cost, nbytes = [], []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 6))
        cost.append(draw(st.lists(st.integers(0, largest_cost), min_size=count, max_size=count)))
        sizes = draw(st.lists(st.integers(0, largest_size), min_size=count, max_size=count))
        nbytes.append([unit * size for size in sizes])
    least, most = sum(map(min, nbytes)), sum(map(max, nbytes))
    return cost, nbytes, draw(st.integers(least, most + 1)), draw(st.sampled_from([1.0, 1e-8, 1e-16, 1e-30]))


@settings(max_examples=400)
@given(instance=instances())
def test_all_choices_tried(
    instance: tuple[list[list[int]], list[list[int]], int, float],
) -> None:
    check_solved(*instance)


@pytest.mark.parametrize("tens", [6, 9, 11])
@pytest.mark.parametrize("in_line", [True, False])
def test_near_ties_are_told_apart(in_line: bool, tens: int) -> None:
    """Many choices cost the same to 6, 9 or 11 digits; the digits behind them decide."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        unit = [1, 7, 10**6][seed % 3]
        steps = rng.integers(1, 5, (int(rng.integers(3, 7)), 4))
        coarse = 5 - steps if in_line else rng.integers(0, 4, steps.shape)
        cost = (coarse * 10**tens + rng.integers(0, 10, steps.shape)).tolist()
        nbytes = (steps * unit).tolist()
        budget = int(rng.integers(sum(map(min, nbytes)), sum(map(max, nbytes)) + 1))
        check_solved(cost, nbytes, budget, 1e-20)


def test_an_unavoidable_cost_hides_no_tiny_one() -> None:
    rng = np.random.default_rng(1)
    cost = [[10**20], *rng.integers(1, 1000, (5, 4)).tolist()]
    nbytes = [[8], *rng.integers(1, 9, (5, 4)).tolist()]
    for budget in range(sum(map(min, nbytes)), sum(map(max, nbytes)) + 1):
        check_solved(cost, nbytes, budget, 1e-20)


def test_dominated_options_are_dropped() -> None:
    cost, nbytes = np.array([4.0, 9.0, 4.0, 3.0, 3.5, 1.0]), np.array([2, 2, 3, 5, 6, 7])
    assert list(knapsack._undominated(cost, nbytes)) == [0, 3, 5]


def test_a_byte_decides() -> None:
    cost, nbytes = [np.array([3.0, 1.0])] * 2, [np.array([10**9, 10**9 + 1])] * 2
    assert knapsack.solve(cost, nbytes, 2 * 10**9 + 2) == [1, 1]
    assert sorted(knapsack.solve(cost, nbytes, 2 * 10**9 + 1)) == [0, 1]
    assert knapsack.solve(cost, nbytes, 2 * 10**9) == [0, 0]
    with pytest.raises(CalibError, match="1999999999 bytes: the smallest one takes 2000000000"):
        knapsack.solve(cost, nbytes, 2 * 10**9 - 1)


def by_dynamic_programming(cost: list[NDArray[np.float64]], units: list[NDArray[np.int64]], budget: int) -> float:
    """The least cost for every number of units, a layer more at a time."""
    least = np.zeros(budget + 1)
    for own_cost, own_units in zip(cost, units, strict=True):
        layer = np.full(budget + 1, np.inf)
        for c, u in zip(own_cost, own_units, strict=True):
            layer[u:] = np.minimum(layer[u:], c + least[: budget + 1 - u])
        least = layer
    return float(least[budget])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_dynamic_programming(noise: float, seed: int) -> None:
    shapes = [(256, 256)] * 20 + [(1024, 256), (256, 1280)] * 5
    cost, nbytes = realistic(shapes, seed, noise)
    unit = 256 * 256 // 32
    for bits in (2.7, 4.5, 6.0):
        budget = math.floor(bits * sum(map(math.prod, shapes)) / 8)
        choice = knapsack.solve(cost, nbytes, budget)
        assert sum(int(own[i]) for own, i in zip(nbytes, choice, strict=True)) <= budget
        found = math.fsum(own[i] for own, i in zip(cost, choice, strict=True))
        expected = by_dynamic_programming(cost, [own // unit for own in nbytes], budget // unit)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_large_model_takes_seconds(noise: float) -> None:
    """340 layers of 18 options: SD3-medium. The linear relaxation, which bounds the optimum, is nearly met."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(337)] + [(1536, 256), (1536, 4096), (64, 1536)]
    cost, nbytes = realistic(shapes, seed=1, noise=noise)
    budget = math.floor(4.5 * sum(map(math.prod, shapes)) / 8)
    start = time.monotonic()
    choice = knapsack.solve(cost, nbytes, budget)
    assert time.monotonic() - start < 60
    assert sum(int(own[i]) for own, i in zip(nbytes, choice, strict=True)) <= budget
    one_each = np.kron(np.eye(len(shapes)), np.ones(18))
    scaled = np.concatenate(cost) / np.concatenate(cost).mean()
    sizes = np.concatenate(nbytes) / budget
    bound = optimize.linprog(scaled, sizes[None], [1.0], one_each, np.ones(len(shapes)), bounds=(0, 1))
    found = math.fsum(scaled[18 * layer + option] for layer, option in enumerate(choice))
    assert bound.fun * (1 - 1e-7) <= found <= bound.fun * 1.001


def contested() -> tuple[list[NDArray[np.float64]], list[NDArray[np.int64]], int]:
    """What the bound does not decide: 71 options are left."""
    shapes = [(256, 256)] * 20 + [(1024, 256), (256, 1280)] * 5
    return *realistic(shapes, seed=0, noise=0.3), math.floor(2.7 * sum(map(math.prod, shapes)) / 8)


def test_the_contested_instance_needs_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    solver = optimize.milp
    monkeypatch.setattr(optimize, "milp", lambda *a, **k: calls.append(a[0]) or solver(*a, **k))
    knapsack.solve(*contested())
    (costs,) = calls
    assert len(costs) > 50


def test_an_unproven_optimum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(status=1, message="Time limit reached.", x=None)
    monkeypatch.setattr(optimize, "milp", lambda *_, **__: failed)
    with pytest.raises(CalibError, match=r"no optimum \(Time limit reached\.\)"):
        knapsack.solve(*contested())


@pytest.mark.parametrize("lowest", [True, False])
def test_what_highs_returns_is_checked(monkeypatch: pytest.MonkeyPatch, lowest: bool) -> None:
    """A choice over the budget, and one worse than the greedy one, whatever HiGHS calls them."""

    def wrong(costs: Any, constraints: Any, **_: Any) -> SimpleNamespace:
        lines, sizes = constraints[0].A.toarray()[:, :-1], constraints[1].A[0][:-1]
        x = np.zeros(len(costs))
        for line in lines:
            own = np.flatnonzero(line)
            x[own[sizes[own].argmin() if lowest else sizes[own].argmax()]] = 1
        return SimpleNamespace(status=0, message="Optimal", x=x)

    monkeypatch.setattr(optimize, "milp", wrong)
    with pytest.raises(CalibError, match="does not fit or is worse"):
        knapsack.solve(*contested())


def test_what_highs_prints_is_not_seen(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor is what C code left in its buffer before lost."""
    libc, solver = ctypes.CDLL(None), optimize.milp
    libc.fflush(None)
    capfd.readouterr()

    def talkative(*arguments: Any, **options: Any) -> Any:
        libc.puts(b"from a buffer")
        os.write(1, b"at once")
        return solver(*arguments, **options)

    monkeypatch.setattr(optimize, "milp", talkative)
    libc.puts(b"before")
    knapsack.solve(*contested())
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
