"""Z-Image-Turbo as mflux draws it: ``model=zimage_turbo``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from calib.base.errors import ConfigError
from calib.models.memory import preflight
from calib.models.mflux import note_version
from calib.models.mflux.decoder import Decoder, drawing_bytes
from calib.models.mflux.files import (
    component_of,
    component_weights,
    folder_of,
    known_folder,
    load_component,
    sizes,
    tokenizer_of,
)
from calib.models.mflux.flow import MfluxFlow
from calib.models.mflux.precision import check_dtype
from calib.models.mflux.text import TextEncoder
from calib.models.mflux.zimage_transformer import ZImageArchitecture
from calib.models.model import DiffusionModel, ModelDtype
from calib.models.placed import placed

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mflux.models.z_image.latent_creator.z_image_latent_creator import ZImageLatentCreator
from mflux.models.z_image.model.z_image_text_encoder.prompt_encoder import PromptEncoder
from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder as Qwen3
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mflux.models.z_image.model.z_image_vae.vae import VAE
from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition as Definition
from mlx import nn

#: What ``config.json`` calls the sizes of the transformer and of its text encoder, and what mflux calls them.
SIZES = {
    "dim": "dim",
    "n_layers": "n_layers",
    "n_refiner_layers": "n_refiner_layers",
    "n_heads": "n_heads",
    "cap_feat_dim": "cap_feat_dim",
    "axes_dims": "axes_dims",
}
TEXT_SIZES = {
    name: name
    for name in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "head_dim"),
    )
}
#: mflux's sampler of a model without guidance.
SCHEDULER = "linear"


def skeleton(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    dtype: ModelDtype = ModelDtype.BFLOAT16,
    shift: float = 1.0,
    image_size: Sequence[int] = (1024, 1024),
    cfg_weight: float = 0.0,
    stream: bool | None = None,
) -> ZImageArchitecture:
    """Check the parameters of :func:`load`, and build the transformer without weights."""
    check_dtype(dtype)
    if shift != 1:
        raise ConfigError.bad_value("sampler.shift", shift, f"{name} takes only 1: mflux shifts by the picture's size")
    latent_shape(image_size)
    if cfg_weight > 0:
        raise ConfigError.bad_value("sampler.cfg_weight", cfg_weight, f"{name} takes only 0, its guidance is distilled")
    about = sizes(known_folder(repository, checkpoint, Definition), "transformer", SIZES)
    return ZImageArchitecture(ZImageTransformer(**about), about)


def latent_shape(image_size: Sequence[int]) -> tuple[int, int, int]:
    """(height, width, 16) of the latent of an image of ``image_size`` pixels; the VAE shrinks by 8.

    Raises:
        ConfigError: the transformer's patches, 2 by 2, do not fill it.
    """
    height, width = image_size
    if height % 16 or width % 16:
        allowed = "must be [height, width], each a multiple of 16"
        raise ConfigError.bad_value("sampler.image_size", list(image_size), allowed)
    return height // 8, width // 8, 16


def load(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    dtype: ModelDtype = ModelDtype.BFLOAT16,
    shift: float = 1.0,
    image_size: Sequence[int] = (1024, 1024),
    stream: bool | None = None,
) -> DiffusionModel:
    """Load Z-Image-Turbo, from the hub or from a folder in its layout.

    Guidance is distilled into the weights: ``sampler.cfg_weight`` must be 0.

    Args:
        checkpoint: a folder with transformer, text_encoder, vae and tokenizer, as the hub has them or mflux saves them.
        shift: mflux's alone, by size: must be 1.
        image_size: height and width, pixels.
        stream: read the transformer's weights in each forward; None: where they do not fit into memory.
    """
    note_version()
    preflight(name, skeleton(name, repository, checkpoint, dtype, shift, image_size).module, dtype, stream)
    folder, shape = folder_of(repository, checkpoint, Definition), latent_shape(image_size)
    about = sizes(folder, "transformer", SIZES)
    text = text_encoder(folder, dtype.mlx)
    transformer = ZImageTransformer(**about)
    component = component_of(Definition, "transformer", num_layers=len(transformer.layers))
    read = partial(component_weights, folder, component, dtype.mlx)
    read()  # what is wrong with the transformer is said first
    vae = VAE()
    load_component(vae, folder, component_of(Definition, "vae"), dtype.mlx)
    model = model_of(name, ZImageArchitecture(transformer, about), vae, text, dtype.mlx, shape, image_size)
    return placed(model, read, str(folder / component.hf_subdir), stream)


def text_encoder(folder: Path, dtype: mx.Dtype) -> TextEncoder:
    """The text encoder of a folder; its weights are read at first use."""
    tokenizer = tokenizer_of(Definition, folder)
    assert isinstance(tokenizer, LanguageTokenizer)
    skeleton = partial(Qwen3, **sizes(folder, "text_encoder", TEXT_SIZES))

    def loaded() -> nn.Module:
        module: nn.Module = skeleton()
        component = component_of(Definition, "text_encoder", num_layers=len(module.layers))
        own = module.rotary_emb.pop("inv_freq")  # a constant, which the hub's files lack
        load_component(module, folder, component, dtype, unused=("rotary_emb.", "lm_head."))
        module.rotary_emb.inv_freq = own
        return module

    return TextEncoder(tokenizer, skeleton, loaded, PromptEncoder.encode_prompt, dtype)


def model_of(
    name: str,
    architecture: ZImageArchitecture,
    vae: VAE,
    text: Any,
    dtype: mx.Dtype,
    shape: tuple[int, int, int],
    image_size: Sequence[int],
) -> DiffusionModel:
    """The model of these parts, for pictures of one size."""
    decoder = Decoder(vae)
    create_noise = ZImageLatentCreator.create_noise
    channels = int(vae.decoder.conv_out.conv.weight.shape[-1])
    return DiffusionModel(
        name=name,
        architecture=architecture,
        sampler=MfluxFlow(ModelConfig.z_image_turbo(), SCHEDULER, create_noise, image_size, dtype),
        encode_text=text,
        decoder=decoder,
        decode_latents=decoder,
        draw_latents=decoder.draw,
        dtype=dtype,
        latent_shape=shape,
        text_length=text.length,
        token_count=text.count,
        max_prompt_tokens=text.length,
        text_encoders="qwen3",
        supports_guidance=False,
        unload_text=text.unload,
        text_bytes=text.nbytes,
        decoding_bytes=drawing_bytes(image_size, channels, dtype),
    )
