"""A small FLUX.1-dev and -schnell with random weights."""

from dataclasses import replace
from functools import partial
from typing import Any

from calib.models.mflux import flux1
from calib.models.mflux.files import component_for
from calib.models.mflux.flux1 import dev, schnell
from calib.models.mflux.flux1 import sizes as of_mflux

import mlx.core as mx
import pytest
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.vae.vae_util import VAEUtil
from mflux.models.flux import flux_initializer
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.flux_transformer.transformer import Transformer
from mflux.models.flux.model.flux_vae.vae import VAE
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition
from standin_mflux import Sizes, write_flux1
from tiny_mflux import Tiny, names_alone

#: Tokens of a text, in place of 512 and 256.
LENGTH = 160
#: CLIP's vocabulary has 514 tokens more.
MERGES = 126
SIZES = Sizes(
    transformer={
        **{"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32},
        **{"joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": [8, 12, 12]},
    },
    text={"d_model": 64, "d_ff": 64, "num_layers": 2, "vocab_size": 704},
    clip={
        **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
        "vocab_size": MERGES + 514,
    },
)
T5 = partial(of_mflux.make_t5, **{of_mflux.T5_SIZES[name]: value for name, value in SIZES.text.items()})
CLIP = partial(of_mflux.make_clip, **{of_mflux.CLIP_SIZES[name]: value for name, value in SIZES.clip.items()})
WIDTH = 32


class SmallVAE(VAE):
    """mflux's, whose sizes are in its code, 32 channels wide; of the encoder there are the names."""

    def __init__(self) -> None:
        super().__init__()
        of_mflux.resize(self.decoder, dict.fromkeys((512, 256, 128), WIDTH))
        names_alone(self.encoder)


def components() -> list[Any]:
    """mflux's definition of the files, for as many blocks of T5."""
    changes = {"t5_encoder": {"num_blocks": OF_T5.num_blocks, "mapping_getter": OF_T5.mapping_getter}}
    return [replace(own, **changes.get(own.name, {})) for own in _components()]


_components, OF_T5 = FluxWeightDefinition.get_components, component_for(FluxWeightDefinition, "t5_encoder", T5())


def small_transformer(model_config: ModelConfig, **_: Any) -> Transformer:
    return of_mflux.make_transformer(model_config, **SIZES.transformer)


def patched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flux1, "VAE", SmallVAE)
    patch.setattr(flux_initializer, "VAE", SmallVAE)
    patch.setattr(flux_initializer, "T5Encoder", T5)
    patch.setattr(flux_initializer, "CLIPEncoder", CLIP)
    patch.setattr(flux_initializer, "Transformer", small_transformer)
    for module in (dev, schnell):
        patch.setattr(module.FAMILY.config, "max_sequence_length", LENGTH)
    patch.setattr(FluxWeightDefinition, "get_components", staticmethod(components))


def decoded(own: Flux1, latents: mx.array, size: tuple[int, int]) -> mx.array:
    return VAEUtil.decode(own.vae, FluxLatentCreator.unpack_latents(latents, *size))


TINY = {
    kind: Tiny(
        option=f"flux1_{kind}",
        family=module.FAMILY,
        sizes=SIZES,
        width=64,
        told=kind == "dev",
        pooled=32,
        varying=False,
        patched=patched,
        write=lambda folder, dtype, kind=kind: write_flux1(folder, kind, SIZES, dtype, SmallVAE, MERGES),
        mfluxs=lambda folder, own=module.FAMILY.config: Flux1(model_path=str(folder), model_config=own),
        unpacked=lambda latents, size: latents[0].reshape(size[0] // 16, size[1] // 16, -1),
        decoded=decoded,
    )
    for kind, module in (("dev", dev), ("schnell", schnell))
}
