"""Quantizer ``smooth``: wide input channels narrowed, the weights that read them widened, then rounding to nearest.

SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438), equations 3 and 4: W x = (W diag(s)) (diag(s)⁻¹ x), with
s_c = max|x_c|^α / max|W_c|^(1 − α). The division moves, exactly, into what makes x, so only where that is linear:
adaLN's shift and scale before q, k, v, fc1 and the final layer, and v before o, since attention mixes tokens and not
channels. Before fc2 stands a GELU, before adaLN a SiLU, before the embedders nothing: these are only rounded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from calib.activations.taps import linear_layers
from calib.analysis.ranges import StepRanges
from calib.errors import CalibError, ConfigError
from calib.models.names import module_path
from calib.quantization.packed import Packed
from calib.quantization.quantizer import Quantized, Work

import mlx.core as mx
import numpy as np
from diffusionkit.mlx.mmdit import MMDiT, TransformerBlock
from mlx import nn
from numpy.typing import NDArray

#: Of the widest channel: what is narrower is not widened to match it.
NOTHING = 1e-5


@dataclass(frozen=True)
class Source:
    """The layer whose output, its chunk ``chunk`` of ``chunks``, is to be divided, once ``offset`` is added to it."""

    name: str
    chunk: int = 0
    chunks: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """Layers that read the same channels, and what makes these."""

    readers: tuple[str, ...]
    sources: tuple[Source, ...]


def quantize(work: Work, alpha: float = 0.5) -> Quantized:
    """Weights smoothed and rounded, and the activation ranges of the layers that read less.

    Args:
        alpha: how much of the width moves from the activations to the weights: 0 none of it, 1 all.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError.bad_value("quantizer.alpha", alpha, "must be 0 to 1")
    linear = linear_layers(work.transformer)
    divisors = {
        site: divisors_of(work, linear, site, alpha)
        for site in sites(work.transformer, linear)
        if work.plan.keys() & set(site.readers)
    }
    changed = smoothed(linear, divisors)
    result = Quantized({})
    for name, layer in work.layers.items():
        plan = work.plan[name]
        weight = changed.pop((name, "weight"), layer.weight)
        result.layers[name] = Packed.nearest(weight, plan.weight_bits, plan.group_size, work.dtype)
    for (name, part), value in changed.items():
        result.weights[f"{module_path(name)}.{part}"] = value.astype(linear[name][part].dtype)
    for site, s in divisors.items():
        result.ranges |= {name: _ranges(work, name, s) for name in site.readers if name in work.plan}
    return result


def sites(transformer: MMDiT, linear: Mapping[str, nn.Module]) -> Iterator[Site]:
    """Where a division can be moved, in the order of the network."""
    for i, block in enumerate(transformer.multimodal_transformer_blocks):
        streams = (f"mm_block_{i}.image", f"mm_block_{i}.text")
        yield from _modulated(streams[0], block.image_transformer_block)
        yield from _modulated(streams[1], block.text_transformer_block)
        # Each stream attends to the values of both. The last text stream has no o_proj.
        readers = [f"{stream}.attn.o_proj" for stream in streams if f"{stream}.attn.o_proj" in linear]
        yield Site(tuple(readers), tuple(Source(f"{stream}.attn.v_proj") for stream in streams))
    for i in range(transformer.config.depth_unified):
        name = f"unified_block_{i}"
        yield from _modulated(name, transformer.unified_transformer_blocks[i].transformer_block)
        yield Site((f"{name}.attn.o_proj",), (Source(f"{name}.attn.v_proj"),))
    yield Site(("final_layer.linear",), _modulation("final_layer", 0, 2))


def _modulated(name: str, block: TransformerBlock) -> Iterator[Site]:
    """What reads a block's modulated stream; the chunks are those of ``TransformerBlock.pre_sdpa``."""
    attention = tuple(f"{name}.attn.{which}_proj" for which in "qkv")
    mlp = (f"{name}.mlp.fc1",)
    chunks = block.num_modulation_params
    yield Site(attention + mlp if block.parallel_mlp else attention, _modulation(name, 0, chunks))
    if not block.parallel_mlp and not block.skip_post_sdpa:
        yield Site(mlp, _modulation(name, 3, chunks))


def _modulation(name: str, first: int, chunks: int) -> tuple[Source, Source]:
    """adaLN's shift and, after it, its scale: x (1 + scale) + shift."""
    return Source(f"{name}.adaln", first, chunks), Source(f"{name}.adaln", first + 1, chunks, offset=1.0)


def divisors_of(work: Work, linear: Mapping[str, nn.Module], site: Site, alpha: float) -> NDArray[np.float64]:
    """s, (channels,): equation 4; 1 where a channel or its weights are as good as zero."""
    x = np.max([_widest(work, name) for name in site.readers if name in work.plan], axis=0)
    w = np.max([np.array(mx.abs(linear[name].weight).max(axis=0).astype(mx.float32)) for name in site.readers], axis=0)
    s = np.ones(len(x))
    x[~np.isfinite(x)] = 0  # of a channel without finite values
    usable = (x > NOTHING * x.max()) & (w > NOTHING * w.max())
    s[usable] = x[usable] ** alpha / w[usable].astype(np.float64) ** (1 - alpha)
    return s


def _widest(work: Work, name: str) -> NDArray[np.float64]:
    """max|x_c| of each input channel, (channels,)."""
    found = work.channel_range(name)
    if found is None:
        raise _lacking(name)
    return np.maximum(np.abs(found.low), np.abs(found.high))


def smoothed(
    linear: Mapping[str, nn.Module], divisors: Mapping[Site, NDArray[np.float64]]
) -> dict[tuple[str, str], mx.array]:
    """What changes, by layer name and 'weight' or 'bias': full precision, float32; lazy."""
    changed: dict[tuple[str, str], mx.array] = {}

    def now(name: str, part: str) -> mx.array:
        own: mx.array = linear[name][part]
        return changed.get((name, part), own.astype(mx.float32))

    for site, s in divisors.items():
        for name in site.readers:
            changed[name, "weight"] = now(name, "weight") * _float32(s)
        for source in site.sources:
            share, offset = np.ones((source.chunks, len(s))), np.zeros((source.chunks, len(s)))
            share[source.chunk], offset[source.chunk] = 1 / s, source.offset
            factor, added = _float32(share.ravel()), _float32(offset.ravel())
            changed[source.name, "weight"] = now(source.name, "weight") * factor[:, None]
            # The model adds the offset itself.
            changed[source.name, "bias"] = (now(source.name, "bias") + added) * factor - added
    return changed


def _float32(x: NDArray[np.float64]) -> mx.array:
    return mx.array(x.astype(np.float32))


def _ranges(work: Work, name: str, s: NDArray[np.float64]) -> StepRanges:
    ranges = work.ranges(name, None, s)
    if ranges is None:
        raise _lacking(name)
    return ranges


def _lacking(name: str) -> CalibError:
    return CalibError(f"quantizer=smooth needs activations.h5: no statistics of {name}; calib collect makes them")
