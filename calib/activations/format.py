"""Definitions that writing and reading ``activations.h5`` share; docs/FORMAT.md is its specification."""

from collections.abc import Mapping
from dataclasses import dataclass

FORMAT, FORMAT_VERSION = "calib-activations", 2
READABLE = (1, FORMAT_VERSION)

#: Names of the halves of the guidance batch, whose own statistics are stored under ``<tap>/<half>``.
HALVES = ("conditional", "unconditional")
#: Encoding of histogram keys by type of the activations.
ENCODINGS = {"float32": "ordered-bfloat16-midpoint", "float16": "ordered-float16", "bfloat16": "ordered-bfloat16"}

RANGE_STATISTICS = ("min", "max", "p01", "p99")
MOMENTS = ("sum", "sum_remainder", "sum_of_squares", "sum_of_squares_remainder")
#: Dimension scales of each dataset, in the group of a layer and at the root.
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
    """Images replayed in one batch; ``number`` is the index among the blocks of the whole subset."""

    number: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class Levels:
    """A trajectory's number of steps, and sigma and timestep by step index, where there is no manifest."""

    num_steps: int
    sigmas: Mapping[int, float]
    timesteps: Mapping[int, float]
