"""Canonical layer names of DiffusionKit's MMDiT: the same in every file, table and plot.

``multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj`` is ``mm_block_0.image.attn.q_proj``. A name
denotes a layer, and in statistics that layer's input; ``mm_block_0.image`` denotes a block's output.
"""

import re
from functools import cache

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


_WITHIN_BLOCK = ("adaln", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2", "linear")


@cache
def layer_name(path: str) -> str:
    """The canonical name of the module at ``path`` in a DiffusionKit MMDiT."""
    for pattern, replacement in _TO_NAME:
        path = re.sub(pattern, replacement, path)
    return path


@cache
def module_path(name: str) -> str:
    """The module path of a canonical layer name; the inverse of :func:`layer_name`."""
    for pattern, replacement in _TO_PATH:
        name = re.sub(pattern, replacement, name)
    return name


def network_order(name: str) -> tuple[int, int, str, int]:
    """Sort key of a canonical name: embedders, blocks by number (image before text, then as they run), final layer."""
    head, _, rest = name.partition(".")
    stem, _, index = head.rpartition("_")
    place = {"mm_block": 1, "unified_block": 2}.get(stem, 3 if head == "final_layer" else 0)
    stream, _, layer = rest.partition(".") if stem == "mm_block" else ("", "", rest)
    rank = _WITHIN_BLOCK.index(layer) if layer in _WITHIN_BLOCK else 0
    return place, int(index) if place in (1, 2) else 0, stream or name * (place == 0), rank
