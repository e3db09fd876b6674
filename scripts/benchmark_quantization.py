"""What plans and quantizers cost on held-out prompts, in one run: PSNR, SSIM, output error, with intervals.

    python scripts/benchmark_quantization.py                          # the shipped model: every row, three seeds
    python scripts/benchmark_quantization.py --only gptq uniform --seeds 0 --images 8
    python scripts/benchmark_quantization.py --out results model=sd3_medium model.use_t5=false

Overrides of the configuration come last. Sensitivities are measured where the cache does not have them. Comparisons
are paired: same prompts, seeds and noise. Tables are printed in Markdown; ``results.json`` holds every prompt's values.
"""

import calib  # isort: skip  (it sees to it that a fast BLAS is loaded before MLX)

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from calib.analysis import ranges
from calib.analysis.heuristic import Heuristic
from calib.analysis.heuristics import allocate, cv, mse, sensitivity, sqnr, uniform
from calib.analysis.heuristics import range as range_heuristic
from calib.analysis.layers import read_summaries
from calib.analysis.observed import average_activation_bits, observed_ranges, plan_steps
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.ranges import RangeRule
from calib.analysis.sensitivities import Of, Sensitivities
from calib.base.device import device_name
from calib.base.layout import ACTIVATIONS
from calib.cli.compose import plain
from calib.cli.conf import CONF
from calib.evaluation.metrics import Fidelity, bootstrap, bootstrap_difference
from calib.evaluation.paired import Paired
from calib.evaluation.reference import control_of, draw_reference
from calib.models.model import DiffusionModel
from calib.quantization import fit, gptq, learned, percentile, rtn, smooth, taqdit
from calib.quantization.apply import applied
from calib.quantization.build import Calibration, quantize_layers
from calib.quantization.quantizer import Quantizer
from calib.runs.directory import RunDirectory
from calib.stages import collect
from calib.stages.analyze import importance_of, sensitivities_of
from calib.stages.build import build
from calib.stages.origin import collected
from calib.stages.quantize import spare_prompts
from calib.stages.settings import Method, Settings

import numpy as np
from hydra import compose, initialize_config_dir

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
RECONSTRUCTED = [
    *(Row(f"W4 A8, {name}", uniformly(4), function, activation_bits=8) for name, function in W4A8.items()),
    *(
        Row(f"W4 A8 per_step, {name}", uniformly(4), W4A8[name], ranges.per_step, activation_bits=8)
        for name in ("gptq", "taqdit")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark_quantization"))
    parser.add_argument("--only", nargs="*", help="rows whose label holds one of these")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=16, help="held-out images a seed")
    parser.add_argument("--calibration", type=int, default=100, help="images calibrated on")
    arguments, overrides = parser.parse_known_args()
    setup = prepared(arguments, overrides)
    print(device_name(), *(f"{key}={value}" for key, value in vars(arguments).items()), sep="; ")
    results: dict[str, dict] = {}
    references = {}
    for seed in arguments.seeds:
        held_out = [f"evaluation.num_images={arguments.images}", f"evaluation.seed={seed}"]
        own = configured([*overrides, f"num_images={arguments.calibration}", *held_out])
        wanted, drawn = own.evaluate.evaluation, own.generate
        what = (drawn.prompts[::-1], wanted.num_images, drawn.sampler, wanted.base_seed, wanted.steps)
        reference = draw_reference(setup.model, own.evaluate.data_dir, *what)
        references[seed] = Paired(setup.model, reference)
        control = control_of(setup.model, reference, references[seed], own.job.cache_dir)
        add(results, "control (bfloat16)", control, {})
    for title, rows in ROWS.items():
        chosen = [r for r in rows if not arguments.only or any(word in r.label for word in arguments.only)]
        for row in chosen:
            measure(setup, row, references, results)
            save(arguments.out, results)
        if chosen:
            table(title, [r.label for r in chosen], results)
    table("Noise floor", ["control (bfloat16)"], results)
    claims(results)
    if not arguments.only:
        fragile(setup)


def configured(overrides: Sequence[str]) -> Settings:
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="benchmark"):
        return build(plain(compose("config", overrides=["stage=run", *overrides])))


def prepared(arguments, overrides: Sequence[str]) -> Setup:
    """Dataset and statistics; both are kept in the working folder."""
    settings = configured([*overrides, f"num_images={arguments.calibration}"])
    model = settings.job.model.load()
    run = RunDirectory(arguments.out / "run", "run", settings.fingerprint)
    run.path.mkdir(parents=True, exist_ok=True)
    if not (run.path / ACTIVATIONS).exists():
        collect.run(settings, run, lambda: model, {})
    return Setup(settings, model, run.path)


def measure(setup: Setup, row: Row, references, results) -> None:
    plan = planned = row.plan(setup)
    start = time.monotonic()
    if row.activation_bits is not None:
        layers = {n: replace(layer, activation_bits=row.activation_bits) for n, layer in plan.layers.items()}
        plan = replace(plan, layers=layers)
    path = setup.run / ACTIVATIONS
    bits = None
    if row.phase_bits:
        bits = Heuristic.of(range_heuristic.plan_layer, "range").phase_bits(setup.layers, plan)
    observed = {} if row.activation_bits == A16 else observed_ranges(plan, path)
    known = [found for made, found in setup.importance.values() if made is planned]
    steps = replace(plan_steps(plan, observed, path, row.rule, bits), importance=known[0] if known else {})
    wanted = setup.settings.quantize.calibration
    states = collected(setup.settings, setup.run, "").states(wanted.images, wanted.steps)
    source = Calibration(path, row.rule, lambda: states, prompts=spare_prompts(setup.settings))
    quantized, _ = quantize_layers(setup.model, plan.layers, steps, row.quantizer, source, {})
    size, made = quantized.size(), time.monotonic() - start
    about = {
        "average_bits": size.average_bits,
        "bytes": size.nbytes,
        "activation_bits": average_activation_bits(
            path, {name: steps.bits_by_step(name, layer.activation_bits) for name, layer in plan.layers.items()}
        ),
        "seconds": made,
        "predicted": plan.predicted_psnr,
    }
    for paired in references.values():
        # The same numbers as MLX's quantized kernels, which a GPU compiles for a minute at every new bit-width.
        change = partial(applied, setup.model, quantized, dequantize=True)
        add(results, row.label, paired.compare(change, row.label).fidelity, about)
    print(f"{row.label}: {time.monotonic() - start:.1f} s", flush=True)


def add(results, label: str, found: Fidelity, about) -> None:
    entry = results.setdefault(label, {**about, "psnr": [], "ssim": [], "error": []})
    entry["psnr"] += np.minimum(found.psnr, 107.12).tolist()
    entry["ssim"] += found.ssim.tolist()
    entry["error"] += found.error.tolist()
    entry["steps"] = found.steps.tolist()


def save(folder: Path, results) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


def output_error(entry) -> np.ndarray:
    """Mean over steps, (prompts,)."""
    return np.array(entry["error"]).mean(axis=1)


def table(title: str, labels: Sequence[str], results) -> None:
    print(f"\n### {title}\n\n| plan | bits a weight | A bits | kB | s | predicted | PSNR, dB | SSIM | output error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for label in labels:
        entry = results[label]
        psnr, ssim, error = bootstrap(np.array(entry["psnr"])), np.mean(entry["ssim"]), bootstrap(output_error(entry))
        figures = [entry.get(key, otherwise) for key, otherwise in (("average_bits", 16), ("activation_bits", 16))]
        bits = " | ".join([*(f"{f:.2f}" for f in figures), f"{entry['bytes'] / 1e3:.0f}" if "bytes" in entry else ""])
        seconds = f"{entry['seconds']:.1f}" if "seconds" in entry else ""
        predicted = f"{entry['predicted']:.1f}" if entry.get("predicted") is not None else ""
        print(
            f"| {label} | {bits} | {seconds} | {predicted} | {psnr.mean:.2f} [{psnr.low:.2f}, {psnr.high:.2f}] | "
            f"{ssim:.4f} | "
            f"{error.mean:.2e} [{error.low:.2e}, {error.high:.2e}] |"
        )


def claims(results) -> None:
    heads = ("first", "second", "PSNR gained, dB", "output error, ratio", "verdict")
    print(f"\n### Is it better?\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for first, second in CLAIMS:
        if first not in results or second not in results:
            continue
        a, b = results[first], results[second]
        psnr = bootstrap_difference(np.array(a["psnr"]), np.array(b["psnr"]))
        ratio = bootstrap_difference(np.log(output_error(a)), np.log(output_error(b)))
        low, mean, high = np.exp([ratio.low, ratio.mean, ratio.high])
        print(
            f"| {first} | {second} | {psnr.mean:+.2f} [{psnr.low:+.2f}, {psnr.high:+.2f}] | "
            f"{mean:.3f} [{low:.3f}, {high:.3f}] | {verdict(psnr, ratio)} |"
        )


def verdict(psnr, ratio) -> str:
    better, worse = (psnr.low > 0) + (ratio.high < 0), (psnr.high < 0) + (ratio.low > 0)
    if better and worse:
        return "mixed"
    word = "worse" if worse else "better"
    return {0: "no difference beyond chance", 1: f"{word} in one of the two", 2: word}[better or worse]


def fragile(setup: Setup) -> None:
    """What the allocator gives the most and the fewest bits at 4.5 and at 3.5."""
    for budget in (4.5, 3.5):
        plan = whole(allocate.plan_layers, average_bits=budget)(setup)
        ordered = sorted(plan.layers.items(), key=lambda item: -item[1].weight_bits - 32 / item[1].group_size)
        shown: list[tuple[str, LayerPlan]] = [*ordered[:14], *ordered[-6:]]
        print(f"\n### Bits by allocate at {budget}\n\n| layer | bits | group | |\n|---|---|---|---|")
        for name, layer in shown:
            print(f"| {name} | {layer.weight_bits} | {layer.group_size} | {layer.figure} |")
        print("\n" + "\n".join(plan.notes))


if __name__ == "__main__":
    main()
