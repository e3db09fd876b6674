"""Load DiffusionKit's SD3 and FLUX.

Weights are read with DiffusionKit's own key mappings and every name is checked: MLX's strict loading rejects
DiffusionKit's FLUX loader, and lenient loading would hide a missing tensor.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.base.errors import CalibError, ConfigError, suggest
from calib.models.hub import fetch, load_checked, renamed
from calib.models.memory import preflight
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, ModelDtype
from calib.models.placed import placed
from calib.models.tensors import read_weights
from calib.models.text import CLIP_TOKENS, TextEncoders

import mlx.core as mx
from diffusionkit.mlx import DiffusionPipeline, FluxLatentFormat, FluxPipeline, SD3LatentFormat, model_io
from diffusionkit.mlx.config import FLUX_SCHNELL, MMDiTConfig, VAEDecoderConfig
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import FluxSampler, ModelSamplingDiscreteFlow
from diffusionkit.mlx.vae import VAEDecoder

SD3_PREFIX = "model.diffusion_model."

#: Suffix of repositories with 4-bit weights.
QUANTIZED = "-4bit-quantized"

#: Parts of tensor names in FLUX checkpoints that DiffusionKit's model lacks: key biases, distilled-guidance embedding.
FLUX_UNUSED = (".k_proj.bias", "guidance_in.")


def latent_shape(image_size: Sequence[int]) -> tuple[int, int, int]:
    """(height, width, 16) of the latent of an image of ``image_size`` pixels; the VAEs shrink by 8.

    Raises:
        ConfigError: the transformers' patches, 2 by 2, do not fill it.
    """
    height, width = image_size
    if height % 16 or width % 16:
        allowed = "must be [height, width], each a multiple of 16"
        raise ConfigError.bad_value("sampler.image_size", list(image_size), allowed)
    return height // 8, width // 8, 16


def _known(name: str, repository: str, flux: bool) -> None:
    """Raise unless DiffusionKit has a key mapping for the 16-bit checkpoint of ``repository``."""
    if repository.endswith(QUANTIZED):
        plain = repository.removesuffix(QUANTIZED)
        allowed = f"its weights are 4-bit already, calib needs those of 16 bits: {plain}"
        raise ConfigError.bad_value("model.repository", repository, allowed)
    known = {key for key, config in model_io._CONFIG.items() if (config.depth_unified > 0) == flux}
    known = {key for key in known if not key.endswith(QUANTIZED)}
    if repository not in known:
        raise ConfigError(f"model.repository={repository}: not known for {name}.{suggest(repository, known)}")


def sd3_config(repository: str) -> MMDiTConfig:
    """A copy of DiffusionKit's configuration, whose loaders change the shared one."""
    return replace(model_io._CONFIG[repository], low_memory_mode=False)


def sd3_skeleton(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    use_t5: bool = True,
    dtype: ModelDtype = ModelDtype.FLOAT16,
    image_size: Sequence[int] = (512, 512),
    cfg_weight: float = 0.0,
    stream: bool | None = None,
) -> MMDiTArchitecture:
    """Check the parameters of :func:`load_sd3`, and build the transformer without weights."""
    _known(name, repository, flux=False)
    _check_file("model.checkpoint", checkpoint)
    config = sd3_config(repository)
    if max(latent_shape(image_size)[:2]) > config.max_latent_resolution:
        allowed = f"{name} has positions for at most {8 * config.max_latent_resolution} pixels a side"
        raise ConfigError.bad_value("sampler.image_size", list(image_size), allowed)
    return MMDiTArchitecture(MMDiT(config))


def flux_skeleton(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    dtype: ModelDtype = ModelDtype.BFLOAT16,
    image_size: Sequence[int] = (512, 512),
    cfg_weight: float = 0.0,
    stream: bool | None = None,
) -> MMDiTArchitecture:
    """Check the parameters of :func:`load_flux`, and build the transformer without weights."""
    _known(name, repository, flux=True)
    if cfg_weight > 0:
        raise ConfigError.bad_value("sampler.cfg_weight", cfg_weight, f"{name} takes only 0, its guidance is distilled")
    latent_shape(image_size)
    _check_file("model.checkpoint", checkpoint)
    _check_file("model.vae_checkpoint", vae_checkpoint)
    return MMDiTArchitecture(MMDiT(flux_config()))


def flux_config() -> MMDiTConfig:
    """FLUX.1-schnell's configuration, also for dev: DiffusionKit cannot run the guidance embedding of ``FLUX_DEV``."""
    return replace(FLUX_SCHNELL, low_memory_mode=False)


def _check_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).expanduser().is_file():
        raise ConfigError.bad_value(key, path, "no such file; name a .safetensors, or leave it out for the hub's")


def _check_lengths(weights: dict[str, mx.array], lengths: dict[str, tuple[int, int]], path: str) -> None:
    """Raise where a tensor is longer than DiffusionKit's mapping expects, which would drop the rest silently.

    ``lengths`` maps a part of a tensor's name to an axis and its expected length.
    """
    for name, weight in weights.items():
        for part, (axis, length) in lengths.items():
            if part in name and weight.ndim > axis and weight.shape[axis] != length:
                raise CalibError(
                    f"{path}: tensor {name!r} has shape {weight.shape}, with {length} expected on axis {axis}"
                )


def sd3_weights(path: str) -> dict[str, mx.array]:
    """The weights of SD3's transformer, by its own paths, from a checkpoint in Stability's naming; lazy."""
    weights = {name: w for name, w in read_weights(path).items() if name.startswith(SD3_PREFIX)}
    if not weights:
        raise CalibError(f"{path}: holds no tensor named {SD3_PREFIX}…; is it an SD3 checkpoint?")
    _check_lengths(weights, {"pos_embed": (0, 1)}, path)
    mapping = partial(model_io.mmdit_state_dict_adjustments, prefix=SD3_PREFIX)
    return renamed(mapping, weights, path)


def flux_weights(path: str, config: MMDiTConfig) -> dict[str, mx.array]:
    """The weights of FLUX's transformer, by its own paths, from a checkpoint in Black Forest Labs' naming; lazy."""
    weights = read_weights(path)
    if "img_in.weight" not in weights:
        raise CalibError(f"{path}: holds no tensor named img_in.weight; is it a FLUX checkpoint?")
    lengths = {
        ".linear1.": (0, (3 + config.mlp_ratio) * config.hidden_size),
        ".linear2.weight": (1, (1 + config.mlp_ratio) * config.hidden_size),
    }
    _check_lengths(weights, lengths, path)
    mapping = partial(model_io.flux_state_dict_adjustments, hidden_size=config.hidden_size, mlp_ratio=config.mlp_ratio)
    mapped = renamed(mapping, weights, path)
    # The output projection and fc2 share one bias in a unified block: DiffusionKit adds it once, and zeroes fc2's in
    # the first forward. Zeroing it here keeps the weights, and so their fingerprint, constant.
    for name in mapped:
        if name.startswith("unified_transformer_blocks") and name.endswith("mlp.fc2.bias"):
            mapped[name] = mx.zeros_like(mapped[name])
    return mapped


def load_vae_decoder(path: str, prefix: str, dtype: mx.Dtype) -> VAEDecoder:
    """Load the VAE's decoder from a checkpoint in the original naming."""
    config = VAEDecoderConfig()
    decoder = VAEDecoder(
        config.in_channels,
        config.out_channels,
        list(config.block_out_channels),
        config.layers_per_block,
        config.resnet_groups,
    )
    weights = {name: w for name, w in read_weights(path).items() if name.startswith(prefix)}
    _check_lengths(weights, {".attn_1.": (3, 1), ".nin_shortcut.": (3, 1)}, path)
    mapping = partial(model_io.vae_decoder_state_dict_adjustments, prefix=prefix)
    load_checked(decoder, renamed(mapping, weights, path), dtype, path)
    return decoder


def load_sd3(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    use_t5: bool = True,
    dtype: ModelDtype = ModelDtype.FLOAT16,
    shift: float = 3.0,
    image_size: Sequence[int] = (512, 512),
    stream: bool | None = None,
) -> DiffusionModel:
    """Load Stable Diffusion 3 or 3.5, from the hub or a local checkpoint that holds transformer and VAE.

    Args:
        use_t5: encode prompts with T5-XXL besides the two CLIPs; without it 10 GB less memory, simpler pictures.
        shift: timestep shift of the sampler (arXiv 2403.03206, equation 23).
        image_size: height and width, pixels.
        stream: read the transformer's weights in each forward; None: where they do not fit into memory.
    """
    transformer = MMDiT(sd3_config(repository))
    preflight(name, transformer, dtype, stream)
    path = checkpoint or fetch(repository, model_io._MMDIT[repository]["vae"], "model.checkpoint")
    # First, so that a file that the hub does not provide is reported before gigabytes are read.
    text = TextEncoders(DiffusionPipeline, repository, dtype.mlx, clip_g=True, use_t5=use_t5)
    decoder = load_vae_decoder(path, model_io._PREFIX[repository]["vae_decoder"], dtype.mlx)
    model = DiffusionModel(
        name=name,
        architecture=MMDiTArchitecture(transformer),
        sampler=ModelSamplingDiscreteFlow(shift=shift),
        latent_format=SD3LatentFormat(),
        encode_text=text,
        decoder=decoder,
        decode_latents=decoder,
        dtype=dtype.mlx,
        latent_shape=latent_shape(image_size),
        text_length=text.length,
        text_encoders=text.names,
        # With T5 too: text beyond CLIP's 77 tokens reaches neither the pooled text nor CLIP's half of the tokens.
        token_count=text.clip_tokens,
        max_prompt_tokens=CLIP_TOKENS,
        unload_text=text.unload,
        text_bytes=text.nbytes,
        smaller_text="model.use_t5=false" if use_t5 else "",
    )
    return placed(model, partial(sd3_weights, path), path, stream)


def load_flux(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    dtype: ModelDtype = ModelDtype.BFLOAT16,
    shift: float = 1.0,
    image_size: Sequence[int] = (512, 512),
    stream: bool | None = None,
) -> DiffusionModel:
    """Load FLUX.1 schnell or dev, from the hub or from local checkpoints of transformer and VAE.

    Parameters as for :func:`load_sd3`. Guidance is distilled into the weights: ``sampler.cfg_weight`` must be 0.
    """
    transformer = MMDiT(flux_config())
    preflight(name, transformer, dtype, stream)
    files = model_io._MMDIT[repository]
    path = checkpoint or fetch(repository, files[repository], "model.checkpoint")
    vae = vae_checkpoint or fetch(repository, files["vae"], "model.vae_checkpoint")
    text = TextEncoders(FluxPipeline, repository, dtype.mlx, clip_g=False, use_t5=True)
    decoder = load_vae_decoder(vae, "decoder.", dtype.mlx)
    model = DiffusionModel(
        name=name,
        architecture=MMDiTArchitecture(transformer),
        sampler=FluxSampler(shift=shift),
        latent_format=FluxLatentFormat(),
        encode_text=text,
        decoder=decoder,
        decode_latents=decoder,
        dtype=dtype.mlx,
        latent_shape=latent_shape(image_size),
        text_length=text.length,
        text_encoders=text.names,
        # T5 alone provides the token-level text; CLIP's limit of 77 tokens affects only the pooled text.
        token_count=text.t5_tokens,
        max_prompt_tokens=text.length,
        supports_guidance=False,
        unload_text=text.unload,
        text_bytes=text.nbytes,
    )
    return placed(model, partial(flux_weights, path, transformer.config), path, stream, FLUX_UNUSED)
