"""What writing and reading ``activations.h5`` have in common; docs/FORMAT.md is its specification."""

from collections.abc import Mapping
from dataclasses import dataclass

FORMAT, FORMAT_VERSION = "calib-activations", 2
READABLE = (1, FORMAT_VERSION)

#: Statistics of one half of the guidance batch, kept beside those of both under ``<tap>/conditional``.
HALVES = ("conditional", "unconditional")
#: How the histogram of a type is keyed.
ENCODINGS = {"float32": "ordered-bfloat16-midpoint", "float16": "ordered-float16", "bfloat16": "ordered-bfloat16"}

RANGE_STATISTICS = ("min", "max", "p01", "p99")
MOMENTS = ("sum", "sum_remainder", "sum_of_squares", "sum_of_squares_remainder")
#: What lies along which dimension scales, in a group of a layer and at the root.
AXES = {
    "sigma": ("step_index",),
    "timestep": ("step_index",),
    "evaluated_by_sampler": ("step_index",),
    "image_block": ("image_id",),
    "channel_min": ("step_index", "channel"),
    "channel_max": ("step_index", "channel"),
    "channel_mean": ("step_index", "channel"),
    "channel_std": ("step_index", "channel"),
    "channel_count": ("step_index", "channel"),
    "channel_sums": ("step_index", "moment", "channel"),
    "histogram_counts": ("histogram_keys",),
    "nan_count": ("step_index",),
    "inf_count": ("step_index",),
    "image_ranges": ("step_index", "image_id", "range_statistic"),
    "weight_sqnr": ("weight_bits",),
    "samples": ("step_index", "sample", "channel"),
    "sample_image": ("sample",),
    "sample_half": ("sample",),
    "sample_token": ("step_index", "sample"),
}


@dataclass(frozen=True)
class Block:
    """Images replayed side by side; ``number`` counts the blocks of the whole subset."""

    number: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class Levels:
    """A trajectory's number of steps, and sigma and timestep by step index, where no manifest is at hand."""

    num_steps: int
    sigmas: Mapping[int, float]
    timesteps: Mapping[int, float]
