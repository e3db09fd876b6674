"""Quantizer ``smooth``: divide wide input channels, multiply the weights that read them, then round to nearest.

SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438), equations 3 and 4: W x = (W diag(s)) (diag(s)⁻¹ x), with
s_c = max|x_c|^α / max|W_c|^(1 − α). The division moves exactly into the layer that produces x, and so only where that
is linear: the sites of :class:`~calib.models.architecture.Smoothable`. Other layers are only rounded.
"""

from collections.abc import Mapping

from calib.analysis.ranges import StepRanges
from calib.base.errors import CalibError, ConfigError
from calib.base.layout import ACTIVATIONS
from calib.models.architecture import Site, Smoothable
from calib.models.grids import searched
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

#: Share of the largest channel maximum below which a channel counts as zero and is not scaled.
NEGLIGIBLE_SHARE = 1e-5


def quantize(work: QuantizerInput, alpha: float = 0.5) -> Quantized:
    """Smooth and round the weights, and set activation ranges for the layers whose inputs are divided.

    Args:
        alpha: share of the range that moves from the activations to the weights: 0 none, 1 all.

    Raises:
        ConfigError: ``alpha`` is out of range, or the model is not smoothable.
        CalibError: there are no statistics of a layer.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError.bad_value("quantizer.alpha", alpha, "must be 0 to 1")
    work.refuse_streamed("factors of quantizer=smooth, which go from layer to layer,")
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
        result.layers[name] = searched(weight, plan.weight_bits, plan.group_size, work.dtype)
    for (name, part), value in changed.items():
        result.weights[f"{architecture.path(name)}.{part}"] = value.astype(linear[name][part].dtype)
    for site, s in divisors.items():
        result.ranges |= {name: _ranges(work, name, s) for name in site.readers if name in work.plan}
    return result


def divisors_of(work: QuantizerInput, linear: Mapping[str, nn.Module], site: Site, alpha: float) -> NDArray[np.float64]:
    """s of equation 4, (channels,); 1 where a channel or its weights are almost zero."""
    x = np.max([_channel_maximum(work, name) for name in site.readers if name in work.plan], axis=0)
    w = np.max([np.array(mx.abs(linear[name].weight).max(axis=0).astype(mx.float32)) for name in site.readers], axis=0)
    s = np.ones(len(x))
    x[~np.isfinite(x)] = 0  # for a channel without finite values
    usable = (x > NEGLIGIBLE_SHARE * x.max()) & (w > NEGLIGIBLE_SHARE * w.max())
    s[usable] = x[usable] ** alpha / w[usable].astype(np.float64) ** (1 - alpha)
    return s


def _channel_maximum(work: QuantizerInput, name: str) -> NDArray[np.float64]:
    """max|x_c| of each input channel, (channels,)."""
    found = work.channel_range(name)
    if found is None:
        raise _lacking(name)
    return np.maximum(np.abs(found.low), np.abs(found.high))


def smoothed(
    linear: Mapping[str, nn.Module], divisors: Mapping[Site, NDArray[np.float64]]
) -> dict[tuple[str, str], mx.array]:
    """The changed parameters by layer name and 'weight' or 'bias', in float32; lazy."""
    changed: dict[tuple[str, str], mx.array] = {}

    def now(name: str, part: str) -> mx.array:
        own: mx.array = linear[name][part]
        return changed.get((name, part), own.astype(mx.float32))

    for site, s in divisors.items():
        for name in site.readers:
            changed[name, "weight"] = now(name, "weight") * _float32(s)
        for producer in site.producers:
            share, offset = np.ones((producer.chunks, len(s))), np.zeros((producer.chunks, len(s)))
            share[producer.chunk], offset[producer.chunk] = 1 / s, producer.offset
            factor, added = _float32(share.ravel()), _float32(offset.ravel())
            changed[producer.name, "weight"] = now(producer.name, "weight") * factor[:, None]
            if "bias" in linear[producer.name] or producer.offset:
                # The model adds the offset itself.
                changed[producer.name, "bias"] = (now(producer.name, "bias") + added) * factor - added
    return changed


def _float32(x: NDArray[np.float64]) -> mx.array:
    return mx.array(x.astype(np.float32))


def _ranges(work: QuantizerInput, name: str, s: NDArray[np.float64]) -> StepRanges:
    ranges = work.ranges(name, None, s)
    if ranges is None:
        raise _lacking(name)
    return ranges


def _lacking(name: str) -> CalibError:
    return CalibError(f"quantizer=smooth needs {ACTIVATIONS}: no statistics of {name}; calib collect makes them")
