"""FLUX.2-klein-4B as mflux draws it: ``model=flux2_klein_4b``."""

from collections.abc import Sequence

from calib.models.mflux.decoder import channels_first, drawing_bytes
from calib.models.mflux.family import Family
from calib.models.mflux.flux2.transformer import Flux2Architecture
from calib.models.mflux.text import Encoder

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mflux.models.flux2.latent_creator.flux2_latent_creator import Flux2LatentCreator
from mflux.models.flux2.model.flux2_text_encoder.prompt_encoder import Flux2PromptEncoder
from mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder import Qwen3TextEncoder
from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE
from mflux.models.flux2.weights.flux2_weight_definition import Flux2KleinWeightDefinition
from mlx import nn

#: What ``config.json`` calls the sizes, as mflux does.
SIZES = (
    *("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads"),
    *("joint_attention_dim", "mlp_ratio", "axes_dims_rope", "rope_theta", "timestep_guidance_channels"),
)
TEXT_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "head_dim", "rope_theta", "rms_norm_eps"),
)
#: Layers of the text encoder whose outputs the transformer reads, side by side.
LAYERS_READ = (9, 18, 27)


def encode(text: str, tokenizer: LanguageTokenizer, encoder: nn.Module) -> mx.array:
    """What the transformer reads of ``text``, (tokens, width)."""
    tokens: mx.array
    tokens, _ = Flux2PromptEncoder.encode_prompt(
        text, tokenizer, encoder, max_sequence_length=tokenizer.max_length, text_encoder_out_layers=LAYERS_READ
    )
    return tokens[0]


def noise(seed: int, height: int, width: int) -> mx.array:
    """mflux's for ``seed``, (height, width, channels) of the latent of a picture of this size."""
    made: mx.array
    made, *_ = Flux2LatentCreator.prepare_latents(seed, height, width, batch_size=1)
    return made[0].transpose(1, 2, 0)


def decoding_bytes(vae: Flux2VAE, image_size: Sequence[int], dtype: mx.Dtype) -> int:
    """Bytes of activations of drawing a picture."""
    return drawing_bytes(image_size, vae.decoder.conv_out.weight.shape[-1], dtype)


FAMILY = Family(
    command="mflux-generate-flux2",
    definition=Flux2KleinWeightDefinition,
    config=ModelConfig.flux2_klein_4b(),
    scheduler="flow_match_euler_discrete",
    architecture=lambda about: Flux2Architecture(Flux2Transformer(**about), about),
    sizes={name: name for name in SIZES},
    encoders={"text_encoder": Encoder(Qwen3TextEncoder, {name: name for name in TEXT_SIZES})},
    encode=encode,
    padded=True,
    text_encoders="qwen3",
    vae=lambda: Flux2VAE(),
    # A latent's place is 2 by 2 of the VAE's; its batch norm has their scales.
    unpacked=lambda vae, latents: vae.unpack_packed_latents(channels_first(latents)),
    decoding_bytes=decoding_bytes,
    latent=(16, 128),
    noise=noise,
    # mflux rounds them, by up to 2 of 1000 to bfloat16: gradients and controls, in float32, are of the same steps.
    times=lambda levels, dtype: (levels * 1000).astype(dtype).astype(mx.float32),
)

skeleton, load = FAMILY.skeleton, FAMILY.load
