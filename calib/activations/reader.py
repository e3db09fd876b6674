"""Read ``activations.h5``, of this and earlier versions; docs/FORMAT.md is its specification."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from calib.activations.format import FORMAT, HALVES, READABLE, Block, Levels
from calib.activations.histogram import Histogram
from calib.activations.statistics import Moments, Statistics, merge_all
from calib.base import hdf5
from calib.base.errors import CalibError, check_format, reason_of, suggest
from calib.base.layout import ACTIVATIONS
from calib.base.locks import refuse_unsettled, settled
from calib.dataset.arrays import check_dataset, contents, most_bytes
from calib.dataset.manifest import MOST_STEPS
from calib.models.former import former_order

import h5py
import numpy as np
from numpy.typing import NDArray

#: Tokens of a layer at most: a picture of 8192 × 8192 pixels has a quarter of them.
MOST_TOKENS = 1 << 20
_PER_STEP = (
    *("channel_min", "channel_max", "channel_count", "nan_count", "inf_count"),
    *("histogram_keys", "histogram_counts", "histogram_offsets"),
)


def _address(group: h5py.Group) -> int:
    return int(h5py.h5o.get_info(group["channel_min"].id).addr)


def statistics_by_step(steps: Sequence[int], data: Mapping[str, NDArray[Any]], dtype: str) -> dict[int, Statistics]:
    """Statistics of a layer by collected step, from its datasets.

    Moments are in full precision where there are ``channel_sums``, else from mean and standard deviation.
    """
    found = {}
    for row, step in enumerate(steps):
        part = slice(data["histogram_offsets"][row], data["histogram_offsets"][row + 1])
        count = data["channel_count"][row]
        if "channel_sums" in data:
            moments = Moments(data["channel_sums"][row])
        else:
            mean, std = (data[name][row].astype(np.float64) for name in ("channel_mean", "channel_std"))
            moments = Moments.of(count, mean, std)
        found[step] = Statistics(
            minimum=data["channel_min"][row],
            maximum=data["channel_max"][row],
            count=count,
            moments=moments,
            histogram=Histogram(dtype, data["histogram_keys"][part], data["histogram_counts"][part]),
            nan=int(data["nan_count"][row]),
            inf=int(data["inf_count"][row]),
        )
    return found


class ActivationFile:
    """Statistics of a run's activations; use as a context, in which others do not open the file for writing.

    >>> with ActivationFile(run / "activations.h5") as file:  # doctest: +SKIP
    ...     file.percentiles("mm_block_0.image.mlp.fc2", [1, 99], steps=[0, 5, 10])

    Attributes:
        attributes: attributes of the file's root.
        steps: collected step indices, ascending.
        layers: names of layers, blocks and their streams, in network order.
        order: the position of each in the network.
        images: ids of the collected images; empty in files of version 1.
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise CalibError(f"{path}: no such file; calib collect writes it")
        self.path = path
        self._stack = ExitStack()
        try:
            with self._reading():
                self._most = most_bytes(path)
                raw = self._stack.enter_context(settled(path))
                self._file = self._stack.enter_context(hdf5.opened(raw))
                self.attributes: dict[str, Any] = dict(self._file.attrs)
                check_format(self.path, self.attributes, FORMAT, READABLE, "update calib, or collect again")
                self.steps: list[int] = self._all(self._file["step_index"]).tolist()
                self.images: list[int] = self._all(self._file["image_id"]).tolist() if "image_id" in self._file else []
                self._groups: dict[str, h5py.Group] = dict(self._file["layers"].items())
                self.order: dict[str, int] = self._order()
                self.layers: list[str] = list(self.order)
                self._first_with: dict[int, str] = {}
                for name in self.layers:
                    self._first_with.setdefault(_address(self._groups[name]), name)
        except CalibError:
            self._stack.close()
            raise

    def _order(self) -> dict[str, int]:
        """Positions of the layers; files of calib 0.1.0, which were all of MMDiTs, do not record them."""
        places = {name: group.attrs.get("order") for name, group in self._groups.items()}
        if None in places.values():
            return {name: place for place, name in enumerate(former_order(places))}
        return {name: int(places[name]) for name in sorted(places, key=lambda name: (places[name], len(name), name))}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn h5py's errors for a damaged file into a CalibError that names the file."""
        try:
            yield
        except (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            refuse_unsettled(self.path, error)
            what = f"damaged or not an {ACTIVATIONS} ({reason_of(error)})"
            raise CalibError(f"{self.path}: {what}; run calib collect again") from None

    def _all(self, dataset: h5py.Dataset) -> NDArray[Any]:
        return contents(dataset, self._most)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def evaluated_steps(self) -> list[int]:
        """Collected steps that the sampler evaluates the model at: all but the finished latent."""
        with self._reading():
            flags = self._all(self._file["evaluated_by_sampler"])
        return [step for step, flag in zip(self.steps, flags, strict=True) if flag]

    def levels(self) -> Levels:
        """Number of steps of the trajectories, and sigma and timestep of the collected steps."""
        with self._reading():
            sigmas, timesteps = (self._all(self._file[name]).tolist() for name in ("sigma", "timestep"))
            num_steps = int(self.attributes["num_steps"])
            if not 0 < num_steps <= MOST_STEPS:
                raise ValueError(f"num_steps={num_steps}")
        by_step = [dict(zip(self.steps, values, strict=True)) for values in (sigmas, timesteps)]
        return Levels(num_steps, by_step[0], by_step[1])

    def kind(self, layer: str) -> str:
        """Kind of the layer's input: modulated, post-gelu, …; 'block' for a block's output."""
        with self._reading():
            return str(self._group(layer).attrs["kind"])

    def halves(self, layer: str) -> list[str]:
        """Names of the layer's guidance halves for the other methods; empty where they were pooled."""
        with self._reading():
            self._group(layer)
            return [f"{layer}/{half}" for half in HALVES if f"{half}/{layer}" in self._file]

    def weight_sqnr(self, layer: str) -> dict[int, float]:
        """SQNR of the layer's weights by bit-width, dB; empty where they cannot be quantized."""
        with self._reading():
            group = self._group(layer)
            if "weight_sqnr" not in group:
                return {}
            bits, values = self._all(self._file["weight_bits"]).tolist(), self._all(group["weight_sqnr"]).tolist()
        return dict(zip(bits, values, strict=True))

    def by_step(self, layer: str) -> dict[int, Statistics]:
        """Statistics of one layer by collected step; every dataset is read once."""
        with self._reading():
            group = self._group(layer)
            moments = ("channel_sums",) if "channel_sums" in group else ("channel_mean", "channel_std")
            data = {name: self._all(group[name]) for name in (*_PER_STEP, *moments)}
            return statistics_by_step(self.steps, data, str(group.attrs["dtype"]))

    def count(self, layer: str) -> int:
        """Return the number of finite values that were seen of a layer, at all collected steps."""
        with self._reading():
            return int(self._all(self._group(layer)["channel_count"]).sum())

    def extremes(self, layer: str) -> NDArray[np.float64]:
        """Return the smallest and the largest value of a layer at each collected step, (steps, 2)."""
        with self._reading():
            group = self._group(layer)
            low, high = self._all(group["channel_min"]).min(axis=1), self._all(group["channel_max"]).max(axis=1)
        return np.stack([low, high], axis=1).astype(np.float64)

    def statistics(self, layer: str, steps: Sequence[int] | None = None) -> Statistics:
        """Statistics of one layer merged over ``steps``; None: all."""
        by_step = self.by_step(layer)
        return merge_all([by_step[step] for step in self._chosen(steps)])

    def percentiles(
        self, layer: str, percents: Sequence[float], steps: Sequence[int] | None = None
    ) -> NDArray[np.float64]:
        """Percentiles (0 … 100) of one layer's values over ``steps`` from its histograms; None: all steps."""
        return self.statistics(layer, steps).histogram.percentiles(percents)

    def image_ranges(self, layer: str, steps: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Min, max, 1st and 99th percentile of each image at ``steps``, (steps, images, 4); None: all steps.

        Raises:
            CalibError: the file is of version 1, which has none.
        """
        rows = [self.steps.index(step) for step in self._chosen(steps)]
        with self._reading():
            group = self._group(layer)
            if "image_ranges" not in group:
                raise CalibError(f"{self.path}: holds nothing image by image, it is of version 1; collect again")
            ranges: NDArray[np.float32] = self._all(group["image_ranges"])
        return ranges[rows]

    def samples(self, layer: str, step: int) -> NDArray[Any]:
        """Stored activations of a layer at a step, (rows, channels); bfloat16 as its bits, uint16.

        Raises:
            CalibError: none were stored.
        """
        with self._reading():
            group = self._group(layer)
            if "samples" not in group:
                raise CalibError(f"{self.path}: keeps no activations of {layer}; storage=sampled or storage=full does")
            check_dataset(group["samples"], self._most)
            rows: NDArray[Any] = group["samples"][self.steps.index(self._chosen([step])[0])]
        return rows

    def sample_info(self, layer: str) -> dict[str, Any] | None:
        """Type of a layer's stored activations and its number of tokens; None where none were stored."""
        with self._reading():
            group = self._group(layer)
            if "samples" not in group:
                return None
            info: dict[str, Any] = dict(group["samples"].attrs)
            if not 0 < int(info["tokens"]) <= MOST_TOKENS:
                raise ValueError(f"{layer} has {info['tokens']} tokens")
            return info

    def blocks(self) -> list[Block]:
        """Blocks of images as they were replayed, ascending by number."""
        with self._reading():
            numbers = self._all(self._file["image_block"]).tolist()
        pairs = list(zip(numbers, self.images, strict=True))
        return [Block(n, tuple(i for number, i in pairs if number == n)) for n in dict.fromkeys(numbers)]

    def same_data(self, layer: str) -> str:
        """The first layer that shares this layer's datasets, as layers with the same input array do."""
        return self._first_with[_address(self._group(layer))]

    def _chosen(self, steps: Sequence[int] | None) -> list[int]:
        for step in steps or ():
            if step not in self.steps:
                raise CalibError(f"{self.path}: step {step} was not collected; it has {self.steps}")
        return self.steps if steps is None else list(steps)

    def _group(self, layer: str) -> h5py.Group:
        if layer in self._groups:
            return self._groups[layer]
        name, _, half = layer.partition("/")
        if name not in self._groups or half not in HALVES or f"{half}/{name}" not in self._file:
            raise CalibError(f"{self.path}: no layer {layer!r}.{suggest(layer, self.layers, list_all=False)}")
        return self._file[half][name]
