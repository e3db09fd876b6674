"""A small Z-Image with random weights: as files that calib and mflux read, and as a model in itself."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from calib.models.architecture import Conditioning
from calib.models.mflux import zimage
from calib.models.mflux.flow import MfluxFlow
from calib.models.mflux.zimage_transformer import ZImageArchitecture
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
import numpy as np
import pytest
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.z_image import z_image_initializer
from mflux.models.z_image.latent_creator.z_image_latent_creator import ZImageLatentCreator
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mflux.models.z_image.model.z_image_vae.common.unet_mid_block import UNetMidBlock
from mflux.models.z_image.model.z_image_vae.decoder.conv_in import ConvIn
from mflux.models.z_image.model.z_image_vae.decoder.conv_norm_out import ConvNormOut
from mflux.models.z_image.model.z_image_vae.decoder.conv_out import ConvOut
from mflux.models.z_image.model.z_image_vae.decoder.up_decoder_block import UpDecoderBlock
from mflux.models.z_image.model.z_image_vae.vae import VAE
from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition
from mlx.utils import tree_map
from standin_mflux import ZImageSizes, random_weight, write_zimage

TRANSFORMER = {"dim": 192, "n_heads": 6, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 64}
SIZES = ZImageSizes(
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
        self.encoder.update(tree_map(lambda w: mx.zeros([1] * w.ndim), self.encoder.parameters()))


def components() -> list[Any]:
    """mflux's definition of the files, for as many layers."""
    layers = {"transformer": SIZES.transformer["n_layers"], "text_encoder": SIZES.text["num_hidden_layers"]}
    return [replace(own, num_layers=layers.get(own.name)) for own in _components()]


_components = ZImageWeightDefinition.get_components


@contextmanager
def small_zimage(folder: Path) -> Iterator[Path]:
    """The model's files; in the context mflux, which has the sizes in its code, has these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zimage, "VAE", SmallVAE)
        patch.setattr(z_image_initializer, "VAE", SmallVAE)
        for name, sizes in (("ZImageTransformer", SIZES.transformer), ("TextEncoder", SIZES.text)):
            patch.setattr(z_image_initializer, name, partial(getattr(z_image_initializer, name), **sizes))
        patch.setattr(ZImageWeightDefinition, "get_components", staticmethod(components))
        write_zimage(folder, SIZES, mx.float32, vae=SmallVAE)
        yield folder


def architecture(dtype: mx.Dtype = mx.float32) -> ZImageArchitecture:
    transformer = ZImageTransformer(**SIZES.transformer)
    mx.random.seed(0)
    for path, weight in weights(transformer).items():
        transformer.load_weights([(path, random_weight(path, weight.shape).astype(dtype))], strict=False)
    mx.eval(transformer.parameters())
    return ZImageArchitecture(transformer, SIZES.transformer)


def encode_text(text: str) -> Conditioning:
    """Random tokens, four for each letter: texts of other lengths, once padded, too."""
    random = np.random.RandomState(zlib.crc32(text.encode()))
    tokens = random.randn(1, length_of(text), TRANSFORMER["cap_feat_dim"]).astype(np.float32)
    return Conditioning(mx.array(tokens), lengths=(length_of(text),))


def length_of(text: str) -> int:
    return 4 * len(text) + 1


def tiny_zimage(model: DiffusionModel, dtype: mx.Dtype = mx.float32) -> DiffusionModel:
    """The emoji ``model`` with such a transformer and mflux's sampler, for latents of its size; no text encoder."""
    size = [8 * side for side in model.latent_shape[:2]]
    flow = MfluxFlow(ModelConfig.z_image_turbo(), zimage.SCHEDULER, ZImageLatentCreator.create_noise, size, dtype)
    return replace(
        model,
        name="tiny_zimage",
        architecture=architecture(dtype),
        sampler=flow,
        encode_text=encode_text,
        token_count=length_of,
        text_length=128,
        max_prompt_tokens=128,
        dtype=dtype,
        supports_guidance=False,
    )
