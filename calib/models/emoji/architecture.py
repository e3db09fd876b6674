"""Configuration of the emoji model, and its parts built from DiffusionKit's classes."""

import json
import sys
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.models.tokens import fit

import mlx.core as mx
from diffusionkit.mlx import LatentFormat
from diffusionkit.mlx.clip import CLIPTextModel
from diffusionkit.mlx.config import CLIPTextModelConfig, MMDiTConfig
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.tokenizer import Tokenizer
from diffusionkit.mlx.vae import Decoder, Encoder

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class EmojiConfig:
    """Sizes of the three networks; hidden widths are multiples of 128, so that every group size divides them."""

    hidden_size: int = 256
    num_heads: int = 4
    depth: int = 4
    text_width: int = 256
    text_layers: int = 2
    text_length: int = 16
    vocab_size: int = 2560
    image_size: int = 64
    latent_size: int = 16
    latent_channels: int = 16
    patch_size: int = 2
    vae_channels: tuple[int, ...] = (64, 128, 160)
    vae_layers: int = 1
    vae_groups: int = 8
    # Latents are standardised: process_in is (z - latent_shift) * latent_scale.
    latent_scale: float = 1.0
    latent_shift: float = 0.0

    @classmethod
    def load(cls, path: Path) -> Self:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "vae_channels": tuple(values["vae_channels"])})

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def build_transformer(config: EmojiConfig, dtype: mx.Dtype = mx.float32) -> MMDiT:
    """Build the transformer, untrained."""
    return MMDiT(
        MMDiTConfig(
            num_heads=config.num_heads,
            depth_multimodal=config.depth,
            hidden_size_override=config.hidden_size,
            use_qk_norm=True,
            vae_latent_dim=config.latent_channels,
            patch_size=config.patch_size,
            max_latent_resolution=config.latent_size,
            pooled_text_embed_dim=config.text_width,
            token_level_text_embed_dim=config.text_width,
            dtype=dtype,
            low_memory_mode=False,
        )
    )


def build_text_encoder(config: EmojiConfig) -> CLIPTextModel:
    """Build the text encoder, untrained."""
    return CLIPTextModel(
        CLIPTextModelConfig(
            num_layers=config.text_layers,
            model_dims=config.text_width,
            num_heads=config.text_width // 64,
            max_length=config.text_length,
            vocab_size=config.vocab_size,
        )
    )


def build_encoder(config: EmojiConfig) -> Encoder:
    """Build the VAE's encoder, untrained."""
    return Encoder(3, 2 * config.latent_channels, list(config.vae_channels), config.vae_layers, config.vae_groups)


def build_decoder(config: EmojiConfig) -> Decoder:
    """Build the VAE's decoder, untrained."""
    return Decoder(config.latent_channels, 3, list(config.vae_channels), config.vae_layers, config.vae_groups)


def latent_format(config: EmojiConfig) -> LatentFormat:
    """Scale and shift between the VAE's latents and the transformer's."""
    form = LatentFormat()
    form.scale_factor, form.shift_factor = config.latent_scale, config.latent_shift
    return form


class EmojiTokenizer:
    """DiffusionKit's BPE tokenizer over a small vocabulary, defined for every string."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int):
        self.length = length
        self._bpe = Tokenizer({pair: rank for rank, pair in enumerate(merges)}, vocab, pad_with_eos=True)
        self._bpe.max_length = sys.maxsize  # `fit` truncates; DiffusionKit's truncation would warn
        self._alphabet = {token for token in vocab if len(token) == 1}

    @classmethod
    def load(cls, folder: Path, length: int) -> Self:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines]
        return cls(vocab, [(left, right) for left, right in pairs], length)

    def normalise(self, text: str) -> str:
        """``text`` in lower case, accents stripped, characters outside the vocabulary replaced by spaces."""
        plain = unicodedata.normalize("NFKD", text.lower())
        kept = (c if c in self._alphabet else " " for c in plain if not unicodedata.combining(c))
        return " ".join("".join(kept).split())

    def tokens(self, text: str) -> list[int]:
        """All token ids of ``text``, begin and end tokens included."""
        found: list[int] = self._bpe.tokenize(self.normalise(text))
        return found

    def __call__(self, text: str) -> list[int]:
        """Token ids of ``text``, padded with the end token to the model's length; longer text is truncated."""
        return fit(self.tokens(text), self.length, self._bpe.eos_token)
