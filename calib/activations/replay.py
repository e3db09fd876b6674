"""Forwards of the transformer over stored states, watched by an observer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Self

from calib.activations.format import HALVES
from calib.activations.observer import Observer
from calib.activations.observer_cuda import CudaObserver
from calib.activations.observer_mlx import PlainObserver
from calib.activations.samples import SampleWriter
from calib.activations.taps import TapPoint, tapped
from calib.base import blas
from calib.base.device import cores, on_cuda, on_gpu
from calib.models.architecture import Conditioning
from calib.models.model import DiffusionModel

import mlx.core as mx


def new_observer(histogram_stride: int, finite_only: bool = False) -> Observer:
    """The fastest observer of this device; ``finite_only`` leaves NaN and infinities out, and counts them."""
    if on_cuda() and not finite_only:
        return CudaObserver(histogram_stride)
    return PlainObserver(histogram_stride, finite_only)


@cache
def _streams(count: int) -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(count)]


def parts_of(rows: int) -> list[slice]:
    """Rows of a batch that run side by side: all on a GPU; on a CPU as many parts as there are processors.

    Of MLX's operations on a CPU only products use more than one processor. Rows do not see each other, so their
    forwards can run at once, each a stream with its share of BLAS threads: half the time for the emoji model on two.
    """
    count = 1 if on_gpu() else min(cores(), rows)
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]


def streams_of(parts: int) -> list[mx.Stream]:
    """A stream for each of so many parts of a batch; the device's own where there is one part."""
    return _streams(parts) if parts > 1 else [mx.default_stream(mx.default_device())]


@contextmanager
def shared_cores(rows: int) -> Iterator[None]:
    """Within the context products leave room for the other parts of a batch of ``rows``."""
    with blas.threads(max(1, cores() // len(parts_of(rows)))):
        yield


def traced_shapes(model: DiffusionModel, points: Sequence[TapPoint]) -> dict[str, tuple[int, int]]:
    """Tokens and channels of one row at each tap, from a forward that is built and never computed."""
    found: dict[str, tuple[int, int]] = {}

    def record(name: str, activation: mx.array) -> mx.array:
        channels = activation.shape[-1]
        found[name] = (activation.size // channels, channels)
        return activation

    width, pooled_width = model.architecture.text_widths()
    tokens = mx.zeros((1, model.text_length, width), dtype=model.dtype)
    pooled = None if pooled_width is None else mx.zeros((1, pooled_width), dtype=model.dtype)
    timestep = mx.array(0.0).astype(model.dtype)
    mx.eval(timestep)
    with tapped(model.architecture, points, record):
        model.velocity(mx.zeros((1, *model.latent_shape), dtype=model.dtype), Conditioning(tokens, pooled), timestep)
    return found


class Replay:
    """Watched forwards of one model, in a context that places the taps; one is prepared while another is computed.

    Args:
        apart: observe the halves of the guidance batch each by itself.
    """

    def __init__(self, model: DiffusionModel, points: Sequence[TapPoint], apart: bool = False):
        self._model, self._points, self._apart = model, points, apart
        self._running: list[mx.array] = []
        self._watch: _Watch | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(tapped(self._model.architecture, self._points, self._record))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _record(self, name: str, activation: mx.array) -> mx.array:
        assert self._watch is not None
        return self._watch.record(name, activation)

    def forward(
        self,
        observer: Observer,
        x: mx.array,
        text: Conditioning,
        timestep: mx.array,
        guidance: bool,
        phase: int,
        images: Sequence[int] = (),
        sampler: SampleWriter | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> mx.array:
        """Start a forward over states ``x`` (batch, height, width, channels).

        Returns whether its output is finite; lazy. ``timestep`` must be evaluated, ``phase`` moves the sampled rows.
        ``sampler`` keeps rows of ``images``; ``between`` is called when the forward before is done.
        """
        rows = (mx.concatenate([x, x]) if guidance else x).astype(self._model.dtype)
        half = len(x) if guidance and self._apart else None
        owners = [*images] * (2 if guidance else 1)
        outputs = []
        parts = parts_of(len(rows))
        for part, stream in zip(parts, streams_of(len(parts)), strict=True):
            with mx.stream(stream):
                observer.begin(phase)
                self._watch = _Watch(observer, len(rows), half, part, sampler, owners[part])
                outputs.append(self._model.velocity(rows[part], text[part], timestep))
        finite = mx.stack([mx.all(mx.isfinite(output)) for output in outputs]).all()
        todo = observer.end_forward()
        todo.append([*outputs, finite, *(sampler.end_forward() if sampler is not None else [])])
        mx.eval(self._running)  # two forwards at once would need the memory of two
        between()
        for arrays in todo:
            mx.async_eval(arrays)
        self._running = outputs
        observer.settle()
        if sampler is not None:
            sampler.settle()
        return finite


@dataclass(frozen=True)
class _Watch:
    """What watches one part of a forward; ``half`` is the batch's first unconditional row, if halves are kept apart."""

    observer: Observer
    whole: int
    half: int | None
    part: slice
    sampler: SampleWriter | None
    images: Sequence[int]

    def record(self, name: str, activation: mx.array) -> mx.array:
        """Called by every tap."""
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
        return self.observer.tie(activation)
