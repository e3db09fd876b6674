"""CLIP (arXiv 2103.00020) in MLX: both towers and their projections, with the names of transformers' ``CLIPModel``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calib.base.device import compiled
from calib.models.gelu import Gelu

import mlx.core as mx
from mlx import nn

#: Tensors of checkpoints that features do not need.
UNUSED = ("position_ids", "logit_scale")


@compiled
def _quick_gelu(x: mx.array) -> mx.array:
    return x / (1 + mx.exp(-1.702 * x))  # on a CPU faster than mx.sigmoid


#: By ``hidden_act``: OpenAI's, and OpenCLIP's.
ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {"quick_gelu": _quick_gelu, "gelu": Gelu()}


@dataclass(frozen=True)
class Tower:
    """Sizes of a tower's transformer."""

    width: int
    inner: int
    layers: int
    heads: int
    activation: str
    eps: float


@dataclass(frozen=True)
class Sizes:
    """Sizes of a CLIP: both towers, number and places of tokens, sides of pictures and patches, length of features."""

    text: Tower
    vision: Tower
    tokens: int
    places: int
    picture: int
    patch: int
    features: int


class Attention(nn.Module):
    """Attention of several heads, in the text to what comes before alone."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self._heads, self._mask = heads, "causal" if causal else None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def __call__(self, x: mx.array) -> mx.array:
        rows, length, width = x.shape
        size = width // self._heads
        q, k, v = (
            project(x).reshape(rows, length, self._heads, size).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5, mask=self._mask)
        return self.out_proj(found.transpose(0, 2, 1, 3).reshape(rows, length, width))


class Mlp(nn.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, width: int, inner: int, activation: str):
        super().__init__()
        self._activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._activation(self.fc1(x)))


class Layer(nn.Module):
    """A layer of either tower."""

    def __init__(self, tower: Tower, causal: bool):
        super().__init__()
        self.self_attn = Attention(tower.width, tower.heads, causal)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(tower.width, tower.eps) for _ in range(2))
        self.mlp = Mlp(tower.width, tower.inner, tower.activation)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers of a tower."""

    def __init__(self, tower: Tower, causal: bool):
        super().__init__()
        self.layers = [Layer(tower, causal) for _ in range(tower.layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEmbeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.token_embedding = nn.Embedding(sizes.tokens, sizes.text.width)
        self.position_embedding = nn.Embedding(sizes.places, sizes.text.width)

    def __call__(self, tokens: mx.array) -> mx.array:
        found: mx.array = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        return found


class TextTower(nn.Module):
    """The text's tower."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.embeddings = TextEmbeddings(sizes)
        self.encoder = Encoder(sizes.text, causal=True)
        self.final_layer_norm = nn.LayerNorm(sizes.text.width, sizes.text.eps)

    def __call__(self, tokens: mx.array, ends: mx.array) -> mx.array:
        """What is at the place ``ends`` of each row of ``tokens``; rows may be padded behind it with any token."""
        x = self.encoder(self.embeddings(tokens))
        found: mx.array = self.final_layer_norm(x[mx.arange(len(x)), ends])
        return found


class Patches(nn.Module):
    """A convolution whose stride is its size: a matrix product, with its weight as PyTorch has it."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.weight = mx.zeros((width, 3, size, size))

    def __call__(self, x: mx.array) -> mx.array:
        """(rows, 3, height, width) → (rows, patches, channels)."""
        (rows, channels, height, width), (out, *_, size) = x.shape, self.weight.shape
        x = x.reshape(rows, channels, height // size, size, width // size, size).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(rows, -1, channels * size * size) @ self.weight.reshape(out, -1).T


class VisionEmbeddings(nn.Module):
    """Patches behind a token of the class, and their places."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.class_embedding = mx.zeros(sizes.vision.width)
        self.patch_embedding = Patches(sizes.vision.width, sizes.patch)
        self.position_embedding = nn.Embedding(1 + (sizes.picture // sizes.patch) ** 2, sizes.vision.width)

    def __call__(self, x: mx.array) -> mx.array:
        patches = self.patch_embedding(x)
        first = mx.broadcast_to(self.class_embedding, (len(x), 1, patches.shape[-1]))
        return mx.concatenate([first, patches], axis=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """The picture's tower."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes.vision.width, sizes.vision.eps)  # transformers' spelling
        self.encoder = Encoder(sizes.vision, causal=False)
        self.post_layernorm = nn.LayerNorm(sizes.vision.width, sizes.vision.eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        found: mx.array = self.post_layernorm(x[:, 0])
        return found


class Clip(nn.Module):
    """Both towers; features are of unit length."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.text_model, self.vision_model = TextTower(sizes), VisionTower(sizes)
        self.text_projection = nn.Linear(sizes.text.width, sizes.features, bias=False)
        self.visual_projection = nn.Linear(sizes.vision.width, sizes.features, bias=False)

    def texts(self, tokens: mx.array, ends: mx.array) -> mx.array:
        """Features of token ids (texts, length), each text's end token at its place in ``ends``."""
        return _unit(self.text_projection(self.text_model(tokens, ends)))

    def pictures(self, x: mx.array) -> mx.array:
        """Features of prepared pictures (pictures, 3, size, size)."""
        return _unit(self.visual_projection(self.vision_model(x)))


def _unit(x: mx.array) -> mx.array:
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)
