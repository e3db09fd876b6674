"""A small Z-Image with random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.models.mflux import zimage

import mlx.core as mx
import pytest
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.vae.vae_util import VAEUtil
from mflux.models.z_image import z_image_initializer
from mflux.models.z_image.model.z_image_vae.common.unet_mid_block import UNetMidBlock
from mflux.models.z_image.model.z_image_vae.decoder.conv_in import ConvIn
from mflux.models.z_image.model.z_image_vae.decoder.conv_norm_out import ConvNormOut
from mflux.models.z_image.model.z_image_vae.decoder.conv_out import ConvOut
from mflux.models.z_image.model.z_image_vae.decoder.up_decoder_block import UpDecoderBlock
from mflux.models.z_image.model.z_image_vae.vae import VAE
from mflux.models.z_image.variants.z_image import ZImage
from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition
from standin_mflux import Sizes, write_zimage
from tiny_mflux import Tiny, names_alone, smaller

TRANSFORMER = {"dim": 192, "n_heads": 6, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 64}
SIZES = Sizes(
    transformer={**TRANSFORMER, "axes_dims": [8, 12, 12]},
    text={
        **{"head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
        **{"num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 640},
    },
)
WIDTH = 32


class SmallVAE(VAE):
    """mflux's, whose sizes are in its code, 32 channels wide; of the encoder there are the names."""

    def __init__(self) -> None:
        super().__init__()
        own = self.decoder
        own.conv_in, own.mid_block = ConvIn(out_channels=WIDTH), UNetMidBlock(WIDTH)
        own.up_blocks = [UpDecoderBlock(WIDTH, WIDTH, 3, add_upsample=i < 3) for i in range(4)]
        own.conv_norm_out, own.conv_out = ConvNormOut(WIDTH), ConvOut(WIDTH)
        names_alone(self.encoder)


def components() -> list[Any]:
    """mflux's definition of the files, for as many layers."""
    layers = {"transformer": SIZES.transformer["n_layers"], "text_encoder": SIZES.text["num_hidden_layers"]}
    return [replace(own, num_layers=layers.get(own.name)) for own in _components()]


_components = ZImageWeightDefinition.get_components


def patched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zimage, "VAE", SmallVAE)
    patch.setattr(z_image_initializer, "VAE", SmallVAE)
    smaller(patch, z_image_initializer, {"ZImageTransformer": SIZES.transformer, "TextEncoder": SIZES.text})
    patch.setattr(ZImageWeightDefinition, "get_components", staticmethod(components))


@contextmanager
def small_zimage(folder: Path) -> Iterator[Path]:
    """The model's files; in the context mflux, which has the sizes in its code, has these."""
    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        TINY.write(folder, mx.float32)
        yield folder


TINY = Tiny(
    option="zimage_turbo",
    family=zimage.FAMILY,
    sizes=SIZES,
    width=TRANSFORMER["cap_feat_dim"],
    varying=True,
    patched=patched,
    write=lambda folder, dtype: write_zimage(folder, SIZES, dtype, vae=SmallVAE),
    mfluxs=lambda folder: ZImage(model_path=str(folder), model_config=ModelConfig.z_image_turbo()),
    unpacked=lambda latents, size: latents[:, 0].transpose(1, 2, 0),
    decoded=lambda own, latents, size: VAEUtil.decode(own.vae, latents.transpose(1, 0, 2, 3)),
)
