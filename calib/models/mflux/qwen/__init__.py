"""Qwen-Image as mflux draws it: ``model=qwen_image``."""

from collections.abc import Sequence
from typing import Any

from calib.base.device import on_gpu
from calib.models.mflux.decoder import unpacked
from calib.models.mflux.family import Family
from calib.models.mflux.qwen.transformer import QwenArchitecture
from calib.models.mflux.text import Encoder

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mflux.models.qwen.latent_creator.qwen_latent_creator import QwenLatentCreator
from mflux.models.qwen.model.qwen_text_encoder.qwen_encoder import QwenEncoder
from mflux.models.qwen.model.qwen_text_encoder.qwen_encoder_layer import QwenEncoderLayer
from mflux.models.qwen.model.qwen_text_encoder.qwen_text_encoder import QwenTextEncoder
from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer
from mflux.models.qwen.model.qwen_vae.qwen_image_rms_norm import QwenImageRMSNorm
from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE
from mflux.models.qwen.variants.txt2img.qwen_image import QwenImage
from mflux.models.qwen.weights.qwen_weight_definition import QwenWeightDefinition
from mlx import nn

#: What ``config.json`` calls the sizes, as mflux does.
SIZES = (
    "in_channels",
    "out_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
)
OF_ENCODER = ("vocab_size", "hidden_size", "num_hidden_layers")
OF_LAYERS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
#: First tokens of a text that mflux drops: its template's.
DROPPED = 34
#: What decoding takes at once, in units of (pixels, channels at full size), in float32: its convolutions have three
#: axes, and on a CPU unfold 27 places of each. Measured there: 917, 3659 and 14617 MB of 128, 256 and 512 px. Of a GPU,
#: that of other decoders, not measured.
DECODER_WIDTHS_CPU, DECODER_WIDTHS_GPU = 146, 16


def text_encoder(**sizes: Any) -> QwenTextEncoder:
    """mflux's, whose layers have their sizes in its code, of ``sizes`` where they are given."""
    found = QwenTextEncoder()
    own = {name: sizes[name] for name in OF_ENCODER if name in sizes}
    found.encoder = QwenEncoder(**{**own, "num_hidden_layers": 0})
    layer = {name: sizes[name] for name in ("hidden_size", *OF_LAYERS) if name in sizes}
    found.encoder.layers = [QwenEncoderLayer(**layer) for _ in range(own.get("num_hidden_layers", 28))]
    return found


def encode(text: str, tokenizer: LanguageTokenizer, encoder: nn.Module) -> mx.array:
    """What the transformer reads of ``text``, (tokens, width)."""
    given = tokenizer.tokenize(text)
    tokens: mx.array
    tokens, _ = encoder(given.input_ids, given.attention_mask)
    return tokens[0]


def vae() -> QwenVAE:
    """mflux's, with norms as its files have them: it loads arrays of any shape, and turns these itself."""
    found = QwenVAE()
    for module in found.modules():
        if isinstance(module, QwenImageRMSNorm):
            module.weight = module.weight.reshape(-1)
    return found


def noise(seed: int, height: int, width: int) -> mx.array:
    """mflux's for ``seed``, (height, width, channels) of the latent of a picture of this size."""
    made: mx.array = QwenLatentCreator.create_noise(seed, height, width)
    return made.reshape(height // 16, width // 16, -1)


def decoding_bytes(vae: QwenVAE, image_size: Sequence[int], dtype: mx.Dtype) -> int:
    """Bytes of activations of drawing a picture, in one piece."""
    channels = int(vae.decoder.conv_out.conv3d.weight.shape[-1])
    widths = DECODER_WIDTHS_GPU if on_gpu() else DECODER_WIDTHS_CPU
    return int(dtype.size) * widths * channels * image_size[0] * image_size[1]


FAMILY = Family(
    command="mflux-generate-qwen",
    definition=QwenWeightDefinition,
    config=ModelConfig.qwen_image(),
    scheduler="linear",
    architecture=lambda about: QwenArchitecture(QwenTransformer(**about), about),
    sizes={name: name for name in SIZES},
    encoders={"text_encoder": Encoder(text_encoder, {name: name for name in (*OF_ENCODER, *OF_LAYERS)})},
    encode=encode,
    encoder_dtype=mx.bfloat16,
    dropped=DROPPED,
    text_encoders="qwen2.5-vl",
    vae=vae,
    unpacked=lambda vae, latents: unpacked(latents),
    decoding_bytes=decoding_bytes,
    in_strips=False,
    latent=(16, 64),
    noise=noise,
    noise_kind="mlx-channels-last",
    times=lambda levels, dtype: levels,
    guidance=QwenImage.compute_guided_noise,
    activations=mx.float32,
)

skeleton, load = FAMILY.skeleton, FAMILY.load
