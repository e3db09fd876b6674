"""DiffusionKit's SD3 and FLUX behind calib's interface.

Weights are read with DiffusionKit's own key mappings and every name is checked: MLX's strict loading rejects
DiffusionKit's FLUX loader, and a lenient one would hide a missing tensor. Text is encoded by DiffusionKit's own
``encode_text``, called on a pipeline object that holds nothing but the encoders.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.errors import CalibError, ConfigError, suggest
from calib.models.model import Conditioning, DiffusionModel, ModelDtype

import mlx.core as mx
from diffusionkit.mlx import T5_MAX_LENGTH, DiffusionPipeline, FluxLatentFormat, FluxPipeline, SD3LatentFormat, model_io
from diffusionkit.mlx.config import FLUX_SCHNELL, MMDiTConfig, VAEDecoderConfig
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import FluxSampler, ModelSamplingDiscreteFlow
from diffusionkit.mlx.vae import VAEDecoder
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from mlx import nn
from mlx.utils import tree_flatten

SD3_PREFIX = "model.diffusion_model."

#: In FLUX checkpoints but not in DiffusionKit's model: it has no key bias and no distilled-guidance embedding.
FLUX_UNUSED = (".k_proj.bias", "guidance_in.")


def latent_shape(image_size: Sequence[int]) -> tuple[int, int, int]:
    """(height, width, 16) of the latent of an image of ``image_size`` pixels; the VAEs shrink by 8."""
    height, width = image_size
    return height // 8, width // 8, 16


def _known(name: str, repository: str, table: dict[str, Any]) -> None:
    if repository not in table:
        raise ConfigError(f"model.repository={repository}: not known for {name}.{suggest(repository, table)}")


def sd3_config(repository: str) -> MMDiTConfig:
    """DiffusionKit's configuration; a copy, as DiffusionKit's loaders change the shared one."""
    return replace(model_io._CONFIG[repository], low_memory_mode=False)


def sd3_skeleton(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    use_t5: bool = True,
    dtype: ModelDtype = ModelDtype.FLOAT16,
    image_size: Sequence[int] = (512, 512),
    cfg_weight: float = 0.0,
) -> MMDiT:
    """The transformer without its weights, and a check of what was asked of it; parameters as for :func:`load_sd3`."""
    _known(name, repository, model_io._CONFIG)
    _check_file("model.checkpoint", checkpoint)
    return MMDiT(sd3_config(repository))


def flux_skeleton(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    dtype: ModelDtype = ModelDtype.BFLOAT16,
    image_size: Sequence[int] = (512, 512),
    cfg_weight: float = 0.0,
) -> MMDiT:
    """The transformer without its weights, and a check of what was asked of it; parameters as for :func:`load_flux`."""
    _known(name, repository, model_io._CONFIG)
    if cfg_weight > 0:
        raise ConfigError.bad_value("sampler.cfg_weight", cfg_weight, f"{name} takes only 0, its guidance is distilled")
    _check_file("model.checkpoint", checkpoint)
    _check_file("model.vae_checkpoint", vae_checkpoint)
    return MMDiT(flux_config())


def flux_config() -> MMDiTConfig:
    """FLUX.1-schnell's, also for dev: DiffusionKit's model cannot run the guidance embedding of ``FLUX_DEV``."""
    return replace(FLUX_SCHNELL, low_memory_mode=False)


def _check_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).expanduser().is_file():
        raise ConfigError.bad_value(key, path, "no such file; name a .safetensors, or leave it out for the hub's")


def fetch(repository: str, file: str) -> str:
    """Path of a hub file, downloaded once; an unreachable or gated one ends in a line that says what to do."""
    # Its retries are not news to the user; the one line below is.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return hf_hub_download(repository, file)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CalibError(
            f"{repository}/{file}: cannot be fetched ({reason}); check the network, accept the model's licence and "
            "run `hf auth login`, or give model.checkpoint=FILE"
        ) from None


def load_checked(
    module: nn.Module, weights: dict[str, mx.array], dtype: mx.Dtype, source: str, unused: Sequence[str] = ()
) -> None:
    """Load ``weights`` into ``module`` as ``dtype``; every parameter must be given, and every name used.

    ``unused`` lists parts of names that the module is known not to have.
    """
    given = {name: w for name, w in weights.items() if not any(part in name for part in unused)}
    wanted = dict(tree_flatten(module.parameters()))
    for name in sorted(wanted.keys() ^ given.keys()):
        state = "lacks" if name in wanted else "has an unknown"
        raise CalibError(f"{source}: {state} tensor {name!r}; is it the right checkpoint?")
    for name, value in given.items():
        if value.shape != wanted[name].shape:
            raise CalibError(f"{source}: tensor {name!r} has shape {value.shape}, not {wanted[name].shape}")
    module.load_weights([(name, value.astype(dtype)) for name, value in given.items()])
    mx.eval(module.parameters())


def read_weights(path: str) -> dict[str, mx.array]:
    """The tensors of a safetensors file."""
    try:
        weights = mx.load(str(Path(path).expanduser()))
    except (RuntimeError, ValueError) as error:
        raise CalibError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})") from None
    assert isinstance(weights, dict)
    return weights


def load_sd3_transformer(path: str, config: MMDiTConfig, dtype: mx.Dtype) -> MMDiT:
    """SD3's transformer from a checkpoint in Stability's naming."""
    transformer = MMDiT(config)
    weights = {name: w for name, w in read_weights(path).items() if name.startswith(SD3_PREFIX)}
    if not weights:
        raise CalibError(f"{path}: holds no tensor named {SD3_PREFIX}…; is it an SD3 checkpoint?")
    load_checked(transformer, model_io.mmdit_state_dict_adjustments(weights, prefix=SD3_PREFIX), dtype, path)
    return transformer


def load_flux_transformer(path: str, config: MMDiTConfig, dtype: mx.Dtype) -> MMDiT:
    """FLUX's transformer from a checkpoint in Black Forest Labs' naming."""
    transformer = MMDiT(config)
    weights = read_weights(path)
    if "img_in.weight" not in weights:
        raise CalibError(f"{path}: holds no tensor named img_in.weight; is it a FLUX checkpoint?")
    mapped = model_io.flux_state_dict_adjustments(weights, hidden_size=config.hidden_size, mlp_ratio=config.mlp_ratio)
    # Output and fc2 share one bias in a unified block: DiffusionKit adds it once, and zeroes fc2's in the first
    # forward. Zeroing it here keeps the weights the same for ever after.
    for name in mapped:
        if name.startswith("unified_transformer_blocks") and name.endswith("mlp.fc2.bias"):
            mapped[name] = mx.zeros_like(mapped[name])
    load_checked(transformer, mapped, dtype, path, unused=FLUX_UNUSED)
    return transformer


def load_vae_decoder(path: str, prefix: str, dtype: mx.Dtype) -> VAEDecoder:
    """The VAE's decoder from a checkpoint in the original naming."""
    config = VAEDecoderConfig()
    decoder = VAEDecoder(
        config.in_channels,
        config.out_channels,
        list(config.block_out_channels),
        config.layers_per_block,
        config.resnet_groups,
    )
    weights = {name: w for name, w in read_weights(path).items() if name.startswith(prefix)}
    load_checked(decoder, model_io.vae_decoder_state_dict_adjustments(weights, prefix=prefix), dtype, path)
    return decoder


def _clip(key: str, dtype: ModelDtype) -> Any:
    return model_io.load_text_encoder(model_io._DEFAULT_MODEL, dtype is not ModelDtype.FLOAT32, model_key=key)


def _tokenizer(part: str, pad_with_eos: bool) -> Any:
    keys = {"merges_key": f"tokenizer_{part}_merges", "vocab_key": f"tokenizer_{part}_vocab"}
    return model_io.load_tokenizer(model_io._DEFAULT_MODEL, pad_with_eos=pad_with_eos, **keys)


def _add_encoders(pipeline: DiffusionPipeline, dtype: ModelDtype, use_t5: bool, clip_g: bool) -> None:
    """Fill ``pipeline`` with the text encoders of the hub's ``argmaxinc/stable-diffusion``."""
    model_io._FLOAT16 = dtype.mlx
    for file in ("clip_l_config", "clip_l", *(("clip_g",) * clip_g), *(("t5",) * use_t5)):
        fetch(model_io._DEFAULT_MODEL, model_io._MODELS[model_io._DEFAULT_MODEL][file])
    pipeline.clip_l, pipeline.tokenizer_l = _clip("clip_l", dtype), _tokenizer("l", True)
    if clip_g:
        pipeline.clip_g, pipeline.tokenizer_g = _clip("clip_g", dtype), _tokenizer("g", False)
    pipeline.use_t5 = use_t5
    if use_t5:
        half = dtype is not ModelDtype.FLOAT32
        pipeline.t5_encoder = model_io.load_t5_encoder(float16=half, low_memory_mode=False)
        pipeline.t5_tokenizer = model_io.load_t5_tokenizer(T5_MAX_LENGTH[pipeline.model_version])


def text_encoder(pipeline: DiffusionPipeline, guidance: bool) -> Callable[[str, float], Conditioning]:
    """DiffusionKit's ``encode_text``; SD3's gives two rows always, of which one is kept without guidance."""

    def encode(prompt: str, cfg_weight: float) -> Conditioning:
        tokens, pooled = pipeline.encode_text(prompt, cfg_weight, "")
        rows = 2 if guidance and cfg_weight > 0 else 1
        return Conditioning(tokens[:rows], pooled[:rows])

    return encode


def load_sd3(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    use_t5: bool = True,
    dtype: ModelDtype = ModelDtype.FLOAT16,
    shift: float = 3.0,
    image_size: Sequence[int] = (512, 512),
) -> DiffusionModel:
    """Stable Diffusion 3 or 3.5, from the hub or a local checkpoint that holds transformer and VAE.

    Args:
        use_t5: encode prompts with T5-XXL besides the two CLIPs; without it 10 GB less memory, plainer pictures.
        shift: timestep shift of the sampler (arXiv 2403.03206, equation 23).
        image_size: height and width, pixels.
    """
    path = checkpoint or fetch(repository, model_io._MMDIT[repository]["vae"])
    transformer = load_sd3_transformer(path, sd3_config(repository), dtype.mlx)
    decoder = load_vae_decoder(path, model_io._PREFIX[repository]["vae_decoder"], dtype.mlx)
    pipeline = DiffusionPipeline.__new__(DiffusionPipeline)
    pipeline.model_version = repository
    _add_encoders(pipeline, dtype, use_t5, clip_g=True)
    return DiffusionModel(
        name=name,
        transformer=transformer,
        sampler=ModelSamplingDiscreteFlow(shift=shift),
        latent_format=SD3LatentFormat(),
        encode_text=text_encoder(pipeline, guidance=True),
        decode_latents=decoder,
        dtype=dtype.mlx,
        latent_shape=latent_shape(image_size),
    )


def load_flux(
    name: str,
    repository: str,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    dtype: ModelDtype = ModelDtype.BFLOAT16,
    shift: float = 1.0,
    image_size: Sequence[int] = (512, 512),
) -> DiffusionModel:
    """FLUX.1 schnell or dev, from the hub or from local checkpoints of transformer and VAE.

    Parameters as for :func:`load_sd3`. Guidance is distilled into the weights: ``sampler.cfg_weight`` must be 0.
    """
    files = model_io._MMDIT[repository]
    path = checkpoint or fetch(repository, files[repository])
    transformer = load_flux_transformer(path, flux_config(), dtype.mlx)
    decoder = load_vae_decoder(vae_checkpoint or fetch(repository, files["vae"]), "decoder.", dtype.mlx)
    pipeline = FluxPipeline.__new__(FluxPipeline)
    pipeline.model_version = repository
    _add_encoders(pipeline, dtype, use_t5=True, clip_g=False)
    return DiffusionModel(
        name=name,
        transformer=transformer,
        sampler=FluxSampler(shift=shift),
        latent_format=FluxLatentFormat(),
        encode_text=text_encoder(pipeline, guidance=False),
        decode_latents=decoder,
        dtype=dtype.mlx,
        latent_shape=latent_shape(image_size),
        supports_guidance=False,
    )
