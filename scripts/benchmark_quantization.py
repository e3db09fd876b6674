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
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from calib.analysis.heuristic import Heuristic
from calib.analysis.heuristics import allocate
from calib.analysis.heuristics import range as range_heuristic
from calib.analysis.observed import average_activation_bits, observed_ranges, plan_steps
from calib.analysis.plan import LayerPlan
from calib.base.device import device_name
from calib.base.layout import ACTIVATIONS
from calib.cli.compose import plain
from calib.cli.conf import CONF
from calib.evaluation.metrics import Fidelity, bootstrap, bootstrap_difference
from calib.evaluation.paired import Paired
from calib.evaluation.reference import control_of, draw_reference
from calib.quantization.apply import applied
from calib.quantization.build import Calibration, quantize_layers
from calib.runs.directory import RunDirectory
from calib.stages import collect
from calib.stages.build import build
from calib.stages.origin import collected
from calib.stages.quantize import spare_prompts
from calib.stages.settings import Settings

import numpy as np
from hydra import compose, initialize_config_dir
from quantization_rows import A16, CLAIMS, ROWS, Row, Setup, whole

assert calib.__version__


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
    start = time.monotonic()
    quantized, about = made(setup, row)
    for paired in references.values():
        # The same numbers as MLX's quantized kernels, which a GPU compiles for a minute at every new bit-width.
        change = partial(applied, setup.model, quantized, dequantize=True)
        add(results, row.label, paired.compare(change, row.label), about)
    print(f"{row.label}: {time.monotonic() - start:.1f} s", flush=True)


def made(setup: Setup, row: Row):
    """The quantized model of a row, and what is shown of it."""
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
    source = Calibration(path, row.rule, lambda: states, prompts=lambda: spare_prompts(setup.settings, states))
    quantized, _ = quantize_layers(setup.model, plan.layers, steps, row.quantizer, source, {})
    size, seconds = quantized.size(), time.monotonic() - start
    about = {
        "average_bits": size.average_bits,
        "bytes": size.nbytes,
        "activation_bits": average_activation_bits(
            path, {name: steps.bits_by_step(name, layer.activation_bits) for name, layer in plan.layers.items()}
        ),
        "seconds": seconds,
        "predicted": plan.predicted_psnr,
    }
    return quantized, about


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
