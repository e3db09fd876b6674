"""Weights under the names, and in the shapes, of the original checkpoints: the inverse of DiffusionKit's key mappings.

Each function takes the parameters of one of DiffusionKit's networks by path. The arrays that come back are lazy.
"""

from collections.abc import Sequence

from calib.models.diffusionkit import SD3_PREFIX

import mlx.core as mx

Weights = dict[str, mx.array]
Renaming = Sequence[tuple[str, str]]

MID_BLOCKS = (("mid_blocks.0", "mid.block_1"), ("mid_blocks.1", "mid.attn_1"), ("mid_blocks.2", "mid.block_2"))
VAE_NAMES = (
    *MID_BLOCKS,
    ("up_blocks", "up"),
    ("down_blocks", "down"),
    ("resnets", "block"),
    ("conv_shortcut", "nin_shortcut"),
    (".upsample.", ".upsample.conv."),
    (".downsample.", ".downsample.conv."),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    ("query_proj", "q"),
    ("key_proj", "k"),
    ("value_proj", "v"),
    ("out_proj", "proj_out"),
)
SD3_NAMES = (
    ("multimodal_transformer_blocks", "joint_blocks"),
    ("image_transformer_block", "x_block"),
    ("text_transformer_block", "context_block"),
    ("attn.o_proj", "attn.proj"),
    ("qk_norm.q_norm", "attn.ln_q"),
    ("qk_norm.k_norm", "attn.ln_k"),
    ("mlp.layers.", "mlp."),
    ("adaLN_modulation.layers.", "adaLN_modulation."),
    ("x_pos_embedder.pos_embed.weight", "pos_embed"),
)
FLUX_NAMES = (
    ("multimodal_transformer_blocks", "double_blocks"),
    ("text_transformer_block.attn.", "txt_attn."),
    ("image_transformer_block.attn.", "img_attn."),
    ("text_transformer_block.mlp.fc1", "txt_mlp.0"),
    ("text_transformer_block.mlp.fc2", "txt_mlp.2"),
    ("image_transformer_block.mlp.fc1", "img_mlp.0"),
    ("image_transformer_block.mlp.fc2", "img_mlp.2"),
    ("image_transformer_block.adaLN_modulation.layers.1", "img_mod.lin"),
    ("text_transformer_block.adaLN_modulation.layers.1", "txt_mod.lin"),
    ("text_transformer_block.qk_norm.q_norm.weight", "txt_attn.norm.query_norm.scale"),
    ("text_transformer_block.qk_norm.k_norm.weight", "txt_attn.norm.key_norm.scale"),
    ("image_transformer_block.qk_norm.q_norm.weight", "img_attn.norm.query_norm.scale"),
    ("image_transformer_block.qk_norm.k_norm.weight", "img_attn.norm.key_norm.scale"),
    ("o_proj", "proj"),
    ("x_embedder.proj.", "img_in."),
    ("context_embedder.", "txt_in."),
    ("t_embedder.", "time_in."),
    ("y_embedder.", "vector_in."),
    ("mlp.layers.0", "in_layer"),
    ("mlp.layers.2", "out_layer"),
    ("adaLN_modulation.layers.1", "adaLN_modulation.1"),
)
CLIP_NAMES = (
    ("attention.query_proj", "self_attn.q_proj"),
    ("attention.key_proj", "self_attn.k_proj"),
    ("attention.value_proj", "self_attn.v_proj"),
    ("attention.out_proj", "self_attn.out_proj"),
    ("linear1", "mlp.fc1"),
    ("linear2", "mlp.fc2"),
)
T5_NAMES = (
    ("encoder.layers.", "encoder.block."),
    ("encoder.ln.", "encoder.final_layer_norm."),
    (".ln1.", ".layer.0.layer_norm."),
    (".ln2.", ".layer.1.layer_norm."),
    (".attention.query_proj.", ".layer.0.SelfAttention.q."),
    (".attention.key_proj.", ".layer.0.SelfAttention.k."),
    (".attention.value_proj.", ".layer.0.SelfAttention.v."),
    (".attention.out_proj.", ".layer.0.SelfAttention.o."),
    (".dense.", ".layer.1.DenseReluDense."),
    (
        "encoder.relative_attention_bias.embeddings.",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
    ),
)


def _renamed(name: str, names: Renaming) -> str:
    for ours, theirs in names:
        name = name.replace(ours, theirs)
    return name


def _joined(weights: Weights, stem: str, part: str) -> mx.array:
    """q, k and v of a layer as the one tensor of the originals, in which k has a bias too."""
    q, k, v = (weights.get(f"{stem}.{name}_proj.{part}") for name in "qkv")
    assert q is not None and v is not None
    return mx.concatenate([q, mx.zeros_like(q) if k is None else k, v])


def _with_joined_qkv(weights: Weights) -> Weights:
    joined = {}
    for name, w in weights.items():
        if ".q_proj." in name:
            stem, part = name.split(".q_proj.")
            joined[f"{stem}.qkv.{part}"] = _joined(weights, stem, part)
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined[name] = w
    return joined


def sd3(weights: Weights) -> Weights:
    """Stability's names of SD3's and SD3.5's transformer."""
    original = {_renamed(name, SD3_NAMES): w for name, w in _with_joined_qkv(weights).items()}
    original["pos_embed"] = original["pos_embed"][None]
    original["x_embedder.proj.weight"] = original["x_embedder.proj.weight"].transpose(0, 3, 1, 2)
    return {SD3_PREFIX + name: w for name, w in original.items()}


def flux(weights: Weights) -> Weights:
    """Black Forest Labs' names of FLUX.1's transformer (FLUX.1-dev has ``guidance_in`` besides)."""
    unified = {name: w for name, w in weights.items() if name.startswith("unified")}
    rest = {name: w for name, w in weights.items() if name not in unified}
    original = {_renamed(name, FLUX_NAMES): w for name, w in _with_joined_qkv(rest).items()}
    original["img_in.weight"] = original["img_in.weight"].flatten(1)
    for i in range(len({name.split(".")[1] for name in unified})):
        stem, block = f"unified_transformer_blocks.{i}.transformer_block", f"single_blocks.{i}"
        for part in ("weight", "bias"):
            first = [_joined(weights, f"{stem}.attn", part), weights[f"{stem}.mlp.fc1.{part}"]]
            original[f"{block}.linear1.{part}"] = mx.concatenate(first)
            original[f"{block}.modulation.lin.{part}"] = weights[f"{stem}.adaLN_modulation.layers.1.{part}"]
        second = [weights[f"{stem}.attn.o_proj.weight"], weights[f"{stem}.mlp.fc2.weight"]]
        original[f"{block}.linear2.weight"] = mx.concatenate(second, axis=1)
        original[f"{block}.linear2.bias"] = weights[f"{stem}.attn.o_proj.bias"]
        for ours, theirs in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            original[f"{block}.norm.{theirs}.scale"] = weights[f"{stem}.qk_norm.{ours}.weight"]
    return original


def vae(weights: Weights, prefix: str) -> Weights:
    """The original names of a half of the VAE; its linear layers are 1x1 convolutions there."""
    original = {}
    for name, w in weights.items():
        if w.ndim == 4:
            w = w.transpose(0, 3, 1, 2)
        elif w.ndim == 2:
            w = w[:, :, None, None]
        original[prefix + _renamed(name, VAE_NAMES)] = w
    return original


def clip(weights: Weights) -> Weights:
    """The names of a CLIP text model in Hugging Face's transformers."""
    original = {}
    for name, w in weights.items():
        if "embedding" in name:
            name = f"text_model.embeddings.{name}"
        elif name.startswith("layers."):
            name = f"text_model.encoder.{_renamed(name, CLIP_NAMES)}"
        elif name.startswith("final_layer_norm."):
            name = f"text_model.{name}"
        original[name] = w
    return original


def t5(weights: Weights) -> Weights:
    """The names of T5's encoder in Hugging Face's transformers, which holds the embedding twice."""
    original = {_renamed(name, T5_NAMES): w for name, w in weights.items() if name != "wte.weight"}
    original["shared.weight"] = original["encoder.embed_tokens.weight"] = weights["wte.weight"]
    return original
