"""Statistics of one step over some images, and their form in the cache: flat arrays over all taps."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calib.activations.format import HALVES
from calib.activations.histogram import Histogram
from calib.activations.observer import TapResult
from calib.activations.statistics import Moments, Statistics

import numpy as np
from numpy.typing import NDArray


@dataclass
class StepRecord:
    """Statistics of one step.

    Attributes:
        images: image ids, in the order of every tap's ``ranges``, which have one row for each.
        seen: statistics by tap; streams of blocks and halves of the guidance batch have their own entries.
        finite_output: False where the transformer's output held NaN or infinity.
        samples: table of the kept rows in the file of samples, see :mod:`calib.activations.samples`.
    """

    step: int
    images: list[int]
    seen: dict[str, TapResult] = field(default_factory=dict)
    finite_output: bool = True
    samples: dict[str, Any] = field(default_factory=dict)

    def merge(self, other: "StepRecord") -> "StepRecord":
        """Merge with the record of other images, which come after these; tables of samples are merged separately."""
        seen = {name: own.merge(other.seen[name]) for name, own in self.seen.items()}
        return StepRecord(self.step, [*self.images, *other.images], seen, self.finite_output and other.finite_output)


def merge_halves(seen: Mapping[str, TapResult]) -> dict[str, TapResult]:
    """``seen`` with an entry under a tap's own name that merges its guidance halves, where they are separate."""
    merged: dict[str, TapResult] = {}
    for name, own in seen.items():
        tap, _, half = name.partition("/")
        if half == HALVES[0]:
            other = seen[f"{tap}/{HALVES[1]}"]
            ranges = over_rows(np.stack([own.ranges, other.ranges]))
            merged[tap] = TapResult(own.dtype, own.statistics.merge(other.statistics), ranges)
        merged[name] = own
    return merged


def over_rows(ranges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Merge ``ranges`` (rows, images, 4) over the rows of each image: extremes, and means of the percentiles."""
    low, high = ranges[..., 0].min(axis=0), ranges[..., 1].max(axis=0)
    return np.stack([low, high, ranges[..., 2].mean(axis=0), ranges[..., 3].mean(axis=0)], axis=-1)


def pack(record: StepRecord) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Convert a record to a JSON-able header and flat arrays."""
    taps = [
        {
            "name": name,
            "dtype": seen.dtype,
            "channels": seen.statistics.channels,
            "bins": len(seen.statistics.histogram.keys),
            "nan": seen.statistics.nan,
            "inf": seen.statistics.inf,
        }
        for name, seen in record.seen.items()
    ]
    all_statistics = [seen.statistics for seen in record.seen.values()]
    arrays = {
        "minimum": np.concatenate([s.minimum for s in all_statistics]),
        "maximum": np.concatenate([s.maximum for s in all_statistics]),
        "count": np.concatenate([s.count for s in all_statistics]),
        "moments": np.concatenate([s.moments.sums for s in all_statistics], axis=1),
        "keys": np.concatenate([s.histogram.keys for s in all_statistics]),
        "counts": np.concatenate([s.histogram.counts for s in all_statistics]),
        "ranges": np.stack([seen.ranges for seen in record.seen.values()]),
    }
    header = {
        "step": record.step,
        "images": record.images,
        "finite_output": record.finite_output,
        "samples": record.samples,
        "taps": taps,
    }
    return header, arrays


def unpack(
    header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], names: Collection[str] | None = None
) -> StepRecord:
    """The inverse of :func:`pack`, for all taps; or for those in ``names``, which keep no others' arrays alive."""
    whole = names is None or len(names) >= len(header["taps"])

    def own(part: NDArray[Any]) -> NDArray[Any]:
        return part if whole else part.copy()

    record = StepRecord(header["step"], list(header["images"]), {}, header["finite_output"], header["samples"])
    for number, (tap, channels, bins) in enumerate(_slices(header["taps"])):
        if names is not None and tap["name"] not in names:
            continue
        histogram = Histogram(tap["dtype"], own(arrays["keys"][bins]), own(arrays["counts"][bins]))
        statistics = Statistics(
            own(arrays["minimum"][channels]),
            own(arrays["maximum"][channels]),
            own(arrays["count"][channels]),
            Moments(own(arrays["moments"][:, channels])),
            histogram,
            tap["nan"],
            tap["inf"],
        )
        record.seen[tap["name"]] = TapResult(tap["dtype"], statistics, own(arrays["ranges"][number]))
    return record


def _slices(taps: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], slice, slice]]:
    """Yield each tap with its channels and its histogram bins in the flat arrays."""
    channel = bin_ = 0
    for tap in taps:
        yield tap, slice(channel, channel + tap["channels"]), slice(bin_, bin_ + tap["bins"])
        channel, bin_ = channel + tap["channels"], bin_ + tap["bins"]
