"""Activation ranges that vary with the step: the rules, what they are made from, and the file they end in."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from calib.activations.format import Block, Levels
from calib.activations.observer_mlx import MlxObserver
from calib.activations.reader import ActivationFile
from calib.activations.record import StepRecord
from calib.activations.store import Records, write_activations
from calib.activations.taps import TapPoint
from calib.analysis import ranges
from calib.analysis.observed import channel_extremes, drift_text, observe, range_drift
from calib.analysis.ranges import (
    Observed,
    RangeRule,
    StepRanges,
    grouped,
    per_step,
    polynomial,
    ranges_from_json,
    ranges_to_json,
    static,
)
from calib.base.errors import CalibError
from calib.base.targets import bind_target
from calib.dataset.manifest import Manifest
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from helpers import CHECKOUT, SMALLEST_NORMAL, STEPS, check_config_error
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import OmegaConf
from watching import Whole, watch, write_collected

NUMBER = st.floats(-1e4, 1e4, allow_subnormal=False)
RULES: dict[str, RangeRule] = {rule.__name__: rule for rule in (static, per_step, grouped, polynomial)}
PATH = Path("run/timestep_config.json")


def made(steps: Sequence[int], low: Sequence[float], high: Sequence[float], num_steps: int) -> Observed:
    """A layer seen so; noise levels as of a sampler with shift 3."""
    t = 1 - np.arange(num_steps) / num_steps
    bounds = np.array(low, np.float64), np.array(high, np.float64)
    return Observed(np.array(steps), *bounds, bounds[1], 3 * t / (1 + 2 * t))


@st.composite
def observations(draw: st.DrawFn, most: int = 60) -> Observed:
    """Ranges of any kind: wild ones, constant ones, zeros, one step that stands out."""
    num_steps = draw(st.integers(1, 60))
    every = st.integers(0, num_steps - 1)
    steps = sorted(draw(st.sets(every, min_size=1, max_size=min(most, num_steps))))
    edge = draw(st.sampled_from([NUMBER, st.integers(-3, 3).map(float), st.just(0.5), st.just(0.0)]))
    low, high = np.sort([[draw(edge) for _ in steps] for _ in range(2)], axis=0)
    if draw(st.booleans()):
        high[draw(st.integers(0, len(steps) - 1))] *= 1000
        low, high = np.minimum(low, high), np.maximum(low, high)
    return made(steps, low.tolist(), high.tolist(), num_steps)


def along(found: StepRanges, observed: Observed) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high at every step."""
    pairs = np.array([found.at(step) for step in range(observed.num_steps)])
    return pairs[:, 0], pairs[:, 1]


# The rules


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(observed=observations())
def test_every_rule(rule: RangeRule, observed: Observed) -> None:
    found = rule(observed)
    assert found.from_step[0] == 0
    assert all(a < b for a, b in pairwise((*found.from_step, observed.num_steps)))
    low, high = along(found, observed)
    assert np.all(low <= high)
    assert np.all(low[observed.steps] <= observed.low)
    assert np.all(high[observed.steps] >= observed.high)
    assert low.min() == observed.low.min()
    assert high.max() == observed.high.max()
    assert all(a != b for a, b in pairwise(zip(found.low, found.high, strict=True))), "equal neighbours are one"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(observed=observations(most=1))
def test_a_single_step(rule: RangeRule, observed: Observed) -> None:
    assert rule(observed) == StepRanges((0,), (float(observed.low[0]),), (float(observed.high[0]),))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bounds", [(0.0, 0.0), (-0.3, 0.7), (3.0, 3.0)])
def test_a_constant_range(rule: RangeRule, bounds: tuple[float, float]) -> None:
    observed = made([0, 4, 5, 9, 17, 30], [bounds[0]] * 6, [bounds[1]] * 6, 50)
    assert rule(observed) == StepRanges((0,), (bounds[0],), (bounds[1],))


@given(observed=observations())
def test_static(observed: Observed) -> None:
    assert static(observed) == StepRanges((0,), (min(observed.low),), (max(observed.high),))


@given(observed=observations())
def test_per_step(observed: Observed) -> None:
    low, high = along(per_step(observed), observed)
    steps = observed.steps.tolist()
    for found, seen in ((low, observed.low), (high, observed.high)):
        assert np.array_equal(found[steps], seen)
        assert np.all(found[: steps[0]] == seen[0])
        assert np.all(found[steps[-1] :] == seen[-1])
        for i, (a, b) in enumerate(pairwise(steps)):
            line = [(seen[i] * (b - step) + seen[i + 1] * (step - a)) / (b - a) for step in range(a, b)]
            assert found[a:b] == pytest.approx(line, rel=1e-9, abs=1e-9 * np.abs(seen).max())


def test_per_step_of_narrow_ranges() -> None:
    """Of so many pairs of lines that part by one digit, the last, some cross where they are interpolated."""
    for low, high in np.random.RandomState(0).randn(200, 2):
        observed = made([0, 39], [low, high], [np.nextafter(low, np.inf), high], 40)
        lows, highs = along(per_step(observed), observed)
        assert np.all(lows <= highs)


def lost_bits(low: NDArray[np.float64], high: NDArray[np.float64], observed: Observed) -> float:
    """Σ log2(W / w) over the collected steps, W being the width of low … high, each with zero in it."""
    own = np.maximum(observed.high, 0) - np.minimum(observed.low, 0)
    shared = np.maximum(high, 0) - np.minimum(low, 0)
    floor = 2.0**-16 * (observed.high.max(initial=0) - observed.low.min(initial=0)) or 1.0
    return float(np.log2(np.maximum(shared, floor) / np.maximum(own, floor)).sum())


@given(observed=observations(most=8), groups=st.integers(1, 6))
def test_no_other_grouping_loses_less(observed: Observed, groups: int) -> None:
    found = grouped(observed, groups)
    count = len(observed.steps)
    assert len(found.from_step) <= min(groups, count)
    least = np.inf
    for inner in combinations(range(1, count), min(groups, count) - 1):
        low, high = observed.low.copy(), observed.high.copy()
        for a, b in pairwise((0, *inner, count)):
            low[a:b], high[a:b] = low[a:b].min(), high[a:b].max()
        least = min(least, lost_bits(low, high, observed))
    low, high = along(found, observed)
    assert lost_bits(low[observed.steps], high[observed.steps], observed) == pytest.approx(least, rel=1e-9, abs=1e-9)


@given(observed=observations(), groups=st.integers(1, 6))
def test_groups_are_hulls(observed: Observed, groups: int) -> None:
    found = grouped(observed, groups)
    steps = observed.steps
    for i, (first, end) in enumerate(pairwise((*found.from_step, observed.num_steps))):
        inside = (steps >= first) & (steps < end)
        assert (found.low[i], found.high[i]) == (observed.low[inside].min(), observed.high[inside].max())
        if i:
            before, after = steps[steps < first].max(), steps[inside].min()
            assert first - before in (after - first, after - first + 1)


def test_grouped_finds_groups() -> None:
    steps = [0, 5, 10, 12, 20, 30, 37, 48]
    observed = made(steps, [-1, -1, -1, -4, -4, 0, 0, -9], [1, 1, 1, 2, 2, 8, 8, 9], 50)
    assert grouped(observed) == StepRanges((0, 11, 25, 43), (-1, -4, 0, -9), (1, 2, 8, 9))
    assert grouped(observed, groups=20) == grouped(observed)


def test_grouped_sets_an_outlier_apart() -> None:
    observed = made(range(10), [-1.0] * 10, [1.0] * 6 + [500.0] + [1.0] * 3, 10)
    assert grouped(observed, groups=3) == StepRanges((0, 6, 7), (-1, -1, -1), (1, 500, 1))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_grouped_minds_narrow_steps(scale: float) -> None:
    """From 90 to 100 it is farther than from 1 to 2, but only a seventh of a bit."""
    observed = made(range(4), [0.0] * 4, [100 * scale, 90 * scale, 2 * scale, scale], 4)
    assert grouped(observed, groups=3).high == (100 * scale, 2 * scale, scale)


MONOTONE = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)


@given(low=MONOTONE, high=MONOTONE, inner=st.sets(st.integers(1, 48), min_size=5, max_size=20))
def test_polynomials_of_polynomials(low: list[float], high: list[float], inner: set[int]) -> None:
    """Also at steps that were not collected."""
    sigmas = made([0], [0], [0], 50).sigmas
    lows, highs = -np.polyval(low, sigmas), np.polyval(high, sigmas)
    steps = [0, *sorted(inner), 49]
    found = along(polynomial(made(steps, lows[steps], highs[steps], 50), r_squared=1.0), made([0], [0], [0], 50))
    np.testing.assert_allclose(found, [lows, highs], rtol=1e-7)


@given(low=st.lists(NUMBER, min_size=1, max_size=5), width=st.floats(0, 1e4))
def test_polynomials_where_collected(low: list[float], width: float) -> None:
    """Where it turns, too."""
    lows = np.polyval(low, made([0], [0], [0], 30).sigmas)
    observed = made(range(30), lows.tolist(), (lows + width).tolist(), 30)
    found = along(polynomial(observed, r_squared=1.0), observed)
    np.testing.assert_allclose(found, [observed.low, observed.high], rtol=0, atol=1e-9 * (np.abs(found).max() + 1))


@pytest.mark.parametrize("slope", [1, -1])
def test_polynomials_pass_over_a_dip(slope: int) -> None:
    """Extremes of a few images dip by chance; a curve that runs above one widens the range there."""
    line = 3 + slope * made([0], [0], [0], 20).sigmas
    seen = line - 0.04 * (np.arange(20) == 8)
    high = along(polynomial(made(range(20), [0.0] * 20, seen.tolist(), 20)), made([0], [0], [0], 20))[1]
    assert high == pytest.approx(line, abs=0.01)
    assert high[8] > seen[8] + 0.01


def test_polynomials_are_of_the_lowest_degree() -> None:
    """R² of the straight line through this curve is 0.917."""
    steps = list(range(0, 50, 7))
    sigmas = made([0], [0], [0], 50).sigmas
    high = 1 + 4 * (1 - sigmas) ** 2
    observed = made(steps, [0.0] * len(steps), high[steps], 50)
    line = polynomial(observed, degree=1)
    assert polynomial(observed, r_squared=0.9) == line
    assert polynomial(observed) == polynomial(observed, degree=2) != line
    assert along(polynomial(observed), observed)[1] == pytest.approx(np.minimum(high, high[49]), rel=1e-6)


@given(observed=observations(), degree=st.integers(1, 8))
def test_polynomials_stay_near_the_steps(observed: Observed, degree: int) -> None:
    low, high = along(polynomial(observed, degree), observed)
    steps, last = observed.steps, len(observed.steps) - 1
    for step in range(observed.num_steps):
        around = [i for i in range(last + 1) if steps[i] == step]
        around.append(max((i for i in range(last + 1) if steps[i] < step), default=0))
        around.append(min((i for i in range(last + 1) if steps[i] > step), default=last))
        assert observed.low[around].min() <= low[step] <= observed.low[around].max()
        assert observed.high[around].min() <= high[step] <= observed.high[around].max()


def test_polynomials_do_not_swing() -> None:
    """The curve of degree 8 through such a jump goes to several times its height."""
    steps = [0, 1, 2, 3, 40, 41, 42, 43, 44]
    observed = made(steps, [0.0] * 9, [1, 1, 1, 1.5, 3, 3, 3.5, 3, 3], 50)
    high = along(polynomial(observed, degree=8), observed)[1]
    assert np.all((high[4:40] >= 1.5) & (high[4:40] <= 3))
    assert np.all(high[45:] == 3), "nor is it extrapolated"


def test_polynomials_that_cross() -> None:
    """From a point to a point to a range: the parabola of high bends more, and dips below that of low."""
    observed = made([0, 5, 9], [-2, 0, 5], [-2, 0, 7], 12)
    found, between = polynomial(observed), per_step(observed)
    for step in (3, 4, 6):
        assert found.at(step) == between.at(step)
    for step in (1, 7, 8):
        assert found.at(step) != between.at(step)


@pytest.mark.parametrize(
    ("rule", "parameters", "words"),
    [
        (grouped, {"groups": 0}, ("ranges.groups=0", "1 or more")),
        (grouped, {"groups": -2}, ("ranges.groups=-2",)),
        (polynomial, {"degree": 0}, ("ranges.degree=0", "1 to 8")),
        (polynomial, {"degree": 9}, ("ranges.degree=9", "1 to 8")),
        (polynomial, {"r_squared": 0.0}, ("ranges.r_squared=0.0",)),
        (polynomial, {"r_squared": 1.01}, ("ranges.r_squared=1.01",)),
    ],
)
def test_bad_parameters(rule: Callable[..., Any], parameters: dict[str, float], words: Sequence[str]) -> None:
    check_config_error(lambda: rule(made([0], [0], [1], 4), **parameters), words)


@pytest.mark.parametrize("name", RULES)
def test_options_name_every_default(name: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(CHECKOUT / f"conf/ranges/{name}.yaml"))
    bound = bind_target("ranges", node, given=("observed",))
    assert bound.func is getattr(ranges, name)
    defaults = {key: p.default for key, p in inspect.signature(RULES[name]).parameters.items() if key != "observed"}
    assert bound.keywords == defaults


# What was seen


def written(path: Path, values: Mapping[int, NDArray[np.float64]], num_steps: int, sigmas: Mapping[int, float]) -> Path:
    """An ``activations.h5`` with ``values``, (rows, tokens, channels) at each step, going into layer x."""
    records = {
        step: StepRecord(step, [0], watch(MlxObserver(1, finite_only=True), [{"x": mx.array(x).astype(mx.float16)}]))
        for step, x in values.items()
    }
    source = Records(["x"], lambda names: records, 1 << 20, [Block(0, (0,))], halves=1)
    levels = Levels(num_steps, sigmas, {step: 1000 * sigma for step, sigma in sigmas.items()})
    attributes = {"producer": "calib test", "git_commit": "unknown", "config": "{}"}
    write_activations(path, source, [TapPoint("x", "modulated")], levels, list(values), {}, attributes, {"x": 0})
    return path


SIGMAS = {2: 0.75, 5: 0.5, 8: 0.125, 10: 0.0}


@pytest.fixture(scope="module")
def values() -> dict[int, NDArray[np.float64]]:
    """As float16 has them, at steps 2, 5, 8 and in the finished latent, 10, which is the widest."""
    spread = np.array([1, 0.1, 5, 2]) + np.array([0, 0.5, 0, 1])
    random = np.random.RandomState(0)
    return {step: (random.randn(1, 500, 4) * spread * (1 + step)).astype(np.float16).astype(float) for step in SIGMAS}


@pytest.fixture(scope="module")
def path(values: dict[int, NDArray[np.float64]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("ranges") / "activations.h5", values, 10, SIGMAS)


def test_observed_at_evaluated_steps(path: Path, values: dict[int, NDArray[np.float64]]) -> None:
    with ActivationFile(path) as file:
        observed = observe(file, "x", (0, 100))
    assert observed.steps.tolist() == [2, 5, 8], "the finished latent is left out"
    assert observed.low.tolist() == [values[step].min() for step in (2, 5, 8)]
    assert observed.high.tolist() == [values[step].max() for step in (2, 5, 8)]
    assert observed.p99 == pytest.approx([np.percentile(values[step], 99) for step in (2, 5, 8)], rel=1e-12)
    assert observed.num_steps == 10
    between = [1, 0.875, 0.75, 2 / 3, 7 / 12, 0.5, 0.375, 0.25, 0.125, 0.0625]
    assert observed.sigmas == pytest.approx(between, rel=1e-6), "1 at step 0, 0 at step 10"


def test_observed_by_percentiles(path: Path, values: dict[int, NDArray[np.float64]]) -> None:
    with ActivationFile(path) as file:
        observed = observe(file, "x", (0.5, 98))
    expected = np.array([np.percentile(values[step], (0.5, 98)) for step in (2, 5, 8)])
    np.testing.assert_allclose([observed.low, observed.high], expected.T, rtol=1e-12)


@pytest.mark.parametrize("clip", [(0.0, 100.0), (1.0, 99.0)])
def test_observed_with_divisors(path: Path, values: dict[int, NDArray[np.float64]], clip: tuple[float, float]) -> None:
    divisors = np.array([2.0, 0.05, 30.0, 3.0])
    with ActivationFile(path) as file:
        observed = observe(file, "x", clip, divisors)
        even = observe(file, "x", clip, np.full(4, 4.0))
    divided = [values[step] / divisors for step in (2, 5, 8)]
    assert observed.low.tolist() == [x.min() for x in divided]
    assert observed.high.tolist() == [x.max() for x in divided]
    assert even.p99 == pytest.approx([np.percentile(values[step] / 4, 99) for step in (2, 5, 8)], rel=1e-9)
    assert np.all((observed.low < observed.p99) & (observed.p99 < observed.high))


def test_channel_extremes(path: Path, values: dict[int, NDArray[np.float64]]) -> None:
    with ActivationFile(path) as file:
        low, high = channel_extremes(file, "x")
    together = np.concatenate([values[step][0] for step in (2, 5, 8)])
    assert low.tolist() == together.min(axis=0).tolist()
    assert high.tolist() == together.max(axis=0).tolist()
    assert low.dtype == high.dtype == np.float64
    assert low.min() > values[10].min()


@pytest.mark.parametrize("clip", [(0.0, 100.0), (1.0, 99.0)])
@pytest.mark.parametrize("divisors", [None, np.array([2.0, 1.0, 0.5, 3.0])])
def test_steps_without_a_finite_value(
    values: dict[int, NDArray[np.float64]],
    clip: tuple[float, float],
    divisors: NDArray[np.float64] | None,
    tmp_path: Path,
) -> None:
    part = np.where(np.arange(4) < 2, np.inf, values[5])
    broken = {2: np.full_like(part, np.nan), 5: part, 8: values[8]}
    path = written(tmp_path / "activations.h5", broken, 10, SIGMAS)
    with ActivationFile(path) as file:
        observed = observe(file, "x", clip, divisors)
        low, high = channel_extremes(file, "x")
    assert observed.steps.tolist() == [5, 8]
    finite = values[5][..., 2:] / (1 if divisors is None else divisors[2:])
    ends = clip if divisors is None else (0, 100)
    assert (observed.low[0], observed.high[0]) == pytest.approx(tuple(np.percentile(finite, ends)), rel=1e-12)
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize("look", [lambda file: observe(file, "x", (0, 100)), lambda file: channel_extremes(file, "x")])
@pytest.mark.parametrize("steps", [(5, 10), (10,)])
def test_nothing_to_observe(
    values: dict[int, NDArray[np.float64]],
    steps: Sequence[int],
    look: Callable[[ActivationFile], object],
    tmp_path: Path,
) -> None:
    broken = {step: values[step] if step == 10 else np.full_like(values[step], np.nan) for step in steps}
    path = written(tmp_path / "activations.h5", broken, 10, SIGMAS)
    with ActivationFile(path) as file, pytest.raises(CalibError, match=r"activations\.h5.*'x'.*finite") as error:
        look(file)
    assert "\n" not in str(error.value)


def test_a_missing_layer(path: Path) -> None:
    with ActivationFile(path) as file:
        for look in (lambda: observe(file, "y", (0, 100)), lambda: channel_extremes(file, "y")):
            with pytest.raises(CalibError, match="'y'"):
                look()


def test_layers_of_a_model(model: DiffusionModel, whole: Whole, manifest: Manifest, tmp_path: Path) -> None:
    with ActivationFile(write_collected(tmp_path / "activations.h5", model, whole.collection, STEPS)) as file:
        found = {name: observe(file, name, (0, 100)) for name in whole.activations[0]}
        clipped = {name: observe(file, name, (1, 99)) for name in found}
        from_below = {name: observe(file, name, (0, 99)) for name in found}
    assert len(found) > 30
    for name, observed in found.items():
        assert observed.steps.tolist() == [0, 3]
        seen = [whole.activations[step][name] for step in (0, 3)]
        np.testing.assert_allclose(observed.low, [x.min() for x in seen], rtol=0, atol=SMALLEST_NORMAL)
        np.testing.assert_allclose(observed.high, [x.max() for x in seen], rtol=0, atol=SMALLEST_NORMAL)
        ends = np.array([np.percentile(x, (1, 99)) for x in seen])
        assert np.all(from_below[name].low >= observed.low), "no bin's midpoint lies beyond"
        allowed = 0.004 * np.abs(ends).max()  # bins of float32 are read at their midpoint
        np.testing.assert_allclose([clipped[name].low, clipped[name].high], ends.T, rtol=0, atol=allowed)
        assert observed.sigmas[[0, 3]] == pytest.approx([manifest.sigmas[0], manifest.sigmas[3]], rel=1e-6)
        assert np.all(np.diff(observed.sigmas) < 0)


# Drift


@given(observed=observations())
def test_drift(observed: Observed) -> None:
    widths = observed.high - observed.low
    found = range_drift(observed)
    assert 0 <= found <= 1
    assert found * widths.max() == pytest.approx(widths.max() - widths.min(), abs=1e-9)
    if not widths.any():
        assert found == 0


def test_drift_is_told_the_worst_first() -> None:
    wide = {"a": 1.6, "b": 4.1, "c": 1.5, "d": 1.0}
    layers = {name: made([0, 20, 48], [-1, -1, -1], [0, 0.2, times - 1], 50) for name, times in wide.items()}
    layers["e"] = made([3, 4], [0, 0], [0, 7], 50)
    assert drift_text(layers) == (
        "  Drift over the steps (width at its widest : at its narrowest):\n"
        "    - e (×∞, widest at step 4, narrowest at step 3)\n"
        "    - b (×4.1, widest at step 48, narrowest at step 0)\n"
        "    - a (×1.6, widest at step 48, narrowest at step 0)\n"
        "    3 of 5 layers above ×1.5\n"
    )
    assert drift_text(layers, most=1).splitlines()[1:] == [
        "    - e (×∞, widest at step 4, narrowest at step 3)",
        "    3 of 5 layers above ×1.5",
    ]


def test_no_drift_is_told() -> None:
    layers = {"c": made([0, 9], [0, 0], [1, 1.5], 10), "z": made([0, 9], [0, 0], [0, 0], 10)}
    head = "  Drift over the steps (width at its widest : at its narrowest):\n"
    assert drift_text(layers) == drift_text({}) == head + "    - none\n"


# The file


@given(observed=observations(), rule=st.sampled_from(sorted(RULES)))
def test_json(observed: Observed, rule: str) -> None:
    made_of = {"mm_block_0.image.mlp.fc2": RULES[rule](observed), "x_embedder": static(observed)}
    document = json.loads(json.dumps(ranges_to_json(made_of), allow_nan=False))
    assert ranges_from_json(document, PATH, observed.num_steps) == made_of
    assert set(document["x_embedder"]) == {"from_step", "low", "high"}


SOUND = {"from_step": [0, 5, 9], "low": [-1.5, -2, 0], "high": [1, 2.5, 0]}


def test_json_of_whole_numbers() -> None:
    found = ranges_from_json({"a": SOUND}, PATH, 10)
    assert found == {"a": StepRanges((0, 5, 9), (-1.5, -2.0, 0.0), (1.0, 2.5, 0.0))}
    assert all(type(value) is float for value in (*found["a"].low, *found["a"].high))
    assert ranges_from_json({}, PATH, 10) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"from_step": [0, 5, 5]}, "ascend"),
        ({"from_step": [0, 9, 5]}, "ascend"),
        ({"from_step": [1, 5, 9]}, "begin with 0"),
        ({"from_step": [-1, 0, 9]}, "begin with 0"),
        ({"from_step": [0, 5, 10]}, "10"),
        ({"from_step": [0, 5.0, 9]}, "5.0"),
        ({"from_step": [False, 5, 9]}, "False"),
        ({"from_step": [0, "5", 9]}, "'5'"),
        ({"from_step": [0, 5]}, "2, 3 and 3 entries"),
        ({"low": [0, 0]}, "3, 2 and 3 entries"),
        ({"high": [0, 0, 1, 2]}, "3, 3 and 4 entries"),
        ({"from_step": [], "low": [], "high": []}, "begin with 0"),
        ({"low": [float("nan"), -2, 0]}, "low holds nan"),
        ({"high": [1, float("inf"), 0]}, "high holds inf"),
        ({"high": [1, 10**400, 0]}, "high holds 1000"),
        ({"low": [None, -2, 0]}, "low holds None"),
        ({"low": [True, -2, 0]}, "low holds True"),
        ({"high": [1, "2.5", 0]}, "high holds '2.5'"),
        ({"high": [1, -2.5, 0]}, "low -2 is above high -2.5 at step 5"),
        ({"high": 3}, "must have lists"),
        ({"low": None}, "must have lists"),
    ],
)
def test_damaged_json(change: dict[str, Any], words: str) -> None:
    document = {"b": SOUND, "mm_block_0.image.mlp.fc2": SOUND | change}
    with pytest.raises(CalibError) as error:
        ranges_from_json(document, PATH, 10)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(PATH), "'mm_block_0.image.mlp.fc2'", words):
        assert part in message


@pytest.mark.parametrize("document", [None, [], 3, "x", {"a": None}, {"a": [0]}, {"a": {}}, {"a": {"step_index": [0]}}])
def test_json_of_no_ranges(document: Any) -> None:
    with pytest.raises(CalibError, match=r"timestep_config\.json.*must"):
        ranges_from_json(document, PATH, 10)
