"""FLUX.1's networks as mflux has them, with the sizes in its code; and of other sizes, where these are given.

Layers read their sizes from their weights, so smaller weights are a smaller layer. What else knows a size is told of
it: attributes, and the one layer that has it in its forward pass.
"""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.model.flux_text_encoder.clip_encoder.clip_encoder import CLIPEncoder
from mflux.models.flux.model.flux_text_encoder.t5_encoder.t5_encoder import T5Encoder
from mflux.models.flux.model.flux_transformer.ada_layer_norm_zero import AdaLayerNormZero
from mflux.models.flux.model.flux_transformer.transformer import Transformer
from mlx import nn
from mlx.utils import tree_map_with_path

#: What ``config.json`` calls the sizes, as :func:`make_transformer` does.
SIZES = (
    *("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim"),
    *("pooled_projection_dim", "axes_dims_rope"),
)
#: Likewise for :func:`make_t5` and :func:`make_clip`. T5's heads are mflux's, 64 of 64 channels, whatever the width.
T5_SIZES = {"d_model": "width", "d_ff": "inner", "num_layers": "layers", "vocab_size": "vocabulary"}
CLIP_SIZES = {
    **{"hidden_size": "width", "intermediate_size": "inner", "num_hidden_layers": "layers"},
    **{"num_attention_heads": "heads", "vocab_size": "vocabulary"},
}
#: Sizes of mflux's.
WIDTH, HEADS, OF_HEAD, OF_T5, OF_CLIP = 3072, 24, 128, 4096, 768
#: Multiples of the width among the sizes of weights.
MULTIPLES = (1, 2, 3, 4, 5, 6)


class Modulation(nn.Module):
    """mflux's ``own``, which has the width in its forward pass, of any width."""

    def __init__(self, own: AdaLayerNormZero):
        super().__init__()
        self.linear, self.norm = own.linear, own.norm

    def __call__(self, hidden_states: mx.array, text_embeddings: mx.array) -> tuple[mx.array, ...]:
        shift, scale, gate, *of_mlp = mx.split(self.linear(nn.silu(text_embeddings)), 6, axis=-1)
        return (self.norm(hidden_states) * (1 + scale[:, None]) + shift[:, None], gate, *of_mlp)


def make_transformer(
    config: ModelConfig,
    num_layers: int = 19,
    num_single_layers: int = 38,
    num_attention_heads: int = HEADS,
    attention_head_dim: int = OF_HEAD,
    joint_attention_dim: int = OF_T5,
    pooled_projection_dim: int = OF_CLIP,
    axes_dims_rope: Sequence[int] = (16, 56, 56),
) -> Transformer:
    """mflux's for the model of ``config``, of these sizes."""
    found = Transformer(config, num_layers, num_single_layers)
    width = num_attention_heads * attention_head_dim
    if (width, num_attention_heads, joint_attention_dim, pooled_projection_dim) == (WIDTH, HEADS, OF_T5, OF_CLIP):
        return found
    sizes = {WIDTH * n: width * n for n in MULTIPLES}
    sizes |= {OF_T5: joint_attention_dim, OF_CLIP: pooled_projection_dim, OF_HEAD: attention_head_dim}
    resize(found, sizes)
    found.pos_embed.axes_dim, found.norm_out.embedding_dim = list(axes_dims_rope), width
    for block in found.transformer_blocks:
        for name in ("norm1", "norm1_context"):
            block[name] = Modulation(block[name])
    for block in found.single_transformer_blocks:
        block.norm.dim = width
    for block in (*found.transformer_blocks, *found.single_transformer_blocks):
        block.attn.num_heads, block.attn.head_dimension = num_attention_heads, attention_head_dim
    return found


def make_t5(width: int = OF_T5, inner: int = 10240, layers: int = 24, vocabulary: int = 32128) -> T5Encoder:
    """mflux's T5, of these sizes."""
    found = T5Encoder()
    found.t5_blocks = found.t5_blocks[:layers]
    sizes = {OF_T5: width, 10240: inner, 32128: vocabulary}
    # The heads together are as wide as ever: of q, k and v the rows are theirs, of o the columns.
    heads = {f"SelfAttention.{name}.weight": axis for name, axis in (("q", 0), ("k", 0), ("v", 0), ("o", 1))}
    resize(found, sizes, lambda path: next((heads[end] for end in heads if path.endswith(end)), None))
    return found


def make_clip(
    width: int = OF_CLIP, inner: int = 3072, layers: int = 12, heads: int = 12, vocabulary: int = 49408
) -> CLIPEncoder:
    """mflux's CLIP, of these sizes."""
    found = CLIPEncoder()
    own = found.text_model.encoder
    own.layers = own.layers[:layers]
    for layer in own.layers:
        layer.self_attn.num_heads, layer.self_attn.head_dimension = heads, width // heads
    resize(found, {OF_CLIP: width, 3072: inner, 49408: vocabulary})
    return found


def resize(module: nn.Module, sizes: Mapping[int, int], kept: Callable[[str], int | None] = lambda path: None) -> None:
    """Give weights other ``sizes``, by those that they have; ``kept``: of a path, the axis whose size stays."""

    def resized(path: str, weight: mx.array) -> mx.array:
        axis = kept(path)
        shape = tuple(n if i == axis else sizes.get(n, n) for i, n in enumerate(weight.shape))
        return weight if shape == weight.shape else mx.zeros(shape, weight.dtype)

    module.update(tree_map_with_path(resized, module.parameters()))
