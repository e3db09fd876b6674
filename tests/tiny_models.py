"""Small transformers with random weights, of SD3's structure and of FLUX's, in the emoji model's place."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calib.dataset.generate import generate
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StateDtype
from calib.models import emoji
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
import numpy as np
from diffusionkit.mlx.config import MMDiTConfig, PositionalEncoding
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import FluxSampler
from helpers import PROMPTS

#: SD3's; FLUX's, with an MLP beside the attention in unified blocks; and that with the MLP after the attention.
STRUCTURES = ("sd3", "flux", "serial")


def config_of(structure: str, dtype: mx.Dtype = mx.float32, text: int = 256, pooled: int = 256) -> MMDiTConfig:
    """64 channels, and blocks of every kind; ``text`` and ``pooled`` are the widths of what the prompt becomes."""
    flux = structure != "sd3"
    return MMDiTConfig(
        num_heads=2,
        hidden_size_override=64,
        depth_multimodal=2 if flux else 3,
        depth_unified=2 if flux else 0,
        parallel_mlp_for_unified_blocks=structure != "serial",
        patchify_via_reshape=flux,
        pos_embed_type=PositionalEncoding.PreSDPARope if flux else PositionalEncoding.LearnedInputEmbedding,
        rope_axes_dim=(8, 12, 12) if flux else None,
        max_latent_resolution=16,
        pooled_text_embed_dim=pooled,
        token_level_text_embed_dim=text,
        use_qk_norm=True,
        dtype=dtype,
        low_memory_mode=False,
    )


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
    tiny = replace(
        model,
        name=f"tiny_{structure}",
        architecture=MMDiTArchitecture(tiny_transformer(structure, dtype)),
        decode_latents=enlarged,
        dtype=dtype,
    )
    return tiny if structure == "sd3" else replace(tiny, sampler=FluxSampler(shift=1.0), supports_guidance=False)


def load(name: str, shift: float, image_size: Sequence[int]) -> DiffusionModel:
    """A small FLUX, for ``model._target_``."""
    return replace(tiny_model(emoji.load(image_size=image_size), "flux"), name=name)


def draw(model: DiffusionModel, folder: Path, batch_size: int = 3) -> Path:
    """Three images of four steps, kept in float32; with guidance where the model takes it."""
    settings = SamplerSettings(num_steps=4, cfg_weight=3.0 if model.supports_guidance else 0, batch_size=batch_size)
    generate(model, PROMPTS, 3, folder, settings, seed=7, dtype=StateDtype.FLOAT32)
    return folder
