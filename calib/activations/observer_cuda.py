"""The observer for NVIDIA GPUs: each activation is read once and not copied, a few taps per launch.

A forward pass has many short kernels, and a launch costs the host some 70 µs, so 16 taps are observed per launch. The
statistics are those of :mod:`calib.activations.observer_mlx`; here moments and extremes of all channels stay on the
device, in one array over all taps, until the results are requested.
"""

from dataclasses import dataclass
from typing import Any

from calib.activations import cuda_kernels as kernels
from calib.activations.bits import DTYPES
from calib.activations.cuda_launch import (
    TAPS,
    Launch,
    TapShape,
    ceil_div,
    count_kernel,
    merge_kernel,
    merge_tables,
    observe_kernel,
    plan_launch,
    ranges_kernel,
)
from calib.activations.histogram import BINS, Histogram
from calib.activations.observer import TapResult
from calib.activations.statistics import Moments, Statistics

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Largest count in the 32-bit counters before they are read and reset.
MOST_COUNTS = 1 << 31


@dataclass
class _Tap:
    name: str
    dtype: mx.Dtype
    launch: int
    place: int


class CudaObserver:
    """Observer of forward passes whose taps always come in the same order and with the same channels."""

    def __init__(self, histogram_stride: int):
        self._stride = histogram_stride
        self._group: list[tuple[str, mx.array, TapShape]] = []
        self._untied: list[mx.array] = []
        self._done: list[mx.array] = []
        self._taps: list[_Tap] = []
        self._launches: list[Launch] = []
        self._sums: list[mx.array] = []
        self._picked: list[mx.array] = []
        self._ranges: list[tuple[list[int], mx.array]] = []
        self._counters: list[mx.array] = []
        self._host_counts: list[NDArray[Any]] = []
        self._counted = 0
        self._moments: mx.array | None = None
        self._extremes: mx.array | None = None
        self._values: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._phase = mx.array([0], dtype=mx.uint32)
        self._fetched: tuple[NDArray[np.float64], NDArray[np.float32], list[tuple[list[int], NDArray[Any]]]] | None = (
            None
        )
        self.sound = True

    def begin(self, phase: int) -> None:
        self._phase = mx.array([phase], dtype=mx.uint32)
        self._taps, self._launches, self._sums, self._picked, self._done = [], [], [], [], []

    def see(self, name: str, x: mx.array, before: int = 0, whole: int | None = None) -> None:
        assert (before, whole or len(x)) == (0, len(x)), "on a GPU a batch has one part"
        if x.ndim > 3 and x.shape[2:-1] != (1,):
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self._group and self._group[0][1].dtype != x.dtype:
            self._flush()
        self._group.append((name, x, (x.shape[0], x.shape[1] if x.ndim > 2 else 1, x.shape[-1])))
        if len(self._group) == TAPS:
            self._flush()

    def tie(self, x: mx.array) -> mx.array:
        if not self._untied:
            return x
        tied: mx.array = mx.depends([x], self._untied)[0]
        self._untied = []
        return tied

    def _flush(self) -> None:
        """Launch the kernels over the collected activations."""
        if not self._group:
            return
        arrays = [x for _, x, _ in self._group]
        axes = tuple((1 if x.ndim > 2 else 0, x.ndim - 1) for x in arrays)
        launch = plan_launch(tuple(shape for *_, shape in self._group), axes, self._stride)
        inputs = arrays + [arrays[0]] * (TAPS - len(arrays))
        template = [("T", arrays[0].dtype), ("TAPS", TAPS), ("FIELDS", len(kernels.FIELDS))]
        sums, picked = observe_kernel()(
            inputs=[*inputs, launch.plan],
            template=template,
            grid=(launch.blocks * kernels.OBSERVE_THREADS, 1, 1),
            threadgroup=(kernels.OBSERVE_THREADS, 1, 1),
            output_shapes=[(launch.sums,), (launch.picked,)],
            output_dtypes=[mx.float32, mx.uint16],
        )
        number = len(self._launches)
        if number == len(self._counters):
            # Not evaluated here, as evaluation would wait for everything that is being computed.
            self._counters.append(mx.zeros((TAPS, BINS), dtype=mx.uint32))
        (counted,) = count_kernel()(
            inputs=[*inputs, launch.plan, self._phase, self._counters[number]],
            template=template,
            grid=(2 * launch.count_blocks * kernels.COUNT_THREADS, 1, 1),
            threadgroup=(kernels.COUNT_THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.uint32],
        )
        self._taps += [_Tap(name, x.dtype, number, i) for i, (name, x, _) in enumerate(self._group)]
        self._launches.append(launch)
        self._sums.append(sums)
        self._picked.append(picked)
        self._untied += [sums, picked, counted]
        self._done.append(counted)
        self._group = []

    def end_forward(self) -> list[list[mx.array]]:
        self._flush()
        self._untied = []
        shapes = [shape for launch in self._launches for shape in launch.shapes]
        tables = merge_tables(tuple(self._launches), tuple(tap.dtype for tap in self._taps))
        self._merge(shapes, tables[0])
        rows = [rows for rows, _, _ in shapes]
        (ranges,) = ranges_kernel(len(self._launches))(
            inputs=[*self._picked, *self._sums, tables[1]],
            template=[("TAPS", len(shapes))],
            grid=(sum(rows) * kernels.RANGES_THREADS, 1, 1),
            threadgroup=(kernels.RANGES_THREADS, 1, 1),
            output_shapes=[(sum(rows), 4)],
            output_dtypes=[mx.float32],
        )
        self._ranges.append((rows, ranges))
        assert self._moments is not None and self._extremes is not None
        self._counted += max(rows * tokens * channels for rows, tokens, channels in shapes)
        # Counts too: those tied to an activation that nothing uses would never be computed.
        return [[self._moments, self._extremes, ranges, *self._done]]

    def settle(self) -> None:
        if self._counted > MOST_COUNTS:
            mx.eval(self._moments)
            self._empty_counters()

    def _merge(self, shapes: list[TapShape], table: mx.array) -> None:
        """Add the sums of the forward pass to those of earlier ones, on the device."""
        channels = sum(shape[2] for shape in shapes)
        if self._moments is None or self._extremes is None:
            self._moments = mx.zeros((4, channels), dtype=mx.uint64)
            self._extremes = mx.stack([mx.full((channels,), mx.inf), mx.full((channels,), -mx.inf)])
            self._values = np.zeros(len(shapes), np.uint64)
        self._moments, self._extremes = merge_kernel(len(self._launches))(
            inputs=[*self._sums, table, self._moments, self._extremes],
            template=[("TAPS", len(shapes)), ("CHANNELS", channels)],
            grid=(ceil_div(channels, 256) * 256, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[(4, channels), (2, channels)],
            output_dtypes=[mx.uint64, mx.float32],
        )
        self._values += np.array([rows * tokens for rows, tokens, _ in shapes], np.uint64)

    def _empty_counters(self) -> None:
        new = [np.array(counters) for counters in self._counters]
        old = self._host_counts
        self._host_counts = [a.astype(np.uint64) + b for a, b in zip(old, new, strict=True)] if old else new
        self._counters = []
        self._counted = 0

    def fetch(self) -> None:
        assert self._moments is not None and self._extremes is not None
        mx.eval(self._moments, [ranges for _, ranges in self._ranges])  # completes the counters as well
        self._empty_counters()
        ranges = [(rows, np.array(ranges)) for rows, ranges in self._ranges]
        moments = np.array(self._moments).view(np.float64)
        self.sound = bool(np.isfinite(moments).all())
        self._fetched = moments, np.array(self._extremes), ranges
        # Freed here, as MLX may be recording launches, which other threads must not disturb.
        self._moments = self._extremes = None
        self._ranges, self._sums, self._picked, self._done, self._untied = [], [], [], [], []

    def results(self) -> dict[str, TapResult]:
        if self._fetched is None:
            self.fetch()
        assert self._fetched is not None
        moments, extremes, rows_of_forwards = self._fetched
        # One array per forward pass, with the rows of one tap after the other.
        forwards = [np.split(ranges, np.cumsum(rows)[:-1]) for rows, ranges in rows_of_forwards]
        found, first = {}, 0
        for number, tap in enumerate(self._taps):
            field = self._launches[tap.launch].fields[tap.place]
            part = slice(first, first + field["channels"])
            first = part.stop
            dtype = DTYPES[tap.dtype]
            statistics = Statistics(
                extremes[0, part],
                extremes[1, part],
                np.full(field["channels"], self._values[number]),
                Moments(moments[:, part]),
                Histogram.from_counts(self._host_counts[tap.launch][tap.place], dtype),
            )
            ranges = np.concatenate([forward[number] for forward in forwards])
            found[tap.name] = TapResult(dtype, statistics, ranges.astype(np.float64))
        return found
