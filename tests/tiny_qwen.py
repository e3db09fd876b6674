"""A small Qwen-Image with random weights."""

from functools import partial

from calib.models.mflux import qwen

import mlx.core as mx
import pytest
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.vae.vae_util import VAEUtil
from mflux.models.qwen import qwen_initializer
from mflux.models.qwen.latent_creator.qwen_latent_creator import QwenLatentCreator
from mflux.models.qwen.model.qwen_vae.qwen_image_causal_conv_3d import QwenImageCausalConv3D
from mflux.models.qwen.model.qwen_vae.qwen_image_mid_block_3d import QwenImageMidBlock3D
from mflux.models.qwen.model.qwen_vae.qwen_image_rms_norm import QwenImageRMSNorm
from mflux.models.qwen.model.qwen_vae.qwen_image_up_block_3d import QwenImageUpBlock3D
from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE
from mflux.models.qwen.variants.txt2img.qwen_image import QwenImage
from standin_mflux import Sizes, write_qwen
from tiny_mflux import Tiny, names_alone, smaller

SIZES = Sizes(
    transformer={
        **{"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 112},
        **{"in_channels": 64, "out_channels": 16},
    },
    text={
        **{"hidden_size": 112, "intermediate_size": 64, "num_attention_heads": 28, "num_hidden_layers": 2},
        **{"num_key_value_heads": 4, "vocab_size": 640},
    },
)
WIDTH = 8


class SmallVAE(QwenVAE):
    """mflux's, whose sizes are in its code, 8 channels wide; of the encoder there are the names."""

    def __init__(self) -> None:
        super().__init__()
        own = self.decoder
        own.conv_in, own.mid_block = QwenImageCausalConv3D(16, 4 * WIDTH), QwenImageMidBlock3D(4 * WIDTH)
        widths = ((4, 4, "upsample3d"), (2, 4, "upsample3d"), (2, 2, "upsample2d"), (1, 1, None))
        for i, (first, last, mode) in enumerate(widths):
            own[f"up_block{i}"] = QwenImageUpBlock3D(first * WIDTH, last * WIDTH, 2, mode)
        own.norm_out, own.conv_out = QwenImageRMSNorm(WIDTH, images=False), QwenImageCausalConv3D(WIDTH, 3)
        names_alone(self.encoder)


def patched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(qwen, "QwenVAE", SmallVAE)
    patch.setattr(qwen_initializer, "QwenVAE", SmallVAE)
    patch.setattr(qwen_initializer, "QwenTextEncoder", partial(qwen.text_encoder, **SIZES.text))
    smaller(patch, qwen_initializer, {"QwenTransformer": SIZES.transformer})


def decoded(own: QwenImage, latents: mx.array, size: tuple[int, int]) -> mx.array:
    return VAEUtil.decode(own.vae, QwenLatentCreator.unpack_latents(latents, *size))


TINY = Tiny(
    option="qwen_image",
    family=qwen.FAMILY,
    sizes=SIZES,
    width=112,
    varying=True,
    patched=patched,
    write=lambda folder, dtype: write_qwen(folder, SIZES, dtype, vae=SmallVAE),
    mfluxs=lambda folder: QwenImage(model_path=str(folder), model_config=ModelConfig.qwen_image()),
    unpacked=lambda latents, size: latents[0].reshape(size[0] // 16, size[1] // 16, -1),
    decoded=decoded,
)
