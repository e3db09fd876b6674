"""Self-test of the whole model: the shipped model draws two pictures, compared with stored values."""

from collections.abc import Iterator

from calib.cli.selftest_check import Check, relative
from calib.dataset.generate import trajectory
from calib.dataset.settings import SamplerSettings
from calib.models import emoji
from calib.models.model import DiffusionModel

import numpy as np
from numpy.typing import NDArray

#: Stored results of :func:`drawn_values`, written by scripts/make_selftest.py.
REFERENCE = emoji.FOLDER / "selftest.npz"

PROMPTS, SEEDS = ("red apple", "octopus"), (0, 1)
NUM_STEPS, CFG_WEIGHT = 8, 3.0


def drawn_values(model: DiffusionModel) -> dict[str, NDArray[np.float32]]:
    """Draw two pictures; returns a selection of their final latents and of their pixels in [0, 1].

    The strides share no factor with the arrays' widths, so that every channel and position is represented.
    """
    settings = SamplerSettings(num_steps=NUM_STEPS, cfg_weight=CFG_WEIGHT)
    *_, final = trajectory(model, PROMPTS, SEEDS, settings)
    latents, pixels = np.array(final.x), np.array(model.decode(final.x))
    return {"latents": latents.reshape(-1)[::17], "pixels": pixels.reshape(-1)[::53]}


def check_sampling() -> Iterator[Check]:
    """Compare the whole model (text encoder, transformer, sampler and decoder) with the stored values.

    On a CPU, computing all of the transformer in float16 (as coarse as TF32) gives an error of 0.01 in the latents;
    bfloat16 gives 0.08, weights rounded to 8 bits 0.05.
    """
    model = emoji.load()
    with np.load(REFERENCE, allow_pickle=False) as stored:
        same = str(stored["fingerprint"]) == model.fingerprint
        yield Check("model: fingerprint of the weights", float(not same), 0.0, "" if same else "other weights")
        drawn = drawn_values(model)
        label = f"sampling: {len(PROMPTS)} pictures, {NUM_STEPS} steps, CFG {CFG_WEIGHT:g}"
        yield Check(f"{label}, latents", relative(drawn["latents"], stored["latents"]), 2e-2)
        yield Check(f"{label}, pixels", relative(drawn["pixels"], stored["pixels"]), 2e-2)
