"""The model that ships with calib: text to 64x64 emoji, built from DiffusionKit's own classes.

A CLIP text encoder, an MMDiT and a VAE in small configurations; MODEL_CARD.md describes their training.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from calib.base.errors import ConfigError
from calib.models.architecture import Conditioning
from calib.models.emoji.architecture import (
    EmojiConfig,
    EmojiTokenizer,
    build_decoder,
    build_encoder,
    build_text_encoder,
    build_transformer,
    latent_format,
)
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.models.placed import placed
from calib.models.tensors import read_weights, set_weights

import mlx.core as mx
from diffusionkit.mlx.sampler import ModelSamplingDiscreteFlow
from diffusionkit.mlx.vae import Encoder
from mlx import nn

FOLDER = Path(__file__).parent


def _read(file: str, prefix: str = "") -> dict[str, mx.array]:
    stored = read_weights(str(FOLDER / file))
    return {name.removeprefix(prefix): weight for name, weight in stored.items() if name.startswith(prefix)}


def _load_weights(module: nn.Module, file: str, dtype: mx.Dtype, prefix: str = "") -> None:
    set_weights(module, _read(file, prefix), dtype)
    mx.eval(module.parameters())


def load(
    name: str = "emoji",
    dtype: ModelDtype = ModelDtype.FLOAT32,
    shift: float = 1.0,
    image_size: Sequence[int] = (64, 64),
    stream: bool | None = None,
) -> DiffusionModel:
    """Load the shipped model.

    Args:
        dtype: weight and activation type of the transformer; the stored weights are float16.
        shift: timestep shift of the sampler (SD3, arXiv 2403.03206, equation 23).
        image_size: must be the size of the training images, (64, 64).
        stream: read the transformer's weights in each forward; None: where they do not fit into memory.
    """
    architecture = skeleton(name, dtype, image_size)
    config = EmojiConfig.load(FOLDER / "config.json")
    text_encoder = build_text_encoder(config)
    decoder = build_decoder(config)
    _load_weights(text_encoder, "text.safetensors", mx.float32)
    _load_weights(decoder, "vae.safetensors", mx.float32, prefix="decoder.")
    tokenizer = EmojiTokenizer.load(FOLDER, config.text_length)

    def encode_text(text: str) -> Conditioning:
        output = text_encoder(mx.array([tokenizer(text)]))
        return Conditioning(output.last_hidden_state, output.pooled_output)

    def decode_latents(latents: mx.array) -> mx.array:
        image: mx.array = decoder(latents.astype(mx.float32))
        return image

    model = DiffusionModel(
        name=name,
        architecture=architecture,
        sampler=ModelSamplingDiscreteFlow(shift=shift),
        latent_format=latent_format(config),
        encode_text=encode_text,
        decoder=decoder,
        decode_latents=decode_latents,
        dtype=dtype.mlx,
        latent_shape=(config.latent_size, config.latent_size, config.latent_channels),
        text_length=config.text_length,
        text_encoders="emoji",
        token_count=lambda text: len(tokenizer.tokens(text)),
        max_prompt_tokens=config.text_length,
        text_bytes=sum(weight.nbytes for weight in weights(text_encoder).values()),
    )
    file = "transformer.safetensors"
    return placed(model, partial(_read, file), str(FOLDER / file), stream)


def skeleton(
    name: str = "emoji",
    dtype: ModelDtype = ModelDtype.FLOAT32,
    image_size: Sequence[int] = (64, 64),
    cfg_weight: float = 0.0,
    stream: bool | None = None,
) -> MMDiTArchitecture:
    """Check the parameters of :func:`load`, and build the transformer without weights."""
    if tuple(image_size) != (64, 64):
        raise ConfigError.bad_value("sampler.image_size", list(image_size), f"the {name} model draws [64, 64] only")
    return MMDiTArchitecture(build_transformer(EmojiConfig.load(FOLDER / "config.json"), dtype.mlx))


def load_encoder() -> Encoder:
    """Load the VAE's encoder: images (batch, 64, 64, 3) in [-1, 1] -> (batch, 16, 16, 32), mean and log variance."""
    encoder = build_encoder(EmojiConfig.load(FOLDER / "config.json"))
    _load_weights(encoder, "vae.safetensors", mx.float32, prefix="encoder.")
    return encoder


def training_names() -> list[str]:
    """The Unicode names of the 1,911 training emoji, in the data set's order."""
    return (FOLDER / "names.txt").read_text(encoding="utf-8").splitlines()
