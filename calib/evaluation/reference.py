"""The reference of a comparison: full-precision pictures, and a control that measures the noise floor."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from calib.base.errors import CalibError
from calib.base.files import read_json, remove_abandoned, short_hash, write_json
from calib.base.locks import locked
from calib.base.progress import say
from calib.base.versions import numerics
from calib.dataset.generate import generate, missing_images
from calib.dataset.load import load_manifest
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StateDtype
from calib.dataset.timesteps import evenly
from calib.evaluation.metrics import Fidelity
from calib.evaluation.paired import Paired, Reference, rounded_to_bfloat16
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np

#: Version of the procedure that measures the control.
CONTROL_VERSION = 3
#: Pictures that the control draws where it serves as a landmark alone, and how much closer than the quantized model's
#: they are then, dB.
FEW_IMAGES, FAR = 4, 10.0


def draw_reference(
    model: DiffusionModel,
    folder: Path,
    prompts: Sequence[str],
    num_images: int,
    sampler: SamplerSettings,
    base_seed: int,
    steps: int,
) -> Reference:
    """The first ``num_images`` full-precision pictures of the dataset in ``folder``; missing ones are drawn.

    Args:
        steps: number of the sampler's steps, evenly spaced, at which outputs are compared.
    """
    if missing := missing_images(folder, num_images, thorough=True):
        generate(
            *(model, prompts, num_images, folder, sampler, base_seed),
            dtype=StateDtype.FLOAT32,
            wait=True,
            known_missing=missing,
        )
    manifest = load_manifest(folder)
    manifest.images = {i: manifest.images[i] for i in range(num_images)}
    return Reference(folder, manifest, evenly(manifest.num_steps - 1, steps))


def control_of(
    model: DiffusionModel, reference: Reference, paired: Paired, cache_dir: Path, quantized: Fidelity | None = None
) -> Fidelity:
    """The noise floor, with weights and states rounded to bfloat16; cached by model and reference.

    Of the first :data:`FEW_IMAGES` alone where each of them is far closer than ``quantized``, which is of all.
    """
    few = reference.images[:FEW_IMAGES]
    if quantized is not None and len(few) < len(reference.images):
        found = _control_of(model, reference, paired, cache_dir, few)
        if np.all(found.psnr >= quantized.psnr[: len(few)] + FAR):
            return found
    return _control_of(model, reference, paired, cache_dir, reference.images)


def _control_of(
    model: DiffusionModel, reference: Reference, paired: Paired, cache_dir: Path, chosen: Sequence[int]
) -> Fidelity:
    images = [[e.prompt, *e.checksums.values()] for e in (reference.manifest.images[i] for i in chosen)]
    drawn_in = [reference.manifest.batch_size, reference.manifest.parts]
    device = [mx.default_device().type.name, numerics(model.transformer)]
    made_by = [CONTROL_VERSION, model.fingerprint, images, list(reference.steps), *drawn_in, *device]
    made_by += paired.measures.made_by
    path = cache_dir / "evaluation" / f"control_{short_hash(made_by, digits=16)}.json"
    with locked(path.with_suffix(".lock"), lambda: say(f"waiting for the process that measures the control ({path})")):
        if path.exists():
            with suppress(CalibError, KeyError, TypeError, ValueError):  # a damaged one is measured again
                return Fidelity.from_json(read_json(path))
        remove_abandoned(path.parent)  # what a killed process was writing
        found = paired.compare(partial(rounded_to_bfloat16, model), "control", chosen)
        write_json(path, found.to_json())
    return found
