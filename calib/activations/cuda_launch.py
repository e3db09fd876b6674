"""Launches of the CUDA kernels of :mod:`calib.activations.cuda_kernels`: compiled kernels, and the tables they read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

from calib.activations import cuda_kernels as kernels
from calib.activations.observer_mlx import pick_stride

import mlx.core as mx
import numpy as np

#: Number of taps per launch.
TAPS = 16
#: Largest number of tokens that a warp sums: longer float32 sums lose digits, shorter ones leave more to merge.
MOST_TOKENS = 256

Kernel = Callable[..., list[mx.array]]
TapShape = tuple[int, int, int]


@cache
def observe_kernel() -> Kernel:
    """The kernel that sums and picks values of a launch's activations."""
    return _activation_kernel("calib_observe", kernels.OBSERVE, ["plan"], ["sums", "picked"], 0)


@cache
def count_kernel() -> Kernel:
    """The kernel that counts bit patterns of a launch's activations."""
    inputs = ["plan", "phase", "counters"]
    return _activation_kernel("calib_count", kernels.COUNT, inputs, ["done"], kernels.COUNT_SHARED)


def _activation_kernel(name: str, body: str, inputs: list[str], outputs: list[str], shared: int) -> Kernel:
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
    return cast(Kernel, found)


@cache
def merge_kernel(launches: int) -> Kernel:
    """The kernel that adds the sums of ``launches`` launches to the moments and extremes so far."""
    outputs = ["new_moments", "new_ends"]
    return _joint_kernel("calib_merge", launches, ["sums"], ["taps", "moments", "ends"], outputs)


@cache
def ranges_kernel(launches: int) -> Kernel:
    """The kernel that computes the ranges of every row from the outputs of ``launches`` launches."""
    return _joint_kernel("calib_ranges", launches, ["picked", "sums"], ["taps"], ["ranges"])


def _joint_kernel(name: str, launches: int, each: list[str], inputs: list[str], outputs: list[str]) -> Kernel:
    """A kernel over the outputs of ``launches`` launches."""
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
    return cast(Kernel, found)


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch over activations of given shapes.

    Attributes:
        shapes: (rows, tokens, channels) of each activation.
        plan: (TAPS · fields + 1,) int32, the ``FIELDS`` of each tap and the number of warps.
        fields: the same by name.
        blocks, count_blocks: number of blocks of the two kernels.
        sums, picked: sizes of the outputs.
    """

    shapes: tuple[TapShape, ...]
    plan: mx.array
    fields: list[dict[str, int]]
    blocks: int
    count_blocks: int
    sums: int
    picked: int


def ceil_div(a: int, b: int) -> int:
    """The quotient a / b, rounded up."""
    return -(-a // b)


@cache
def plan_launch(shapes: tuple[TapShape, ...], axes: tuple[tuple[int, int], ...], stride: int) -> Launch:
    """Lay out a launch; ``axes`` are the axes of tokens and channels of each activation."""
    warp = count_block = sums = picked = 0
    fields = []
    for place, ((rows, tokens, channels), (token_axis, channel_axis)) in enumerate(zip(shapes, axes, strict=True)):
        columns, splits = ceil_div(channels, kernels.COLUMN), ceil_div(tokens, MOST_TOKENS)
        # A tap without tokens is counted completely; few values per block, as its counters have 16 bits.
        counted = 1 if tokens == 1 else stride
        count_rows = max(1, kernels.MOST_COUNTED // channels)
        pick = pick_stride(tokens * channels, channels)
        picks = ceil_div(tokens * channels, pick)
        values = [warp, columns, tokens, channels, splits, ceil_div(tokens, splits), sums, token_axis, channel_axis]
        values += [picked, pick, picks, rows, count_block, count_rows, counted, place]
        fields.append(dict(zip(kernels.FIELDS, values, strict=True)))
        warp += rows * splits * columns
        count_block += ceil_div(ceil_div(rows * tokens, counted), count_rows)
        sums += rows * splits * 5 * channels
        picked += rows * picks
    unused = dict.fromkeys(kernels.FIELDS, 0) | {"warp": 2**31 - 1, "count_block": 2**31 - 1}
    table = [value for f in [*fields, *[unused] * (TAPS - len(fields))] for value in f.values()]
    plan = mx.array(np.array([*table, warp], np.int32))
    mx.eval(plan)
    return Launch(shapes, plan, fields, ceil_div(warp, kernels.WARPS), count_block, sums, picked)


@cache
def merge_tables(launches: tuple[Launch, ...], dtypes: tuple[mx.Dtype, ...]) -> tuple[mx.array, mx.array]:
    """The ``taps`` tables of the merging and the ranges kernel; see :mod:`calib.activations.cuda_kernels`."""
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
