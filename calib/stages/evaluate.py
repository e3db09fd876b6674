"""Draws held-out prompts at full precision and with a quantized model, same seeds and noise.

Main keys: plan (the run directory of calib quantize), evaluation.num_images, evaluation.seed, evaluation.steps,
evaluation.metrics (further ones: lpips_effnet, kid_effnet, fd_effnet, all with evaluation=effnet; fid, kid, precision,
recall, with evaluation=distribution; with evaluation.clip clip_score, clip_similarity, cmmd), evaluation.by

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
from calib.base.files import checksum, content_of, short_hash, write_json, write_text
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
from calib.evaluation.agreement import cut_lines, score_lines
from calib.evaluation.categories import categories_of, categories_text
from calib.evaluation.folders import vectors_of
from calib.evaluation.measures import DEFAULT, Chosen, Gathered, Sources, check_names, choose
from calib.evaluation.paired import Paired, Pictures
from calib.evaluation.pictures import check_pictures, pictures_in
from calib.evaluation.reference import control_of, draw_reference
from calib.evaluation.report import (
    fidelity_text,
    picture_grid,
    plot_error,
    repeated_note,
    save_pictures,
    seen_note,
    sets_notes,
    sets_text,
)
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
import numpy as np

logger = logging.getLogger("calib")

#: Pictures of the grid.
SHOWN = 8
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
        check_names("evaluation.metrics", own.evaluation.metrics, check_pictures(folder))
    if missing_images(own.data_dir, own.evaluation.num_images):
        check_folders(own.data_dir)


def sources(settings: Settings) -> list[str]:
    """Checksum of the quantized model's description, which has the checksums of its other files; the reference's."""
    return [content_of(quantized_of(settings) / CHECKPOINT), *reference_sources(settings)]


def reference_sources(settings: Settings) -> list[str]:
    """Hashes of what was named: the CLIP, the pictures (names, sizes, times), Inception's weights, categories."""
    own, wanted = settings.evaluate, settings.evaluate.evaluation
    if not wanted.num_images:
        return []
    found = [] if wanted.clip is None else _measures(settings).clips
    if (folder := wanted.reference) is not None:
        files = {name: path.stat() for name, path in pictures_in(folder).items()}
        found.append(short_hash([[name, s.st_size, s.st_mtime_ns] for name, s in files.items()], digits=16))
    if (weights := wanted.inception) is not None:
        found.append(checksum(weights))
    if own.categories is not None:
        found.append(short_hash(own.categories, digits=16))
    return found


def _measures(settings: Settings) -> Chosen:
    """Measures besides those that are always there; raises where one lacks a package or a CLIP."""
    wanted = settings.evaluate.evaluation
    named = [name for name in wanted.metrics if name not in DEFAULT]
    return choose(named, Sources(settings.job.cache_dir, wanted.clip, wanted.inception))


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
    measures = _measures(settings)
    # Before anything is drawn, as one of them may be damaged.
    theirs = None if wanted.reference is None else vectors_of(wanted.reference, measures)
    # From the end of the list, for prompts that a smaller dataset has not used.
    what = (drawn.prompts[::-1], wanted.num_images, drawn.sampler, wanted.base_seed)
    reference = draw_reference(model(), settings.evaluate.data_dir, *what, wanted.steps)
    paired = Paired(model(), reference, measures)
    mx.reset_peak_memory()
    seen = _Seen(run.path, measures)
    change = partial(applied, model(), quantized, wanted.dequantize)
    found, peak = paired.compare(change, "quantized", see=seen), mx.get_peak_memory()
    quantized = replace(quantized, layers={}, weights={}, copies={})  # the control has other weights
    control = control_of(model(), reference, paired, settings.job.cache_dir, found)
    sets = measures.of_sets(theirs or seen.full.vectors(), seen.own.vectors(), theirs is None) if measures.sets else {}
    about = {key: quantized.about[key] for key in CARRIED if key in quantized.about}
    text = fidelity_text(found, control, drawn.sampler.num_steps)
    cut = paired.measures.truncated(reference.prompts)
    about_prompts = [*filter(None, [repeated_note(reference.prompts)]), *cut_lines(cut, len(reference.prompts))]
    text += "".join(f"note: {line}\n" for line in about_prompts)
    text += sets_text(sets, "the full-precision model's" if wanted.reference is None else str(wanted.reference))
    known, prompts = prompts_seen(quantized, reference.prompts), reference.prompts
    text += _planned(quantized, about) + (f"note: {seen_note(known, len(prompts))}\n" if known else "")
    text += f"peak memory while drawing quantized: {readable_bytes(peak)}{_counted(model(), wanted.dequantize)}\n"
    made_from = {"quantized": content_of(folder / CHECKPOINT), "model": model().fingerprint}
    details = {"prompts": prompts, "quantized": found.to_json(), "control": control.to_json()}
    of_sets = {key: value for name, own in sets.items() for key, value in own.summary(name).items()}
    details |= {"sets": of_sets} if of_sets else {}
    notes = [*score_lines(found.further, "full precision"), *about_prompts, *sets_notes(sets)]
    details |= {"notes": notes} if notes else {}
    if wanted.by is not None and settings.evaluate.categories is not None:
        categories = categories_of(wanted.by, settings.evaluate.categories, wanted.metrics, found)
        text += categories_text(categories, prompts)
        details["categories"] = categories.to_json()
        run.add_metrics(Stage.EVALUATE, categories.summary())
    details["made_from"] = made_from | {"images": reference.image_hashes}
    write_text(run.path / FIDELITY, text)
    write_json(run.path / DETAILS, details)
    plot_error(run.path / ERROR_PLOT, {"quantized": found, "control: weights and states in bfloat16": control})
    picture_grid(run.path / PICTURE_GRID, *seen.first(), reference.prompts[:SHOWN], SHOWN)
    seconds = time.monotonic() - start
    run.add_metrics(Stage.EVALUATE, {**found.summary(), **of_sets, **control.summary("control_")})
    run.add_metrics(Stage.EVALUATE, about | ({"prompts_seen": known} if known else {}))
    run.add_metrics(Stage.EVALUATE, {"prompts_truncated": cut} if cut else {})
    run.add_metrics(Stage.EVALUATE, {"evaluate_seconds": seconds, "evaluate_peak_bytes": peak})
    logger.info("evaluated %d images in %.1f s", len(reference.images), seconds)
    print(f"\n{text}")


class _Seen:
    """What is kept of pictures as they are drawn: files, vectors, and the first ones themselves."""

    def __init__(self, run: Path, measures: Chosen):
        self._folders = (run / FULL_PICTURES, run / QUANTIZED_PICTURES)
        self.full, self.own = Gathered(measures), Gathered(measures)
        self._first: list[tuple[Pictures, Pictures]] = []
        self._count = 0

    def __call__(self, exact: Pictures, drawn: Pictures) -> None:
        for folder, gathered, pictures in zip(self._folders, (self.full, self.own), (exact, drawn), strict=True):
            save_pictures(folder, pictures, self._count)
            gathered.add(pictures)
        if self._count < SHOWN:
            self._first.append((exact, drawn))
        self._count += len(exact)

    def first(self) -> tuple[Pictures, Pictures]:
        """The first pictures, at full precision and quantized."""
        exact, drawn = (np.concatenate(own)[:SHOWN] for own in zip(*self._first, strict=True))
        return exact, drawn


def prompts_seen(quantized: QuantizedModel, prompts: Sequence[str]) -> int:
    """How many of ``prompts`` the making of the quantized model saw."""
    before = set(quantized.about.get(SEEN, ()))
    return sum(short_hash(prompt) in before for prompt in prompts)


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
