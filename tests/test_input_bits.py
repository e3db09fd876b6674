"""Bits of inputs by layer and step within an average, against every choice tried; what is refused; how files say it."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from calib.analysis.heuristics.allocate import plan_layers
from calib.analysis.input_bits import CHOICES, allocate_inputs, input_error, over_ranges
from calib.analysis.layers import LayerSummary
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.ranges import StepRanges
from calib.analysis.sensitivities import INPUT_BITS, Of, Sensitivities
from calib.analysis.steps import StepPlan, applied_hash, read_steps
from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json, write_json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import SUMMARY, layers_of, measured

ONE = {(4, 64): 1e-3}
Errors = Mapping[str, Mapping[int, Sequence[float]]]


def model_of(
    errors: Errors, steps: tuple[int, ...], num_steps: int, taps: Mapping[str, tuple[str, ...]] | None = None
) -> Sensitivities:
    names = [name for first in errors for name in (taps or {}).get(first, (first,))]
    first_of = {name: first for first in errors for name in (taps or {}).get(first, (first,))}
    own = {n: {b: np.array(e, dtype=np.float64) for b, e in errors[first_of[n]].items()} for n in names}
    return replace(
        measured(dict.fromkeys(names, ONE), steps=steps, num_steps=num_steps), activations=own, taps=dict(taps or {})
    )


def sized(numbers: Mapping[str, int]) -> dict[str, LayerSummary]:
    return {name: replace(SUMMARY, num_samples=count) for name, count in numbers.items()}


def nearest(step: int, steps: Sequence[int]) -> int:
    """The place of the measured step that ``step`` is nearest to, the later of two."""
    return min(range(len(steps)), key=lambda i: (abs(steps[i] - step), -i))


def error_at(errors: Mapping[int, Sequence[float]], bits: int, place: int) -> float:
    """As measured; beyond, by the distance of the grid's values."""
    if bits == 16:
        return 0.0
    finest = max(errors)
    factor = ((2**finest - 1) / (2**bits - 1)) ** 2 if bits > finest else 1.0
    return float(errors[min(bits, finest)][place]) * factor


@st.composite
def cases(draw: st.DrawFn) -> tuple[Errors, dict[str, int], tuple[int, ...], int, list[int], int | None, Fraction]:
    steps, num_steps = draw(st.sampled_from([((0, 1, 2), 3), ((0, 3), 6), ((1, 2, 6), 9), ((4,), 5)]))
    names = "abc"[: draw(st.integers(1, 3 if len(steps) < 3 else 2))]
    error = st.floats(0, 1, allow_subnormal=False).map(lambda x: x * 1e-6)
    errors = {n: {b: draw(st.lists(error, min_size=len(steps), max_size=len(steps))) for b in (4, 6, 8)} for n in names}
    numbers = {n: 3072 * draw(st.integers(1, 9)) for n in names}
    choices = draw(st.lists(st.sampled_from([4, 6, 8, 10, 16]), min_size=1, max_size=3, unique=True))
    groups = draw(st.sampled_from([None, 1, 2, 9]))
    share = Fraction(draw(st.integers(0, 1000)), 1000)
    budget = min(choices) + share * (max(choices) - min(choices))
    return errors, numbers, steps, num_steps, choices, groups, budget


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_no_other_choice_is_better(case: Any) -> None:
    """Every input and group of steps tried at all bits; sizes by the numbers that are read at each step."""
    errors, numbers, steps, num_steps, choices, groups, budget = case
    found = allocate_inputs(sized(numbers), model_of(errors, steps, num_steps), float(budget), choices, groups)
    parts = [list(p) for p in np.array_split(range(len(steps)), min(groups or len(steps), len(steps)))]
    places = [nearest(step, steps) for step in range(num_steps)]
    options = list(itertools.product(errors, parts))
    total, exact = sum(numbers.values()) * num_steps, Fraction(str(float(budget)))

    def cost(bits: Mapping[str, Sequence[int]]) -> tuple[float, int]:
        errs = [error_at(errors[n], b, places[s]) / num_steps for n, own in bits.items() for s, b in enumerate(own)]
        return math.fsum(errs), sum(numbers[n] * b for n, own in bits.items() for b in own)

    best = math.inf
    for chosen in itertools.product(choices, repeat=len(options)):
        of = dict(zip([(n, tuple(p)) for n, p in options], chosen, strict=True))
        bits = {n: [next(b for (m, p), b in of.items() if m == n and place in p) for place in places] for n in errors}
        error, size = cost(bits)
        best = min(best, error if size <= exact * total else math.inf)
    error, size = cost(found.by_layer)
    assert size <= exact * total and found.average == pytest.approx(size / total)
    assert error == pytest.approx(best, rel=1e-9, abs=1e-20) and found.error == pytest.approx(error, abs=1e-20)
    for bits in found.by_layer.values():
        assert all(len({bits[s] for s in range(num_steps) if places[s] in p}) == 1 for p in parts)


FALLING = {b: [4.0**-b, 100 * 4.0**-b] for b in INPUT_BITS}


def test_an_input_counts_once() -> None:
    """However many layers read it; they have the same bits."""
    taps = {"q": ("q", "k", "v"), "fc": ("fc",)}
    numbers = dict.fromkeys(("q", "k", "v", "fc"), 10)
    shared = allocate_inputs(sized(numbers), model_of({"q": FALLING, "fc": FALLING}, (0, 1), 2, taps), 6.0)
    alone = allocate_inputs(sized(numbers), model_of({"q": FALLING, "fc": FALLING}, (0, 1), 2), 6.0)
    assert shared.by_layer["q"] == shared.by_layer["k"] == shared.by_layer["v"] == alone.by_layer["q"]
    assert shared.error == alone.error and shared.average == alone.average
    everywhere = dict.fromkeys(numbers, 6)
    assert input_error(model_of({"q": FALLING, "fc": FALLING}, (0, 1), 2, taps), everywhere) == pytest.approx(
        2 * 4.0**-6 * 50.5
    )


def test_a_plan_with_bits_by_step() -> None:
    """Few bits where errors are small; each layer's own are their mean; predictions with and without inputs."""
    found = replace(model_of({"a": FALLING, "b": FALLING}, (0, 1), 2), of=Of.PICTURE)
    plan = plan_layers(layers_of(found, "block"), found, average_activation_bits=6, activation_bits=9)
    fixed = plan_layers(layers_of(found), found, activation_bits=6)
    for name in "ab":
        early, late = plan.step_activation_bits[name]
        assert 4 <= early < late and plan.layers[name].activation_bits == round((early + late) / 2)
    assert plan.layers["block"].activation_bits == 9 and fixed.step_activation_bits == {}
    assert plan.predicted_weights_psnr == fixed.predicted_weights_psnr == pytest.approx(-10 * math.log10(2e-3))
    assert fixed.predicted_psnr == pytest.approx(-10 * math.log10(2e-3 + 2 * 4.0**-6 * 50.5))
    assert fixed.predicted_psnr < plan.predicted_psnr < plan.predicted_weights_psnr
    whole = plan_layers(layers_of(found), found, average_activation_bits=16)
    assert whole.predicted_psnr == whole.predicted_weights_psnr
    assert any("the same average with bits by layer alone: PSNR = " in note for note in plan.notes)
    assert any("phase_bits has no effect" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"average": 3.99}, "analysis.average_activation_bits=3.99: must be 4 to 16"),
        ({"average": 16.01}, "analysis.average_activation_bits=16.01: must be 4 to 16"),
        ({"average": math.nan}, "analysis.average_activation_bits=nan: must be 4 to 16"),
        ({"average": -math.inf}, "analysis.average_activation_bits=-inf: must be 4 to 16"),
        ({"average": 9, "choices": [6, 8]}, "analysis.average_activation_bits=9: must be 6 to 8"),
        ({"average": 6, "choices": []}, "analysis.activation_choices=[]: must be some of 4 to 16"),
        ({"average": 6, "choices": [2, 8]}, "analysis.activation_choices=[2, 8]: must be some of 4 to 16"),
        ({"average": 6, "step_groups": 0}, "analysis.step_groups=0: must be 1 or more"),
    ],
)
def test_impossible_values(given: dict[str, Any], message: str) -> None:
    found = model_of({"a": FALLING}, (0, 1), 2)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        allocate_inputs(layers_of(found), found, **({"choices": CHOICES} | given))


@pytest.mark.parametrize("errors", [{}, {"a": {}}])
def test_inputs_that_were_not_measured(errors: Errors) -> None:
    with pytest.raises(CalibError, match="no error of inputs was measured"):
        allocate_inputs({"a": SUMMARY}, model_of(errors, (0, 1), 2), 6, [4, 5])


# Files


def steps_with(bits: dict[str, tuple[int, ...]], **more: Any) -> StepPlan:
    timesteps = tuple(np.linspace(1000, 100, 4).tolist())
    return StepPlan(timesteps, {"early": (0, 1), "late": (2, 3)}, step_bits=bits, **more)


def test_written_and_read(tmp_path: Path) -> None:
    steps = steps_with({"a": (4, 4, 6, 16), "b": (8, 8, 8, 8)})
    write_json(tmp_path / "steps.json", steps.to_json())
    assert read_json(tmp_path / "steps.json")["activation_bits"]["a"] == {"from_step": [0, 2, 3], "bits": [4, 6, 16]}
    read = read_steps(tmp_path / "steps.json")
    assert read.step_bits == steps.step_bits
    assert read.bits_by_step("a", 8) == (4, 4, 6, 16) and read.bits_by_step("c", 7) == (7, 7, 7, 7)
    assert "activation_bits" not in steps_with({}).to_json(), "as before, so that hashes of older plans hold"


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d["phases"]["late"]["activation_bits"].update(a=8), "of a both by step and in phase 'late'"),
        (lambda d: d["activation_bits"]["a"].update(bits=[4, 6]), "3 steps with 2 bits of a"),
        (lambda d: d["activation_bits"]["a"].update(bits=[4, 6, 17]), "17 bits of a from step 3"),
        (lambda d: d["activation_bits"]["a"].update(bits=[4, 6, 8.5]), "8.5 bits of a from step 3"),
        (lambda d: d["activation_bits"]["a"].update(from_step=[0, 2, 4]), "from_step holds 4"),
        (lambda d: d["activation_bits"]["a"].update(from_step=[1, 2, 3]), "must begin with 0"),
        (lambda d: d["activation_bits"]["a"].pop("bits"), "'bits'"),
        (lambda d: d.update(activation_bits=[4]), "activation_bits"),
        (lambda d: d["activation_bits"].update(a=[4, 4]), "activation_bits"),
    ],
)
def test_damaged_bits(tmp_path: Path, change: Change, word: str) -> None:
    path = tmp_path / "timestep_config.json"
    document = steps_with({"a": (4, 4, 6, 16)}).to_json()
    document["phases"]["late"]["activation_bits"] = {}
    change(document)
    write_json(path, document)
    with pytest.raises(CalibError) as caught:
        read_steps(path)
    assert str(path) in str(caught.value) and (word in str(caught.value) or word == "activation_bits")
    assert "\n" not in str(caught.value)


def test_what_a_prediction_holds_for() -> None:
    """For other weights nothing, for other inputs that of the weights alone; older files have that alone."""
    layers = {"a": LayerPlan(4, 6), "b": LayerPlan(3, 8)}
    plan = Plan(layers, predicted_psnr=30.0, predicted_weights_psnr=32.0, step_activation_bits={"a": (4, 4, 6, 16)})
    steps = steps_with(plan.step_activation_bits).with_predictions(plan, {})
    both = {"predicted_psnr": 30.0, "predicted_weights_psnr": 32.0}
    weights = {"predicted_psnr": 32.0, "predicted_weights_psnr": 32.0}
    assert steps.predictions(layers) == both
    assert replace(steps, step_bits={"a": (4, 4, 6, 8)}).predictions(layers) == weights
    assert steps.predictions(layers | {"b": LayerPlan(3, 4)}) == weights
    assert steps.predictions(layers | {"b": LayerPlan(4, 8)}) == {}
    older = replace(steps, predicted={"psnr": 32.0, "plan": steps.predicted["plan"]})
    assert older.predictions(layers) == weights
    assert applied_hash(layers, steps) != applied_hash(layers, replace(steps, step_bits={}))


def test_errors_beyond_those_measured() -> None:
    """They fall with the distance of the grid's values, at every step; of fewer bits nothing is known."""
    found = model_of({"a": {8: [1.0, 3.0]}}, (0, 1), 2)
    assert input_error(found, {"a": 12}) == pytest.approx(2.0 * (255 / 4095) ** 2)
    assert input_error(found, {"a": 16}) == 0.0 and input_error(found, {"a": 7}) is None


def test_errors_over_other_ranges() -> None:
    """They grow with the square of the width, zero included, at each step; a range of nothing stays as it is."""
    found = model_of({"a": {8: [1.0, 3.0]}, "b": {8: [1.0, 3.0]}}, (0, 2), 4)
    before = {"a": StepRanges((0, 1), (-1.0, 1.0), (1.0, 2.0)), "b": StepRanges((0,), (0.0,), (0.0,))}
    after = {"a": StepRanges((0,), (-2.0,), (4.0,)), "b": StepRanges((0,), (-1.0,), (1.0,))}
    scaled = over_ranges(found, before, after)
    assert scaled.activations["a"][8].tolist() == pytest.approx([9.0, 27.0])
    assert scaled.activations["b"][8].tolist() == [1.0, 3.0]
