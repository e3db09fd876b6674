"""What measures of pictures say of plans, and which of them can tell which plans apart.

    python scripts/benchmark_metrics.py                        # the shipped model, 200 held-out pictures a plan
    python scripts/benchmark_metrics.py --images 20 --calibration 24 --only W4 3.5
    python scripts/benchmark_metrics.py --runs outputs/learned-4.5  # finished runs too, by the names of their folders

Plans are drawn with the same noise as at full precision. Two plans are apart by a measure of pairs where the interval
of the paired difference (bootstrap over prompts, 95%) leaves out 0, by a measure of sets where the two intervals do not
meet. Tables are printed in Markdown; ``metrics.json`` in --out has every value, and what it has is not drawn again.
"""

import calib  # isort: skip  (it sees to it that a fast BLAS is loaded before MLX)

import argparse
import json
import time
from collections.abc import Mapping
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from calib.analysis.heuristics import allocate
from calib.base.device import device_name
from calib.base.layout import MODEL
from calib.evaluation.measures import Chosen, Gathered, Sources, choose
from calib.evaluation.metrics import Interval, bootstrap, bootstrap_difference
from calib.evaluation.paired import Paired, rounded_to_bfloat16
from calib.evaluation.reference import draw_reference
from calib.evaluation.titles import TITLES
from calib.quantization import fit, gptq, rtn
from calib.quantization.apply import applied
from calib.quantization.checkpoint import load

import numpy as np
from benchmark_quantization import configured, made, prepared
from quantization_rows import A16, Row, uniformly, whole

assert calib.__version__

FURTHER = ("lpips_effnet", "kid_effnet", "fd_effnet")
CONTROL = "bfloat16 (noise floor)"
#: Pairs of plans are also counted for so many pictures.
FEW = 16


def _row(label: str, plan: Any, quantizer: Any) -> Row:
    return Row(label, plan, quantizer, activation_bits=A16)


ROWS = [
    *(_row(f"uniform W{bits}, rtn", uniformly(bits), rtn.quantize) for bits in (8, 6, 5, 4, 3, 2)),
    *(_row(f"uniform W{bits}, gptq", uniformly(bits), gptq.quantize) for bits in (4, 3)),
    *(
        _row(f"allocate {bits}, {name}", whole(allocate.plan_layers, average_bits=bits), quantizer)
        for bits in (4.5, 3.5)
        for name, quantizer in (("fit", fit.quantize), ("gptq", gptq.quantize))
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark_metrics"))
    parser.add_argument("--only", nargs="*", help="rows whose label holds one of these")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="directories of runs, shown beside the rows")
    parser.add_argument("--images", type=int, default=200, help="held-out images")
    parser.add_argument("--calibration", type=int, default=100, help="images calibrated on")
    arguments, overrides = parser.parse_known_args()
    setup = prepared(arguments, overrides)
    held_out = [f"num_images={arguments.calibration}", f"evaluation.num_images={arguments.images}"]
    own = configured([*overrides, *held_out])
    wanted, drawn = own.evaluate.evaluation, own.generate
    measures = choose(FURTHER, Sources(own.job.cache_dir))
    prompts = drawn.prompts[::-1]
    what = (own.evaluate.data_dir, prompts, wanted.num_images, drawn.sampler, wanted.base_seed, 1)
    paired = Paired(setup.model, draw_reference(setup.model, *what), measures)
    kept = arguments.out / "metrics.json"
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    print(device_name(), *(f"{key}={value}" for key, value in vars(arguments).items()), sep="; ", flush=True)

    def saw(label: str, change: Any, bits: float) -> None:
        start = time.monotonic()
        found[label] = values(paired, measures, change, label) | {"bits": bits}
        print(f"{label}: {time.monotonic() - start:.0f} s", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))

    for row in ROWS:
        if row.label in found or (arguments.only and not any(word in row.label for word in arguments.only)):
            continue
        quantized, about = made(setup, row)
        saw(row.label, partial(applied, setup.model, quantized, dequantize=True), about["average_bits"])
    for folder in arguments.runs:
        if folder.name in found:
            continue
        quantized = load(folder / MODEL)
        change = partial(applied, setup.model, quantized, dequantize=True)
        saw(folder.name, change, quantized.size().average_bits)
    if CONTROL not in found:
        saw(CONTROL, partial(rounded_to_bfloat16, setup.model), 16.0)
    show(found)


def values(paired: Paired, measures: Chosen, change: Any, label: str) -> dict[str, Any]:
    """Values of each measure of pairs, and value and ends of each of sets, over all pictures."""
    full, own = Gathered(measures), Gathered(measures)

    def see(exact: Any, drawn: Any) -> None:
        full.add(exact)
        own.add(drawn)

    fidelity = paired.compare(change, label, see=see)
    sets = measures.of_sets(full.vectors(), own.vectors(), paired=True)
    pairs = {"psnr": fidelity.psnr, "ssim": fidelity.ssim, **fidelity.further}
    return {
        "pairs": {name: np.minimum(own, 107.12).tolist() for name, own in pairs.items()},
        "sets": {name: [own.value, own.low, own.high] for name, own in sets.items()},
    }


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of plans by measures, and the one of what is apart."""
    of_pairs, of_sets = (list(next(iter(found.values()))[kind]) for kind in ("pairs", "sets"))
    names = [*of_pairs, *of_sets]
    titles = " | ".join(TITLES[name].title for name in names)
    print(f"\n| plan | bits a weight | {titles} |\n{'|---' * (len(names) + 2)}|")
    ordered = sorted(found, key=lambda label: -np.mean(found[label]["pairs"]["psnr"]))
    for label in ordered:
        own = found[label]
        cells = [_cell(name, bootstrap(np.array(own["pairs"][name]))) for name in of_pairs]
        cells += [_cell(name, Interval(*own["sets"][name])) for name in of_sets]
        print(f"| {label} | {own['bits']:.2f} | {' | '.join(cells)} |")
    plans = [label for label in ordered if label != CONTROL]
    print("\n| measure | pairs of plans apart | of the first pictures | neighbours not apart |\n|---|---|---|---|")
    for name in names:
        count = len(list(combinations(plans, 2)))
        apart = sum(differ(found, name, *two) for two in combinations(plans, 2))
        few = sum(differ(found, name, *two, FEW) for two in combinations(plans, 2)) if name in of_pairs else None
        close = [f"{a} / {b}" for a, b in pairwise(plans) if not differ(found, name, a, b)]
        first = "" if few is None else f"{few} ({FEW})"
        print(f"| {TITLES[name].title} | {apart} of {count} | {first} | {'; '.join(close) or 'none'} |")


def _cell(name: str, interval: Interval) -> str:
    form = TITLES[name].form
    return f"{form.format(interval.mean)} [{form.format(interval.low)}, {form.format(interval.high)}]"


def differ(found: Mapping[str, Any], name: str, one: str, other: str, pictures: int | None = None) -> bool:
    """Whether a measure, of the first ``pictures``, can tell two plans apart."""
    if name in found[one]["sets"]:
        (_, low, high), (_, own_low, own_high) = found[one]["sets"][name], found[other]["sets"][name]
        return bool(low > own_high or own_low > high)
    a, b = (np.array(found[plan]["pairs"][name][:pictures]) for plan in (one, other))
    difference = bootstrap_difference(a, b)
    return difference.low > 0 or difference.high < 0


if __name__ == "__main__":
    main()
