"""What a function of the user's own returns, in every group: natural forms are the same, others end in one line."""

import itertools
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.ranges import Observed, StepRanges, ranges_to_json
from calib.base import option
from calib.base.errors import ConfigError
from calib.dataset.settings import SamplerSettings
from calib.models.model import DiffusionModel
from calib.models.packed import Packed
from calib.quantization import rtn
from calib.quantization.quantizer import Quantized, QuantizerInput
from calib.stages.options import (
    chooser_of,
    heuristic_of,
    model_choice,
    prompts_of,
    quantizer_of,
    ranges_of,
    schedule_of,
)

import mlx.core as mx
import numpy as np
import plain_dit
import pytest

# The user's own functions: each returns what the test in hand wants

answer: Callable[..., Any] = print


def prompts():
    return answer()


def schedule(num_steps):
    return answer()


def subset(image_ids, num_images):
    return answer()


def layer(layer):
    return answer()


def whole(layers):
    return answer()


def rule(observed):
    return answer()


def quantizer(work):
    return answer(work)


def load(shift, image_size, name, dtype="float32"):
    return answer()


# How each group calls them, and what of the result counts, as JSON holds it

STEPS, IMAGES, NAMES = 8, range(6), ("a", "b")
MODEL = {"_target_": "plain_dit.load", "skeleton": "plain_dit.skeleton", "name": "plain_dit", "dtype": "float32"}
SAMPLER = SamplerSettings(image_size=(16, 16))
SEEN = Observed(np.array([0, 2]), *np.ones((3, 2)) * [[-1], [1], [1]], np.linspace(1, 0, 4))


@cache
def work() -> QuantizerInput:
    architecture = plain_dit.skeleton("plain_dit", plain_dit.ModelDtype.FLOAT32, (16, 16), 0.0, depth=1)
    layers = {n: layer for n, layer in architecture.layers().items() if layer.weight.shape == (64, 64)}
    plan = dict.fromkeys(layers, LayerPlan(4, 16, group_size=32))
    return replace(QuantizerInput.without_layers(architecture, mx.float16), layers=layers, plan=plan)


@cache
def loaded() -> DiffusionModel:
    return plain_dit.load("plain_dit", plain_dit.ModelDtype.FLOAT32, 1.0, (16, 16), depth=1)


def quantized_by(node: Mapping[str, Any]) -> Any:
    made = quantizer_of(node, model_choice(MODEL, SAMPLER))(work())
    arrays = {name: [p.weight.tolist(), p.scales.tolist(), p.biases.tolist()] for name, p in made.layers.items()}
    shapes = {name: [p.bits, p.group_size, str(p.scales.dtype)] for name, p in made.layers.items()}
    weights = {path: array.tolist() for path, array in made.weights.items()}
    return [arrays, shapes, weights, made.notes, ranges_to_json(made.ranges)]


CALLS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "prompts": ("prompts", prompts_of),
    "schedule": ("timestep_schedule", lambda node: schedule_of(node, STEPS)),
    "subset": ("subset", lambda node: chooser_of(node, False)(IMAGES, None)),
    "layer": ("analysis", lambda node: heuristic_of(node).layer_plan("a", PROBE).to_json()),
    "whole": ("analysis", lambda node: vars(heuristic_of(node).whole(dict.fromkeys(NAMES, PROBE)))),
    "rule": ("ranges", lambda node: ranges_to_json({"a": ranges_of(node, (0, 2), 4, collects=True)(SEEN)})),
    "quantizer": ("quantizer", quantized_by),
    "load": ("model", lambda node: model_choice({"name": "mine", **node}, SAMPLER).load().latent_shape),
}


def result(name: str) -> Any:
    """What calib makes of the answer: only what JSON can hold, so that every file can."""
    made = CALLS[name][1]({"_target_": f"{__name__}.{name}"})
    return json.loads(json.dumps(made, default=lambda plan: plan.to_json(), allow_nan=False))


def plan_of(**given: Any) -> LayerPlan:
    known = {"weight_bits": 4, "activation_bits": 8, "clip_percentile": (1.0, 99.0), "group_size": 32, "reason": "why"}
    return LayerPlan(**{**known, "sensitivity": 0.5, "nbytes": 10, "sensitive": True, **given})


def nearest(change: Callable[[Packed], Any] = lambda packed: packed, **more: Any) -> Callable[[QuantizerInput], Any]:
    return lambda given: Quantized({n: change(p) for n, p in rtn.quantize(given).layers.items()}, **more)


def packed_layers(given: QuantizerInput) -> dict[str, Packed]:
    return rtn.quantize(given).layers


def with_numpy(packed: Packed) -> Packed:
    arrays = (np.array(array) for array in (packed.weight, packed.scales, packed.biases))
    return Packed(*arrays, np.int64(packed.bits), np.uint8(packed.group_size))


def model_with(**given: Any) -> DiffusionModel:
    return replace(loaded(), **given)


LAYERS = {name: plan_of() for name in NAMES}
RANGES = StepRanges((0, 2), (-1.0, -0.5), (1.0, 0.5))
PHASES, NUMPY_PHASES = {"late": {"a": 3}}, {"late": {"a": np.int64(3)}}

#: What means the same as the first of its row.
SAME: Mapping[str, Sequence[Any]] = {
    "prompts": [
        ["x", "y"],
        ("x", "y"),
        np.array(["x", "y"]),
        np.array(["x", "y"], object),
        [np.str_("x"), "y"],
        {"x": 1, "y": 2}.keys(),
        lambda: iter("xy"),
        lambda: (name for name in "xy"),
    ],
    "schedule": [
        [0, 4, 8],
        (8, 4, 0, 4),
        range(0, 9, 4),
        {0, 4, 8},
        np.array([0, 4, 8]),
        np.array([0, 4, 8], np.uint8),
        [np.int32(0), 4, np.int64(8)],
        mx.array([0, 4, 8]),
        lambda: (4 * i for i in range(3)),
    ],
    "subset": [
        [0, 2, 4],
        (0, 2, 4),
        range(0, 6, 2),
        np.arange(0, 6, 2),
        [np.int64(0), np.int8(2), 4],
        mx.array([0, 2, 4]),
        lambda: iter([0, 2, 4]),
    ],
    "layer": [
        plan_of(),
        plan_of(weight_bits=np.int64(4), activation_bits=np.uint8(8), group_size=np.int32(32), nbytes=np.int64(10)),
        plan_of(clip_percentile=[1, 99]),
        plan_of(clip_percentile=np.array([1.0, 99.0])),
        plan_of(reason=np.str_("why"), sensitivity=np.float32(0.5), sensitive=np.bool_(True)),
    ],
    "whole": [
        Plan(LAYERS, phase_weight_bits=PHASES, notes=("so",)),
        Plan(types.MappingProxyType(LAYERS), phase_weight_bits=PHASES, notes=["so"]),
        Plan(LAYERS, phase_weight_bits=NUMPY_PHASES, notes="so"),
        Plan(
            {name: plan_of(weight_bits=np.int64(4)) for name in reversed(NAMES)}, phase_weight_bits=PHASES, notes=["so"]
        ),
    ],
    "whole, layers alone": [
        Plan(LAYERS),
        LAYERS,
        types.MappingProxyType(LAYERS),
        [*LAYERS.values()],
        (*LAYERS.values(),),
    ],
    "rule": [
        RANGES,
        StepRanges([0, 2], [-1, -0.5], [1, 0.5]),
        StepRanges(np.array([0, 2]), np.array([-1, -0.5]), np.array([1, 0.5], np.float32)),
        StepRanges((np.int64(0), 2), (np.float32(-1), -0.5), (np.float64(1), np.float16(0.5))),
        StepRanges(mx.array([0, 2]), mx.array([-1, -0.5]), mx.array([1, 0.5])),
    ],
    "quantizer": [nearest(), packed_layers, nearest(with_numpy), nearest(notes=()), nearest(ranges={}, weights={})],
    "quantizer, with more": [
        nearest(notes=["so"], ranges={"a": RANGES}),
        nearest(notes=("so",), ranges={"a": StepRanges([0, 2], np.array([-1, -0.5]), [np.float32(1), 0.5])}),
        nearest(notes="so", ranges={"a": RANGES}),
    ],
    "load": [model_with(), model_with(latent_shape=[4, 4, 4]), model_with(latent_shape=np.array([4, 4, 4]))],
}

#: What is refused in every group, with what the line says of it.
NEVER: Mapping[str, Any] = {"None": None, "int": 3, "float": 0.5, "function": lambda *_: print}

#: What is refused besides, by group.
WRONG: Mapping[str, Mapping[str, Any]] = {
    "prompts": {
        "returned str": "red apple",
        "returned bytes": b"red apple",
        "returned dict": {"red apple": 1},
        "returned a set, which has no order": {"red apple", "rocket"},
        "returned none": [],
        "returned None in a list": ["red apple", None],
        "returned 3 in a tuple": ("red apple", 3),
        "returned b'x' in a ndarray": np.array([b"x"]),
        "returned ['x'] in a list": [["x"]],
        "returned one str in a ndarray": np.array("red apple"),
    },
    "schedule": {
        "returned str": "048",
        "returned dict": {0: 1},
        "returned none": np.array([]),
        "returned 9": [0, 9],
        "returned -1": range(-1, 3),
        "returned 0.5, no integer": [0, 0.5],
        "returned 4.0, no integer": np.linspace(0, 8, 3)[1:],
        "returned nan, no integer": [0, float("nan")],
        "returned True, no integer": [True],
        "returned np.True_, no integer": [np.True_],
        "returned None, no integer": [None],
        "returned [0, 4], no integer": np.array([[0, 4]]),
        "returned a count of more than 1,000 values": itertools.count,
    },
    "subset": {
        "returned str": "024",
        "returned none": (),
        "returned 6, which is none of them": [0, 6],
        "returned 2 more than once": np.array([2, 0, 2]),
        "returned 0.0, no integer": np.zeros(2),
        "returned nan, no integer": [float("nan")],
    },
    "layer": {
        "returned tuple for a made-up layer": (4, 8),
        "a made-up layer has weight_bits=4.5, no integer": plan_of(weight_bits=4.5),
        "a made-up layer has weight_bits=True, no integer": plan_of(weight_bits=True),
        "a made-up layer has group_size=nan, no integer": plan_of(group_size=float("nan")),
        "suggested_weight_bits=7: MLX quantizes weights to": plan_of(weight_bits=7),
        "group_size=16: MLX has groups of": plan_of(group_size=np.int64(16)),
        "clip_percentile=[nan, 99.0]: must ascend": plan_of(clip_percentile=(float("nan"), 99)),
        "a made-up layer has sensitivity=nan": plan_of(sensitivity=np.float32("nan")),
        "a made-up layer has LayerPlan(": plan_of(clip_percentile=None),
    },
    "whole": {
        "returned list of 1": [plan_of()],
        "it lacks b": {"a": plan_of()},
        "it has 'c', which is no layer": {**LAYERS, "c": plan_of()},
        "returned None for a": {**LAYERS, "a": None},
        "b has suggested_weight_bits=7": Plan({**LAYERS, "b": plan_of(weight_bits=7)}),
        "its phase_weight_bits has {'noon'": Plan(LAYERS, phase_weight_bits={"noon": {"a": 4}}),
        "its phase_weight_bits has {'late': {'c'": Plan(LAYERS, phase_weight_bits={"late": {"c": 4}}),
        "its phase_weight_bits has {'late': {'a': 7": Plan(LAYERS, phase_weight_bits={"late": {"a": 7}}),
        "a has weight bits 4.0, no integer": Plan(LAYERS, phase_weight_bits={"late": {"a": 4.0}}),
    },
    "rule": {
        "returned tuple": ((0,), (-1.0,), (1.0,)),
        "in what it returned, from_step holds 0.0, not a step index": StepRanges(np.zeros(1), (-1.0,), (1.0,)),
        "from_step must begin with 0": StepRanges((1,), (-1.0,), (1.0,)),
        "from_step holds 4, where the last of 4 steps is 3": StepRanges((0, 4), (-1.0, -1.0), (1.0, 1.0)),
        "low holds nan, not a finite number": StepRanges((0,), (np.float32("nan"),), (1.0,)),
        "low 2.0 is above high 1.0 at step 0": StepRanges((0,), [np.float32(2)], [1.0]),
        "have 1, 2 and 1 entries": StepRanges((0,), (-1.0, -2.0), (1.0,)),
        "returned float": StepRanges((0,), -1.0, (1.0,)),
    },
    "quantizer": {
        "returned no weights for time_mlp.0": lambda _: {},
        "returned layer 'nobody', which it was not given": lambda w: {**packed_layers(w), "nobody": None},
        "returned array for time_mlp.0, no Packed": nearest(lambda packed: packed.dequantize()),
        "returned 8 bits in groups of 32 for time_mlp.0; the plan has 4": nearest(
            lambda p: replace(p, bits=np.int8(8))
        ),
        "time_mlp.0 has bits=4.0, no integer": nearest(lambda packed: replace(packed, bits=4.0)),
        "returned float32 of shape (64, 2) for time_mlp.0; it must be float16": nearest(
            lambda packed: replace(packed, scales=packed.scales.astype(mx.float32))
        ),
        "returned list for time_mlp.0, no array": nearest(lambda packed: replace(packed, biases=[0])),
        "returned other weights at 'nowhere', which the model has not": nearest(weights={"nowhere": mx.zeros(1)}),
        "it must be shape (64,)": nearest(weights={"time_mlp.0.bias": np.zeros(63)}),
        "low holds nan": nearest(ranges={"a": StepRanges((0,), (float("nan"),), (1.0,))}),
    },
    "load": {
        "object is no Architecture, it lacks module, ": lambda: model_with(architecture=object()),
        "its latent_shape is (4, 4), not (height, width, channels)": lambda: model_with(latent_shape=(4, 4)),
        "its latent_shape holds 4.0, no integer": lambda: model_with(latent_shape=(4.0, 4, 4)),
        "its dtype is 'float32', none of MLX's": lambda: model_with(dtype="float32"),
    },
}


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes the user's functions return a value, or what a function returns."""
    monkeypatch.setattr(option, "MOST_VALUES", 1000)

    def answers(value: Any) -> None:
        called = value if isinstance(value, types.FunctionType | type) else lambda *_: value
        monkeypatch.setitem(globals(), "answer", called)

    return answers


@pytest.mark.parametrize("row", SAME)
def test_natural_forms_are_the_same(row: str, answering: Callable[[Any], None]) -> None:
    found = []
    for value in SAME[row]:
        answering(value)
        found.append(result(row.partition(",")[0]))
    assert found == [found[0]] * len(found)


def line_of(name: str) -> str:
    """The one line that an answer ends in, after the option's name."""
    with pytest.raises(ConfigError) as error:
        result(name)
    line, named = str(error.value), f"{CALLS[name][0]}._target_={__name__}.{name}: "
    assert "\n" not in line and line.startswith(named), line
    return line.removeprefix(named)


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in CALLS for words in (*NEVER, *WRONG[name])])
def test_others_end_in_one_line(name: str, words: str, answering: Callable[[Any], None]) -> None:
    answering({**NEVER, **WRONG[name]}[words])
    line = line_of(name)
    assert words in line or (words == "function" and "builtin_function_or_method" in line)
    assert line.startswith("must return ") or "is no Architecture" in line


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, OSError, SystemExit, ConfigError])
@pytest.mark.parametrize("name", CALLS)
def test_what_it_raises_ends_in_one_line(
    name: str, error: type[BaseException], answering: Callable[[Any], None]
) -> None:
    def fails(*_: Any) -> None:
        raise error("my own\nbug")

    answering(fails)
    if error is ConfigError:  # of calib's own checks within
        with pytest.raises(ConfigError, match=r"^my own\nbug$"):
            result(name)
        return
    line = line_of(name)
    said = "'my own\\nbug'" if error is KeyError else "my own bug"
    place = f"({Path(__file__).relative_to(Path.cwd())}:{fails.__code__.co_firstlineno + 1}); it must return "
    assert line.startswith(f"raised {error.__name__}: {said} {place}")


def test_a_generator_raises_while_it_is_read(answering: Callable[[Any], None]) -> None:
    def fails() -> Iterator[int]:
        yield 0
        raise RuntimeError("late")

    answering(fails)
    assert line_of("schedule").startswith("raised RuntimeError: late (")


def annotated(num_steps: int, which: int | str = 0, steps: Sequence = (), more: list[int] | None = None):
    return [0, *steps, *(more or [])] if which == "all" else [num_steps]


def test_parameters_may_have_any_annotation() -> None:
    """One of several types, and a list of anything."""
    target = {"_target_": f"{__name__}.annotated"}
    assert schedule_of({**target, "which": "all", "steps": [2], "more": [4]}, STEPS) == (0, 2, 4)
    assert schedule_of({**target, "which": 1}, STEPS) == (STEPS,)
    for wrong, allowed in {"which": "must be text", "steps": "must be a list", "more": "must be a list"}.items():
        with pytest.raises(ConfigError, match=rf"^timestep_schedule\.{wrong}=0\.5: {allowed}"):
            schedule_of({**target, wrong: 0.5}, STEPS)


# What is refused for what it says of itself, and never called


def called(*_: Any, **__: Any) -> Any:
    raise AssertionError("it must not be called")


def says_nothing(num_steps: int) -> None:
    called()


def says_text(num_steps: int) -> str:
    return str(called())


def says_mapping(num_steps: int) -> dict[int, int] | None:
    called()


def by_position(num_steps: int, /) -> list[int]:
    return [called()]


async def later(num_steps: int) -> list[int]:
    return [called()]


def says_steps(observed: Observed) -> tuple[int, ...]:
    return (called(),)


def one_by_one(observed):
    yield called()


class NoRule:
    def __init__(self, observed: Observed):
        called()


def says_integer(layer: LayerSummary) -> int:
    return int(called())


def says_layer_plan(layers: Mapping[str, LayerSummary]) -> LayerPlan:
    return plan_of(weight_bits=called())


def says_plan(work: QuantizerInput) -> Plan:
    return Plan(called())


def says_array(shift: float, image_size: Sequence[int], name: str) -> mx.array:
    return mx.array(called())


REFUSED = {
    ("schedule", "says_nothing"): "must return several values or DriftSchedule; it says that it returns NoneType",
    ("schedule", "says_text"): "must return several values or DriftSchedule; it says that it returns str",
    ("schedule", "says_mapping"): "must return several values or DriftSchedule; it says that it returns dict[int, int]",
    ("schedule", "by_position"): "must take num_steps; this one takes num_steps by position alone",
    ("schedule", "later"): "is asynchronous; name an ordinary function",
    ("schedule", "nothing.there"): "names no function (AttributeError: ",
    ("subset", "says_nothing"): "must return several values; it says that it returns NoneType",
    ("layer", "says_integer"): "must return LayerPlan; it says that it returns int",
    ("whole", "says_layer_plan"): "must return Plan or Mapping or list or tuple; it says that it returns LayerPlan",
    ("rule", "says_steps"): "must return StepRanges; it says that it returns tuple[int, ...]",
    ("rule", "one_by_one"): "must return StepRanges; it says that it returns Iterator",
    ("rule", "NoRule"): "must return StepRanges; it says that it returns NoRule",
    ("quantizer", "says_plan"): "must return Quantized or Mapping; it says that it returns Plan",
    ("load", "says_array"): "must return DiffusionModel; it says that it returns array",
}


@pytest.mark.parametrize(("name", "target"), REFUSED)
def test_what_cannot_be_an_option_is_not_called(name: str, target: str) -> None:
    group, call = CALLS[name]
    with pytest.raises(ConfigError) as error:
        call({"_target_": f"{__name__}.{target}"})
    assert str(error.value).startswith(f"{group}._target_={__name__}.{target}: {REFUSED[name, target]}")


@pytest.mark.parametrize("target", ["builtins.print", "os.getcwd", "time.time", "math.pi", "None", "", "os", 7])
def test_what_is_no_function_of_pythons_is_no_option(target: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^prompts\._target_={target}: names no function \(.*\)$"):
        prompts_of({"_target_": target})


@pytest.mark.parametrize("body", ["1 / 0", "def f(:", "raise SystemExit(3)", "import nowhere_at_all"])
def test_a_module_that_fails_is_told(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_module.py").write_text(f"{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        prompts_of({"_target_": "failing_module.f"})
    assert str(error.value).startswith("prompts._target_=failing_module.f: names no function (")
    assert "\n" not in str(error.value)
