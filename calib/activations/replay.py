"""Observed forward passes of the transformer over stored states."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from calib.activations.format import HALVES
from calib.activations.observer import Observer
from calib.activations.observer_cuda import CudaObserver
from calib.activations.observer_mlx import MlxObserver
from calib.activations.samples import SampleWriter
from calib.activations.taps import TapPoint, tapped
from calib.base.device import on_cuda, on_gpu
from calib.base.errors import CalibError
from calib.models.architecture import Conditioning
from calib.models.model import DiffusionModel
from calib.models.parallel import parts_of

import mlx.core as mx


def new_observer(histogram_stride: int, finite_only: bool = False) -> Observer:
    """The fastest observer for this device; with ``finite_only`` NaN and infinities are left out and counted."""
    if on_cuda() and not finite_only:
        return CudaObserver(histogram_stride)
    return MlxObserver(histogram_stride, finite_only)


def traced_shapes(model: DiffusionModel, points: Sequence[TapPoint]) -> dict[str, tuple[int, int]]:
    """Tokens and channels of one row at each tap, from a forward pass that is traced and not evaluated."""
    found: dict[str, tuple[int, int]] = {}

    def record(name: str, activation: mx.array) -> mx.array:
        channels = activation.shape[-1]
        found[name] = (activation.size // channels, channels)
        return activation

    width, pooled_width = model.architecture.text_widths()
    tokens = mx.zeros((1, model.text_length, width), dtype=model.dtype)
    pooled = None if pooled_width is None else mx.zeros((1, pooled_width), dtype=model.dtype)
    architecture = model.architecture if model.streamed is None else model.streamed.inner
    x, timestep = mx.zeros((1, *model.latent_shape), dtype=model.dtype), mx.array(0.0, model.time_dtype)
    with tapped(architecture, points, record):
        architecture.velocity(x, Conditioning(tokens, pooled), timestep)
    return found


class Replay:
    """Observed forward passes of one model, in a context that installs the taps.

    The graph of one forward pass is built while the previous one is computed.

    Args:
        apart: observe the halves of the guidance batch separately.
    """

    def __init__(self, model: DiffusionModel, points: Sequence[TapPoint], apart: bool = False):
        self._model, self._points, self._apart = model, points, apart
        self._running: list[mx.array] = []
        self._part: _PartObserver | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(tapped(self._model.architecture, self._points, self._record))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _record(self, name: str, activation: mx.array) -> mx.array:
        assert self._part is not None
        return self._part.record(name, activation)

    def forward(
        self,
        observer: Observer,
        x: mx.array,
        text: Conditioning,
        timestep: float,
        guidance: bool,
        phase: int,
        images: Sequence[int] = (),
        sampler: SampleWriter | None = None,
    ) -> mx.array:
        """Start a forward pass over states ``x`` (batch, height, width, channels).

        Returns whether its output is finite; lazy.

        Args:
            phase: shifts the rows sampled for histograms.
            images: image ids of the states, for ``sampler``, which stores rows of their activations.
        """
        rows = (mx.concatenate([x, x]) if guidance else x).astype(self._model.dtype)
        half = len(x) if guidance and self._apart else None
        owners = [*images] * (2 if guidance else 1)
        # On a CPU summaries are computed in turn with the forward, unless this must not wait for its end.
        tied, observers = on_gpu() or self._model.streamed is not None, dict[int, _PartObserver]()

        def entering(part: slice) -> None:
            if part.start not in observers:
                observer.begin(phase)
                own = _PartObserver(observer, len(rows), half, part, sampler, owners[part], tied)
                observers[part.start] = own
            self._part = observers[part.start]

        outputs = self._model.velocities(rows, text, timestep, parts_of(len(rows)), entering)
        finite = mx.stack([mx.all(mx.isfinite(output)) for output in outputs]).all()
        todo = observer.end_forward()
        todo.append([*outputs, finite, *(sampler.end_forward() if sampler is not None else [])])
        mx.eval(self._running)  # two forwards at once would need the memory of two
        for arrays in todo:
            mx.async_eval(arrays)
        self._running = outputs
        observer.settle()
        if sampler is not None:
            sampler.settle()
        return finite


@dataclass(frozen=True)
class _PartObserver:
    """Observes one part of a forward pass.

    Attributes:
        whole: number of rows of the batch.
        half: index of the batch's first unconditional row; None where the guidance halves are pooled.
        part: rows of the batch in this part.
        images: image id of each row of the part, for ``sampler``.
        tied: whether activations are freed once they are summarised.
    """

    observer: Observer
    whole: int
    half: int | None
    part: slice
    sampler: SampleWriter | None
    images: Sequence[int]
    tied: bool

    def record(self, name: str, activation: mx.array) -> mx.array:
        """Pass an activation to the observer and the sampler; called by every tap."""
        rows = self.part.stop - self.part.start
        if len(activation) != rows:
            shape = f"{name} reads an array of shape {activation.shape} in a forward of {rows} rows"
            raise CalibError(f"{shape}; Architecture.velocity must give every layer as many rows")
        if self.half is None:
            self.observer.see(name, activation, self.part.start, self.whole)
        else:
            border = min(max(self.half - self.part.start, 0), len(activation))
            places = (
                (min(self.part.start, self.half), self.half),
                (max(self.part.start - self.half, 0), self.whole - self.half),
            )
            halves = (activation[:border], activation[border:])
            for which, own, place in zip(HALVES, halves, places, strict=True):
                if len(own):
                    self.observer.see(f"{name}/{which}", own, *place)
        if self.sampler is not None:
            activation = self.sampler.take(name, activation, self.images)
        return self.observer.tie(activation) if self.tied else activation
