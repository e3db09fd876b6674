"""Quantizer ``smooth``: wide input channels narrowed, the weights that read them widened, then rounding to nearest.

SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438), equations 3 and 4: W x = (W diag(s)) (diag(s)⁻¹ x), with
s_c = max|x_c|^α / max|W_c|^(1 − α). The division moves, exactly, into what makes x, so only where that is linear:
adaLN's shift and scale before q, k, v, fc1 and the final layer, and v before o, since attention mixes tokens and not
channels. Before fc2 stands a GELU, before adaLN a SiLU, before the embedders nothing: these are only rounded.
"""

from collections.abc import Mapping

from calib.analysis.ranges import StepRanges
from calib.base.errors import CalibError, ConfigError
from calib.models.architecture import Site, Smoothable
from calib.quantization.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

#: Of the widest channel: what is narrower is not widened to match it.
NEGLIGIBLE = 1e-5


def quantize(work: QuantizerInput, alpha: float = 0.5) -> Quantized:
    """Weights smoothed and rounded, and the activation ranges of the layers that read less.

    Args:
        alpha: how much of the width moves from the activations to the weights: 0 none of it, 1 all.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError.bad_value("quantizer.alpha", alpha, "must be 0 to 1")
    architecture = work.architecture
    if not isinstance(architecture, Smoothable):
        raise ConfigError(
            "quantizer=smooth: this model does not say where a factor can be moved; choose another quantizer"
        )
    linear = architecture.layers()
    divisors = {
        site: divisors_of(work, linear, site, alpha)
        for site in architecture.sites()
        if work.plan.keys() & set(site.readers)
    }
    changed = smoothed(linear, divisors)
    result = Quantized({})
    for name, layer in work.layers.items():
        plan = work.plan[name]
        weight = changed.pop((name, "weight"), layer.weight)
        result.layers[name] = Packed.nearest(weight, plan.weight_bits, plan.group_size, work.dtype)
    for (name, part), value in changed.items():
        result.weights[f"{architecture.path(name)}.{part}"] = value.astype(linear[name][part].dtype)
    for site, s in divisors.items():
        result.ranges |= {name: _ranges(work, name, s) for name in site.readers if name in work.plan}
    return result


def divisors_of(work: QuantizerInput, linear: Mapping[str, nn.Module], site: Site, alpha: float) -> NDArray[np.float64]:
    """s, (channels,): equation 4; 1 where a channel or its weights are as good as zero."""
    x = np.max([_widest(work, name) for name in site.readers if name in work.plan], axis=0)
    w = np.max([np.array(mx.abs(linear[name].weight).max(axis=0).astype(mx.float32)) for name in site.readers], axis=0)
    s = np.ones(len(x))
    x[~np.isfinite(x)] = 0  # of a channel without finite values
    usable = (x > NEGLIGIBLE * x.max()) & (w > NEGLIGIBLE * w.max())
    s[usable] = x[usable] ** alpha / w[usable].astype(np.float64) ** (1 - alpha)
    return s


def _widest(work: QuantizerInput, name: str) -> NDArray[np.float64]:
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


def _ranges(work: QuantizerInput, name: str, s: NDArray[np.float64]) -> StepRanges:
    ranges = work.ranges(name, None, s)
    if ranges is None:
        raise _lacking(name)
    return ranges


def _lacking(name: str) -> CalibError:
    return CalibError(f"quantizer=smooth needs activations.h5: no statistics of {name}; calib collect makes them")
