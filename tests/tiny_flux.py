"""FLUX's structure, small: double and unified blocks, rotary positions, no guidance; with random weights."""

from collections.abc import Sequence
from dataclasses import replace

from calib.models import emoji
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
import numpy as np
from diffusionkit.mlx.config import MMDiTConfig, PositionalEncoding
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import FluxSampler


def flux_config(
    unified: int = 2, parallel: bool = True, text: int = 256, pooled: int = 256, dtype: mx.Dtype = mx.float32
) -> MMDiTConfig:
    """Two double blocks, some ``unified`` ones; ``text`` and ``pooled`` are the widths of what the prompt becomes."""
    return MMDiTConfig(
        num_heads=2,
        depth_multimodal=2,
        depth_unified=unified,
        parallel_mlp_for_unified_blocks=parallel,
        hidden_size_override=64,
        patchify_via_reshape=True,
        pos_embed_type=PositionalEncoding.PreSDPARope,
        rope_axes_dim=(8, 12, 12),
        pooled_text_embed_dim=pooled,
        token_level_text_embed_dim=text,
        use_qk_norm=True,
        dtype=dtype,
        low_memory_mode=False,
    )


def flux_transformer(parallel: bool = True, dtype: mx.Dtype = mx.float32) -> MMDiT:
    """Two blocks of each kind, of the emoji model's latents and texts; as FLUX is, or its MLP after the attention."""
    transformer = MMDiT(flux_config(parallel=parallel, dtype=dtype))
    random = np.random.RandomState(0)
    for path, weight in weights(transformer).items():
        scale = 0.08 * np.exp(0.5 * random.randn(weight.shape[0], *[1] * (weight.ndim - 1)))
        value = (scale * random.randn(*weight.shape)).astype(np.float16).astype(np.float32)
        if "norm" in path:
            value = np.ones_like(value)
        if path.startswith("unified") and path.endswith("fc2.bias"):
            value = np.zeros_like(value)  # DiffusionKit sets it so in every forward
        transformer.load_weights([(path, mx.array(value).astype(dtype))], strict=False)
    mx.eval(transformer.parameters())
    return transformer


def flux_model(model: DiffusionModel, parallel: bool = True, dtype: mx.Dtype = mx.float32) -> DiffusionModel:
    """The emoji ``model`` with such a transformer in place of its own: it draws noise, but it draws."""
    return replace(
        model,
        name="tiny_flux",
        transformer=flux_transformer(parallel, dtype),
        dtype=dtype,
        sampler=FluxSampler(shift=1.0),
        supports_guidance=False,
    )


def load(name: str, shift: float, image_size: Sequence[int]) -> DiffusionModel:
    """For ``model._target_``."""
    return replace(flux_model(emoji.load(image_size=image_size)), name=name)
