"""Run a DiffusionKit MMDiT for one timestep, without emptying its adaLN layers.

DiffusionKit's ``cache_modulation_params`` computes the modulations of every timestep ahead, replaces the adaLN
weights by empty arrays and needs the checkpoint again for the next image. The same arithmetic, done for the one
timestep that is about to be used, touches no weight and no disk: a lookup table of one entry is hung on the
blocks for the time of the call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)

import mlx.core as mx
import mlx.nn as nn
from diffusionkit.mlx.mmdit import MMDiT


def modulated_modules(transformer: MMDiT) -> list[nn.Module]:
    """The modules that own an ``adaLN_modulation``, in the order in which they run."""
    modules: list[nn.Module] = []
    for block in transformer.multimodal_transformer_blocks:
        modules += [block.image_transformer_block, block.text_transformer_block]
    if transformer.config.depth_unified > 0:
        modules += [block.transformer_block for block in transformer.unified_transformer_blocks]
    return [*modules, transformer.final_layer]


@contextmanager
def modulation(transformer: MMDiT, pooled: mx.array, timesteps: mx.array, key: float) -> Iterator[None]:
    """Within the context the transformer may be called with timestep ``key``.

    Args:
        pooled: pooled text embeddings, (rows, pooled width).
        timesteps: timestep of each row, (rows,); rows may differ, as they do in training.
        key: what the blocks will be asked for: the value of the timestep passed to the transformer.
    """
    embedding = transformer.y_embedder(pooled)[:, None, None, :] + transformer.t_embedder(timesteps)
    modules = modulated_modules(transformer)
    try:
        for module in modules:
            module._modulation_params = {key: module.adaLN_modulation(embedding)}
        yield
    finally:
        for module in modules:
            module.pop("_modulation_params", None)


@contextmanager
def modulated(transformer: MMDiT, pooled: mx.array, timestep: mx.array, rows: int) -> Iterator[mx.array]:
    """:func:`modulation` for so many ``rows``; yields what the transformer is to be called with as timestep.

    Where rows have timesteps of their own that is a number that stands for all of them.
    """
    if timestep.size == 1:
        times, key = mx.repeat(timestep.reshape(1), rows, axis=0), timestep
    else:
        times, key = timestep, _ANY_TIMESTEP
    with modulation(transformer, pooled, times, cast(float, key.item())):
        yield key


_ANY_TIMESTEP = mx.array(-1.0)
