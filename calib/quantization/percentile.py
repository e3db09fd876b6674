"""Quantizer ``percentile``: round weights to nearest, and clip activations at the same percentiles in every layer."""

from calib.base.errors import CalibError, ConfigError
from calib.base.layout import ACTIVATIONS
from calib.quantization import rtn
from calib.quantization.quantizer import Quantized, QuantizerInput


def quantize(work: QuantizerInput, low: float = 0.1, high: float = 99.9) -> Quantized:
    """Quantize weights as ``rtn`` does; activations are clipped at the percentiles ``low`` and ``high``.

    They replace the plan's clipping. The few values beyond them saturate, and all others get a finer grid.

    Raises:
        ConfigError: the percentiles are out of range, or ``low`` is not below ``high``.
        CalibError: there are no statistics of a layer.
    """
    if low < 0:
        raise ConfigError.bad_value("quantizer.low", low, "must be 0 or more")
    if high > 100:
        raise ConfigError.bad_value("quantizer.high", high, "must be 100 or less")
    if low >= high:
        raise ConfigError.bad_value("quantizer.low", low, f"must be less than quantizer.high ({high})")
    result = rtn.quantize(work)
    for name in (name for name in work.architecture.layers() if name in work.plan):
        ranges = work.ranges(name, (low, high), None)
        if ranges is None:
            raise CalibError(
                f"quantizer=percentile needs {ACTIVATIONS}: no statistics of {name}; calib collect makes them"
            )
        result.ranges[name] = ranges
    return result
