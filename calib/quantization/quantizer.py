"""The interface of quantizers, the options of the config group ``quantizer``: their input and their result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from calib.activations.batches import Batch, StoredStates
from calib.activations.taps import TapPoint
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges
from calib.models.architecture import Architecture
from calib.models.model import DiffusionModel
from calib.models.packed import Packed
from calib.models.streamed import INSTEAD_OF_TRAINING, refusal

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChannelRange:
    """Minimum and maximum of each input channel of a layer over all collected steps of the sampler, (channels,)."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]


#: Called as record(tap name, activation, step of each row) in a forward; returns the activation.
StepRecorder: TypeAlias = Callable[[str, mx.array, Sequence[int]], mx.array]
#: Runs forwards, observed at taps: see :class:`QuantizerInput`.
Replay: TypeAlias = Callable[
    [Sequence[TapPoint], StepRecorder, Callable[[], Sequence[mx.array]], Mapping[str, Packed]],
    None,
]


class Batches(Protocol):
    """Gives calibration states in batches."""

    def __call__(self, size: int | None = None) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class QuantizerInput:
    """The input of a quantizer, which changes nothing in it; its result is the :class:`Quantized` that it returns.

    Attributes:
        architecture: the transformer at full precision.
        layers: the layers whose weights are to be quantized, by canonical name, in network order; all ``nn.Linear``
            whose width the plan's group size divides.
        plan: bits and group size of each of ``layers`` (and of others, which are not quantized).
        dtype: 16-bit type of scales and biases.
        replay: ``replay(points, record, pending, replaced)`` runs the calibration states through it and records the
            inputs at taps ``points``: ``record(tap name, activation (rows, …, channels), step of each row)`` is called
            while a lazy graph is built, block after block, of each block for all states in batches. After a batch of a
            block the arrays that ``pending`` returns are evaluated; what comes after the last tap is never computed.
            ``replaced`` holds packed weights by layer name that stand in for the full-precision ones meanwhile. What
            blocks are given is kept, so that the next replay of the same or a later block begins there.
        release: frees what replays keep; to be called when there will be no more of them.
        batches: ``batches(size)`` yields the calibration states in batches of at most ``size``, by default as many as
            this device draws at once; each is read, and its prompts encoded, when it is reached: ``for batch in
            work.batches(): v = work.architecture.velocity(batch.x, batch.text, batch.timesteps)``. Gradients may be
            taken through that, by ``nn.value_and_grad`` of ``work.architecture.module``; they keep the activations of
            all blocks, so that a large model needs a small ``size``.
        channel_range: extremes of a layer's input channels, from the statistics; None where there are no statistics.
        ranges: ``ranges(name, clip, divisors)`` returns activation ranges of a layer from the statistics, with other
            clipping percentiles unless ``clip`` is None, and with each input channel divided by its entry in
            ``divisors`` unless that is None; None where there are no statistics.
        channel_power: mean square of a layer's input channels over the collected steps, (channels,), likewise; each
            step counts by ``importance``.
        importance: how much an error of a layer's output at each step reaches the picture, (num_steps,), in units of
            its own; None where the plan was not made by gradients of the picture.
        input_bits: bits of a layer's input at each step, (num_steps,); empty: those of the plan at all steps.
        scratch: a folder for what long work has done so far, to go on there after an interruption; it stands for the
            model's weights, the states, the statistics and the device. None: nothing is kept.
        model: the model of ``architecture``, to draw with; None where there is none.
        states: returns the calibration set, with its dataset; None where no run is known.
        prompts: returns texts of the list that the dataset is of that may be drawn beside the dataset's; none that an
            evaluation by the same configuration draws.
        home: the run directory, where a training that goes on is marked; None where there is none.
        streamed: whether the model's weights are read anew in each forward, as they do not fit into memory; then those
            of the last layer that was taken from ``layers`` are in memory.
    """

    architecture: Architecture
    layers: Mapping[str, nn.Linear]
    plan: Mapping[str, LayerPlan]
    dtype: mx.Dtype
    replay: Replay
    batches: Batches
    channel_range: Callable[[str], ChannelRange | None]
    ranges: Callable[[str, tuple[float, float] | None, NDArray[np.float64] | None], StepRanges | None]
    channel_power: Callable[[str], NDArray[np.float64] | None] = lambda _: None
    importance: Callable[[str], NDArray[np.float64] | None] = lambda _: None
    input_bits: Callable[[str], tuple[int, ...]] = lambda _: ()
    scratch: Path | None = None
    model: DiffusionModel | None = None
    states: Callable[[], StoredStates] | None = None
    prompts: Callable[[], Sequence[str]] = lambda: ()
    home: Path | None = None
    streamed: bool = False
    release: Callable[[], None] = lambda: None

    def refuse_streamed(self, what: str) -> None:
        """Raise where the model is streamed; ``what`` needs all of its weights at once."""
        if self.streamed:
            raise refusal(what, INSTEAD_OF_TRAINING)

    @classmethod
    def without_layers(cls, architecture: Architecture, dtype: mx.Dtype, streamed: bool = False) -> "QuantizerInput":
        """An input without layers, for trying a quantizer's parameters before anything is loaded."""
        return cls(
            architecture,
            layers={},
            plan={},
            dtype=dtype,
            replay=lambda *_: None,
            batches=lambda size=None: iter(()),
            channel_range=lambda _: None,
            ranges=lambda *_: None,
            streamed=streamed,
        )


@dataclass
class Quantized:
    """The result of a quantizer.

    Attributes:
        layers: packed weights by canonical layer name.
        weights: other changed parameters, by the transformer's parameter path.
        ranges: activation ranges by layer name, where they replace the plan's.
        notes: notes for people, a line each.
        divisors, shifts: what each channel of an input is divided by, and is shifted by before it is rounded, by layer
            name, (channels,); see :class:`~calib.quantization.model.InputRule`. Such a layer's ``ranges`` are of that.
        rotations: size of the blocks in which an input is rotated before it is rounded, by layer name; its ``ranges``
            are of that.
        drawn: texts, beside those of the calibration set, that were drawn: their pictures tell nothing about others.
    """

    layers: dict[str, Packed]
    weights: dict[str, mx.array] = field(default_factory=dict)
    ranges: dict[str, StepRanges] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    divisors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    shifts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rotations: dict[str, int] = field(default_factory=dict)
    drawn: Sequence[str] = ()


#: A quantizer, its parameters bound.
Quantizer: TypeAlias = Callable[[QuantizerInput], Quantized]
