"""Run a DiffusionKit MMDiT for one timestep, without emptying its adaLN layers.

DiffusionKit's ``cache_modulation_params`` computes the modulations of all timesteps in advance, replaces the adaLN
weights by empty arrays and needs the checkpoint again for the next image. This module does the same arithmetic for the
one timestep that is about to run, and changes no weight: the blocks get a lookup table of one entry for the time of
the call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)

import mlx.core as mx
import mlx.nn as nn
from diffusionkit.mlx.mmdit import MMDiT


def modulated_modules(transformer: MMDiT) -> list[nn.Module]:
    """Modules with an ``adaLN_modulation``, in the order in which they run."""
    modules: list[nn.Module] = []
    for block in transformer.multimodal_transformer_blocks:
        modules += [block.image_transformer_block, block.text_transformer_block]
    if transformer.config.depth_unified > 0:
        modules += [block.transformer_block for block in transformer.unified_transformer_blocks]
    return [*modules, transformer.final_layer]


def embedding_of(transformer: MMDiT, pooled: mx.array, timesteps: mx.array) -> mx.array:
    """What all modulations are made of, (rows, 1, 1, width), for pooled text and timesteps of each row."""
    embedding: mx.array = transformer.y_embedder(pooled)[:, None, None, :] + transformer.t_embedder(timesteps)
    return embedding


@contextmanager
def modulating(modules: Sequence[nn.Module], embedding: mx.array, key: float) -> Iterator[None]:
    """Hold the modulations of ``modules`` ready, in the context, for calls with timestep ``key``."""
    try:
        for module in modules:
            module._modulation_params = {key: module.adaLN_modulation(embedding)}
        yield
    finally:
        for module in modules:
            module.pop("_modulation_params", None)


@contextmanager
def modulation(transformer: MMDiT, pooled: mx.array, timesteps: mx.array, key: float) -> Iterator[None]:
    """Prepare the modulations under timestep ``key``: in the context the transformer may be called with it.

    Args:
        pooled: pooled text embeddings, (rows, pooled width).
        timesteps: timestep of each row, (rows,); rows may differ, as they do in training.
        key: the value of the timestep that is passed to the transformer, by which the blocks look up modulations.
    """
    with modulating(modulated_modules(transformer), embedding_of(transformer, pooled, timesteps), key):
        yield


@contextmanager
def modulated(transformer: MMDiT, pooled: mx.array, timestep: mx.array, rows: int) -> Iterator[mx.array]:
    """:func:`modulation` for ``rows`` rows; yields the timestep to call the transformer with: :data:`TIMESTEP`."""
    with modulation(transformer, pooled, timesteps_of(timestep, rows), KEY):
        yield TIMESTEP


def timesteps_of(timestep: mx.array, rows: int) -> mx.array:
    """The timestep of each row, (rows,)."""
    return mx.repeat(timestep.reshape(1), rows, axis=0) if timestep.size == 1 else timestep


#: An arbitrary number, under which the modulations of all rows are stored: to read a timestep would be to wait for the
#: device, and rows may differ in it.
KEY = -1.0
TIMESTEP = mx.array(KEY)
