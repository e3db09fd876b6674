"""Small transformers with random weights, of SD3's structure and of FLUX's, in the emoji model's place."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from calib.dataset.generate import generate
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StateDtype
from calib.models import emoji
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.models.small import config_of

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import FluxSampler
from helpers import PROMPTS

#: SD3's; FLUX's, with an MLP beside the attention in unified blocks; and that with the MLP after the attention.
STRUCTURES = ("sd3", "flux", "serial")
#: Those of mflux's families, in blocks that are no MMDiT's.
MFLUX = ("zimage", "flux2", "qwen", "flux1_dev", "flux1_schnell")
#: The same, of which one is another's network with an input less.
EACH_OF_MFLUX = (*MFLUX[:-1], pytest.param(MFLUX[-1], marks=pytest.mark.slow))


def tiny_transformer(structure: str, dtype: mx.Dtype = mx.float32, spread: float = 0.5, **widths: int) -> MMDiT:
    """Weights that float16 holds, some output channels wider than others, as there are in large models."""
    transformer = MMDiT(config_of(structure, dtype, **widths))
    random = np.random.RandomState(0)
    for path, weight in weights(transformer).items():
        scale = 0.08 * np.exp(spread * random.randn(weight.shape[0], *[1] * (weight.ndim - 1)))
        value = (scale * random.randn(*weight.shape)).astype(np.float16).astype(np.float32)
        if "norm" in path:
            value = np.ones_like(value)
        if path.startswith("unified") and path.endswith("fc2.bias"):
            value = np.zeros_like(value)  # DiffusionKit sets it so in every forward
        transformer.load_weights([(path, mx.array(value).astype(dtype))], strict=False)
    mx.eval(transformer.parameters())
    return transformer


def enlarged(latents: mx.array) -> mx.array:
    """Three channels of latents (batch, height, width, channels) as pictures, four times as large."""
    return mx.repeat(mx.repeat(latents[..., :3].astype(mx.float32), 4, axis=1), 4, axis=2)


def tiny_model(model: DiffusionModel, structure: str, dtype: mx.Dtype = mx.float32) -> DiffusionModel:
    """The emoji ``model`` with such a transformer, and next to no decoder: it draws noise, but it draws."""
    if structure in MFLUX:
        pytest.importorskip("mflux", reason="mflux is not installed")
        return replace(tiny_of(structure).model(model, dtype), decode_latents=enlarged)
    tiny = replace(
        model,
        name=f"tiny_{structure}",
        architecture=MMDiTArchitecture(tiny_transformer(structure, dtype)),
        decode_latents=enlarged,
        dtype=dtype,
    )
    return tiny if structure == "sd3" else replace(tiny, sampler=FluxSampler(shift=1.0), supports_guidance=False)


def tiny_of(structure: str) -> Any:
    """The small model of a family of mflux's."""
    module, _, kind = structure.partition("_")
    found = import_module(f"tiny_{module}").TINY
    return found[kind] if kind else found


def load(
    name: str,
    shift: float,
    image_size: Sequence[int],
    structure: str = "flux",
    dtype: ModelDtype = ModelDtype.FLOAT32,
) -> DiffusionModel:
    """A small FLUX or SD3, for ``model._target_``."""
    return replace(tiny_model(emoji.load(image_size=image_size), structure, dtype.mlx), name=name)


def draw(model: DiffusionModel, folder: Path, batch_size: int = 3, cfg_weight: float = 3.0) -> Path:
    """Three images of four steps, kept in float32; with guidance where the model takes it."""
    guidance = cfg_weight if model.supports_guidance else 0
    settings = SamplerSettings(num_steps=4, cfg_weight=guidance, batch_size=batch_size)
    generate(model, PROMPTS, 3, folder, settings, seed=7, dtype=StateDtype.FLOAT32)
    return folder
