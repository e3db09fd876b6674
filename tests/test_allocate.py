"""Plans from measured sensitivities: the best within a budget, against every choice tried; the fewest bits that do."""

import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from calib.analysis import allocate, knapsack, sensitivity
from calib.analysis.allocate import plan_layers
from calib.analysis.layers import LayerSummary
from calib.analysis.options import Options
from calib.analysis.plan import GROUP_SIZES, WEIGHT_BITS, Plan
from calib.analysis.sensitivity import Sensitivities
from calib.errors import CalibError, ConfigError
from calib.typed import bind

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import OmegaConf
from scipy.optimize import linprog

SUMMARY = LayerSummary(-1.0, 1.0, 0.0, 0.5, {"p01": -0.9, "p99": 0.9}, 100)
CONF = Path(__file__).parents[1] / "conf" / "analysis"

Found = Mapping[str, Mapping[tuple[int, int], float | Sequence[float]]]


def measured(
    weights: Found,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    steps: tuple[int, ...] = (0,),
    num_steps: int = 10,
    activations: Mapping[str, Mapping[int, float]] | None = None,
) -> Sensitivities:
    """Sensitivities with the same S at every step where one number is given; layers of 64 × 128 unless told."""

    def at_steps(s: float | Sequence[float]) -> NDArray[np.float64]:
        return np.broadcast_to(np.array(s, dtype=np.float64), (len(steps),)).copy()

    return Sensitivities(
        steps,
        num_steps,
        {name: {option: at_steps(s) for option, s in own.items()} for name, own in weights.items()},
        {name: {bits: at_steps(s) for bits, s in own.items()} for name, own in (activations or {}).items()},
        dict(shapes) if shapes is not None else dict.fromkeys(weights, (64, 128)),
    )


def layers_of(found: Sensitivities, *more: str) -> dict[str, LayerSummary]:
    return dict.fromkeys([*found.shapes, *more], SUMMARY)


def typical(names: Sequence[str] = ("a", "b", "c"), seed: int = 0) -> dict[str, dict[tuple[int, int], float]]:
    """S that falls by 4 a bit, and differs between layers."""
    rng = np.random.default_rng(seed)
    fragility = dict(zip(names, np.exp(rng.normal(-8, 2, len(names))), strict=True))
    return {
        name: {
            (bits, size): float(fragility[name] * 4.0 ** (2 - bits) * size**0.3 * np.exp(rng.normal(0, 0.1)))
            for bits, size in itertools.product(WEIGHT_BITS, GROUP_SIZES)
        }
        for name in names
    }


def bytes_of(shape: tuple[int, int], bits: int, group_size: int) -> int:
    """Integers in a row's bits, and for every group a scale and a bias of two bytes."""
    rows, columns = shape
    return rows * (columns * bits) // 8 + 2 * 2 * rows * columns // group_size


def taken(plan: Plan, found: Sensitivities) -> int:
    return sum(
        bytes_of(shape, plan.layers[name].weight_bits, plan.layers[name].group_size)
        for name, shape in found.shapes.items()
    )


def error_of(plan: Plan, found: Sensitivities) -> float:
    chosen = {name: (plan.layers[name].weight_bits, plan.layers[name].group_size) for name in found.shapes}
    return math.fsum(found.weights[name][option].mean() for name, option in chosen.items())


# The solver


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
def test_the_solver_finds_what_trying_all_choices_finds(
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


def test_a_cost_that_cannot_be_avoided_hides_no_tiny_one() -> None:
    rng = np.random.default_rng(1)
    cost = [[10**20], *rng.integers(1, 1000, (5, 4)).tolist()]
    nbytes = [[8], *rng.integers(1, 9, (5, 4)).tolist()]
    for budget in range(sum(map(min, nbytes)), sum(map(max, nbytes)) + 1):
        check_solved(cost, nbytes, budget, 1e-20)


def test_options_that_take_more_and_cost_no_less_are_dropped() -> None:
    cost, nbytes = np.array([4.0, 9.0, 4.0, 3.0, 3.5, 1.0]), np.array([2, 2, 3, 5, 6, 7])
    assert list(knapsack._undominated(cost, nbytes)) == [0, 3, 5]


def test_a_byte_decides() -> None:
    cost, nbytes = [np.array([3.0, 1.0])] * 2, [np.array([10**9, 10**9 + 1])] * 2
    assert knapsack.solve(cost, nbytes, 2 * 10**9 + 2) == [1, 1]
    assert sorted(knapsack.solve(cost, nbytes, 2 * 10**9 + 1)) == [0, 1]
    assert knapsack.solve(cost, nbytes, 2 * 10**9) == [0, 0]
    with pytest.raises(CalibError, match="1999999999 bytes: the smallest one takes 2000000000"):
        knapsack.solve(cost, nbytes, 2 * 10**9 - 1)


SHAPES = [(1536, 1536)] * 4 + [(6144, 1536), (1536, 6144), (9216, 1536)]


def realistic(
    shapes: Sequence[tuple[int, int]], seed: int, noise: float
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.int64]]]:
    """All 18 options of layers whose fragility spreads over orders of magnitude."""
    rng = np.random.default_rng(seed)
    options = list(itertools.product(WEIGHT_BITS, GROUP_SIZES))
    cost = [
        np.exp(rng.normal(-12, 2))
        * np.array([4.0 ** (2 - bits) * (size / 64) ** 0.4 * np.exp(rng.normal(0, noise)) for bits, size in options])
        for _ in shapes
    ]
    return cost, [np.array([bytes_of(shape, *option) for option in options]) for shape in shapes]


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
def test_the_solver_agrees_with_dynamic_programming(noise: float, seed: int) -> None:
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
    bound = linprog(scaled, sizes[None], [1.0], one_each, np.ones(len(shapes)), bounds=(0, 1))
    found = math.fsum(scaled[18 * layer + option] for layer, option in enumerate(choice))
    assert bound.fun * (1 - 1e-7) <= found <= bound.fun * 1.001


def contested() -> tuple[list[NDArray[np.float64]], list[NDArray[np.int64]], int]:
    """What the bound does not decide: 71 options are left."""
    shapes = [(256, 256)] * 20 + [(1024, 256), (256, 1280)] * 5
    return *realistic(shapes, seed=0, noise=0.3), math.floor(2.7 * sum(map(math.prod, shapes)) / 8)


def test_the_contested_instance_needs_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    solver = knapsack.milp
    monkeypatch.setattr(knapsack, "milp", lambda *a, **k: calls.append(a[0]) or solver(*a, **k))
    knapsack.solve(*contested())
    (costs,) = calls
    assert len(costs) > 50


def test_an_optimum_that_is_not_proven_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(status=1, message="Time limit reached.", x=None)
    monkeypatch.setattr(knapsack, "milp", lambda *_, **__: failed)
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

    monkeypatch.setattr(knapsack, "milp", wrong)
    with pytest.raises(CalibError, match="does not fit or is worse"):
        knapsack.solve(*contested())


TALKATIVE = """
import ctypes, os, sys
sys.path.insert(0, "tests")
from calib.analysis import knapsack
from test_allocate import contested
libc, solver = ctypes.CDLL(None), knapsack.milp
def talkative(*arguments, **options):
    libc.puts(b"from a buffer")
    os.write(1, b"at once")
    return solver(*arguments, **options)
knapsack.milp = talkative
libc.puts(b"before")
knapsack.solve(*contested())
libc.puts(b"after")
"""


def test_what_highs_prints_is_not_seen() -> None:
    """Nor is what C code left in its buffer before lost."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", TALKATIVE], cwd=root, env=buffered, capture_output=True, text=True, check=True
    )
    assert done.stdout == "before\nafter\n"


# Allocation


def best_by_trying(found: Sensitivities, budget: Fraction) -> float:
    """The least Σ S of all choices within ``budget`` bytes."""
    options = [
        [
            (float(s.mean()), bytes_of(found.shapes[name], *option))
            for option, s in own.items()
            if found.shapes[name][1] % option[1] == 0
        ]
        for name, own in found.weights.items()
    ]
    fitting = (choice for choice in itertools.product(*options) if sum(size for _, size in choice) <= budget)
    return min(math.fsum(s for s, _ in choice) for choice in fitting)


@st.composite
def small_models(draw: st.DrawFn) -> Sensitivities:
    """Up to four layers, each measured at a few of its options; S need not fall with bits."""
    weights, shapes = {}, {}
    steps = draw(st.sampled_from([(0,), (0, 3, 9)]))
    every_option = list(itertools.product(WEIGHT_BITS, GROUP_SIZES))
    for name in "abcd"[: draw(st.integers(1, 4))]:
        shapes[name] = draw(st.tuples(st.sampled_from([1, 8, 24]), st.sampled_from([96, 128, 192, 384])))
        options = draw(st.lists(st.sampled_from(every_option), min_size=1, max_size=5, unique=True))
        options = [*options, (draw(st.sampled_from(WEIGHT_BITS)), 32)]  # which divides every width here
        s = st.floats(0, 1, allow_subnormal=False).map(lambda x: x * 1e-7)
        weights[name] = {o: draw(st.lists(s, min_size=len(steps), max_size=len(steps))) for o in options}
    return measured(weights, shapes, steps)


@settings(max_examples=150)
@given(found=small_models(), share=st.floats(0, 1), in_megabytes=st.booleans())
def test_no_other_plan_within_the_budget_is_better(found: Sensitivities, share: float, in_megabytes: bool) -> None:
    sizes = [
        [bytes_of(shape, *option) for option in found.weights[name] if shape[1] % option[1] == 0]
        for name, shape in found.shapes.items()
    ]
    budget = math.ceil(sum(map(min, sizes)) * (1 - share) + sum(map(max, sizes)) * share)
    weights = sum(map(math.prod, found.shapes.values()))
    # Rounded up, lest the smallest budget be missed by its last digit.
    value = math.ceil(budget * (1 if in_megabytes else 8e6 / weights)) / 1e6
    plan = plan_layers(layers_of(found), found, **{"megabytes" if in_megabytes else "average_bits": value})
    exact = Fraction(str(value)) * (10**6 if in_megabytes else Fraction(weights, 8))
    assert taken(plan, found) <= exact
    assert error_of(plan, found) == pytest.approx(best_by_trying(found, exact), rel=1e-9, abs=1e-22)
    for name, layer in plan.layers.items():
        assert found.shapes[name][1] % layer.group_size == 0


def test_uniform_four_bits_in_groups_of_64_are_four_and_a_half() -> None:
    shapes = {"a": (64, 128), "b": (8, 256), "c": (3, 64)}
    found = measured({name: {(4, 64): 1e-3, (8, 64): 1e-5} for name in shapes}, shapes)
    by_default, at_four_and_a_half = (plan_layers(layers_of(found), found, average_bits=b) for b in (None, 4.5))
    assert by_default == at_four_and_a_half
    assert {(layer.weight_bits, layer.group_size) for layer in by_default.layers.values()} == {(4, 64)}
    with pytest.raises(ConfigError, match=r"^analysis.average_bits=4.4999: must be 4.5 or more"):
        plan_layers(layers_of(found), found, average_bits=4.4999)


@pytest.mark.parametrize("unit", ["average_bits", "megabytes"])
@pytest.mark.parametrize("value", [1e-9, 0.0, -4.5, math.nan, math.inf])
def test_a_budget_that_cannot_be_names_the_smallest_that_can(unit: str, value: float) -> None:
    shapes = {"a": (7, 96), "b": (5, 128), "c": (1, 32)}
    found = measured({n: {(b, 32): 1e-3 / b for b in WEIGHT_BITS} | {(2, 128): 1.0} for n in shapes}, shapes)
    with pytest.raises(ConfigError, match=rf"^analysis.{unit}={re.escape(str(value))}: must be ") as caught:
        plan_layers(layers_of(found), found, **{unit: value})
    named = float(re.search(r"must be (\S+) or more", str(caught.value))[1])
    least = sum(bytes_of(shape, 2, 128 if shape[1] == 128 else 32) for shape in shapes.values())
    exact = least / (1e6 if unit == "megabytes" else sum(map(math.prod, shapes.values())) / 8)
    assert exact <= named < exact + 1e-4
    plan = plan_layers(layers_of(found), found, **{unit: named})
    assert taken(plan, found) >= least


def test_a_budget_is_the_number_that_is_written() -> None:
    """Ten layers at 4.3 bits: eight at 4 and two at 3 in groups of 64. The float 4.3 is a little less than 4.3."""
    found = measured({name: {(3, 64): 1.0, (4, 64): 0.5} for name in "abcdefghij"})
    plan = plan_layers(layers_of(found), found, average_bits=4.3)
    assert sorted(layer.weight_bits for layer in plan.layers.values()) == [3, 3, *[4] * 8]


def test_a_budget_beyond_all_options_gives_the_least_s_and_says_so() -> None:
    weights = typical()
    weights["b"][6, 32] = 0.0  # the best need not be the largest
    found = measured(weights)
    plan = plan_layers(layers_of(found), found, average_bits=20.0)
    for name, own in weights.items():
        chosen = (plan.layers[name].weight_bits, plan.layers[name].group_size)
        assert own[chosen] == min(own.values())
    assert "the budget of 20.000 bits is more than needed: every layer has its least S" in plan.notes
    assert not any("more than needed" in note for note in plan_layers(layers_of(found), found).notes)


def test_only_what_is_allowed_is_chosen() -> None:
    found = measured(typical())
    plan = plan_layers(layers_of(found), found, average_bits=5.0, weight_bits=[3, 6], group_sizes=[32])
    assert {layer.group_size for layer in plan.layers.values()} == {32}
    assert {layer.weight_bits for layer in plan.layers.values()} == {3, 6}


def test_what_mlx_cannot_quantize_is_kept_and_costs_nothing() -> None:
    found = measured(typical())
    layers = {"x_embedder": SUMMARY, **layers_of(found), "narrow": SUMMARY}
    plan = plan_layers(layers, found, activation_bits=6)
    assert list(plan.layers) == list(layers)
    for name in ("x_embedder", "narrow"):
        layer = plan.layers[name]
        assert (layer.weight_bits, layer.activation_bits, layer.reason) == (8, 6, "kept, MLX cannot quantize it")
        assert not layer.sensitive
    assert {layer.activation_bits for layer in plan.layers.values()} == {6}
    assert plan.notes[-1] == "weights are kept and not counted, as MLX cannot quantize them: 2 of 5 layers"
    alone = plan_layers(layers_of(found), found, activation_bits=6)
    assert alone.layers == {name: plan.layers[name] for name in "abc"}
    assert not any("kept" in note for note in alone.notes)


def test_fragile_layers_are_found_and_said() -> None:
    """One layer of eight does a thousand times what the others do; one is tiny and does less."""
    names = [f"block_{i}.fc1" for i in range(6)]
    weights = typical(["adaln", "tiny", *names])
    base = {option: 1e-4 * 4.0 ** (2 - option[0]) * (option[1] / 64) ** 0.3 for option in weights["adaln"]}
    weights = dict.fromkeys(names, base)
    weights |= {"adaln": {o: 1000 * s for o, s in base.items()}, "tiny": {o: s / 10 for o, s in base.items()}}
    shapes = dict.fromkeys(names, (512, 512)) | {"adaln": (512, 512), "tiny": (2, 128)}
    found = measured(weights, shapes)
    plan = plan_layers(layers_of(found), found, average_bits=4.01)  # a little is left that only the tiny one can use
    adaln, tiny = plan.layers["adaln"], plan.layers["tiny"]
    assert (adaln.weight_bits, adaln.sensitive, adaln.aggressive) == (8, True, False)
    assert re.fullmatch(r"fragile: 4\.\d bits more than the average", adaln.reason)
    assert tiny.sensitive
    assert re.fullmatch(r"small layer: [45]\.\d bits more than the average", tiny.reason)
    assert all(plan.layers[name].aggressive and not plan.layers[name].sensitive for name in names)
    chosen = weights["adaln"][8, adaln.group_size]
    assert adaln.figure == f"S = {chosen:.1e}"


@pytest.mark.parametrize(
    ("bits", "group_size", "average", "sensitive", "aggressive"),
    [
        (8, 64, 8.5, True, False),
        (6, 64, 5.0, True, False),
        (6, 64, 5.0001, False, False),
        (5, 64, 4.5, False, False),
        (4, 64, 4.5, False, True),
        (4, 32, 3.5, True, False),  # 1.5 bits above the average: nothing to be aggressive with
        (4, 32, 3.6, False, True),
        (2, 128, 4.5, False, True),
    ],
)
def test_sensitive_and_aggressive(
    bits: int, group_size: int, average: float, sensitive: bool, aggressive: bool
) -> None:
    plan = sensitivity.judged(sensitivity.LayerPlan(bits, 8, group_size=group_size), average)
    assert (plan.sensitive, plan.aggressive) == (sensitive, aggressive)


@pytest.mark.parametrize(
    ("above", "harmless", "words"),
    [
        (0.5, False, "fragile: 0.5 bits more than the average"),
        (0.5, True, "small layer: 0.5 bits more than the average"),
        (0.4, False, "near the average"),
        (-0.4, True, "near the average"),
        (-1.25, True, "robust: 1.2 bits fewer than the average"),
    ],
)
def test_reasons_are_words(above: float, harmless: bool, words: str) -> None:
    assert allocate._reason(above, harmless) == words


@pytest.mark.parametrize(("average", "cost"), [(9.0, 1.0), (8.9, 2.0), (4.0, 2.0), (3.9, 5.0), (1.0, 5.0)])
def test_what_a_layer_does_at_the_average(average: float, cost: float) -> None:
    """The least of what fits; of the smallest option where none does."""
    costs, nbytes = np.array([5.0, 2.0, 7.0, 1.0]), np.array([3, 4, 5, 9])
    own = Options(np.zeros((4, 1), np.int64), np.full(4, 64), costs, nbytes, weights=8)
    assert own.cost_at(average) == cost


# Notes


def test_notes_tell_what_was_reached_and_what_a_bit_costs() -> None:
    found = measured(typical(list("abcdef"), seed=5), dict(zip("abcdef", SHAPES, strict=False)))
    layers = layers_of(found)
    plan, more, less = (plan_layers(layers, found, average_bits=b) for b in (4.0, 5.0, 3.0))
    error, weights = error_of(plan, found), sum(map(math.prod, found.shapes.values()))
    reached = 8 * taken(plan, found) / weights
    size = f"{reached:.3f} bits a weight, scales and biases counted, {taken(plan, found) / 1e6:.2f} MB"
    uniform = math.fsum(float(own[4, 64][0]) for own in found.weights.values())
    assert plan.notes == (
        f"predicted error ΣS = {error:.3g} at {size}",
        f"one bit more on average (5.000): {_said(error_of(more, found), error)}",
        f"one bit less on average (3.000): {_said(error_of(less, found), error)}",
        "uniform 4 bits in groups of 64 take more than this budget",
    )
    assert 3.9 < reached <= 4
    at_default = plan_layers(layers, found)
    said = _said(uniform, error_of(at_default, found))
    assert at_default.notes[-1] == f"uniform 4 bits in groups of 64 (4.500 on average): {said}"
    assert uniform > error_of(at_default, found)
    too_few = "one bit less on average (2.000) does not fit: the fewest bits take 2.250"
    assert too_few in less.notes
    in_megabytes = plan_layers(layers, found, megabytes=weights / 2e6)
    assert in_megabytes.notes == plan.notes


def _said(error: float, best: float) -> str:
    return f"ΣS = {error:.3g}, {error / best:.3g} times as much"


def test_no_comparison_with_uniform_where_a_layer_cannot_have_it() -> None:
    weights = typical()
    for option in [o for o in weights["b"] if o[1] != 32]:
        del weights["b"][option]
    found = measured(weights, {"a": (8, 128), "b": (8, 96), "c": (8, 128)})
    assert not any("uniform" in note for note in plan_layers(layers_of(found), found).notes)


def test_an_error_of_nothing_is_compared_with_nothing() -> None:
    found = measured({"a": {(2, 64): 0.0, (4, 64): 0.0, (8, 64): 0.0}})
    plan = plan_layers(layers_of(found), found)
    assert plan.layers["a"].weight_bits == 2
    assert "uniform 4 bits in groups of 64 (4.500 on average): ΣS = 0" in plan.notes


# Phases: of 10 steps 0–2 are early, 3–6 mid and 7–9 late

MEASURED_AT = (0, 2, 4, 9)
PHASE_STEPS = {"early": ([0, 1], 0.3), "mid": ([2], 0.4), "late": ([3], 0.3)}


def phased_error(found: Sensitivities, name: str, group_size: int, bits: Mapping[str, int]) -> float:
    return sum(
        share * float(np.mean(found.weights[name][bits[phase], group_size][places]))
        for phase, (places, share) in PHASE_STEPS.items()
    )


def copies_bytes(shape: tuple[int, int], group_size: int, bits: Mapping[str, int]) -> int:
    return sum(bytes_of(shape, own, group_size) for own in set(bits.values()))


def best_by_phase(found: Sensitivities, budget: float) -> float:
    """Every group size of every layer with every bits of every phase."""
    options = []
    for name, own in found.weights.items():
        options.append([])
        for group_size in {size for _, size in own}:
            bits_there = [bits for bits, size in own if size == group_size]
            for given_bits in itertools.product(bits_there, repeat=3):
                bits = dict(zip(PHASE_STEPS, given_bits, strict=True))
                size = copies_bytes(found.shapes[name], group_size, bits)
                options[-1].append((phased_error(found, name, group_size, bits), size))
    fitting = (choice for choice in itertools.product(*options) if sum(size for _, size in choice) <= budget)
    return min(sum(s for s, _ in choice) for choice in fitting)


def check_phases(found: Sensitivities, average_bits: float) -> Plan:
    """The plan, compared with every other one."""
    plan = plan_layers(layers_of(found), found, average_bits=average_bits, per_phase=True)
    budget = average_bits * sum(map(math.prod, found.shapes.values())) / 8
    assert list(plan.phase_weight_bits) == ["early", "mid", "late"]
    error, nbytes = 0.0, 0
    for name, shape in found.shapes.items():
        bits = {phase: own[name] for phase, own in plan.phase_weight_bits.items()}
        layer = plan.layers[name]
        error += phased_error(found, name, layer.group_size, bits)
        nbytes += copies_bytes(shape, layer.group_size, bits)
        assert layer.weight_bits == max(bits.values())
        assert layer.figure == f"S = {phased_error(found, name, layer.group_size, bits):.1e}"
        several = f"early {bits['early']}, mid {bits['mid']}, late {bits['late']} bits"
        assert layer.reason.endswith(f"; {several}") == (len(set(bits.values())) > 1)
    assert nbytes <= budget
    assert error == pytest.approx(best_by_phase(found, budget), rel=1e-9)
    assert plan.notes[0].startswith(f"predicted error ΣS = {error:.3g} at ")
    return plan


@settings(max_examples=100)
@given(data=st.data())
def test_no_other_bits_by_phase_are_better(data: st.DataObject) -> None:
    s = st.lists(st.floats(1e-9, 1e-3), min_size=4, max_size=4)
    weights = {}
    for name in "ab"[: data.draw(st.integers(1, 2))]:
        options = [(2, 128), *data.draw(st.lists(st.sampled_from([(2, 32), (4, 32), (4, 128), (5, 128), (8, 128)])))]
        weights[name] = {option: data.draw(s) for option in options}
    check_phases(measured(weights, steps=MEASURED_AT), data.draw(st.floats(2.25, 20)))


def different_by_phase() -> Sensitivities:
    """Layer a is best at 3 bits early and at 4 late, as noise may have it; b is as layers are."""
    early, late = [1e-6, 1e-6, 1e-6, 1e-2], [1e-2, 1e-2, 1e-6, 1e-6]
    falling = {(bits, 64): [1e-4 * 4.0**-bits] * 4 for bits in WEIGHT_BITS}
    weights = {"a": {(3, 64): early, (4, 64): late, (2, 32): [1.0] * 4}, "b": falling}
    return measured(weights, steps=MEASURED_AT)


def test_copies_are_counted_and_what_they_gain_is_said() -> None:
    found = different_by_phase()
    plan = check_phases(found, average_bits=6.0)
    bits = {phase: own["a"] for phase, own in plan.phase_weight_bits.items()}
    assert (bits["early"], bits["late"]) == (3, 4)
    # 3 + 4 bits and two times scale and bias make 8; 4 are left for b: 3 and its scale and bias.
    assert {own["b"] for own in plan.phase_weight_bits.values()} == {3}
    one_copy = min(
        phased_error(found, "a", 64, dict.fromkeys(PHASE_STEPS, own))
        + phased_error(found, "b", 64, dict.fromkeys(PHASE_STEPS, other))
        for own, other in itertools.product((3, 4), WEIGHT_BITS)
        if own + other + 1 <= 12
    )
    reached = float(re.search(r"ΣS = (\S+)", plan.notes[0])[1])
    said = re.fullmatch(
        r"more than one copy of the weights: 1 of 2 layers; with one copy each in the same budget:"
        r" ΣS = (\S+), (\S+) times as much",
        plan.notes[-1],
    )
    assert float(said[1]) == pytest.approx(one_copy, rel=5e-3)
    assert float(said[2]) == pytest.approx(one_copy / reached, rel=1e-2)


def test_where_s_falls_with_bits_one_copy_is_best() -> None:
    """The copy of most bits in all phases takes less, and does no more."""
    rng = np.random.default_rng(2)
    weights = {
        name: {(bits, 64): list(4.0**-bits * np.exp(rng.normal(0, 3, 4))) for bits in WEIGHT_BITS} for name in "abc"
    }
    for own in weights.values():
        running = np.full(4, np.inf)
        for option in own:
            running = np.minimum(running, own[option])
            own[option] = list(running)
    found = measured(weights, steps=MEASURED_AT)
    plan = plan_layers(layers_of(found), found, average_bits=7.0, per_phase=True)
    assert plan.notes[-1].startswith("no layer holds more than one copy of its weights")
    early, mid, late = plan.phase_weight_bits.values()
    assert early == mid == late == {name: layer.weight_bits for name, layer in plan.layers.items()}


def test_kept_layers_have_no_bits_by_phase() -> None:
    found = different_by_phase()
    plan = plan_layers(layers_of(found, "conv"), found, per_phase=True)
    assert all(list(own) == ["a", "b"] for own in plan.phase_weight_bits.values())
    assert plan.layers["conv"].weight_bits == 8
    assert not plan_layers(layers_of(found), found).phase_weight_bits


@pytest.mark.parametrize(
    ("steps", "phase", "missing"),
    [((4, 9), "early", "0 to 2"), ((0, 9), "mid", "3 to 6"), ((0, 4, 10), "late", "7 to 9")],
)
def test_every_phase_must_be_measured(steps: tuple[int, ...], phase: str, missing: str) -> None:
    """State 10 is not: the model never sees it."""
    found = measured({"a": {(4, 64): 1e-3}}, steps=steps)
    with pytest.raises(CalibError, match=f"{phase} phase; measure at one or more of the steps {missing}"):
        plan_layers(layers_of(found), found, per_phase=True)
    assert plan_layers(layers_of(found), found).layers["a"].weight_bits == 4


def test_a_phase_that_a_short_trajectory_lacks_needs_no_measurement() -> None:
    """Of one step all is mid."""
    found = measured({"a": {(4, 64): 1e-3}}, num_steps=1)
    plan = plan_layers(layers_of(found), found, per_phase=True)
    assert plan.phase_weight_bits == {"mid": {"a": 4}}


# What both heuristics refuse

GOOD = {(4, 64): 1e-3}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"average_bits": 4.0, "megabytes": 2.0}, "analysis.average_bits=4.0 and analysis.megabytes=2.0: give one"),
        ({"activation_bits": 1}, "analysis.activation_bits=1: must be 2 to 16"),
        ({"activation_bits": 17}, "analysis.activation_bits=17: must be 2 to 16"),
        ({"weight_bits": [4, 7]}, r"analysis.weight_bits=\[4, 7\]: must be some of \[2, 3, 4, 5, 6, 8\]"),
        ({"weight_bits": []}, r"analysis.weight_bits=\[\]"),
        ({"group_sizes": [16]}, r"analysis.group_sizes=\[16\]: must be some of \[32, 64, 128\]"),
    ],
)
def test_impossible_parameters_are_refused_before_data_are_looked_at(parameters: dict[str, Any], words: str) -> None:
    nothing = measured({})
    with pytest.raises(ConfigError, match=f"^{words}"):
        plan_layers({}, nothing, **parameters)


def with_(**changes: Any) -> Sensitivities:
    fields = {name: getattr(measured({"a": GOOD}), name) for name in Sensitivities.__dataclass_fields__}
    return Sensitivities(**(fields | changes))


BAD_DATA = [
    (with_(weights={}), "layer 'a' of 128 columns has no sensitivity measured"),
    (with_(shapes={"a": (64, 96)}), "layer 'a' of 96 columns has no sensitivity measured"),
    (with_(weights={"a": {(4, 64): np.array([math.nan])}}), "weights of layer 'a' at 4 bits in groups of 64 must be 1"),
    (with_(weights={"a": {(4, 64): np.array([math.inf])}}), "weights of layer 'a' at 4 bits in groups of 64 must be 1"),
    (with_(weights={"a": {(4, 64): np.array([-1e-9])}}), "finite numbers, none negative"),
    (with_(weights={"a": {(4, 64): np.array([0.1, 0.2])}}), "weights of layer 'a' at 4 bits in groups of 64 must be 1"),
    (with_(activations={"a": {8: np.array([math.nan])}}), "input of layer 'a' at 8 bits must be 1 finite"),
    (with_(activations={"aa": {8: np.array([0.1])}}), "name layer 'aa', which the statistics do not have"),
    (with_(shapes={"a": (64, 128), "b": (8, 64)}), "name layer 'b', which the statistics do not have"),
    (with_(weights={"a": {(4, 64): np.array([0.1])}, "z": {}}), "name layer 'z', which the statistics do not have"),
    (with_(shapes={}), "MLX can quantize none of these layers"),
    (with_(steps=()), "measured at no step"),
]


@pytest.mark.parametrize(("found", "words"), BAD_DATA)
@pytest.mark.parametrize("heuristic", [allocate.plan_layers, sensitivity.plan_layers])
def test_garbled_sensitivities_end_with_one_line(
    heuristic: Callable[..., Plan], found: Sensitivities, words: str
) -> None:
    with pytest.raises(CalibError, match=re.escape(words)) as caught:
        heuristic({"a": SUMMARY}, found)
    assert len(str(caught.value).splitlines()) == 1


# Heuristic sensitivity


@settings(max_examples=150)
@given(found=small_models(), tolerance=st.floats(1e-9, 1e-7))
def test_sensitivity_takes_the_smallest_option_within_the_tolerance(found: Sensitivities, tolerance: float) -> None:
    plan = sensitivity.plan_layers(layers_of(found), found, tolerance)
    for name, layer in plan.layers.items():
        shape, own = found.shapes[name], found.weights[name]
        s = {option: float(np.mean(values)) for option, values in own.items() if shape[1] % option[1] == 0}
        chosen = (layer.weight_bits, layer.group_size)
        within = [option for option in s if s[option] <= tolerance]
        if within:
            assert bytes_of(shape, *chosen) == min(bytes_of(shape, *option) for option in within)
            assert s[chosen] <= tolerance
        else:
            assert s[chosen] == min(s.values())
            assert layer.reason == f"fragile: no option has S ≤ {tolerance:g}"
            assert layer.sensitive and not layer.aggressive
        assert layer.figure == f"S = {s[chosen]:.1e}"


def test_fewer_bits_count_before_larger_groups() -> None:
    found = measured({"a": {(2, 32): 1e-4, (3, 128): 1e-6}, "b": {(4, 32): 1e-5, (4, 64): 1e-5, (4, 128): 1e-3}})
    plan = sensitivity.plan_layers(layers_of(found), found)
    assert (plan.layers["a"].weight_bits, plan.layers["a"].group_size) == (2, 32)
    assert (plan.layers["b"].weight_bits, plan.layers["b"].group_size) == (4, 64)
    assert plan.layers["a"].reason == "2 bits do"  # met is enough
    assert plan.layers["b"].reason == "4 bits do"
    assert plan.layers["a"].aggressive


@pytest.mark.parametrize(
    ("s", "bits"),
    [
        ({4: 1e-3, 6: 1e-5, 8: 1e-6}, 6),
        ({4: 1e-5, 6: 1e-4, 8: 1e-3}, 4),
        ({4: 1e-4, 6: 1e-5, 8: 1e-6}, 4),  # met is enough
        ({4: 1.0, 6: 5e-4, 8: 6e-4}, 6),  # none within 1e-4, the best near it
        ({4: 1.0, 6: 1e-2, 8: 1e-3}, 8),  # the best misses it tenfold
        ({4: 1.0, 6: 1e-2, 8: 1.01e-3}, 16),  # and by more
        ({}, 8),
    ],
)
def test_activation_bits_of_sensitivity(s: dict[int, float], bits: int) -> None:
    found = measured({"a": GOOD}, activations={"a": s, "conv": s})
    plan = sensitivity.plan_layers(layers_of(found, "conv", "unknown"), found, 1e-4)
    assert plan.layers["a"].activation_bits == plan.layers["conv"].activation_bits == bits
    assert plan.layers["unknown"].activation_bits == 8
    apart = sensitivity.plan_layers(layers_of(found, "conv"), found, 1e-9, activation_tolerance=1e-4)
    assert apart.layers["a"].activation_bits == bits


def test_sensitivity_tells_what_it_could_not_do() -> None:
    weights = {"a": {(8, 64): 1e-2}, "b": {(3, 64): 1e-5, (8, 64): 0.0}, "c": {(3, 64): 3e-5}}
    found = measured(weights, activations={"a": {8: 1.0}, "b": {8: 1e-6}})
    plan = sensitivity.plan_layers(layers_of(found, "conv"), found)
    nbytes = taken(plan, found)
    size = f"{(8 + 3 + 3) / 3 + 0.5:.3f} bits a weight, scales and biases counted, {nbytes / 1e6:.2f} MB"
    assert plan.notes == (
        f"predicted error ΣS = 0.01 at {size}",
        "weights are kept and not counted, as MLX cannot quantize them: 1 of 4 layers",
        "no option has S ≤ 0.0001, so they have their best: 1 of 3 layers",
        "activations are left as they are, with S > 0.001 at their best: 1 of 4 layers",
    )
    assert (plan.layers["conv"].weight_bits, plan.layers["conv"].reason) == (8, "kept, MLX cannot quantize it")
    assert len(sensitivity.plan_layers(layers_of(found), found, 1.0).notes) == 1


def test_sensitivity_calls_fragile_what_needs_far_more_bits_than_the_rest() -> None:
    weights = {name: {(3, 64): 1e-6} for name in "bcdefgh"} | {"a": {(3, 64): 1e-2, (6, 64): 1e-6}}
    found = measured(weights)
    plan = sensitivity.plan_layers(layers_of(found), found)
    assert plan.layers["a"].sensitive
    assert plan.layers["a"].reason == "fragile: fewer bits have S > 0.0001"
    assert not any(plan.layers[name].sensitive for name in "bcdefgh")


@pytest.mark.parametrize("value", [0.0, -1e-4, math.nan, math.inf])
@pytest.mark.parametrize("key", ["tolerance", "activation_tolerance"])
def test_a_tolerance_must_be_positive(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^analysis.{key}={value}: must be positive and finite"):
        sensitivity.plan_layers({}, measured({}), **{key: value})


# Configuration


@pytest.mark.parametrize("module", [allocate, sensitivity])
def test_the_configuration_names_every_parameter_with_its_default(module: Any) -> None:
    name = module.__name__.rpartition(".")[2]
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    node = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(node, dict)
    assert text.startswith(f"# analysis={name}")
    bound = bind("analysis", node, given=("layers", "sensitivities"))
    found = measured(typical())
    assert bound(layers_of(found), found) == module.plan_layers(layers_of(found), found)
    parameters = [p for p in inspect.signature(module.plan_layers).parameters if p not in ("layers", "sensitivities")]
    assert [key for key in node if key != "_target_"] == parameters
