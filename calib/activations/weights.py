"""SQNR of a model's weights under quantization, measured once per model."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from calib.base.affine import DEFAULT_GROUP_SIZE, WEIGHT_BITS
from calib.base.errors import CalibError, Unsettled
from calib.base.files import read_json, remove_abandoned, write_json
from calib.base.locks import locked
from calib.base.progress import Progress, say
from calib.models.packed import Packed

import mlx.core as mx
from mlx import nn


def energy(x: mx.array) -> float:
    """Σx², summed in the type of ``x``."""
    return cast(float, mx.sum(mx.square(x)).item())


def weight_sqnr(layer: nn.Module) -> dict[int, float]:
    """Signal-to-quantization-noise ratio, dB, of MLX's affine quantization by bit-width, in groups of 64.

    SQNR = 10 log10(Σw² / Σ(w - Q(w))²), in float32. Empty for layers that MLX cannot quantize in this way:
    convolutions, already quantized layers, and widths that 64 does not divide.
    """
    if not isinstance(layer, nn.Linear) or layer.weight.shape[-1] % DEFAULT_GROUP_SIZE:
        return {}
    weight = layer.weight.astype(mx.float32)
    signal = energy(weight)
    result = {}
    for bits in WEIGHT_BITS:
        packed = Packed.nearest(weight, bits, DEFAULT_GROUP_SIZE, mx.float32)
        noise = energy(weight - packed.dequantize())
        result[bits] = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return result


def cached_weight_sqnr(
    cache_dir: Path, fingerprint: str, names: Sequence[str], layers: Callable[[], Mapping[str, nn.Module]]
) -> dict[str, dict[int, float]]:
    """:func:`weight_sqnr` of those layers ``names`` that have one, from ``cache_dir`` where it was measured before.

    Args:
        fingerprint: fingerprint of the model's weights.
        layers: returns every linear layer by name; called only if one is not cached.
    """
    path = cache_dir / "weights" / f"{fingerprint}.json"
    known = _known(path)
    if not set(names) <= set(known):
        with locked(path.with_suffix(".lock"), lambda: say(f"waiting for the process that measures weights ({path})")):
            remove_abandoned(path.parent)  # what a killed process was writing
            known = _known(path)
            _measure([name for name in names if name not in known], layers, known)
            write_json(path, known)
    try:
        return {
            name: {int(bits): math.inf if value is None else float(value) for bits, value in known[name].items()}
            for name in names
            if set(known[name]) >= set(map(str, WEIGHT_BITS))
        }
    except (ValueError, TypeError):
        path.unlink(missing_ok=True)
        return cached_weight_sqnr(cache_dir, fingerprint, names, layers)


def _known(path: Path) -> dict[str, dict[str, float | None]]:
    """Cached results; empty where the file is missing or damaged, so that they are measured again."""
    try:
        return {name: dict(sqnr.items()) for name, sqnr in read_json(path).items()}
    except Unsettled:
        raise
    except (CalibError, AttributeError, TypeError):
        return {}


def _measure(
    missing: Sequence[str],
    layers: Callable[[], Mapping[str, nn.Module]],
    known: dict[str, dict[str, float | None]],
) -> None:
    if not missing:
        return
    modules = layers()
    with Progress("measure weights", len(missing), "layer", delay=2) as progress:
        for name in missing:
            found = weight_sqnr(modules[name]) if name in modules else {}
            known[name] = {str(bits): value if math.isfinite(value) else None for bits, value in found.items()}
            progress.advance()
