"""What a quantizer is given, and what it returns: the interface that options of the config group share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from calib.activations.batches import Batch
from calib.activations.taps import Recorder, TapPoint
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges
from calib.models.architecture import Architecture
from calib.quantization.packed import Packed

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChannelRange:
    """Extremes of each input channel of a layer over all collected steps that the model sees, (channels,)."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class QuantizerInput:
    """What a quantizer works on. It changes nothing in here; what it makes is in the :class:`Quantized` it returns.

    Attributes:
        architecture: the transformer at full precision.
        layers: the layers whose weights are to be quantized, by canonical name, in network order; all ``nn.Linear``
            whose width the plan's group size divides.
        plan: bits and group size of each of ``layers`` (and of others, which are left alone).
        dtype: 16-bit type of scales and biases.
        replay: runs the calibration states through it with the inputs at the given taps recorded; a
            recorder gets (tap name, activation (rows, tokens, 1, channels) or (rows, 1, 1, channels)) in a lazy graph,
            and the arrays that ``pending`` returns after each forward are evaluated, nothing else: what lies behind
            the last tap is never computed. ``replay(points, record, pending, replaced)``, where ``replaced`` holds
            weights by layer name that stand in for the full-precision ones during these forwards.
        batches: calibration states in batches of the size that this device draws at, each read and its prompts
            encoded when it is reached: ``for batch in work.batches(): v = work.architecture.velocity(batch.x,
            batch.text, batch.timesteps)``. Gradients may be taken through that, by ``nn.value_and_grad`` of
            ``work.architecture.module``.
        channel_range: extremes of a layer's input channels, from the statistics; None where there are no statistics.
        ranges: activation ranges of a layer, by name, from the statistics: with other clipping percentiles, or with
            each input channel divided by ``divisors``; None where there are no statistics.
    """

    architecture: Architecture
    layers: Mapping[str, nn.Linear]
    plan: Mapping[str, LayerPlan]
    dtype: mx.Dtype
    replay: Callable[
        [Sequence[TapPoint], Recorder, Callable[[], Sequence[mx.array]], Mapping[str, mx.array]],
        None,
    ]
    batches: Callable[[], Iterator[Batch]]
    channel_range: Callable[[str], ChannelRange | None]
    ranges: Callable[[str, tuple[float, float] | None, NDArray[np.float64] | None], StepRanges | None]

    @classmethod
    def without_layers(cls, architecture: Architecture, dtype: mx.Dtype) -> "QuantizerInput":
        """Nothing to do: for trying a quantizer's parameters before anything is loaded."""
        return cls(
            architecture,
            layers={},
            plan={},
            dtype=dtype,
            replay=lambda *_: None,
            batches=lambda: iter(()),
            channel_range=lambda _: None,
            ranges=lambda *_: None,
        )


@dataclass
class Quantized:
    """What a quantizer made.

    Attributes:
        layers: packed weights by canonical layer name.
        weights: other parameters that it changed, by the transformer's parameter path.
        ranges: activation ranges by layer name where they are not to be the plan's.
        notes: what people should know, a line each.
    """

    layers: dict[str, Packed]
    weights: dict[str, mx.array] = field(default_factory=dict)
    ranges: dict[str, StepRanges] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


#: A quantizer, its parameters bound.
Quantizer: TypeAlias = Callable[[QuantizerInput], Quantized]
