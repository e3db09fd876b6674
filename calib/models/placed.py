"""Put a transformer's weights in their place: in memory, or where they do not fit streamed from the checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from calib.base.errors import ConfigError
from calib.base.progress import note
from calib.models.architecture import Architecture, Divisible
from calib.models.memory import STREAMS, plan_memory
from calib.models.model import DiffusionModel
from calib.models.streamed import Streamed
from calib.models.tensors import checked, evaluate, set_weights

import mlx.core as mx


def placed(
    model: DiffusionModel,
    read: Callable[[], Mapping[str, mx.array]],
    source: str,
    stream: bool | None,
    unused: Sequence[str] = (),
    dtype: mx.Dtype | None = None,
) -> DiffusionModel:
    """``model`` with its transformer's weights: in memory, or where they do not fit streamed from the checkpoint.

    Args:
        read: returns the checkpoint's by path, not read yet; called as often as they are.
        source: the checkpoint, for errors.
        stream: whether to stream; None: where the weights do not fit beside the decoder and the activations of one
            image.
        unused: as in :func:`checked`.
        dtype: of the weights; None: that of the activations.
    """
    dtype = dtype or model.dtype
    divisible = isinstance(model.architecture, Divisible)
    if stream and not divisible:
        kind = type(model.architecture).__name__
        raise ConfigError.bad_value("model.stream", stream, f"{kind} does not run in parts (Divisible); set false")
    found = checked(model.transformer, read(), source, unused)
    set_weights(model.transformer, found, dtype)
    if stream is None and divisible:
        plan = plan_memory(model, model.supports_guidance, 1)
        size, needed = plan.needs.transformer, plan.needs.transformer + plan.needs.decoder + plan.drawing
        stream = needed > plan.memory
        if size <= plan.memory < needed:  # else it was said by preflight
            beside = f"the transformer of {model.name} and one image take {needed / 1e9:.1f}"
            note(f"memory: {beside} of {plan.memory / 1e9:.1f} GB; {STREAMS.format(size / 1e9)}")
    if stream:
        streamed = cast(Architecture, Streamed(model.architecture, found, read, dtype, source))
        return replace(model, architecture=streamed)
    del found  # arrays of another type would stay beside those made of them
    evaluate(model.transformer, source)
    return replace(model, smaller_text=model.smaller_text or "model.stream=true") if divisible else model
