"""The rows of ``benchmark_quantization.py``, and what it claims: plans, quantizers, rules for inputs."""

import calib  # isort: skip  (it sees to it that a fast BLAS is loaded before MLX)

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from calib.analysis import ranges
from calib.analysis.heuristic import Heuristic
from calib.analysis.heuristics import allocate, cv, mse, sensitivity, sqnr, uniform
from calib.analysis.heuristics import range as range_heuristic
from calib.analysis.layers import read_summaries
from calib.analysis.plan import Plan
from calib.analysis.ranges import RangeRule
from calib.analysis.sensitivities import Of, Sensitivities
from calib.models.model import DiffusionModel
from calib.quantization import fit, gptq, learned, percentile, rtn, smooth, taqdit
from calib.quantization.quantizer import Quantizer
from calib.stages.analyze import importance_of, sensitivities_of
from calib.stages.settings import Method, Settings

assert calib.__version__

A16 = 16


@dataclass(frozen=True)
class Row:
    """One quantized model: how its plan is made, and how it is applied."""

    label: str
    plan: Callable[["Setup"], Plan]
    quantizer: Quantizer = rtn.quantize
    rule: RangeRule = ranges.static
    activation_bits: int | None = None  # None: as planned
    phase_bits: bool = False


@dataclass
class Setup:
    """What all rows share."""

    settings: Settings
    model: DiffusionModel
    run: Path
    importance: dict = field(default_factory=dict)

    @cached_property
    def layers(self):
        return read_summaries(self.run)[0]

    def heuristic(self, heuristic: Heuristic, of: Of = Of.PICTURE, method: Method = Method.GRADIENT) -> Plan:
        layers, own = self.layers, self.settings.analyze
        analyze = replace(own, sensitivity=replace(own.sensitivity, of=of, method=method))
        settings, measured = replace(self.settings, analyze=analyze), []

        def measure() -> Sensitivities:
            start = time.monotonic()
            measured.append(sensitivities_of(settings, self.run, layers, lambda: self.model))
            if (seconds := time.monotonic() - start) > 1:
                print(f"sensitivities of the {of}, {method}: {seconds:.1f} s", flush=True)
            return measured[-1]

        plan = heuristic.plan(layers, measure)
        self.importance[id(plan)] = (plan, importance_of(plan, measured))
        return plan


def by_layer(function, **parameters) -> Callable[[Setup], Plan]:
    return lambda setup: setup.heuristic(Heuristic.of(partial(function, **parameters), function.__module__))


def whole(function, of=Of.PICTURE, method=Method.GRADIENT, **parameters) -> Callable[[Setup], Plan]:
    return lambda setup: setup.heuristic(Heuristic.of(partial(function, **parameters), function.__module__), of, method)


def kept_adaln(bits: int) -> Callable[[Setup], Plan]:
    """Uniform bits, adaLN at 8."""

    def plan(setup: Setup) -> Plan:
        base = by_layer(uniform.plan_layer, weight_bits=bits)(setup)
        layers = {
            name: replace(layer, weight_bits=8) if name.endswith("adaln") else layer
            for name, layer in base.layers.items()
        }
        return replace(base, layers=layers)

    return plan


def average_bits(plan: Plan, setup: Setup) -> float:
    """Bits a weight of ``plan``, scales and biases counted."""
    layers = setup.model.architecture.layers()
    found = [(plan.layers[name], layer.weight) for name, layer in layers.items() if layer.weight.ndim == 2]
    bits = sum(w.size * (layer.weight_bits + 32 / layer.group_size) for layer, w in found)
    return bits / sum(w.size for _, w in found)


def allocated_like(other: Callable[[Setup], Plan]) -> Callable[[Setup], Plan]:
    """The allocator at the bytes of another plan."""

    def plan(setup: Setup) -> Plan:
        return whole(allocate.plan_layers, average_bits=average_bits(other(setup), setup) + 1e-9)(setup)

    return plan


def uniformly(bits: int, group_size: int = 64) -> Callable[[Setup], Plan]:
    return by_layer(uniform.plan_layer, weight_bits=bits, group_size=group_size)


RANGE = by_layer(range_heuristic.plan_layer)
WEIGHTS = [
    *(Row(f"uniform W{bits}", uniformly(bits), activation_bits=A16) for bits in (8, 6, 5, 4, 3, 2)),
    Row("uniform W3, adaLN at 8", kept_adaln(3), activation_bits=A16),
    *(
        Row(f"allocate {bits}", whole(allocate.plan_layers, average_bits=bits), activation_bits=A16)
        for bits in (6.5, 5.5, 4.5, 4.0, 3.5, 3.0)
    ),
    Row(
        "allocate 4.5, per phase",
        whole(allocate.plan_layers, of=Of.OUTPUT, average_bits=4.5, per_phase=True),
        activation_bits=A16,
    ),
    Row("range, weights", RANGE, activation_bits=A16),
    Row("allocate at range's bytes", allocated_like(RANGE), activation_bits=A16),
    Row("sensitivity 1e-4, weights", whole(sensitivity.plan_layers, tolerance=1e-4), activation_bits=A16),
    Row("sqnr 25 dB, weights", by_layer(sqnr.plan_layer, target=25.0), activation_bits=A16),
    *(
        Row(f"{name} W{bits}", uniformly(bits), function, activation_bits=A16)
        for bits in (4, 3)
        for name, function in (
            ("MLX's rounding", partial(rtn.quantize, search=False)),
            ("fit", fit.quantize),
            ("gptq", gptq.quantize),
            ("smooth", smooth.quantize),
        )
    ),
    *(
        Row(f"allocate {bits}, {name}", whole(allocate.plan_layers, average_bits=bits), function, activation_bits=A16)
        for bits in (4.5, 3.5, 3.0)
        for name, function in (
            ("fit", fit.quantize),
            ("gptq", gptq.quantize),
            ("gptq for both sides", partial(gptq.quantize, pictures=128)),
            ("learned", learned.quantize),
        )
    ),
    *(
        Row(
            f"allocate {bits} of the {of} by {method}, gptq",
            whole(allocate.plan_layers, of=of, method=method, average_bits=bits),
            gptq.quantize,
            activation_bits=A16,
        )
        for of, method in ((Of.OUTPUT, Method.GRADIENT), (Of.OUTPUT, Method.TRIALS))
        for bits in (4.5, 3.5)
    ),
]
RULES = {
    "static": ranges.static,
    "per_step": ranges.per_step,
    "grouped": ranges.grouped,
    "polynomial": ranges.polynomial,
}
INPUTS = [
    *(
        Row(f"W8 A{bits} {name}", uniformly(8), rule=rule, activation_bits=bits)
        for bits in (8, 6)
        for name, rule in RULES.items()
    ),
    *(
        Row(f"W8 A{bits} mse clip {name}", by_layer(mse.plan_layer, activation_bits=bits), rule=RULES[name])
        for bits in (8, 6)
        for name in ("static", "per_step")
    ),
    *(
        Row(f"W8 A{bits} {label}", uniformly(8), quantizer, activation_bits=bits)
        for bits in (8, 6)
        for label, quantizer in (("percentile", percentile.quantize), ("smooth", smooth.quantize))
    ),
]
PLANS = [
    Row("range", RANGE),
    Row("range, bits by phase", RANGE, phase_bits=True),
    Row("cv", by_layer(cv.plan_layer)),
    Row("sqnr 30 dB", by_layer(sqnr.plan_layer)),
    Row("sqnr 25 dB", by_layer(sqnr.plan_layer, target=25.0)),
    Row("sensitivity 1e-4", whole(sensitivity.plan_layers, tolerance=1e-4)),
    Row("sensitivity 1e-5", whole(sensitivity.plan_layers, tolerance=1e-5)),
    Row("allocate 4.5, A8 static", whole(allocate.plan_layers)),
    Row("allocate 4.5, A8 per_step", whole(allocate.plan_layers), rule=ranges.per_step),
    Row("allocate 4.5, gptq, A8 per_step", whole(allocate.plan_layers), gptq.quantize, ranges.per_step),
    Row("allocate 4.5, fit, A16", whole(allocate.plan_layers), fit.quantize, ranges.per_step, A16),
    *(
        Row(
            f"allocate 4.5, fit, A{bits} {how}",
            whole(allocate.plan_layers, activation_bits=bits, average_activation_bits=average, step_groups=groups),
            fit.quantize,
            ranges.per_step,
        )
        for bits in (8, 6, 5)
        for how, average, groups in (("everywhere", None, None), ("by layer", bits, 1), ("by step", bits, None))
    ),
]
W4A8 = {
    "rtn": rtn.quantize,
    "gptq": gptq.quantize,
    "taqdit": taqdit.quantize,
    "taqdit, roundings and steps apart": partial(taqdit.quantize, joint=False),
    "taqdit, no QDrop": partial(taqdit.quantize, qdrop=0),
    "taqdit, shift": partial(taqdit.quantize, shift=True),
    "taqdit, migration": partial(taqdit.quantize, migrate=0.125),
    "taqdit, by channel": partial(taqdit.quantize, granularity=taqdit.Granularity.CHANNEL),
}
#: With inputs of few bits, ranges by step.
ROTATED = {"gptq": 0, "gptq, rotated by 64": 64, "gptq, rotated by 256": 256}
RECONSTRUCTED = [
    *(Row(f"W4 A8, {name}", uniformly(4), function, activation_bits=8) for name, function in W4A8.items()),
    *(
        Row(f"W4 A8 per_step, {name}", uniformly(4), W4A8[name], ranges.per_step, activation_bits=8)
        for name in ("gptq", "taqdit")
    ),
    *(
        Row(
            f"W4 A{bits} by step, {name}",
            uniformly(4),
            partial(gptq.quantize, rotation=block),
            ranges.per_step,
            activation_bits=bits,
        )
        for bits in (8, 6, 4)
        for name, block in ROTATED.items()
    ),
]
ROWS = {
    "Weights alone": WEIGHTS,
    "Activations, weights at 8 bits": INPUTS,
    "Reconstruction": RECONSTRUCTED,
    "Whole plans": PLANS,
}

#: Claims to test: is the first better than the second?
CLAIMS = [
    ("allocate 4.5", "uniform W4"),
    ("allocate 3.5", "uniform W3"),
    ("allocate at range's bytes", "range, weights"),
    ("allocate 4.5, per phase", "allocate 4.5"),
    ("uniform W3, adaLN at 8", "uniform W3"),
    ("gptq W4", "uniform W4"),
    ("gptq W3", "uniform W3"),
    ("smooth W4", "uniform W4"),
    ("smooth W3", "uniform W3"),
    *((f"allocate {b}, {q}", f"allocate {b}") for b in (4.5, 3.5, 3.0) for q in ("fit", "gptq")),
    *((f"allocate {b}, gptq", f"allocate {b}, fit") for b in (4.5, 3.5, 3.0)),
    *((f"W4 A{b} by step, {name}", f"W4 A{b} by step, gptq") for b in (8, 6, 4) for name in list(ROTATED)[1:]),
    *(("W4 A8, taqdit", f"W4 A8, {name}") for name in W4A8 if name != "taqdit"),
    *(
        (f"allocate {b}, {better}", f"allocate {b}, {other}")
        for b in (4.5, 3.5, 3.0)
        for better, other in (("gptq for both sides", "gptq"), ("learned", "gptq"), ("learned", "gptq for both sides"))
    ),
    *((f"allocate {b}, gptq", f"allocate {b} of the output by {m}, gptq") for b in (4.5, 3.5) for m in Method),
    *((row, f"MLX's rounding W{b}") for b in (4, 3) for row in (f"uniform W{b}", f"fit W{b}", f"gptq W{b}")),
    ("allocate 4.5, gptq, A8 per_step", "allocate 4.5, gptq"),
    *((f"W8 A{b} {rule}", f"W8 A{b} static") for b in (8, 6) for rule in ("per_step", "grouped", "polynomial")),
    *((f"W8 A{b} mse clip static", f"W8 A{b} static") for b in (8, 6)),
    *((f"W8 A{b} {q}", f"W8 A{b} static") for b in (8, 6) for q in ("percentile", "smooth")),
    *((f"allocate 4.5, fit, A{b} by step", "allocate 4.5, fit, A16") for b in (8, 6, 5)),
    *((f"allocate 4.5, fit, A{b} by step", f"allocate 4.5, fit, A{b} by layer") for b in (8, 6, 5)),
]
