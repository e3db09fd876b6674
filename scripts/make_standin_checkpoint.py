"""Build an offline stand-in of the Hugging Face repositories that calib reads SD3, FLUX and mflux's models from.

Names, shapes and types of the tensors are the originals', their values random: pictures are noise, but all that lies
between the hub and the picture really runs.

    python scripts/make_standin_checkpoint.py DIR
    HF_HUB_CACHE=DIR HF_HUB_OFFLINE=1 calib generate model=sd3_medium model.use_t5=false num_images=1

SD3-medium has its full size, 6 GB with the CLIPs. T5 (--t5, and always with FLUX) has 1 of its 24 layers, as its
config.json says. FLUX has fewer blocks (--blocks); DiffusionKit keeps their number in its code, so that calib must be
started with another one: the command is printed at the end. mflux's models have their full size (Z-Image 21 GB with its
text encoder, FLUX.2-klein 16, Qwen-Image 56, FLUX.1 34), or with --layers and --heads that of their config.json, which
calib reads and mflux, with the sizes in its code, does not. FLUX.1's blocks it counts, so with --layers alone, at full
width, it loads the transformer; T5 then has one layer (2 GB in all with --layers 1 1).
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import calib  # it sees to it that a fast BLAS is loaded before MLX
from calib.models.text import REPOSITORY as TEXT_REPOSITORY
from calib.models.text import T5_REPOSITORY

import mlx.core as mx
import original_naming as original
import standin_tokenizers as tokenizers
from diffusionkit.mlx import config as shapes
from diffusionkit.mlx import model_io
from diffusionkit.mlx.clip import CLIPTextModel
from diffusionkit.mlx.config import CLIPTextModelConfig
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.t5 import SD3T5Encoder
from diffusionkit.mlx.vae import VAEDecoder, VAEEncoder
from mlx import nn
from mlx.utils import tree_flatten
from transformers import T5Config

assert calib.__version__

MODELS = {
    "sd3_medium": "argmaxinc/mlx-stable-diffusion-3-medium",
    "sd35_large": "argmaxinc/mlx-stable-diffusion-3.5-large",
    "flux_schnell": "argmaxinc/mlx-FLUX.1-schnell",
    "flux_dev": "argmaxinc/mlx-FLUX.1-dev",
}
ZIMAGE = "Tongyi-MAI/Z-Image-Turbo"
#: mflux's models: the repository, the number of blocks of each kind, and the heads.
OF_MFLUX = {
    "zimage_turbo": (ZIMAGE, (30,), 30),
    "flux2_klein_4b": ("black-forest-labs/FLUX.2-klein-4B", (5, 20), 24),
    "qwen_image": ("Qwen/Qwen-Image-2512", (60,), 24),
    "flux1_dev": ("black-forest-labs/FLUX.1-dev", (19, 38), 24),
    "flux1_schnell": ("black-forest-labs/FLUX.1-schnell", (19, 38), 24),
}
T5 = {  # its config.json, but for the number of layers: 24
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_heads": 64,
    "num_layers": 1,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}


@dataclass(frozen=True)
class TextShapes:
    """Sizes of the text encoders; by default the originals', but for T5's number of layers."""

    clip_l: CLIPTextModelConfig = field(default_factory=lambda: CLIPTextModelConfig(12, 768, 12, projection_dim=768))
    clip_g: CLIPTextModelConfig = field(
        default_factory=lambda: CLIPTextModelConfig(32, 1280, 20, projection_dim=1280, hidden_act="gelu")
    )
    t5: dict[str, Any] = field(default_factory=lambda: T5)


class Repository:
    """A folder in the layout of the hub's cache: ``snapshots/<commit>/…``, and ``refs/main`` that names the commit."""

    def __init__(self, cache: Path, name: str, commit: str | None = None):
        root = cache / f"models--{name.replace('/', '--')}"
        commit = commit or hashlib.sha1(name.encode()).hexdigest()
        main = root / "refs" / "main"
        if main.exists() and main.read_text() != commit:
            sys.exit(f"{root}: holds files of the hub; name an empty folder")
        main.parent.mkdir(parents=True, exist_ok=True)
        main.write_text(commit)
        self._snapshot = root / "snapshots" / commit
        mx.random.seed(0)

    def path(self, file: str) -> Path:
        path = self._snapshot / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_json(self, file: str, content: object) -> None:
        self.path(file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_weights(self, file: str, weights: dict[str, mx.array]) -> None:
        mx.save_safetensors(str(self.path(file)), weights, metadata={"format": "pt"})
        mx.clear_cache()


def random_weights(module: nn.Module, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Values that keep activations near 1, in float16 too: variance 1 / fan-in, norms that change nothing, and
    modulations that are small but not zero. Lazy, so that one tensor at a time is in memory as float32."""

    def draw(name: str, shape: tuple[int, ...]) -> mx.array:
        if "norm" in name or ".ln" in name:
            return mx.full(shape, float(name.endswith("weight")), dtype)
        if "token_embedding" in name or "position_embedding" in name or len(shape) == 1:
            bound = 0.05
        elif name == "wte.weight" or "relative_attention_bias" in name or "pos_embed." in name:
            bound = 1.0
        else:
            bound = math.sqrt(3 / math.prod(shape[1:])) * (0.1 if "adaLN" in name else 1.0)
        return mx.random.uniform(-bound, bound, shape).astype(dtype)

    parameters = tree_flatten(module.parameters())
    return {name: draw(name, w.shape) for name, w in parameters if not name.startswith("pre_sdpa_rope.")}


def vae(dtype: mx.Dtype, prefix: str = "") -> dict[str, mx.array]:
    """Both halves of the VAE."""
    weights = {}
    halves = (("encoder.", VAEEncoder, shapes.VAEEncoderConfig()), ("decoder.", VAEDecoder, shapes.VAEDecoderConfig()))
    for half, network, c in halves:
        module = network(c.in_channels, c.out_channels, list(c.block_out_channels), c.layers_per_block, c.resnet_groups)
        weights |= original.vae(random_weights(module, dtype), prefix + half)
    return weights


def write_transformer(cache: Path, name: str) -> None:
    """The repository ``name``, with as many blocks as DiffusionKit's configuration says."""
    repository, files = Repository(cache, name), model_io._MMDIT[name]
    config = model_io._CONFIG[name]
    repository.write_json("config.json", {})  # DiffusionKit's own loaders ask for one
    if config.depth_unified == 0:
        weights = original.sd3(random_weights(MMDiT(config), mx.float16))
        repository.write_weights(files["vae"], weights | vae(mx.float16, "first_stage_model."))
        return
    weights = original.flux(random_weights(MMDiT(config), mx.bfloat16))
    if name == MODELS["flux_dev"]:
        embedder = MMDiT(shapes.FLUX_DEV).guidance_in.mlp.layers
        for layer, ours in (("in_layer", embedder[0]), ("out_layer", embedder[2])):
            parts = random_weights(ours, mx.bfloat16)
            weights |= {f"guidance_in.{layer}.{part}": w for part, w in parts.items()}
    repository.write_weights(files[name], weights)
    repository.write_weights(files["vae"], vae(mx.float32))


def write_clip(repository: Repository, part: str, shape: CLIPTextModelConfig) -> None:
    """CLIP-L (``part`` l) or CLIP-G: configuration, weights and tokenizer."""
    config = {
        "architectures": ["CLIPTextModelWithProjection"],
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.model_dims,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_length,
        "vocab_size": shape.vocab_size,
        "projection_dim": shape.projection_dim,
        "hidden_act": shape.hidden_act,
    }
    repository.write_json(f"clip_{part}/config.json", config)
    weights = original.clip(random_weights(CLIPTextModel(shape), mx.float16))
    repository.write_weights(f"clip_{part}/model.fp16.safetensors", weights)
    tokenizers.write_clip(repository.path(f"tokenizer_{part}"))


def write_t5(cache: Path, config: dict[str, Any]) -> None:
    """T5's weights, and in a repository of its own its configuration and tokenizer."""
    weights = original.t5(random_weights(SD3T5Encoder(T5Config(**config), low_memory_mode=False), mx.float16))
    Repository(cache, TEXT_REPOSITORY).write_weights("t5/t5xxl.safetensors", weights)
    repository = Repository(cache, T5_REPOSITORY)
    repository.write_json("config.json", config)
    tokenizers.write_t5(repository.path(""))


def write_standin(cache: Path, name: str, use_t5: bool, text: TextShapes) -> None:
    """All that loading the repository ``name`` reads from the hub."""
    write_transformer(cache, name)
    repository = Repository(cache, TEXT_REPOSITORY)
    write_clip(repository, "l", text.clip_l)
    write_clip(repository, "g", text.clip_g)
    if use_t5:
        write_t5(cache, text.t5)


def write_mflux_standin(cache: Path, model: str, layers: Sequence[int] | None, heads: int | None) -> None:
    """All that loading a model of mflux's reads from the hub, at the commit that mflux asks for."""
    import standin_mflux as of_mflux  # mflux need not be installed
    from mflux.models.common.resolution.model_revisions import ModelRevisions

    name, all_layers, all_heads = OF_MFLUX[model]
    folder = Repository(cache, name, ModelRevisions.get(name)).path("")
    write, small, full = {
        "zimage_turbo": (of_mflux.write_zimage, of_mflux.small_zimage_sizes, of_mflux.ZIMAGE),
        "flux2_klein_4b": (of_mflux.write_flux2, of_mflux.small_flux2_sizes, of_mflux.FLUX2),
        "qwen_image": (of_mflux.write_qwen, of_mflux.small_qwen_sizes, of_mflux.QWEN),
        "flux1_dev": (partial(of_mflux.write_flux1, kind="dev"), of_mflux.small_flux1_sizes, of_mflux.FLUX1),
        "flux1_schnell": (partial(of_mflux.write_flux1, kind="schnell"), of_mflux.small_flux1_sizes, of_mflux.FLUX1),
    }[model]
    reduced = layers is not None or heads is not None
    write(folder, sizes=small(*(layers or all_layers), heads or all_heads) if reduced else full)


def flux_code(blocks: tuple[int, int]) -> str:
    """Python that starts calib with ``blocks`` in place of FLUX's number of multimodal and unified blocks."""
    return (
        "import calib.models.compat; from calib.cli.main import main; "
        "from diffusionkit.mlx.config import FLUX_SCHNELL; "
        f"FLUX_SCHNELL.depth_multimodal, FLUX_SCHNELL.depth_unified = {blocks[0]}, {blocks[1]}; main()"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the cache goes")
    parser.add_argument("--model", choices=(*MODELS, *OF_MFLUX), default="sd3_medium")
    parser.add_argument("--t5", action="store_true", help="with T5, which FLUX has always")
    parser.add_argument(
        "--blocks", type=int, nargs=2, metavar=("M", "U"), default=(1, 2), help="FLUX's multimodal and unified blocks"
    )
    help_of_layers = "blocks: Z-Image's after its refiners, Qwen's; of two kinds, FLUX.2's and those of mflux's FLUX.1"
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help=help_of_layers)
    parser.add_argument("--heads", type=int, metavar="H", help="of 30 or 24 heads, each 128 channels wide")
    given = parser.parse_args()
    _, kinds, _ = OF_MFLUX.get(given.model, ("", (), 0))
    if given.layers is not None and len(given.layers) != len(kinds):
        parser.error(f"--layers: {given.model} takes {len(kinds) or 'none'}")
    cache = f"HF_HUB_CACHE={shlex.quote(str(given.folder.absolute()))} HF_HUB_OFFLINE=1"
    if given.model in OF_MFLUX:
        write_mflux_standin(given.folder, given.model, given.layers, given.heads)
        print(f"{cache} calib generate model={given.model} num_images=1")
        return
    flux = given.model.startswith("flux_")
    if flux:
        shapes.FLUX_SCHNELL.depth_multimodal, shapes.FLUX_SCHNELL.depth_unified = given.blocks
    write_standin(given.folder, MODELS[given.model], given.t5 or flux, TextShapes())
    program = f"python -c {shlex.quote(flux_code(given.blocks))}" if flux else "calib"
    without_t5 = "" if given.t5 or flux else " model.use_t5=false"
    print(f"{cache} {program} \\")
    print(f"    generate model={given.model}{without_t5} num_images=1")


if __name__ == "__main__":
    main()
