"""Small stand-ins of the repositories that SD3 and FLUX are read from, in the hub's place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import calib

import make_standin_checkpoint as standin
import pytest
from diffusionkit.mlx.config import FLUX_SCHNELL, CLIPTextModelConfig, SD3_2b, VAEDecoderConfig, VAEEncoderConfig
from huggingface_hub import constants

assert calib.__version__

SD3, FLUX = standin.MODELS["sd3_medium"], standin.MODELS["flux_schnell"]
TINY_TEXT = standin.TextShapes(
    clip_l=CLIPTextModelConfig(2, 32, 2, projection_dim=32),
    clip_g=CLIPTextModelConfig(2, 64, 2, projection_dim=64, hidden_act="gelu"),
    # DiffusionKit's encode_text has T5's width of 4096 in its code.
    t5={**standin.T5, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 1024},
)
SIZES = {"hidden_size_override": 128, "num_heads": 2, "depth_multimodal": 2, "max_latent_resolution": 16}


@contextmanager
def small_hub(folder: Path) -> Iterator[None]:
    """Both models' repositories in ``folder``; DiffusionKit has their sizes, the hub's client reads nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SIZES, "pooled_text_embed_dim": 96}.items():
            patch.setattr(SD3_2b, name, value)
        for name, value in {**SIZES, "pooled_text_embed_dim": 32, "rope_axes_dim": (16, 24, 24)}.items():
            patch.setattr(FLUX_SCHNELL, name, value)
        patch.setattr(FLUX_SCHNELL, "depth_unified", 2)
        channels = (32, 32, 32, 32)
        patch.setattr(VAEDecoderConfig.__init__, "__defaults__", (16, 3, channels, 1, 8))
        patch.setattr(VAEEncoderConfig.__init__, "__defaults__", (3, 32, channels, 1, 8))
        for repository in (SD3, FLUX):
            standin.write_standin(folder, repository, use_t5=True, text=TINY_TEXT)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield
