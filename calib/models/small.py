"""SD3's and FLUX's transformers in small, with random weights: the same operations on fewer numbers."""

from dataclasses import replace

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel

import mlx.core as mx
from diffusionkit.mlx.config import MMDiTConfig, PositionalEncoding
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import FluxSampler


def config_of(structure: str, dtype: mx.Dtype = mx.float32, text: int = 256, pooled: int = 256) -> MMDiTConfig:
    """64 channels, and blocks of every kind.

    Args:
        structure: 'sd3'; 'flux', with an MLP beside the attention in unified blocks; 'serial', with it after that.
        text, pooled: widths of what the prompt becomes.
    """
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


def small_model(model: DiffusionModel, structure: str, dtype: mx.Dtype) -> DiffusionModel:
    """The emoji ``model`` with such a transformer in its transformer's place: it draws noise."""
    transformer = MMDiT(config_of(structure, dtype))
    transformer.set_dtype(dtype)
    small = replace(model, name=structure, architecture=MMDiTArchitecture(transformer), dtype=dtype)
    return small if structure == "sd3" else replace(small, sampler=FluxSampler(shift=1.0), supports_guidance=False)
