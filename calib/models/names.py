"""Canonical layer names: the same in every file, table and plot.

``multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj`` is ``mm_block_0.image.attn.q_proj``. A name
stands for a layer, and in statistics for that layer's input; ``mm_block_0.image`` is a block's own output.
"""

import re

_TO_NAME = (
    (r"multimodal_transformer_blocks\.(\d+)", r"mm_block_\1"),
    (r"unified_transformer_blocks\.(\d+)\.transformer_block", r"unified_block_\1"),
    (r"unified_transformer_blocks\.(\d+)", r"unified_block_\1"),
    (r"\.(image|text)_transformer_block", r".\1"),
    (r"adaLN_modulation\.layers\.1", "adaln"),
    (r"^(y_embedder|t_embedder|guidance_in)\.mlp\.layers\.", r"\1."),
    (r"^x_embedder\.proj$", "x_embedder"),
)
_TO_PATH = (
    (r"mm_block_(\d+)", r"multimodal_transformer_blocks.\1"),
    (r"unified_block_(\d+)\.", r"unified_transformer_blocks.\1.transformer_block."),
    (r"unified_block_(\d+)$", r"unified_transformer_blocks.\1"),
    (r"^(multimodal_transformer_blocks\.\d+)\.(image|text)", r"\1.\2_transformer_block"),
    (r"\.adaln$", ".adaLN_modulation.layers.1"),
    (r"^(y_embedder|t_embedder|guidance_in)\.", r"\1.mlp.layers."),
    (r"^x_embedder$", "x_embedder.proj"),
)


def layer_name(path: str) -> str:
    """The canonical name of the module at ``path`` in a DiffusionKit MMDiT."""
    for pattern, replacement in _TO_NAME:
        path = re.sub(pattern, replacement, path)
    return path


def module_path(name: str) -> str:
    """The module path of a canonical layer name; the inverse of :func:`layer_name`."""
    for pattern, replacement in _TO_PATH:
        name = re.sub(pattern, replacement, name)
    return name
