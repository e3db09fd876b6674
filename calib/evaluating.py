"""The stage that says what a quantized model has lost: the same seeds drawn again, and compared."""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from calib.dataset.generate import generate, missing_images
from calib.dataset.load import load_manifest
from calib.dataset.store import StateDtype
from calib.errors import CalibError, ConfigError
from calib.evaluation.metrics import Fidelity
from calib.evaluation.paired import Paired, Reference, rounded_to_bfloat16
from calib.evaluation.report import fidelity_text, picture_grid, plot_error, save_pictures
from calib.files import locked, read_json, short_hash, write_json, write_text
from calib.models.model import DiffusionModel
from calib.progress import note, readable_bytes, say
from calib.quantization.apply import applied, runs_dense
from calib.quantization.checkpoint import CONFIG, load
from calib.quantizing import FOLDER
from calib.runs.directory import RunDirectory
from calib.runs.layout import DETAILS, FULL, QUANTIZED
from calib.settings import Settings, Stage
from calib.timesteps import evenly
from calib.versions import versions

import mlx.core as mx
import numpy as np

REPORT, PLOT, GRID = "evaluation.txt", "images/output_error.png", "images/pictures.png"

logger = logging.getLogger("calib")


def quantized_folder(settings: Settings) -> Path:
    """The folder of the quantized model that ``plan=`` names."""
    if settings.plan is None:
        raise ConfigError("plan is not set: name the run directory of calib quantize, calib evaluate plan=DIR")
    folder = settings.plan / FOLDER
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"plan={settings.plan}: no quantized model there; calib quantize plan={settings.plan} makes one"
        )
    return folder


def forget_evaluation(run: Path) -> None:
    """Remove what an earlier job in this directory measured: a new quantized model is not what it speaks of."""
    for name in (DETAILS, REPORT, PLOT, GRID):
        (run / name).unlink(missing_ok=True)
    for folder in (FULL, QUANTIZED):
        shutil.rmtree(run / folder, ignore_errors=True)


def run_evaluate(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel]) -> None:
    """Draw held-out prompts at full precision and quantized; metrics, pictures, and a plot into the run directory."""
    start = time.monotonic()
    quantized = load(run.path / FOLDER if settings.stage is Stage.RUN else quantized_folder(settings))
    if quantized.about.get("fingerprint") != model().fingerprint:
        made_from = quantized.about.get("model")
        raise CalibError(f"the quantized model was made from {made_from} with other weights; set model")
    reference = reference_of(settings, model())
    paired = Paired(model(), reference)
    control = control_of(settings, model(), reference, paired)
    mx.reset_peak_memory()
    outcome = paired.compare(partial(applied, model(), quantized, settings.evaluation.dequantize), "quantized")
    peak, found = mx.get_peak_memory(), outcome.fidelity
    text = fidelity_text(found, control, settings.sampler.num_steps)
    text += f"peak memory while drawing quantized: {readable_bytes(peak)}{_counted(settings.evaluation.dequantize)}\n"
    write_text(run.path / REPORT, text)
    details = {"prompts": reference.prompts, "quantized": _to_json(found), "control": _to_json(control)}
    write_json(run.path / DETAILS, details)
    plot_error(run.path / PLOT, {"quantized": found, "control: weights and states in bfloat16": control})
    picture_grid(run.path / GRID, paired.pictures, outcome.pictures, reference.prompts)
    save_pictures(run.path / FULL, paired.pictures)
    save_pictures(run.path / QUANTIZED, outcome.pictures)
    seconds = time.monotonic() - start
    run.add_metrics({**found.summary(), **control.summary("control_")})
    run.add_metrics({"evaluate_seconds": seconds, "evaluate_peak_bytes": peak})
    logger.info("evaluated %d images in %.1f s", len(reference.images), seconds)
    print(f"\n{text}")


def _counted(dequantize: bool | None) -> str:
    """What people must know of the peak."""
    if runs_dense() if dequantize is None else dequantize:
        return " (with dequantized weights: no less than at full precision)"
    return " (the full-precision weights, which stay loaded, counted)"


def reference_of(settings: Settings, model: DiffusionModel) -> Reference:
    """The full-precision pictures; drawn once, and shared by all runs that ask for the same."""
    wanted, folder = settings.evaluation, settings.evaluation_dir
    # From the end of the list: prompts that a smaller dataset has not used.
    prompts = settings.prompts[::-1]
    if wanted.num_images + settings.num_images > len(prompts):
        note("evaluation: the list of prompts is too short for prompts of its own; seeds are others")
    if missing := missing_images(folder, wanted.num_images, thorough=True):
        generate(
            *(model, prompts, wanted.num_images, folder, settings.sampler, wanted.base_seed),
            dtype=StateDtype.FLOAT32,
            wait=True,
            known_missing=missing,
        )
    manifest = load_manifest(folder)
    manifest.images = {i: manifest.images[i] for i in range(wanted.num_images)}
    return Reference(folder, manifest, evenly(manifest.num_steps - 1, wanted.steps))


def control_of(settings: Settings, model: DiffusionModel, reference: Reference, paired: Paired) -> Fidelity:
    """The noise floor, measured once for a model and its reference."""
    images = [[e.prompt, *e.checksums.values()] for e in reference.manifest.images.values()]
    device = [mx.default_device().type.name, versions()["mlx"]]
    version = 2  # of the way of measuring
    key = short_hash([version, model.fingerprint, images, list(reference.steps), *device], digits=16)
    path = settings.cache_dir / "evaluation" / f"control_{key}.json"
    with locked(path.with_suffix(".lock"), lambda: say(f"waiting for the process that measures the control ({path})")):
        if path.exists():
            with suppress(CalibError, KeyError, TypeError, ValueError):  # a damaged one is measured again
                return _from_json(read_json(path))
        found = paired.compare(partial(rounded_to_bfloat16, model), "control").fidelity
        write_json(path, _to_json(found))
    return found


def _to_json(found: Fidelity) -> dict[str, Any]:
    """JSON has no infinity: null stands for that of equal pictures."""
    psnr = [None if np.isinf(value) else value for value in found.psnr.tolist()]
    return {"psnr": psnr, "ssim": found.ssim.tolist(), "steps": found.steps.tolist(), "error": found.error.tolist()}


def _from_json(document: dict[str, Any]) -> Fidelity:
    psnr = np.array([np.inf if value is None else value for value in document["psnr"]])
    return Fidelity(psnr, np.array(document["ssim"]), np.array(document["error"]), np.array(document["steps"]))
