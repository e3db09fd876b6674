"""Plans within a budget, against every choice tried; what they say; bits by phase; what is refused."""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from calib.analysis.heuristics import allocate, sensitivity
from calib.analysis.heuristics.allocate import plan_layers
from calib.analysis.options import Options
from calib.analysis.plan import Plan
from calib.analysis.sensitivities import Sensitivities
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import CalibError, ConfigError
from calib.base.targets import bind_target

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from plans import (
    GOOD,
    SHAPES,
    SUMMARY,
    bytes_of,
    error_of,
    layers_of,
    measured,
    small_models,
    taken,
    typical,
)

CONF = Path(__file__).parents[1] / "conf" / "analysis"


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


@settings(max_examples=150)
@given(found=small_models(), share=st.floats(0, 1), in_megabytes=st.booleans())
def test_no_other_plan_is_better(found: Sensitivities, share: float, in_megabytes: bool) -> None:
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


def test_uniform_four_bits() -> None:
    shapes = {"a": (64, 128), "b": (8, 256), "c": (3, 64)}
    found = measured({name: {(4, 64): 1e-3, (8, 64): 1e-5} for name in shapes}, shapes)
    by_default, at_four_and_a_half = (plan_layers(layers_of(found), found, average_bits=b) for b in (None, 4.5))
    assert by_default == at_four_and_a_half
    assert {(layer.weight_bits, layer.group_size) for layer in by_default.layers.values()} == {(4, 64)}
    with pytest.raises(ConfigError, match=r"^analysis.average_bits=4.4999: must be 4.5 or more"):
        plan_layers(layers_of(found), found, average_bits=4.4999)


@pytest.mark.parametrize("unit", ["average_bits", "megabytes"])
@pytest.mark.parametrize("value", [1e-9, 0.0, -4.5, math.nan, math.inf])
def test_impossible_budgets(unit: str, value: float) -> None:
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


def test_budgets_are_decimal() -> None:
    """Ten layers at 4.3 bits: eight at 4 and two at 3 in groups of 64. The float 4.3 is a little less than 4.3."""
    found = measured({name: {(3, 64): 1.0, (4, 64): 0.5} for name in "abcdefghij"})
    plan = plan_layers(layers_of(found), found, average_bits=4.3)
    assert sorted(layer.weight_bits for layer in plan.layers.values()) == [3, 3, *[4] * 8]


def test_a_budget_beyond_all_options() -> None:
    weights = typical()
    weights["b"][6, 32] = 0.0  # the best need not be the largest
    found = measured(weights)
    plan = plan_layers(layers_of(found), found, average_bits=20.0)
    for name, own in weights.items():
        chosen = (plan.layers[name].weight_bits, plan.layers[name].group_size)
        assert own[chosen] == min(own.values())
    assert "the budget of 20.000 bits is more than needed: every layer has its least error" in plan.notes
    assert not any("more than needed" in note for note in plan_layers(layers_of(found), found).notes)


def test_only_what_is_allowed_is_chosen() -> None:
    found = measured(typical())
    plan = plan_layers(layers_of(found), found, average_bits=5.0, weight_bits=[3, 6], group_sizes=[32])
    assert {layer.group_size for layer in plan.layers.values()} == {32}
    assert {layer.weight_bits for layer in plan.layers.values()} == {3, 6}


def test_kept_layers() -> None:
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


def test_fragile_layers() -> None:
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
def test_reasons(above: float, harmless: bool, words: str) -> None:
    assert allocate._reason(above, harmless) == words


@pytest.mark.parametrize(("average", "cost"), [(9.0, 1.0), (8.9, 2.0), (4.0, 2.0), (3.9, 5.0), (1.0, 5.0)])
def test_cost_at_the_average(average: float, cost: float) -> None:
    """The least of what fits; of the smallest option where none does."""
    costs, nbytes = np.array([5.0, 2.0, 7.0, 1.0]), np.array([3, 4, 5, 9])
    own = Options(np.zeros((4, 1), np.int64), np.full(4, 64), costs, nbytes, weights=8)
    assert own.cost_at(average) == cost


# Notes


def test_notes() -> None:
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


def test_notes_where_uniform_is_impossible() -> None:
    weights = typical()
    for option in [o for o in weights["b"] if o[1] != 32]:
        del weights["b"][option]
    found = measured(weights, {"a": (8, 128), "b": (8, 96), "c": (8, 128)})
    assert not any("uniform" in note for note in plan_layers(layers_of(found), found).notes)


def test_notes_of_no_error() -> None:
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
def test_no_other_phases_are_better(data: st.DataObject) -> None:
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


def test_copies_are_counted() -> None:
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


def test_one_copy_where_s_falls_with_bits() -> None:
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


def test_kept_layers_have_no_phases() -> None:
    found = different_by_phase()
    plan = plan_layers(layers_of(found, "conv"), found, per_phase=True)
    assert all(list(own) == ["a", "b"] for own in plan.phase_weight_bits.values())
    assert plan.layers["conv"].weight_bits == 8
    assert not plan_layers(layers_of(found), found).phase_weight_bits


@pytest.mark.parametrize(
    ("steps", "phase", "missing"),
    [((4, 9), "early", "0 to 2"), ((0, 9), "mid", "3 to 6"), ((0, 4, 10), "late", "7 to 9")],
)
def test_unmeasured_phases(steps: tuple[int, ...], phase: str, missing: str) -> None:
    """State 10 is not: the model never sees it."""
    found = measured({"a": {(4, 64): 1e-3}}, steps=steps)
    with pytest.raises(CalibError, match=f"{phase} phase; measure at one or more of the steps {missing}"):
        plan_layers(layers_of(found), found, per_phase=True)
    assert plan_layers(layers_of(found), found).layers["a"].weight_bits == 4


def test_short_trajectories() -> None:
    """Of one step all is mid."""
    found = measured({"a": {(4, 64): 1e-3}}, num_steps=1)
    plan = plan_layers(layers_of(found), found, per_phase=True)
    assert plan.phase_weight_bits == {"mid": {"a": 4}}


# What both heuristics refuse


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
def test_impossible_parameters(parameters: dict[str, Any], words: str) -> None:
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
def test_garbled_sensitivities(heuristic: Callable[..., Plan], found: Sensitivities, words: str) -> None:
    with pytest.raises(CalibError, match=re.escape(words)) as caught:
        heuristic({"a": SUMMARY}, found)
    assert len(str(caught.value).splitlines()) == 1


# Configuration


@pytest.mark.parametrize("module", [allocate, sensitivity])
def test_options_name_every_default(module: Any) -> None:
    name = module.__name__.rpartition(".")[2]
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    node = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(node, dict)
    assert text.startswith(f"# analysis={name}")
    bound = bind_target("analysis", node, given=("layers", "sensitivities"))
    found = measured(typical())
    assert bound(layers_of(found), found) == module.plan_layers(layers_of(found), found)
    parameters = [p for p in inspect.signature(module.plan_layers).parameters if p not in ("layers", "sensitivities")]
    assert [key for key in node if key != "_target_"] == parameters
