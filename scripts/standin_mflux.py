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
from calib.dataset.prompts import builtin

import mlx.core as mx
from mflux.models.common.weights.mapping.weight_mapping import WeightTarget
from mflux.models.common.weights.mapping.weight_transforms import WeightTransforms
from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mflux.models.z_image.model.z_image_vae.vae import VAE
from mflux.models.z_image.weights.z_image_weight_mapping import ZImageWeightMapping
from mlx import nn
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

assert calib.__version__

#: A file of weights is at most this large, as on the hub.
LARGEST_FILE = 5 << 30
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ZImageSizes:
    """Sizes of Z-Image's transformer and text encoder, as their config.json have them; by default the originals'."""

    transformer: Mapping[str, Any] = field(
        default_factory=lambda: {
            "all_f_patch_size": [1],
            "all_patch_size": [2],
            "axes_dims": [32, 48, 48],
            "cap_feat_dim": 2560,
            "dim": 3840,
            "in_channels": 16,
            "n_heads": 30,
            "n_layers": 30,
            "n_refiner_layers": 2,
        }
    )
    text: Mapping[str, Any] = field(
        default_factory=lambda: {
            "head_dim": 128,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
        }
    )

    @classmethod
    def small(cls, layers: int, heads: int) -> "ZImageSizes":
        """Of fewer blocks, each of ``heads`` heads as wide as the originals', and a text encoder as small."""
        transformer = {**cls().transformer, "n_layers": layers, "n_heads": heads, "dim": 128 * heads}
        width = 64 * heads
        text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers + 1}
        return cls({**transformer, "cap_feat_dim": width}, {**cls().text, **text, "vocab_size": 1024})

    def transformers_own(self) -> dict[str, Any]:
        """The arguments of mflux's transformer."""
        return {name: value for name, value in self.transformer.items() if not name.startswith("all_")}


def write_zimage(
    folder: Path, sizes: ZImageSizes, dtype: mx.Dtype = mx.bfloat16, vae: Callable[[], nn.Module] = VAE
) -> None:
    """All that loading Z-Image reads, in ``folder``."""
    mx.random.seed(0)
    transformer, text = ZImageTransformer(**sizes.transformers_own()), TextEncoder(**sizes.text)
    text.rotary_emb.pop("inv_freq")  # a constant
    mapping = ZImageWeightMapping
    _write(folder / "transformer", transformer, mapping.get_transformer_mapping(), sizes.transformer, dtype)
    _write(folder / "text_encoder", text, mapping.get_text_encoder_mapping(), sizes.text, dtype)
    _write(folder / "vae", vae(), mapping.get_vae_mapping(), {"latent_channels": 16}, dtype)
    write_tokenizer(folder / "tokenizer")


def _write(
    folder: Path, module: nn.Module, mapping: list[WeightTarget], config: Mapping[str, Any], dtype: mx.Dtype
) -> None:
    """A component's weights under the hub's names, in files of at most :data:`LARGEST_FILE`, and its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    originals, files, size = _originals(mapping), [dict[str, mx.array]()], 0
    for path, weight in tree_flatten(module.parameters()):
        name, turned = originals(path)
        value = random_weight(path, weight.shape).astype(dtype)
        value = mx.contiguous(value.transpose(0, 3, 1, 2)) if turned else value
        if size + value.nbytes > LARGEST_FILE:
            files.append({})
            size = 0
        files[-1][name] = value
        size += value.nbytes
    stem, places = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model", dict[str, str]()
    for number, file in enumerate(files, 1):
        name = f"{stem}-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else f"{stem}.safetensors"
        places |= dict.fromkeys(file, name)
        mx.save_safetensors(str(folder / name), file, metadata={"format": "pt"})
        mx.clear_cache()
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _originals(mapping: list[WeightTarget]) -> Callable[[str], tuple[str, bool]]:
    """The hub's name of a tensor of mflux's, and whether mflux turns it as a convolution's."""
    rules = []
    for target in mapping:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(target.to_pattern))
        rules.append((re.compile(pattern), target.from_pattern[0], target.transform))

    def original(path: str) -> tuple[str, bool]:
        for pattern, name, transform in rules:
            if found := pattern.fullmatch(path):
                return name.format(**found.groupdict()), transform is WeightTransforms.transpose_conv2d_weight
        raise KeyError(path)

    return original


def random_weight(path: str, shape: tuple[int, ...]) -> mx.array:
    """Values that keep activations near 1: variance 1 / fan-in, channels of different widths, norms near 1; lazy."""
    if "norm" in path:
        return mx.random.uniform(0.8, 1.2, shape) if path.endswith("weight") else mx.zeros(shape)
    if path == "embed_tokens.weight" or "pad_token" in path:
        return mx.random.normal(shape)
    if len(shape) == 1:
        return 0.05 * mx.random.normal(shape)
    wide = mx.exp(0.4 * mx.random.normal((shape[0], *[1] * (len(shape) - 1))))
    return wide * mx.random.normal(shape) / math.sqrt(math.prod(shape[1:]))


def write_tokenizer(folder: Path, size: int = 600) -> None:
    """A byte-level tokenizer of ``size`` pieces, with Qwen's special tokens and a chat template as its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(builtin(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2], padding_side="right"
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
