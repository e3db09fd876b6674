"""Summaries of activations on NVIDIA GPUs: each activation is read once, a few taps a launch, nothing is copied.

A forward's kernels are short and many, and a launch costs the host some 70 µs: so taps are observed sixteen at a time.
:mod:`calib.activations.observer_mlx` says what is gathered; here moments and extremes of all channels stay on the
device, in one array over all taps, until the results are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from calib.activations import cuda_kernels as kernels
from calib.activations.bits import DTYPES
from calib.activations.histogram import BINS, Histogram
from calib.activations.observer import Seen
from calib.activations.observer_mlx import pick_stride
from calib.activations.statistics import Moments, Statistics

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Taps of one launch.
TAPS = 16
#: A warp sums up so many tokens at most: a longer float32 sum loses digits, a shorter one leaves more to merge.
MOST_TOKENS = 256
#: Counters of 32 bits are emptied before they could overflow.
MOST_COUNTS = 1 << 31

_Kernel = Callable[..., list[mx.array]]
_Shape = tuple[int, int, int]


@cache
def _observe_kernel() -> _Kernel:
    return _activation_kernel("calib_observe", kernels.OBSERVE, ["plan"], ["sums", "picked"], 0)


@cache
def _count_kernel() -> _Kernel:
    inputs = ["plan", "phase", "counters"]
    return _activation_kernel("calib_count", kernels.COUNT, inputs, ["done"], kernels.COUNT_SHARED)


def _activation_kernel(name: str, body: str, inputs: list[str], outputs: list[str], shared: int) -> _Kernel:
    source = body.format(cases="".join(kernels.CASE.format(i=i) for i in range(TAPS)))
    found = mx.fast.cuda_kernel(
        name=name,
        input_names=[*(f"x{i}" for i in range(TAPS)), *inputs],
        output_names=outputs,
        source=source,
        header=kernels.HEADER,
        ensure_row_contiguous=False,
        shared_memory=shared,
    )
    return cast(_Kernel, found)


@cache
def _merge_kernel(launches: int) -> _Kernel:
    outputs = ["new_moments", "new_ends"]
    return _joint_kernel("calib_merge", launches, ["sums"], ["taps", "moments", "ends"], outputs)


@cache
def _ranges_kernel(launches: int) -> _Kernel:
    return _joint_kernel("calib_ranges", launches, ["picked", "sums"], ["taps"], ["ranges"])


def _joint_kernel(name: str, launches: int, each: list[str], inputs: list[str], outputs: list[str]) -> _Kernel:
    """A kernel over what all ``launches`` gave."""
    body, case = {
        "calib_merge": (kernels.MERGE, kernels.MERGE_CASE),
        "calib_ranges": (kernels.RANGES, kernels.RANGES_CASE),
    }[name]
    found = mx.fast.cuda_kernel(
        name=f"{name}_{launches}",
        input_names=[*(f"{part}{i}" for part in each for i in range(launches)), *inputs],
        output_names=outputs,
        source=body.format(cases="".join(case.format(i=i) for i in range(launches))),
    )
    return cast(_Kernel, found)


@dataclass(frozen=True, eq=False)
class _Launch:
    """How activations of given shapes share a launch; ``plan`` is (TAPS · fields + 1,) int32, see ``FIELDS``."""

    shapes: tuple[_Shape, ...]
    plan: mx.array
    fields: list[dict[str, int]]
    blocks: int
    count_blocks: int
    sums: int
    picked: int


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@cache
def _launch(shapes: tuple[_Shape, ...], axes: tuple[tuple[int, int], ...], stride: int) -> _Launch:
    """``axes`` are those of tokens and channels of each activation."""
    warp = count_block = sums = picked = 0
    fields = []
    for place, ((rows, tokens, channels), (token_axis, channel_axis)) in enumerate(zip(shapes, axes, strict=True)):
        columns, splits = _ceil(channels, kernels.COLUMN), _ceil(tokens, MOST_TOKENS)
        # A tap without tokens is counted whole; few values a block, as its counters have 16 bits.
        counted = 1 if tokens == 1 else stride
        count_rows = max(1, kernels.MOST_COUNTED // channels)
        pick = pick_stride(tokens * channels, channels)
        picks = _ceil(tokens * channels, pick)
        values = [warp, columns, tokens, channels, splits, _ceil(tokens, splits), sums, token_axis, channel_axis]
        values += [picked, pick, picks, rows, count_block, count_rows, counted, place]
        fields.append(dict(zip(kernels.FIELDS, values, strict=True)))
        warp += rows * splits * columns
        count_block += _ceil(_ceil(rows * tokens, counted), count_rows)
        sums += rows * splits * 5 * channels
        picked += rows * picks
    unused = dict.fromkeys(kernels.FIELDS, 0) | {"warp": 2**31 - 1, "count_block": 2**31 - 1}
    table = [value for f in [*fields, *[unused] * (TAPS - len(fields))] for value in f.values()]
    plan = mx.array(np.array([*table, warp], np.int32))
    mx.eval(plan)
    return _Launch(shapes, plan, fields, _ceil(warp, kernels.WARPS), count_block, sums, picked)


@dataclass
class _Tap:
    name: str
    dtype: mx.Dtype
    launch: int
    place: int


class CudaObserver:
    """Gathers statistics of forwards whose taps come in the same order and with the same channels every time."""

    def __init__(self, histogram_stride: int):
        self._stride = histogram_stride
        self._group: list[tuple[str, mx.array, _Shape]] = []
        self._untied: list[mx.array] = []
        self._done: list[mx.array] = []
        self._taps: list[_Tap] = []
        self._launches: list[_Launch] = []
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
        """Launch the kernels over the activations at hand."""
        if not self._group:
            return
        arrays = [x for _, x, _ in self._group]
        axes = tuple((1 if x.ndim > 2 else 0, x.ndim - 1) for x in arrays)
        launch = _launch(tuple(shape for *_, shape in self._group), axes, self._stride)
        inputs = arrays + [arrays[0]] * (TAPS - len(arrays))
        template = [("T", arrays[0].dtype), ("TAPS", TAPS), ("FIELDS", len(kernels.FIELDS))]
        sums, picked = _observe_kernel()(
            inputs=[*inputs, launch.plan],
            template=template,
            grid=(launch.blocks * kernels.OBSERVE_THREADS, 1, 1),
            threadgroup=(kernels.OBSERVE_THREADS, 1, 1),
            output_shapes=[(launch.sums,), (launch.picked,)],
            output_dtypes=[mx.float32, mx.uint16],
        )
        number = len(self._launches)
        if number == len(self._counters):
            # Not evaluated here, where that would wait for all that is being computed.
            self._counters.append(mx.zeros((TAPS, BINS), dtype=mx.uint32))
        (counted,) = _count_kernel()(
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
        tables = _tables(tuple(self._launches), tuple(tap.dtype for tap in self._taps))
        self._merge(shapes, tables[0])
        rows = [rows for rows, _, _ in shapes]
        (ranges,) = _ranges_kernel(len(self._launches))(
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
        # Counts too: what was tied to an activation that nothing uses would never be counted.
        return [[self._moments, self._extremes, ranges, *self._done]]

    def settle(self) -> None:
        if self._counted > MOST_COUNTS:
            mx.eval(self._moments)
            self._empty_counters()

    def _merge(self, shapes: list[_Shape], table: mx.array) -> None:
        """Add the forward's sums to those of the ones before, on the device."""
        channels = sum(shape[2] for shape in shapes)
        if self._moments is None or self._extremes is None:
            self._moments = mx.zeros((4, channels), dtype=mx.uint64)
            self._extremes = mx.stack([mx.full((channels,), mx.inf), mx.full((channels,), -mx.inf)])
            self._values = np.zeros(len(shapes), np.uint64)
        self._moments, self._extremes = _merge_kernel(len(self._launches))(
            inputs=[*self._sums, table, self._moments, self._extremes],
            template=[("TAPS", len(shapes)), ("CHANNELS", channels)],
            grid=(_ceil(channels, 256) * 256, 1, 1),
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
        mx.eval(self._moments, [ranges for _, ranges in self._ranges])  # then the counters hold all
        self._empty_counters()
        ranges = [(rows, np.array(ranges)) for rows, ranges in self._ranges]
        self._fetched = np.array(self._moments).view(np.float64), np.array(self._extremes), ranges

    def results(self) -> dict[str, Seen]:
        if self._fetched is None:
            self.fetch()
        assert self._fetched is not None
        moments, extremes, rows_of_forwards = self._fetched
        self.sound = bool(np.isfinite(moments).all())
        # Of each forward one array, the rows of one tap after the other.
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
            found[tap.name] = Seen(dtype, statistics, ranges.astype(np.float64))
        return found


@cache
def _tables(launches: tuple[_Launch, ...], dtypes: tuple[mx.Dtype, ...]) -> tuple[mx.array, mx.array]:
    """What the merging and the ranges kernel must know of each tap; see :mod:`calib.activations.cuda_kernels`."""
    merging, ranging = [], []
    channel = row = 0
    kinds = {mx.bfloat16: 0, mx.float16: 1, mx.float32: 2}
    fields = [(number, field) for number, launch in enumerate(launches) for field in launch.fields]
    for (number, field), dtype in zip(fields, dtypes, strict=True):
        rows, splits, channels, sums = field["rows"], field["splits"], field["channels"], field["sums"]
        merging.append((channel, number, sums, rows * splits, field["tokens"], field["per_split"]))
        ranging.append((row, number, field["picked"], field["picks"], sums, splits, channels, kinds[dtype]))
        channel += channels
        row += rows
    tables = mx.array(np.array(merging, np.int32)), mx.array(np.array(ranging, np.int32))
    mx.eval(tables)
    return tables
