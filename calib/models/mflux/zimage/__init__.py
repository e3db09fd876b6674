"""Z-Image-Turbo as mflux draws it: ``model=zimage_turbo``."""

from calib.models.mflux.decoder import channels_first, drawing_bytes
from calib.models.mflux.family import Family
from calib.models.mflux.text import Encoder
from calib.models.mflux.zimage.transformer import ZImageArchitecture

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.z_image.latent_creator.z_image_latent_creator import ZImageLatentCreator
from mflux.models.z_image.model.z_image_text_encoder.prompt_encoder import PromptEncoder
from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mflux.models.z_image.model.z_image_vae.vae import VAE
from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition

#: What ``config.json`` calls the sizes, as mflux does.
SIZES = ("dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim", "axes_dims")
TEXT_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "head_dim"),
)


def noise(seed: int, height: int, width: int) -> mx.array:
    """mflux's for ``seed``, (height, width, channels) of the latent of a picture of this size."""
    made: mx.array = ZImageLatentCreator.create_noise(seed, height, width)
    return made[:, 0].transpose(1, 2, 0)


FAMILY = Family(
    command="mflux-generate-z-image-turbo",
    definition=ZImageWeightDefinition,
    config=ModelConfig.z_image_turbo(),
    scheduler="linear",
    architecture=lambda about: ZImageArchitecture(ZImageTransformer(**about), about),
    sizes={name: name for name in SIZES},
    encoders={"text_encoder": Encoder(TextEncoder, {name: name for name in TEXT_SIZES})},
    encode=PromptEncoder.encode_prompt,
    text_encoders="qwen3",
    vae=lambda: VAE(),
    unpacked=lambda vae, latents: channels_first(latents),
    decoding_bytes=lambda vae, size, dtype: drawing_bytes(size, vae.decoder.conv_out.conv.weight.shape[-1], dtype),
    latent=(8, 16),
    noise=noise,
    times=lambda levels, dtype: mx.ones_like(levels) - levels,
)


skeleton, load = FAMILY.skeleton, FAMILY.load
