"""Parts of a batch that are computed side by side on a CPU.

On a CPU only MLX's matrix products use more than one processor. As rows are independent, parts of them run at once,
each on its own stream with its share of BLAS threads: half the time for the emoji model on two processors.

Matrix products of fewer rows differ in the last bits. So whoever promises equal bytes records the number of parts and
passes it: a dataset keeps the number that it was begun with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

from calib.base import blas
from calib.base.device import cores, on_gpu

import mlx.core as mx

_streams: list[mx.Stream] = []


def parts_for(rows: int) -> int:
    """Number of parts that ``rows`` rows are best computed in: 1 on a GPU, on a CPU as many as there are processors."""
    return 1 if on_gpu() else min(cores(), rows)


def parts_of(rows: int, parts: int | None = None) -> list[slice]:
    """Parts of a batch's rows that run side by side: ``parts`` of them, or :func:`parts_for`; one on a GPU."""
    count = parts_for(rows) if parts is None or on_gpu() else min(parts, rows)
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]


def streams_of(parts: int) -> list[mx.Stream]:
    """A stream for each of ``parts`` parts of a batch; the device's default stream for a single part."""
    if parts == 1:
        return [mx.default_stream(mx.default_device())]
    _streams.extend(mx.new_stream(mx.cpu) for _ in range(parts - len(_streams)))
    return _streams[:parts]


def compute_in_turn(passes: Sequence[Sequence[mx.array]]) -> None:
    """Evaluate arrays of passes that run side by side, each pass's in the order in which they are best computed.

    MLX computes what one call names on one stream after the other, as far as it can: so a call for each place in turn.
    """
    if len(passes) > 1:
        for arrays in zip(*passes, strict=True):
            mx.async_eval(arrays)
    mx.eval(passes)


@cache
def _reader() -> mx.Stream:
    return mx.new_stream(mx.cpu)


@contextmanager
def reading() -> Iterator[None]:
    """Have arrays of files that are opened in the context read beside what is computed, on a stream of their own."""
    with mx.stream(_reader()):
        yield


@contextmanager
def shared_cores(rows: int, parts: int | None = None) -> Iterator[None]:
    """Limit BLAS threads in the context to a part's share of the processors, for the :func:`parts_of` a batch."""
    with blas.threads(max(1, cores() // len(parts_of(rows, parts)))):
        yield


def by_parts(
    rows: int, compute: Callable[[slice], mx.array], lazily: bool = False, parts: int | None = None
) -> mx.array:
    """Concatenate ``compute`` over the :func:`parts_of` all rows, side by side; they are started unless ``lazily``.

    In a :func:`shared_cores` context each part has its share of the processors.
    """
    chosen = parts_of(rows, parts)
    outputs = []
    for part, stream in zip(chosen, streams_of(len(chosen)), strict=True):
        with mx.stream(stream):
            outputs.append(compute(part))
    if not lazily:
        # All at once, as MLX hands out the work of one call in turn; the concatenation, on one stream, would evaluate
        # one after the other.
        mx.async_eval(outputs)
    return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]
