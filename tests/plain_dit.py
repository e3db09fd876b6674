"""A plain DiT with random weights, none of DiffusionKit's: one stream of patches that attends to text tokens.

The timestep alone modulates its blocks, q, k and v are one layer, text has no pooled vector. It draws noise, but it
draws.
"""

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

from calib.base.errors import ConfigError
from calib.models.architecture import Conditioning
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.models.noise import RectifiedFlow

import mlx.core as mx
import numpy as np
from mlx import nn

WIDTH, HEADS, TEXT_WIDTH, TEXT_LENGTH = 64, 2, 32, 8
#: Channels of a latent, latent places of a patch's side, pixels of an image's side to one of its latent's.
CHANNELS, PATCH, SHRINK = 4, 2, 4
FREQUENCIES = 64


class SelfAttention(nn.Module):
    """Attention among the patches, which see every other."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out(attended(*mx.split(self.qkv(x), 3, axis=-1)))


class CrossAttention(nn.Module):
    """Attention of the patches to the text."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def __call__(self, x: mx.array, text: mx.array) -> mx.array:
        return self.out(attended(self.q(x), *mx.split(self.kv(text), 2, axis=-1)))


def attended(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Softmax attention of (rows, tokens, width) arrays."""

    def heads(x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)

    scale = 1 / math.sqrt(q.shape[-1] // HEADS)
    y = mx.fast.scaled_dot_product_attention(heads(q), heads(k), heads(v), scale=scale)
    return y.transpose(0, 2, 1, 3).reshape(q.shape)


class Feedforward(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(nn.gelu(self.up(x)))


def modulated(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Layer norm without weights, then the timestep's scale and shift."""
    return mx.fast.layer_norm(x, None, None, 1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, cross-attention and feedforward, modulated by the timestep."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attn = SelfAttention(width)
        self.cross = CrossAttention(width)
        self.mlp = Feedforward(width)

    def __call__(self, x: mx.array, text: mx.array, time: mx.array) -> mx.array:
        shift1, scale1, gate1, shift2, scale2, gate2 = mx.split(self.modulation(time), 6, axis=-1)
        x = x + gate1 * self.attn(modulated(x, shift1, scale1))
        x = x + self.cross(x, text)
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))


class PlainDiT(nn.Module):
    """The network; called with a timestep for each row, (rows,)."""

    def __init__(self, depth: int, places: int, width: int = WIDTH):
        super().__init__()
        self.patch_embed = nn.Linear(CHANNELS * PATCH**2, width)
        self.positions = mx.zeros((places, width))
        self.time_mlp = [nn.Linear(FREQUENCIES, width), nn.Linear(width, width)]
        self.text_embed = nn.Linear(TEXT_WIDTH, width)
        self.blocks = [Block(width) for _ in range(depth)]
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, CHANNELS * PATCH**2)

    def __call__(self, x: mx.array, text: mx.array, timestep: mx.array) -> mx.array:
        rows, height, width, channels = x.shape
        shape = (rows, height // PATCH, PATCH, width // PATCH, PATCH, channels)
        patches = x.reshape(shape).transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, CHANNELS * PATCH**2)
        hidden = self.patch_embed(patches) + self.positions
        first, second = self.time_mlp
        time = nn.silu(second(nn.silu(first(waves(timestep).astype(x.dtype)))))[:, None]
        words = self.text_embed(text)
        for block in self.blocks:
            hidden = block(hidden, words, time)
        shift, scale = mx.split(self.head_modulation(time), 2, axis=-1)
        v = self.head(modulated(hidden, shift, scale)).reshape(*(shape[i] for i in (0, 1, 3, 2, 4, 5)))
        return v.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def waves(timestep: mx.array) -> mx.array:
    """Sines and cosines of timesteps (rows,), from 1 to 1000 in period; (rows, FREQUENCIES)."""
    rates = mx.exp(-math.log(1000) * mx.arange(FREQUENCIES // 2) / (FREQUENCIES // 2))
    angles = timestep.astype(mx.float32)[:, None] * rates
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


#: Layers of a block in the order in which they run.
WITHIN_BLOCK = ("modulation", "attn.qkv", "attn.out", "cross.q", "cross.kv", "cross.out", "mlp.up", "mlp.down")
KINDS = {"modulation": "post-silu", "qkv": "modulated", "out": "post-attention", "q": "hidden", "kv": "text"}
KINDS |= {"up": "modulated", "down": "post-gelu", "head": "modulated"}


class PlainDiTArchitecture:
    """What calib asks of a transformer (:class:`calib.models.architecture.Architecture`); names are paths."""

    input_layer = "patch_embed"
    heads = HEADS

    def __init__(self, module: PlainDiT):
        self.module = module
        self.depth = (len(module.blocks),)
        self.width = module.positions.shape[1]

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        return self.module(x, text.tokens, mx.broadcast_to(timestep.reshape(-1), (len(x),)))

    def layers(self) -> dict[str, nn.Module]:
        within = [f"{block}.{layer}" for block in self.blocks() for layer in WITHIN_BLOCK]
        names = ["patch_embed", "time_mlp.0", "time_mlp.1", "text_embed", *within, "head_modulation", "head"]
        modules = dict(self.module.named_modules())
        return {name: modules[name] for name in names}

    def path(self, name: str) -> str:
        return name

    def blocks(self) -> list[str]:
        return [f"blocks.{i}" for i in range(self.depth[0])]

    def streams(self, block: str) -> tuple[str, ...]:
        return ()

    def block_of(self, name: str) -> int | None:
        if name.startswith("head"):
            return self.depth[0]
        return int(name.split(".")[1]) if name.startswith("blocks.") else None

    def shared_input(self, name: str) -> str:
        if name.endswith("modulation"):
            return "blocks.0.modulation"
        return "blocks.0.cross.kv" if name.endswith(".kv") else name

    def kind(self, name: str) -> str:
        return KINDS.get(re.split(r"[._]", name)[-1], "embedding")

    def tokens(self, latent_size: Sequence[int]) -> int:
        return latent_size[0] * latent_size[1] // PATCH**2

    def text_widths(self) -> tuple[int, None]:
        return TEXT_WIDTH, None

    def describe(self) -> dict[str, Any]:
        return {"plain_dit": {"depth": self.depth[0], "places": self.module.positions.shape[0], "width": self.width}}


class Decoder(nn.Module):
    """One layer from a latent's place to the pixels that it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Linear(CHANNELS, 3 * SHRINK**2)

    def __call__(self, latents: mx.array) -> mx.array:
        rows, height, width, _ = latents.shape
        tiles = mx.tanh(self.pixels(latents)).reshape(rows, height, width, SHRINK, SHRINK, 3)
        return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(rows, SHRINK * height, SHRINK * width, 3)


def randomize(module: nn.Module, dtype: mx.Dtype) -> None:
    """Weights by seed and name; channels differ in width, as those of trained networks do."""
    for path, weight in weights(module).items():
        random = np.random.RandomState(zlib.crc32(path.encode()))
        spread = np.exp(0.5 * random.randn(weight.shape[0], *[1] * (weight.ndim - 1))) / math.sqrt(weight.shape[-1])
        value = spread * random.randn(*weight.shape)
        module.load_weights([(path, mx.array(value.astype(np.float32)).astype(dtype))], strict=False)
    mx.eval(module.parameters())


def words_of(text: str) -> list[str]:
    return text.lower().split()


def encode_text(text: str) -> Conditioning:
    """A fixed random vector for each word, zeros behind the last."""
    tokens = np.zeros((1, TEXT_LENGTH, TEXT_WIDTH), np.float32)
    for place, word in enumerate(words_of(text)[:TEXT_LENGTH]):
        tokens[0, place] = np.random.RandomState(zlib.crc32(word.encode())).randn(TEXT_WIDTH)
    return Conditioning(mx.array(tokens))


def skeleton(
    name: str, dtype: ModelDtype, image_size: Sequence[int], cfg_weight: float, depth: int = 3
) -> PlainDiTArchitecture:
    """The transformer in shape, and a check of what was asked of it."""
    if any(size % (SHRINK * PATCH) for size in image_size):
        raise ConfigError.bad_value("sampler.image_size", list(image_size), f"{name} draws multiples of 8")
    places = math.prod(size // (SHRINK * PATCH) for size in image_size)
    return PlainDiTArchitecture(PlainDiT(depth, places))


def load(name: str, dtype: ModelDtype, shift: float, image_size: Sequence[int], depth: int = 3) -> DiffusionModel:
    """The model, ready to draw."""
    architecture, decoder = skeleton(name, dtype, image_size, 0.0, depth), Decoder()
    randomize(architecture.module, dtype.mlx)
    randomize(decoder, mx.float32)
    height, width = image_size
    return DiffusionModel(
        name=name,
        architecture=architecture,
        sampler=RectifiedFlow(shift),
        encode_text=encode_text,
        decoder=decoder,
        decode_latents=lambda latents: decoder(latents.astype(mx.float32)),
        decoding_bytes=2 * 3 * 4 * height * width,  # the pixels, and once more while they are put in order
        dtype=dtype.mlx,
        latent_shape=(height // SHRINK, width // SHRINK, CHANNELS),
        text_length=TEXT_LENGTH,
        token_count=lambda text: len(words_of(text)),
        max_prompt_tokens=TEXT_LENGTH,
        text_encoders="words",
    )
