"""FLUX.1 as mflux draws it: what ``dev`` and ``schnell``, its two models, have in common."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from calib.base.device import on_gpu
from calib.models.memory import DECODER_WIDTHS_GPU
from calib.models.mflux.decoder import unpacked
from calib.models.mflux.family import Family, Told
from calib.models.mflux.flux1.sizes import CLIP_SIZES, SIZES, T5_SIZES, make_clip, make_t5, make_transformer
from calib.models.mflux.flux1.transformer import Flux1Architecture
from calib.models.mflux.text import Encoder

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.flux_text_encoder.clip_encoder.clip_encoder import CLIPEncoder
from mflux.models.flux.model.flux_text_encoder.prompt_encoder import PromptEncoder
from mflux.models.flux.model.flux_text_encoder.t5_encoder.t5_encoder import T5Encoder
from mflux.models.flux.model.flux_vae.vae import VAE
from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition

#: What decoding takes at once on a CPU, in units of (pixels, channels at full size), in float32: 643, 2570 and 10408 MB
#: of 128, 256 and 512 px. On a GPU it is SD3's decoder, of the same layers.
DECODER_WIDTHS_CPU = 78


def encode(
    text: str,
    clip_tokenizer: LanguageTokenizer,
    t5_tokenizer: LanguageTokenizer,
    t5_encoder: T5Encoder,
    clip_encoder: CLIPEncoder,
) -> tuple[mx.array, mx.array]:
    """What the transformer reads of ``text``: T5's tokens, (tokens, width), and CLIP's pooled ones, (width,)."""
    given = {"t5_tokenizer": t5_tokenizer, "clip_tokenizer": clip_tokenizer}
    encoders = {"t5_text_encoder": t5_encoder, "clip_text_encoder": clip_encoder}
    tokens, pooled = PromptEncoder.encode_prompt(text, {}, **given, **encoders)
    return tokens[0], pooled[0]


def noise(seed: int, height: int, width: int) -> mx.array:
    """mflux's for ``seed``, (height, width, channels) of the latent of a picture of this size."""
    made: mx.array = FluxLatentCreator.create_noise(seed, height, width)
    return made.reshape(height // 16, width // 16, -1)


def decoding_bytes(vae: VAE, image_size: Sequence[int], dtype: mx.Dtype) -> int:
    """Bytes of activations of drawing a picture, in one piece."""
    channels = int(vae.decoder.conv_out.conv2d.weight.shape[-1])
    widths = DECODER_WIDTHS_GPU if on_gpu() else DECODER_WIDTHS_CPU
    return int(dtype.size) * widths * channels * image_size[0] * image_size[1]


def architecture(config: ModelConfig, kind: str, guidance: float, about: Mapping[str, Any]) -> Flux1Architecture:
    """The transformer of a model without weights; ``guidance``: 1000 times what it is told, where it takes any."""
    return Flux1Architecture(make_transformer(config, **about), f"flux1_{kind}", about, guidance)


def family(
    config: ModelConfig,
    kind: str,
    guidance: float = 0.0,
    told: Callable[[Family, Told, mx.Dtype], Family] | None = None,
) -> Family:
    """The family of one of the models: of mflux's settings for it, and mflux's name for its kind."""
    return Family(
        command=f"mflux-generate --base-model {kind}",
        definition=FluxWeightDefinition,
        config=config,
        scheduler="linear",
        architecture=partial(architecture, config, kind, guidance),
        sizes={name: name for name in SIZES},
        encoders={"t5_encoder": Encoder(make_t5, T5_SIZES), "clip_encoder": Encoder(make_clip, CLIP_SIZES)},
        encode=encode,
        padded=True,
        of_length="t5",
        text_encoders="clip_l+t5",
        vae=lambda: VAE(),
        unpacked=lambda vae, latents: unpacked(latents),
        decoding_bytes=decoding_bytes,
        in_strips=False,
        latent=(16, 64),
        noise=noise,
        # mflux rounds them to the type of the weights.
        times=lambda levels, dtype: (levels * 1000).astype(dtype).astype(mx.float32),
        noise_kind="mlx-channels-last",
        told=told,
        activations=mx.float32,
    )
