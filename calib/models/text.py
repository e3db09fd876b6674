"""The text encoders of SD3 and FLUX: two CLIPs and T5, loaded at first use and freed by ``unload``.

Texts are encoded by DiffusionKit's own ``encode_text``, called on a pipeline object that holds the encoders alone.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.models.architecture import Conditioning
from calib.models.hub import fetch, load_checked, renamed
from calib.models.tensors import read_weights
from calib.models.tokens import ClipTokenizer, fit

import mlx.core as mx
from diffusionkit.mlx import T5_MAX_LENGTH, DiffusionPipeline, model_io
from diffusionkit.mlx.clip import CLIPTextModel
from diffusionkit.mlx.config import CLIPTextModelConfig
from diffusionkit.mlx.t5 import SD3T5Encoder
from mlx import nn

REPOSITORY = model_io._DEFAULT_MODEL
T5_REPOSITORY = "google/t5-v1_1-xxl"  # of T5's configuration and tokenizer; DiffusionKit names it in its code
T5_FILES = ("config.json", "spiece.model")
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Encoder:
    """One text encoder: its checkpoint, the mapping of its tensors' names to MLX, and a builder of the network."""

    path: str
    mapping: Callable[[dict[str, mx.array]], dict[str, mx.array]]
    build: Callable[[], nn.Module]

    def weights(self) -> dict[str, mx.array]:
        return renamed(self.mapping, read_weights(self.path), self.path)

    def load(self, dtype: mx.Dtype) -> nn.Module:
        """Build the network and load its weights; checks names and shapes, which DiffusionKit's loaders do not."""
        module = self.build()
        load_checked(module, self.weights(), dtype, self.path, unused=("position_ids",))
        return module


def _file(key: str) -> str:
    return fetch(REPOSITORY, model_io._MODELS[REPOSITORY][key])


def clip(key: str) -> Encoder:
    """CLIP-L or CLIP-G, built by its configuration on the hub."""
    config = json.loads(Path(_file(f"{key}_config")).read_text(encoding="utf-8"))
    projected = "WithProjection" in config["architectures"][0]
    shape = CLIPTextModelConfig(
        num_layers=config["num_hidden_layers"],
        model_dims=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        max_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        projection_dim=config["projection_dim"] if projected else None,
        hidden_act=config.get("hidden_act", "quick_gelu"),
    )

    def mapping(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return dict(pair for name, w in weights.items() for pair in model_io.map_clip_text_encoder_weights(name, w))

    return Encoder(_file(key), mapping, lambda: CLIPTextModel(shape))


def t5() -> Encoder:
    """T5-XXL's encoder."""
    from transformers import T5Config  # slow to import, and T5 alone needs it

    for file in T5_FILES:
        fetch(T5_REPOSITORY, file)
    config = T5Config.from_pretrained(T5_REPOSITORY)
    return Encoder(
        _file("t5"), model_io.t5_encoder_state_dict_adjustments, lambda: SD3T5Encoder(config, low_memory_mode=False)
    )


def _clip_tokenizer(part: str, pad_with_eos: bool) -> ClipTokenizer:
    keys = {name: f"tokenizer_{part}_{name}" for name in ("merges", "vocab")}
    for key in keys.values():
        _file(key)
    return ClipTokenizer(
        model_io.load_tokenizer(
            REPOSITORY, merges_key=keys["merges"], vocab_key=keys["vocab"], pad_with_eos=pad_with_eos
        )
    )


def _row(tokenizer: Any, text: str, negative_text: str | None = None) -> mx.array:
    """Token ids of ``text`` alone, in place of DiffusionKit's ``_tokenize``, which appends the negative text's row."""
    length = CLIP_TOKENS if isinstance(tokenizer, ClipTokenizer) else tokenizer.max_length
    pad = tokenizer.eos_token if tokenizer.pad_with_eos else 0
    return mx.array([fit(tokenizer.tokenize(text), length, pad)])


class TextEncoders:
    """Encodes a text as one row of conditioning.

    Args:
        kind: DiffusionKit's pipeline class, whose ``encode_text`` is used.
        repository: the transformer's repository, which determines the length of T5's input.
        dtype: weight type of the encoders.
        clip_g: use CLIP-G besides CLIP-L, as SD3 does.
    """

    def __init__(self, kind: type[DiffusionPipeline], repository: str, dtype: mx.Dtype, clip_g: bool, use_t5: bool):
        self._dtype = dtype
        self._pipeline = object.__new__(kind)
        self._pipeline._tokenize = _row
        self._pipeline.model_version = repository
        self._pipeline.use_t5 = use_t5
        self._encoders = {"clip_l": clip("clip_l")}
        self._pipeline.tokenizer_l = _clip_tokenizer("l", pad_with_eos=True)
        if clip_g:
            self._encoders["clip_g"] = clip("clip_g")
            self._pipeline.tokenizer_g = _clip_tokenizer("g", pad_with_eos=False)
        if use_t5:
            self._encoders["t5_encoder"] = t5()
            self._pipeline.t5_tokenizer = model_io.load_t5_tokenizer(T5_MAX_LENGTH[repository])
        # SD3 has CLIP's tokens, then T5's or as many zeros as CLIP's; FLUX has T5's alone.
        t5_length = T5_MAX_LENGTH[repository] if use_t5 else CLIP_TOKENS
        self.length = CLIP_TOKENS + t5_length if clip_g else t5_length
        self.names = "+".join(name.removesuffix("_encoder") for name in self._encoders)
        counts = (sum(w.size for w in encoder.weights().values()) for encoder in self._encoders.values())
        self.nbytes = sum(counts) * dtype.size

    def __call__(self, text: str) -> Conditioning:
        for name, encoder in self._encoders.items():
            if not hasattr(self._pipeline, name):
                setattr(self._pipeline, name, encoder.load(self._dtype))
        return Conditioning(*self._pipeline.encode_text(text, 0.0, ""))

    def unload(self) -> None:
        """Free the encoders; the tokenizers stay loaded."""
        for name in self._encoders:
            vars(self._pipeline).pop(name, None)
        mx.clear_cache()

    def clip_tokens(self, text: str) -> int:
        """Number of CLIP's tokens of ``text``, begin and end included."""
        return len(self._pipeline.tokenizer_l.tokenize(text))

    def t5_tokens(self, text: str) -> int:
        """Number of T5's tokens of ``text``, end included."""
        return len(self._pipeline.t5_tokenizer._tokenizer(text, verbose=False)["input_ids"])
