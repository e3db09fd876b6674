"""Reconstruction block by block: its arithmetic against float64, its errors by other means, resumed, and refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from calib.activations.batches import Batch
from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges
from calib.base.errors import CalibError, ConfigError
from calib.models.architecture import Conditioning
from calib.models.grids import searched
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import ModelDtype
from calib.quantization import taqdit
from calib.quantization.checkpoint import load, save
from calib.quantization.model import InputRule, QuantizedModel
from calib.quantization.quantizer import ChannelRange, Quantized, QuantizerInput
from calib.quantization.reconstruction.adaround import Roundings, rounding, undecided
from calib.quantization.reconstruction.lsq import InputSteps, stepped
from calib.quantization.reconstruction.reconstruct import Draw, Parameters, See, Training, reconstruct
from calib.quantization.reconstruction.rounded import Rounded, applied_by_rows, linear
from calib.quantization.unfinished import MARK, unfinished

import mlx.core as mx
import numpy as np
import pytest
from helpers import check_config_error, float64
from mlx import nn
from plain_dit import skeleton
from quantizing import DTYPES, Array, integers_of, same
from tiny_models import tiny_transformer
from watching import keep

STEPS = 4
TIMESTEPS = (900.0, 600.0, 300.0, 100.0)
#: As few iterations as show that it learns.
QUICK = {"iterations": 12, "batch_size": 4, "held_out": 0.34, "shift": True, "migrate": 0.125}
#: The block that is trained: one of each kind.
BLOCK = {"sd3": "mm_block_0", "flux": "unified_block_0"}


# Arithmetic


def sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


@pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
def test_roundings_and_their_penalty(progress: float) -> None:
    v = np.linspace(-6, 6, 1001)
    h = np.clip(1.2 * sigmoid(v) - 0.1, 0, 1)
    cost = 1 - np.abs(2 * h - 1) ** (8 - 6 * progress)
    slope = np.where((h > 0) & (h < 1), 1.2 * sigmoid(v) * (1 - sigmoid(v)), 0)
    given = mx.array(v.astype(np.float32))
    assert float64(rounding(given)) == pytest.approx(h, abs=1e-6)
    assert float64(mx.grad(lambda x: rounding(x).sum())(given)) == pytest.approx(slope, abs=1e-6)
    assert float64(undecided(mx.array(h.astype(np.float32)), progress)) == pytest.approx(cost, abs=1e-5)


@pytest.mark.parametrize("scale", [0.03, 0.4, 3.0])
def test_gradients_of_steps_are_those_of_lsq(scale: float) -> None:
    """Equation 3, with the ends of the grid at -5 and 10."""
    x = np.random.RandomState(0).randn(64, 8) * 2
    v = x / scale
    inside = (v > -5) & (v < 10)
    by_scale = np.where(inside, np.round(v) - v, np.where(v <= -5, -5, 10))
    given, s, ends = mx.array(x.astype(np.float32)), mx.array(scale), (mx.array(-5.0), mx.array(10.0))
    assert float64(stepped(given, s, *ends)) == pytest.approx(np.clip(np.round(v), -5, 10) * scale, abs=1e-5)
    of_x, of_scale = mx.grad(lambda x, s: stepped(x, s, *ends).sum(), argnums=(0, 1))(given, s)
    assert np.array_equal(float64(of_x) != 0, inside)
    assert float(of_scale.item()) == pytest.approx(by_scale.sum(), rel=1e-4)


RULES = {
    "static": InputRule(StepRanges((0,), (-1.0,), (2.0,)), (4,)),
    "by step": InputRule(StepRanges((0, 2), (-1.0, -3.0), (2.0, 0.5)), (4, 8, 6, 3)),
    "16 bits, and zeros": InputRule(StepRanges((0, 1, 3), (-1.0, 0.0, -2.0), (2.0, 0.0, 2.0)), (16, 4, 4, 4)),
    "moved": InputRule(StepRanges((0, 2), (-1.0, -3.0), (2.0, 0.5)), (4, 16, 6, 3), (1.0, 2.0, 5.0), (0.25, -0.5, 0.0)),
}


def by_hand(rule: InputRule, x: Array, step: int) -> Array:
    m, z = (np.array(v or otherwise) for v, otherwise in ((rule.divisors, [1.0]), (rule.shifts, [0.0])))
    y, bits, (low, high) = x / m, rule.bits[min(step, len(rule.bits) - 1)], rule.ranges.at(step)
    low, high = min(low, 0), max(high, 0)
    if bits == 16 or low == high:
        return y
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    found: Array = (np.clip(np.round((y - z) / scale) + zero, 0, 2**bits - 1) - zero) * scale + z
    return found


@pytest.mark.parametrize("rule", RULES)
def test_inputs_of_rows_of_any_step(rule: str) -> None:
    """By hand, as a saved model rounds them, as a part does, and in training, before and after factors are learned."""
    own, steps = RULES[rule], np.array([3, 0, 2, 1, 0])
    x = np.random.RandomState(1).randn(5, 7, 3).astype(np.float32) * 2
    expected = np.stack([by_hand(own, row.astype(np.float64), step) for row, step in zip(x, steps, strict=True)])
    given = mx.array(x)
    one_by_one = mx.stack([own.apply(row, step) for row, step in zip(given, steps.tolist(), strict=True)])
    trained = InputSteps.of(own)
    for found in (one_by_one, applied_by_rows(own, given, steps), trained.rounded(given, trained.factors(), steps)):
        assert float64(found) == pytest.approx(expected, abs=1e-5)
    factors = trained.factors() * mx.linspace(1.25, 0.75, len(own.ranges.low))
    learned = applied_by_rows(trained.learned(factors), given, steps)
    assert float64(learned) == pytest.approx(float64(trained.rounded(given, factors, steps)), abs=1e-5)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_roundings_begin_at_the_nearest(bits: int, dtype: str, whole_rows: bool) -> None:
    weight = np.random.RandomState(bits).randn(12, 192).astype(np.float32)
    weight[:3] = np.array([0, 0.25, 1e-9])[:, None]
    start = searched(mx.array(weight), bits, 64, DTYPES[dtype], rounds=2, whole_rows=whole_rows)
    own, v = Roundings.of(mx.array(weight), start)
    apart = np.abs(integers_of(own.packed(v)) - integers_of(start))
    assert apart[3:].mean() < 0.01 and apart[3:].max() <= 1, "but for ties"
    soft, (scale, bias) = float64(own.weight(rounding(v))), (float64(a) for a in (start.scales, start.biases))
    ends = np.repeat(bias, 64, axis=1), np.repeat(bias + scale * (2**bits - 1), 64, axis=1)
    clipped = np.clip(weight, np.minimum(*ends), np.maximum(*ends))
    assert soft == pytest.approx(clipped, abs=2e-5), "in between, before training"
    assert not whole_rows or (np.ptp(scale, axis=1).max(), np.ptp(bias, axis=1).max()) == (0, 0)


# On small transformers


@cache
def states(images: int = 3) -> tuple[Batch, ...]:
    """Noise and random text, with guidance's two halves, a batch to an image."""
    random, found = np.random.RandomState(0), []
    for image in range(images):
        shapes = ((2 * STEPS, 8, 6, 16), (2 * STEPS, 5, 64), (2 * STEPS, 32))
        x, tokens, pooled = (mx.array(random.randn(*shape).astype(np.float32)) for shape in shapes)
        times = mx.array(TIMESTEPS * 2)
        mx.eval(x, tokens, pooled, times)
        found.append(Batch((image,) * STEPS, tuple(range(STEPS)), x, Conditioning(tokens, pooled), times))
    return tuple(found)


@cache
def tiny(structure: str) -> MMDiTArchitecture:
    return MMDiTArchitecture(tiny_transformer(structure, spread=1.0, text=64, pooled=32))


@cache
def extremes(structure: str) -> Mapping[str, ChannelRange]:
    """What statistics would say."""
    own, points, found = tiny(structure), tap_points(tiny(structure), TapSelection()), list[dict[str, mx.array]]()
    for batch in states():
        seen: dict[str, mx.array] = {}
        with tapped(own, points, keep(seen)):
            mx.eval(own.velocity(batch.x, batch.text, batch.timesteps), seen)
        found.append(seen)
    ranges = {}
    for point in points:
        x = np.concatenate([float64(s[point.name]).reshape(-1, s[point.name].shape[-1]) for s in found])
        ranges.update(dict.fromkeys(point.names, ChannelRange(x.min(axis=0), x.max(axis=0))))
    return ranges


def work_on(structure: str = "sd3", bits: int = 3, a: int = 8, only: str = "", images: int = 3) -> QuantizerInput:
    """Attention and MLP of the structure's block, or all layers whose names hold ``only``."""
    own, only = tiny(structure), only or BLOCK[structure]
    layers = {
        name: layer
        for name, layer in own.layers().items()
        if isinstance(layer, nn.Linear) and only in name and "adaln" not in name
    }

    def ranges(name: str, *_: Any) -> StepRanges:
        found = extremes(structure)[name]
        return StepRanges((0,), (float(found.low.min()),), (float(found.high.max()),))

    return replace(
        QuantizerInput.without_layers(own, mx.float16),
        layers=layers,
        plan={**dict.fromkeys(layers, LayerPlan(bits, a, group_size=32)), "mm_block_0": LayerPlan(4, 8)},
        batches=lambda size=None: iter(states(images)),
        channel_range=extremes(structure).get,
        ranges=ranges,
    )


@cache
def trained(structure: str, **parameters: Any) -> Quantized:
    return taqdit.quantize(work_on(structure), **{**QUICK, **parameters})


def rules_of(made: Quantized, bits: int = 8) -> dict[str, InputRule]:
    return {
        name: InputRule(ranges, (bits,), made.divisors.get(name, ()), made.shifts.get(name, ()))
        for name, ranges in made.ranges.items()
    }


@contextmanager
def as_saved(structure: str, made: Quantized, bits: int = 8) -> Iterator[None]:
    """Run the model with what was made of it, its inputs rounded as those of a saved model are."""
    own, layers = tiny(structure), tiny(structure).layers()
    rules = rules_of(made, bits)
    weights = {name: layers[name].weight for name in made.layers}
    try:
        for name, packed in made.layers.items():
            layers[name].weight = packed.dequantize()
        with tapped(own, [TapPoint(name, "") for name in rules], lambda name, x: rules[name].apply(x, 0)):
            yield
    finally:
        for name, weight in weights.items():
            layers[name].weight = weight


def outputs_of_block(structure: str) -> list[Array]:
    """Of the image that is held out."""
    own, batch, found = tiny(structure), states()[-1], list[Any]()
    with own.keeping(own.blocks().index(BLOCK[structure]), found.append):
        mx.eval(own.velocity(batch.x, batch.text, batch.timesteps))
    return [float64(array) for array in (found[0] if isinstance(found[0], tuple) else found) if array is not None]


def error_of_block(structure: str, made: Quantized) -> float:
    """Its relative squared error there."""
    before = outputs_of_block(structure)
    with as_saved(structure, made):
        after = outputs_of_block(structure)
    return sum(float(np.mean((a - b) ** 2) / np.mean(a**2)) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("structure", BLOCK)
def test_a_trained_block_errs_less_on_what_it_has_not_seen(structure: str) -> None:
    errors = {n: error_of_block(structure, trained(structure, iterations=n)) for n in (0, QUICK["iterations"])}
    assert errors[QUICK["iterations"]] < 0.95 * errors[0]
    made = trained(structure)
    assert made.layers.keys() == work_on(structure).layers.keys() == made.ranges.keys()
    assert "1 where rounded to nearest" in made.notes[-1]


SWITCHES: dict[str, dict[str, Any]] = {
    "channel": {"granularity": taqdit.Granularity.CHANNEL},
    "apart": {"joint": False},
    "no shift": {"shift": False},
    "no migration": {"migrate": 0.0},
    "no drop": {"qdrop": 0.0},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches(switch: str) -> None:
    """Each is another model, never worse than its own start, and what is switched off is not in it."""
    given = SWITCHES[switch]
    start, made = trained("sd3", **{**given, "iterations": 0}), trained("sd3", **given)
    assert error_of_block("sd3", made) <= error_of_block("sd3", start)
    assert any(not same(p, trained("sd3").layers[n]) for n, p in made.layers.items())
    after_gelu = {name for name in made.layers if name.endswith("fc2")}
    assert made.shifts.keys() == (after_gelu if given.get("shift", True) else set())
    assert made.divisors.keys() <= after_gelu and bool(made.divisors) == bool(given.get("migrate", True))
    if switch == "channel":
        assert all(np.ptp(float64(p.scales), axis=1).max() == 0 for p in made.layers.values())


def test_what_is_moved_is_the_same_model_unrounded() -> None:
    """Weights times m, inputs divided by m: with fine grids for both the output is as before."""
    own, batch = tiny("sd3"), states()[0]
    made = taqdit.quantize(work_on(bits=8, a=15), **{**QUICK, "iterations": 0})
    assert made.divisors
    before = float64(own.velocity(batch.x, batch.text, batch.timesteps))
    with as_saved("sd3", made, bits=15):
        after = float64(own.velocity(batch.x, batch.text, batch.timesteps))
    assert np.mean((before - after) ** 2) < 1e-3 * np.mean(before**2)


def test_copies_of_a_layer_are_multiplied_alike() -> None:
    """Where a phase has other bits for a layer, this alone is quantized once more, for the same inputs."""
    work = work_on(only="fc2")
    whole = taqdit.quantize(work, **{**QUICK, "iterations": 0})
    name = min(whole.divisors)
    copy = taqdit.quantize(replace(work, layers={name: work.layers[name]}), **{**QUICK, "iterations": 0})
    assert copy.divisors == {name: whole.divisors[name]}


def test_the_plain_case_without_inputs_to_round() -> None:
    made = taqdit.quantize(work_on(a=16), **{**QUICK, "iterations": 4})
    assert (made.ranges, made.shifts, made.divisors) == ({}, {}, {})
    assert "roundings of weights alone" in made.notes[0]


def test_an_input_that_is_always_zero_stays(structure: str = "sd3") -> None:
    work = work_on(structure)
    still = "mm_block_0.image.attn.o_proj"
    zero = replace(work, ranges=lambda n, *_: StepRanges((0,), (0.0,), (0.0,)) if n == still else work.ranges(n, *_))
    made = taqdit.quantize(zero, **{**QUICK, "iterations": 2})
    assert still not in made.ranges and still in made.layers


# Going on


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_reconstruct import *
taqdit.quantize(replace(work_on(only=SEVERAL), scratch=Path({folder!r}) / "cache", home=Path({folder!r})), **QUICK)
"""
#: Of three blocks.
SEVERAL = "image.mlp"


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    """To the same bits, without doing again what was done; another rate is refused, but of another method or run."""
    code = WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None and not list(tmp_path.glob("*/*/*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (done,) = tmp_path.glob("*/*/*.safetensors")
    before = done.stat().st_mtime_ns
    work = replace(work_on(only=SEVERAL), scratch=tmp_path / "cache", home=tmp_path)
    other = {**QUICK, "rate": 0.06, "iterations": 1}
    named = ["quantizer.rate=0.06", "has 0.05", str(tmp_path / MARK)]
    check_config_error(lambda: taqdit.quantize(work, **{**QUICK, "rate": 0.06}), named)
    with unfinished(replace(work, home=tmp_path / "cache"), "learned", {"rate": 7}):
        pass
    mark = (tmp_path / MARK).read_bytes()
    for less in ({"method": "learned", "rate": 0.06}, {"method": "TaQDiT", "rate": 0.05, "memory_gb": 4}):
        with pytest.raises(KeyboardInterrupt), unfinished(work, less.pop("method"), less):
            raise KeyboardInterrupt
        (tmp_path / MARK).write_bytes(mark)
    made, whole = taqdit.quantize(work, **QUICK), taqdit.quantize(replace(work, scratch=None), **QUICK)
    assert all(same(whole.layers[name], packed) for name, packed in made.layers.items())
    assert (made.ranges, made.shifts, made.divisors) == (whole.ranges, whole.shifts, whole.divisors)
    assert made.notes == whole.notes
    assert done.stat().st_mtime_ns == before and len(list(done.parent.iterdir())) == 3
    done.write_bytes(done.read_bytes()[:-1000])
    again = taqdit.quantize(work, **QUICK)
    assert all(same(whole.layers[name], packed) for name, packed in again.layers.items()), "damaged, and done again"
    taqdit.quantize(work, **other)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 2


@pytest.mark.parametrize("memory", [0.0, 2.0])
def test_rows_in_files_are_the_same(memory: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = taqdit.quantize(replace(work_on(), scratch=tmp_path), **{**QUICK, "memory_gb": memory, "iterations": 3})
    wanted = trained("sd3", iterations=3)
    assert all(same(wanted.layers[name], packed) for name, packed in made.layers.items())
    assert all(path.suffix == ".lock" for path in tmp_path.iterdir() if path.is_file())
    assert ("kB of what blocks read" in capsys.readouterr().err) == (memory == 0)


# A method of its own, and what goes wrong


@dataclass
class Stretched:
    """Weights rounded to nearest, times a number that is trained; the loss is NaN from an iteration on."""

    work: QuantizerInput
    fails_at: int
    phases: Sequence[Mapping[str, float]] = ({"stretch": 0.01},)
    calls: int = 0

    def begin(self, names: Sequence[str], observe: Callable[[See], None]) -> Parameters:
        self.calls = 0
        self.packed = {n: searched(self.work.layers[n].weight, 3, 32, mx.float16) for n in names}
        return {"stretch": {name: mx.array(0.9) for name in names}}

    def values(self, own: Parameters, draw: Draw) -> dict[str, mx.array]:
        self.calls += 1
        return own["stretch"]

    def run(self, values: dict[str, mx.array], draw: Draw, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        return linear(layer, self.packed[name].dequantize() * values[name], x)

    def penalty(self, values: dict[str, mx.array], draw: Draw) -> mx.array:
        return mx.array(float("nan") if self.calls >= self.fails_at else 0.0)

    def finish(self, own: Parameters) -> Rounded:
        return Rounded(
            {
                name: replace(p, scales=(p.scales * own["stretch"][name]).astype(mx.float16))
                for name, p in self.packed.items()
            }
        )


def test_a_loss_that_is_no_number() -> None:
    work = work_on(only=SEVERAL)
    plan = {name: layer for name, layer in work.plan.items() if name in work.layers}
    work = replace(work, plan=plan)
    found = reconstruct(work, Stretched(work, fails_at=13), Training(16, 4, held_out=0.34), {})
    assert len(found.notes) == 3
    assert found.notes[0] == "mm_block_0: the loss of iteration 13 is not finite: the best before it is kept"
    assert all(0 < least < start for start, least in found.errors.values())
    assert all(np.isfinite(float64(p.scales)).all() for p in found.layers.values())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"iterations": -1}, ("quantizer.iterations=-1", "0 (rounding to nearest) or more")),
        ({"batch_size": 0}, ("quantizer.batch_size=0", "1 or more")),
        ({"qdrop": 1.0}, ("quantizer.qdrop=1.0", "less than 1")),
        ({"held_out": 0.0}, ("quantizer.held_out=0.0", "more than 0")),
        ({"held_out": 1.0}, ("quantizer.held_out=1.0", "less than 1")),
        ({"seed": -1}, ("quantizer.seed=-1", "0 or more")),
        ({"memory_gb": -1.0}, ("quantizer.memory_gb=-1.0", "0 (files alone) or more")),
        ({"rate": 0.0}, ("quantizer.rate=0.0", "more than 0")),
        ({"rate": float("nan")}, ("quantizer.rate=nan", "more than 0")),
        ({"step_rate": float("inf")}, ("quantizer.step_rate=inf", "more than 0")),
        ({"penalty": -1.0}, ("quantizer.penalty=-1.0", "0 or more")),
        ({"migrate": 0.6}, ("quantizer.migrate=0.6", "0 (none) to 0.5")),
    ],
)
def test_impossible_parameters(parameters: Any, words: Sequence[str]) -> None:
    """Found before anything is loaded."""
    nothing = QuantizerInput.without_layers(tiny("sd3"), mx.float16)
    check_config_error(lambda: taqdit.quantize(nothing, **parameters), words)


def lacking_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("calib.quantization.scratch.free_bytes", lambda _: 1000)


@pytest.mark.parametrize(
    ("change", "parameters", "words"),
    [
        (lambda work: replace(work, ranges=lambda *_: None), {}, ("needs activations.h5", "calib collect")),
        (lambda work: replace(work, channel_range=lambda *_: None), {}, ("needs activations.h5", "calib collect")),
        (lambda work: work_on(images=1), {}, ("1 calibration image", "calibration.images")),
        (lambda work: work, {"held_out": 0.9}, ("3 calibration images", "3 would be held out")),
        (lambda work: work, {"memory_gb": 0.0}, ("are free", "cache_dir", "calibration.images")),
        (
            lambda work: replace(work, batches=lambda size=None: (replace(b, x=b.x * 1e6) for b in states())),
            {},
            ("the states", "float16 cannot hold", "model.dtype=bfloat16"),
        ),
    ],
)
def test_what_is_refused(
    change: Callable[[QuantizerInput], QuantizerInput],
    parameters: Any,
    words: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    lacking_room(monkeypatch)
    with pytest.raises(CalibError) as error:
        taqdit.quantize(replace(change(work_on()), scratch=tmp_path), **{**QUICK, **parameters})
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message
    assert all(path.suffix == ".lock" for path in tmp_path.iterdir())


def test_a_model_that_does_not_run_in_parts() -> None:
    own = skeleton("plain", ModelDtype.FLOAT32, [32, 32], 2.0, 2)
    layers = {name: layer for name, layer in own.layers().items() if isinstance(layer, nn.Linear)}
    work = replace(QuantizerInput.without_layers(own, mx.float16), layers=layers)
    with pytest.raises(ConfigError, match="does not run in parts"):
        taqdit.quantize(replace(work, plan=dict.fromkeys(layers, LayerPlan(4, 16))))


# Saved


def test_a_saved_model_has_what_is_moved(tmp_path: Path) -> None:
    """In a version of the format that readers of the first one refuse."""
    moved = RULES["moved"]
    model = QuantizedModel({}, {"w": mx.zeros(3)}, {"a": RULES["by step"], "b": moved}, TIMESTEPS, {})
    save(model, tmp_path / "moved")
    assert load(tmp_path / "moved").inputs == model.inputs
    save(replace(model, inputs={"a": RULES["by step"]}), tmp_path / "plain")
    versions = [
        (tmp_path / name / "config.json").read_text().count('"format_version": 2') for name in ("moved", "plain")
    ]
    assert versions == [1, 0]
    config = tmp_path / "moved" / "config.json"
    for good, bad in (("0.25", "NaN"), ("5.0", "0.0"), ('"shifts"', '"shift"')):
        text = config.read_text()
        config.write_text(text.replace(good, bad, 1))
        with pytest.raises(CalibError, match=r"config\.json"):
            load(tmp_path / "moved")
        config.write_text(text)
