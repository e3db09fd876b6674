"""A small FLUX.2 with random weights."""

from calib.models.mflux import flux2

import mlx.core as mx
import pytest
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux2 import flux2_initializer
from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from standin_mflux import Sizes, write_flux2
from tiny_mflux import Tiny, names_alone, smaller

SIZES = Sizes(
    transformer={
        **{"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32},
        **{"joint_attention_dim": 96, "axes_dims_rope": [8, 8, 8, 8], "timestep_guidance_channels": 64},
    },
    text={
        **{"head_dim": 8, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
        **{"num_hidden_layers": 27, "num_key_value_heads": 1, "vocab_size": 640},
    },
)


class SmallVAE(Flux2VAE):
    """mflux's, 32 channels wide; of the encoder there are the names."""

    def __init__(self) -> None:
        super().__init__(decoder_block_out_channels=(32, 32, 32, 32))
        names_alone(self.encoder)


def patched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flux2, "Flux2VAE", SmallVAE)
    patch.setattr(flux2_initializer, "Flux2VAE", SmallVAE)
    sizes = {"Flux2Transformer": SIZES.transformer, "Qwen3TextEncoder": SIZES.text}
    smaller(patch, flux2_initializer, sizes)


def unpacked(latents: mx.array, size: tuple[int, int]) -> mx.array:
    return latents[0].reshape(size[0] // 16, size[1] // 16, -1)


TINY = Tiny(
    option="flux2_klein_4b",
    family=flux2.FAMILY,
    sizes=SIZES,
    width=96,
    varying=False,
    patched=patched,
    write=lambda folder, dtype: write_flux2(folder, SIZES, dtype, vae=SmallVAE),
    mfluxs=lambda folder: Flux2Klein(model_path=str(folder), model_config=ModelConfig.flux2_klein_4b()),
    unpacked=unpacked,
    decoded=lambda own, x, size: own.vae.decode_packed_latents(unpacked(x, size).transpose(2, 0, 1)[None]),
)
