"""Draws held-out prompts at full precision and with a quantized model, same seeds and noise.

Main keys: plan (the run directory of calib quantize), evaluation.num_images, evaluation.seed, evaluation.steps,
evaluation.metrics (further ones: lpips_effnet, kid_effnet, fd_effnet)

Two folders of pictures that anything drew, without a model: calib evaluate DIR_A DIR_B; calib evaluate A B --help
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from calib.analysis.sensitivities import trust_note
from calib.base.errors import CalibError
from calib.base.files import content_of, short_hash, write_json, write_text
from calib.base.layout import (
    DETAILS,
    ERROR_PLOT,
    FIDELITY,
    FULL_PICTURES,
    MODEL,
    PICTURE_GRID,
    QUANTIZED_PICTURES,
)
from calib.base.progress import note, readable_bytes
from calib.base.values import at_least
from calib.dataset.generate import missing_images
from calib.dataset.preflight import check_folders
from calib.evaluation.folders import vectors_of
from calib.evaluation.measures import DEFAULT, Chosen, check_names, choose, eight_bits
from calib.evaluation.paired import Outcome, Paired
from calib.evaluation.pictures import pictures_in
from calib.evaluation.reference import control_of, draw_reference
from calib.evaluation.report import fidelity_text, picture_grid, plot_error, save_pictures, sets_text
from calib.evaluation.sets import SetDistance
from calib.models.model import DiffusionModel
from calib.quantization.apply import applied, runs_dense, stays_dense
from calib.quantization.build import SEEN
from calib.quantization.check import check_fits
from calib.quantization.checkpoint import CHECKPOINT, load
from calib.quantization.model import QuantizedModel
from calib.runs.directory import RunDirectory
from calib.stages import Stage
from calib.stages.origin import check_quantized, quantized_of
from calib.stages.settings import Settings

import mlx.core as mx

logger = logging.getLogger("calib")

#: What a quantized model says of itself that is shown beside what it draws.
CARRIED = ("average_activation_bits", "predicted_psnr", "predicted_weights_psnr")


def check(settings: Settings) -> None:
    """Raise where there is no quantized model, or no image to draw."""
    at_least("evaluation.num_images", settings.evaluate.evaluation.num_images, 1)
    check_quantized(quantized_of(settings))
    check_reference(settings)


def check_reference(settings: Settings) -> None:
    """Raise where a measure lacks a package or pictures, or missing ones cannot be written beside the dataset."""
    own = settings.evaluate
    if own.evaluation.num_images:
        _measures(settings)
    if (folder := own.evaluation.reference) is not None:
        check_names("evaluation.metrics", own.evaluation.metrics, len(pictures_in(folder)))
    if missing_images(own.data_dir, own.evaluation.num_images):
        check_folders(own.data_dir)


def sources(settings: Settings) -> list[str]:
    """Checksum of the quantized model's description, which has the checksums of its other files; the reference's."""
    return [content_of(quantized_of(settings) / CHECKPOINT), *reference_sources(settings)]


def reference_sources(settings: Settings) -> list[str]:
    """A hash of the names, sizes and times of the pictures of ``evaluation.reference``; none where it is not set."""
    folder = settings.evaluate.evaluation.reference
    if folder is None:
        return []
    found = {name: path.stat() for name, path in pictures_in(folder).items()}
    return [short_hash([[name, own.st_size, own.st_mtime_ns] for name, own in found.items()], digits=16)]


def _measures(settings: Settings) -> Chosen:
    """Measures besides those that are always there; raises where one lacks a package."""
    named = [name for name in settings.evaluate.evaluation.metrics if name not in DEFAULT]
    return choose(named, settings.job.cache_dir)


def run(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]) -> None:
    """Draw held-out prompts at full precision and quantized; write metrics, pictures and a plot."""
    start, wanted, drawn = time.monotonic(), settings.evaluate.evaluation, settings.generate
    folder = run.path / MODEL if settings.stage is Stage.RUN else quantized_of(settings)
    quantized = load(folder)
    if quantized.about.get("fingerprint") != model().fingerprint:
        made_from = quantized.about.get("model")
        raise CalibError(f"the quantized model was made from {made_from} with other weights; set model")
    check_fits(quantized, model())
    if wanted.num_images + drawn.num_images > len(drawn.prompts):
        note("evaluation: the list of prompts is too short for prompts of its own; seeds are others")
    # From the end of the list, for prompts that a smaller dataset has not used.
    what = (drawn.prompts[::-1], wanted.num_images, drawn.sampler, wanted.base_seed)
    reference = draw_reference(model(), settings.evaluate.data_dir, *what, wanted.steps)
    paired = Paired(model(), reference, _measures(settings))
    mx.reset_peak_memory()
    outcome = paired.compare(partial(applied, model(), quantized, wanted.dequantize), "quantized")
    peak, found = mx.get_peak_memory(), outcome.fidelity
    quantized = replace(quantized, layers={}, weights={}, copies={})  # the control has other weights
    control = control_of(model(), reference, paired, settings.job.cache_dir, found)
    sets = _sets(paired, outcome, wanted.reference)
    about = {key: quantized.about[key] for key in CARRIED if key in quantized.about}
    text = fidelity_text(found, control, drawn.sampler.num_steps)
    text += sets_text(sets, "the full-precision model's" if wanted.reference is None else str(wanted.reference))
    seen = prompts_seen(quantized, reference.prompts)
    text += _planned(quantized, about) + (f"note: {_known(seen, len(reference.prompts))}\n" if seen else "")
    text += f"peak memory while drawing quantized: {readable_bytes(peak)}{_counted(model(), wanted.dequantize)}\n"
    write_text(run.path / FIDELITY, text)
    made_from = {"quantized": content_of(folder / CHECKPOINT), "model": model().fingerprint}
    details = {"prompts": reference.prompts, "quantized": found.to_json(), "control": control.to_json()}
    of_sets = {key: value for name, own in sets.items() for key, value in own.summary(name).items()}
    details |= {"sets": of_sets} if of_sets else {}
    details["made_from"] = made_from | {"images": reference.image_hashes}
    write_json(run.path / DETAILS, details)
    plot_error(run.path / ERROR_PLOT, {"quantized": found, "control: weights and states in bfloat16": control})
    picture_grid(run.path / PICTURE_GRID, paired.pictures, outcome.pictures, reference.prompts)
    save_pictures(run.path / FULL_PICTURES, paired.pictures)
    save_pictures(run.path / QUANTIZED_PICTURES, outcome.pictures)
    seconds = time.monotonic() - start
    run.add_metrics(Stage.EVALUATE, {**found.summary(), **of_sets, **control.summary("control_")})
    run.add_metrics(Stage.EVALUATE, about | ({"prompts_seen": seen} if seen else {}))
    run.add_metrics(Stage.EVALUATE, {"evaluate_seconds": seconds, "evaluate_peak_bytes": peak})
    logger.info("evaluated %d images in %.1f s", len(reference.images), seconds)
    print(f"\n{text}")


def prompts_seen(quantized: QuantizedModel, prompts: Sequence[str]) -> int:
    """How many of ``prompts`` the making of the quantized model saw."""
    before = set(quantized.about.get(SEEN, ()))
    return sum(short_hash(prompt) in before for prompt in prompts)


def _known(seen: int, prompts: int) -> str:
    what = f"{seen} of {prompts} prompts were calibrated or trained on, and say little of others"
    return f"{what}; evaluate fewer (evaluation.num_images), or other prompts"


def _sets(paired: Paired, outcome: Outcome, reference: Path | None) -> dict[str, SetDistance]:
    """Distances of the quantized model's pictures from the full-precision model's, or from those in ``reference``."""
    chosen = paired.measures
    if not chosen.sets:
        return {}
    of_full, own = (chosen.vectors([eight_bits(p) for p in drawn]) for drawn in (paired.pictures, outcome.pictures))
    theirs = of_full if reference is None else vectors_of(reference, chosen)
    return chosen.of_sets(theirs, own, paired=reference is None)


def _planned(quantized: QuantizedModel, about: Mapping[str, float]) -> str:
    """Lines on the bits of inputs and on what was predicted, where they are known, and on what that is of."""
    bits, (psnr, weights) = about.get("average_activation_bits"), (about.get(key) for key in CARRIED[1:])
    lines = [] if bits is None else [f"inputs: {bits:.2f} bits a number that layers read"]
    if psnr is not None:
        alone = "" if weights in (None, psnr) else f", {weights:.2f} dB with inputs at 16 bits"
        quantizer = quantized.about.get("quantizer", {}).get("name", "rtn")
        drawn = f"; drawn by quantizer={quantizer}" if quantizer != "rtn" else ""
        lines.append(f"predicted for these weights, rounded to nearest: PSNR {psnr:.2f} dB{alone}{drawn}")
        lines += [f"note: {said}" for said in trust_note(psnr)]
    return "".join(f"{line}\n" for line in lines)


def _counted(model: DiffusionModel, dequantize: bool | None) -> str:
    """A remark on the weights included in the peak memory."""
    dense = runs_dense() if dequantize is None else dequantize
    if dense and stays_dense(model):
        return " (with dequantized weights: no less than at full precision)"
    anew = "the weights dequantized anew in each forward" if dense else ""
    stay = "the full-precision weights, which stay loaded, counted" if model.streamed is None else ""
    return f" ({'; '.join(filter(None, [anew, stay])) or 'quantized weights alone'})"
