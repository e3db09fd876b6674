"""Stand-ins of the repositories that mflux reads, with random values: make_standin_checkpoint.py writes them.

Names, shapes and types of the tensors are the originals', and so are the files' places. Sizes may be smaller, as each
component's config.json says; mflux itself has them in its code and reads the originals' sizes alone.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import calib  # it sees to it that a fast BLAS is loaded before MLX
from calib.models.mflux.flux1 import sizes as flux1
from calib.models.mflux.qwen import text_encoder

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.weights.mapping.weight_mapping import WeightTarget
from mflux.models.common.weights.mapping.weight_transforms import WeightTransforms
from mflux.models.flux.model.flux_vae.vae import VAE as FluxVAE
from mflux.models.flux.weights.flux_weight_mapping import FluxWeightMapping
from mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder import Qwen3TextEncoder
from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE
from mflux.models.flux2.weights.flux2_weight_mapping import Flux2WeightMapping
from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer
from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE
from mflux.models.qwen.weights.qwen_weight_mapping import QwenWeightMapping
from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mflux.models.z_image.model.z_image_vae.vae import VAE
from mflux.models.z_image.weights.z_image_weight_mapping import ZImageWeightMapping
from mlx import nn
from mlx.utils import tree_flatten
from standin_tokenizers import CLIP_MERGES, write_clip, write_t5
from standin_tokenizers import write_qwen as write_qwens

assert calib.__version__

#: A file of weights is at most this large, as on the hub.
LARGEST_FILE = 5 << 30
#: Axes of the hub's convolutions in mflux's.
TURNED = {
    WeightTransforms.transpose_conv2d_weight: (0, 3, 1, 2),
    WeightTransforms.transpose_conv3d_weight: (0, 4, 1, 2, 3),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's transformer and text encoder, as their config.json have them; of FLUX.1's that is T5."""

    transformer: Mapping[str, Any]
    text: Mapping[str, Any]
    clip: Mapping[str, Any] = field(default_factory=dict)


QWEN3 = {
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}
#: The originals'.
ZIMAGE = Sizes(
    transformer={
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": [32, 48, 48],
        "cap_feat_dim": 2560,
        "dim": 3840,
        "in_channels": 16,
        "n_heads": 30,
        "n_layers": 30,
        "n_refiner_layers": 2,
    },
    text=QWEN3,
)
FLUX2 = Sizes(
    transformer={
        "attention_head_dim": 128,
        "axes_dims_rope": [32, 32, 32, 32],
        "in_channels": 128,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "num_attention_heads": 24,
        "num_layers": 5,
        "num_single_layers": 20,
        "rope_theta": 2000,
        "timestep_guidance_channels": 256,
    },
    text=QWEN3,
)


QWEN = Sizes(
    transformer={
        "attention_head_dim": 128,
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": 60,
        "out_channels": 16,
    },
    text={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
)

FLUX1 = Sizes(
    transformer={
        "attention_head_dim": 128,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "pooled_projection_dim": 768,
    },
    text={"d_ff": 10240, "d_model": 4096, "num_layers": 24, "vocab_size": 32128},
    clip={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 49408,
    },
)


def small_zimage_sizes(layers: int, heads: int) -> Sizes:
    """Of fewer blocks, each of ``heads`` heads as wide as the originals', and a text encoder as small."""
    transformer = {**ZIMAGE.transformer, "n_layers": layers, "n_heads": heads, "dim": 128 * heads}
    text = _small_text(64 * heads, layers + 1)
    return Sizes({**transformer, "cap_feat_dim": text["hidden_size"]}, text)


def small_flux2_sizes(double: int, single: int, heads: int) -> Sizes:
    """Of fewer blocks of both kinds, likewise; of the text encoder's layers the 27th is read."""
    transformer = {**FLUX2.transformer, "num_layers": double, "num_single_layers": single, "num_attention_heads": heads}
    text = _small_text(64 * heads, 27)
    return Sizes({**transformer, "joint_attention_dim": 3 * text["hidden_size"]}, text)


def small_qwen_sizes(layers: int, heads: int) -> Sizes:
    """Of fewer blocks, likewise; the text encoder keeps its 28 heads."""
    width = 28 * 16
    text = {**QWEN.text, **_small_text(width, layers + 1), "num_attention_heads": 28, "num_key_value_heads": 4}
    own = {"num_layers": layers, "num_attention_heads": heads, "joint_attention_dim": width}
    return Sizes({**QWEN.transformer, **own}, {name: text[name] for name in QWEN.text})


def small_flux1_sizes(double: int, single: int, heads: int) -> Sizes:
    """Of fewer blocks of both kinds, likewise, T5 of one layer; CLIP keeps its size, which is small."""
    width = min(FLUX1.text["d_model"], 256 * heads)
    own = {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads}
    text = {**FLUX1.text, "d_model": width, "d_ff": 2 * width, "num_layers": 1}
    return Sizes({**FLUX1.transformer, **own, "joint_attention_dim": width}, text, FLUX1.clip)


def _small_text(width: int, layers: int) -> dict[str, Any]:
    own = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 1024}
    return {**QWEN3, **own}


def write_zimage(
    folder: Path, sizes: Sizes = ZIMAGE, dtype: mx.Dtype = mx.bfloat16, vae: Callable[[], nn.Module] = VAE
) -> None:
    """All that loading Z-Image reads, in ``folder``."""
    own = {name: value for name, value in sizes.transformer.items() if not name.startswith("all_")}
    parts = (lambda: ZImageTransformer(**own), lambda: TextEncoder(**sizes.text), vae)
    _write_all(folder, ZImageWeightMapping, parts, sizes, {"latent_channels": 16}, dtype)


def write_flux2(
    folder: Path, sizes: Sizes = FLUX2, dtype: mx.Dtype = mx.bfloat16, vae: Callable[[], nn.Module] = Flux2VAE
) -> None:
    """All that loading FLUX.2 reads, in ``folder``."""
    parts = (lambda: Flux2Transformer(**sizes.transformer), lambda: Qwen3TextEncoder(**sizes.text), vae)
    _write_all(folder, Flux2WeightMapping, parts, sizes, {"latent_channels": 32}, dtype)


def write_qwen(
    folder: Path, sizes: Sizes = QWEN, dtype: mx.Dtype = mx.bfloat16, vae: Callable[[], nn.Module] = QwenVAE
) -> None:
    """All that loading Qwen-Image reads, in ``folder``; of the text encoder, which reads pictures too, no such part."""
    parts = (lambda: QwenTransformer(**sizes.transformer), lambda: text_encoder(**sizes.text), vae)
    _write_all(folder, QwenWeightMapping, parts, sizes, {"z_dim": 16}, dtype)


def write_flux1(
    folder: Path,
    kind: str,
    sizes: Sizes = FLUX1,
    dtype: mx.Dtype = mx.bfloat16,
    vae: Callable[[], nn.Module] = FluxVAE,
    merges: int = CLIP_MERGES,
) -> None:
    """All that loading FLUX.1-dev or -schnell, its ``kind``, reads, in ``folder``; CLIP's tokenizer has ``merges``."""
    mx.random.seed(0)
    config, maps = ModelConfig.from_name(kind), FluxWeightMapping
    own = {size: value for size, value in sizes.transformer.items() if size in flux1.SIZES}
    stated = {**sizes.transformer, "guidance_embeds": config.supports_guidance}
    t5 = flux1.make_t5(**{flux1.T5_SIZES[name]: value for name, value in sizes.text.items()})
    clip = flux1.make_clip(**{flux1.CLIP_SIZES[name]: value for name, value in sizes.clip.items()})
    _write(folder / "transformer", flux1.make_transformer(config, **own), maps.get_transformer_mapping(), stated, dtype)
    _write(folder / "text_encoder_2", t5, maps.get_t5_encoder_mapping(), sizes.text, dtype)
    _write(folder / "text_encoder", clip, maps.get_clip_encoder_mapping(), sizes.clip, dtype)
    _write(folder / "vae", vae(), maps.get_vae_mapping(), {"latent_channels": 16}, dtype)
    write_clip(folder / "tokenizer", merges)
    write_t5(folder / "tokenizer_2")


def _write_all(
    folder: Path,
    mapping: Any,
    parts: tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], nn.Module]],
    sizes: Sizes,
    vae_sizes: Mapping[str, Any],
    dtype: mx.Dtype,
) -> None:
    """Transformer, text encoder and VAE, which ``parts`` make, and a tokenizer."""
    mx.random.seed(0)
    transformer, text, vae = (make() for make in parts)
    for module in text.modules():
        module.pop("inv_freq", None)  # a constant
    _write(folder / "transformer", transformer, mapping.get_transformer_mapping(), sizes.transformer, dtype)
    _write(folder / "text_encoder", text, mapping.get_text_encoder_mapping(), sizes.text, dtype)
    _write(folder / "vae", vae, mapping.get_vae_mapping(), vae_sizes, dtype)
    write_qwens(folder / "tokenizer")


def _write(
    folder: Path, module: nn.Module, mapping: list[WeightTarget], config: Mapping[str, Any], dtype: mx.Dtype
) -> None:
    """A component's weights under the hub's names, in files of at most :data:`LARGEST_FILE`, and its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    originals, files, size = _originals(mapping), [dict[str, mx.array]()], 0
    for path, weight in tree_flatten(module.parameters()):
        name, axes = originals(path)
        if any(name in file for file in files):  # one for all blocks: T5's positions
            continue
        value = random_weight(path, weight.shape).astype(dtype)
        value = mx.contiguous(value.transpose(*axes)) if axes else value
        if size + value.nbytes > LARGEST_FILE:
            files.append({})
            size = 0
        files[-1][name] = value
        size += value.nbytes
    stem, places = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model", dict[str, str]()
    for number, file in enumerate(files, 1):
        name = f"{stem}-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else f"{stem}.safetensors"
        places |= dict.fromkeys(file, name)
        mx.save_safetensors(str(folder / name), file, metadata={"format": "pt"})
        mx.clear_cache()
    if len(files) > 1 or folder.name.startswith("text_encoder"):  # as all of them are on the hub, and mflux may expect
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _originals(mapping: list[WeightTarget]) -> Callable[[str], tuple[str, tuple[int, ...] | None]]:
    """The hub's name of a tensor of mflux's, and the order of its axes there where mflux turns it."""
    rules = []
    for target in mapping:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(target.to_pattern))
        rules.append((re.compile(pattern), target.from_pattern[0], target.transform))

    def original(path: str) -> tuple[str, tuple[int, ...] | None]:
        for pattern, name, transform in rules:
            if found := pattern.fullmatch(path):
                return name.format(**found.groupdict()), TURNED.get(transform)
        raise KeyError(path)

    return original


def random_weight(path: str, shape: tuple[int, ...]) -> mx.array:
    """Values that keep activations near 1: variance 1 / fan-in, channels of different widths, norms near 1; lazy."""
    if path.startswith("bn."):
        return mx.random.uniform(0.5, 2, shape) if path.endswith("var") else 0.1 * mx.random.normal(shape)
    if "norm" in f".{path}".split(".")[-2]:
        return mx.random.uniform(0.8, 1.2, shape) if path.endswith("weight") else mx.zeros(shape)
    if path == "embed_tokens.weight" or "pad_token" in path:
        return mx.random.normal(shape)
    if len(shape) == 1:
        return 0.05 * mx.random.normal(shape)
    wide = mx.exp(0.4 * mx.random.normal((shape[0], *[1] * (len(shape) - 1))))
    return wide * mx.random.normal(shape) / math.sqrt(math.prod(shape[1:]))
