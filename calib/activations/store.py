"""Write ``activations.h5``; docs/FORMAT.md is its specification, :mod:`calib.activations.reader` reads it."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.activations.format import AXES, ENCODINGS, FORMAT, FORMAT_VERSION, MOMENTS, RANGE_STATISTICS, Block, Levels
from calib.activations.reader import statistics_by_step
from calib.activations.record import StepRecord
from calib.activations.samples import RowIdentity, SampleSettings
from calib.activations.statistics import Statistics, stacked_moments
from calib.activations.taps import TapPoint
from calib.base import hdf5
from calib.base.affine import WEIGHT_BITS
from calib.base.files import take_room
from calib.dataset.manifest import Manifest

import h5py
import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 20
#: Datasets that are compressed: counts, and what has the 16 bits of most activations.
COMPRESSED = ("channel_min", "channel_max", "channel_count", "histogram_keys", "histogram_counts", "histogram_offsets")
#: Upper bound of the bytes of a layer's group besides its data.
GROUP_BYTES = 1 << 16
#: Bytes of records, of all steps and some taps, that are held in memory at a time.
HELD_BYTES = 512 << 20


@dataclass(frozen=True)
class Records:
    """The statistics to write to a file.

    Attributes:
        names: names of all taps, guidance halves as ``<tap>/conditional``.
        load: loads the records of all steps with the given taps.
        nbytes: approximate bytes of all taps and steps in memory.
        blocks: blocks of images, in the order of every record's ranges.
        halves: number of halves of the guidance batch: 2 with guidance, else 1.
        samples: selection of the stored activations; None where there are none.
        rows: yields the stored activations of a tap at a step in pieces, bit patterns (rows, channels).
        sample_bytes: bytes of all stored activations.
        seed: seed of their selection.
    """

    names: Sequence[str]
    load: Callable[[Sequence[str]], Mapping[int, StepRecord]]
    nbytes: int
    blocks: Sequence[Block]
    halves: int
    samples: SampleSettings | None = None
    rows: Callable[[StepRecord, str], Iterator[NDArray[np.uint16]]] | None = None
    sample_bytes: int = 0
    seed: int = 0

    def groups(self) -> Iterator[tuple[Sequence[str], Mapping[int, StepRecord]]]:
        """Yield groups of taps with their records; a tap and its halves are in one group."""
        taps = [name for name in self.names if "/" not in name]
        count = max(1, -(-self.nbytes // HELD_BYTES))
        for part in np.array_split(np.arange(len(taps)), min(count, len(taps))):
            chosen = [taps[i] for i in part]
            with_halves = [name for name in self.names if name.partition("/")[0] in set(chosen)]
            yield with_halves, self.load(with_halves)


def write_activations(
    path: Path,
    source: Records,
    points: Sequence[TapPoint],
    levels: Manifest | Levels,
    steps: Sequence[int],
    weight_sqnr: Mapping[str, Mapping[int, float]],
    attributes: Mapping[str, str | int | float],
    order: Mapping[str, int],
    exact: bool = False,
    watch: Callable[[str, Mapping[int, Statistics]], None] = lambda name, by_step: None,
) -> None:
    """Write the statistics of ``steps`` to the file ``path``.

    Args:
        attributes: root attributes besides format and version.
        order: position of each layer and block in the network.
        exact: store moments in full precision too, so that files of shards merge to that of the whole.
        watch: called with each tap and its statistics by step, as they will be read from the file.
    """
    by_name = {point.name: point for point in points}
    groups = len(source.names) + sum(len(point.aliases) for point in points)
    room = source.nbytes + source.sample_bytes * 11 // 10 + groups * GROUP_BYTES
    with _new_file(path, room) as file:
        own = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_steps": levels.num_steps}
        file.attrs.update(own | dict(attributes))
        _write_axes(file, source, levels, steps, exact)
        for names, records in source.groups():
            by_step = [records[step] for step in steps]
            for name in names:
                data = _layer_data(by_step, name, exact)
                tap, _, half = name.partition("/")
                point = by_name.get(tap) or TapPoint(tap, "block")
                dtype = by_step[0].seen[name].dtype
                watch(name, statistics_by_step(steps, data, dtype))
                described = _attributes(data, dtype) | {"kind": point.kind}
                # A block's stream stands with its block.
                place = order.get(tap, order.get(tap.rpartition(".")[0], len(order)))
                group = _write_layer(file, f"{half or 'layers'}/{tap}", data, described | {"order": place})
                if name in by_step[0].samples:
                    _write_samples(file, group, name, source, records)
                datasets = _datasets(group) if point.aliases else {}
                for alias in point.aliases:
                    _link(file, f"{half or 'layers'}/{alias}", datasets, described | {"order": order[alias]})
        for name, sqnr in weight_sqnr.items():
            if sqnr and f"layers/{name}" in file:
                file[f"layers/{name}"]["weight_sqnr"] = np.asarray([sqnr[bits] for bits in WEIGHT_BITS])
        _attach_scales(file)


@contextmanager
def _new_file(path: Path, nbytes: int) -> Iterator[h5py.File]:
    """Yield a new file, written whole or not at all; space is allocated first, as a full disk ends HDF5's process."""
    with hdf5.writing(path) as (file, temporary):
        with open(temporary, "r+b") as raw:
            take_room(raw, nbytes + CHUNK_BYTES)
        yield file
        file.close()
        os.truncate(temporary, _end(temporary))


def _end(path: Path) -> int:
    """Size of a closed HDF5 file by its superblock (HDF5 format specification, II.A), excess space not included."""
    with open(path, "rb") as file:
        head = file.read(48)
    start = 40 if head[8] < 2 else 28
    return int.from_bytes(head[start : start + 8], "little")


def _write_axes(file: h5py.File, source: Records, levels: Manifest | Levels, steps: Sequence[int], exact: bool) -> None:
    """Write the dimension scales, and the datasets along the steps."""
    blocks = source.blocks
    # A scale lists its datasets in an attribute, which may exceed 64 KiB only if creation order is tracked.
    file.create_dataset("step_index", data=np.asarray(steps, np.int64), track_order=True).make_scale("step_index")
    for group in ("layers", *dict.fromkeys(name.partition("/")[2] for name in source.names if "/" in name)):
        file.create_group(group, track_order=True)
    _add_scale(file, "weight_bits", np.asarray(WEIGHT_BITS, np.int64))
    _add_scale(file, "image_id", np.asarray([i for block in blocks for i in block.images], np.int64))
    file["image_block"] = np.asarray([block.number for block in blocks for _ in block.images], np.int64)
    _add_scale(file, "range_statistic", np.asarray(RANGE_STATISTICS, h5py.string_dtype()))
    if exact:
        _add_scale(file, "moment", np.asarray(MOMENTS, h5py.string_dtype()))
    along_steps = {
        "sigma": np.asarray([levels.sigmas[step] for step in steps], np.float32),
        "timestep": np.asarray([levels.timesteps[step] for step in steps], np.float32),
        "evaluated_by_sampler": np.asarray([step < levels.num_steps for step in steps]),
    }
    for name, values in along_steps.items():
        file[name] = values


def _add_scale(group: h5py.Group, name: str, values: np.ndarray) -> None:
    group[name] = values
    group[name].make_scale(name)


def _attach_scales(file: h5py.File) -> None:
    """Attach dimension scales to all datasets.

    At the end, in one go: a scale's list of datasets is rewritten with every entry, and with other writes in between
    the space of the old lists stays unused, a fifth of a large file.
    """
    found = _datasets(file)
    for path, dataset in found.items():
        group, slash, name = path.rpartition("/")
        for axis, scale in enumerate(AXES.get(name, ())):
            dataset.dims[axis].attach_scale(found.get(f"{group}{slash}{scale}") or found[scale])


def _datasets(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """All datasets in ``group`` and the groups in it by path, those of several paths by the first."""
    found: dict[str, h5py.Dataset] = {}

    def see(path: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[path] = item

    group.visititems(see)
    return found


def _chunked(group: h5py.Group, name: str, values: np.ndarray, compress: bool = False) -> h5py.Dataset:
    """Write a chunked dataset with checksums."""
    if not values.size:  # bins of a layer without finite values; HDF5 has no empty chunks
        return group.create_dataset(name, data=values)
    chunks = (_even(len(values), CHUNK_BYTES // max(1, values[:1].nbytes)), *values.shape[1:])
    packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if compress else {}
    return group.create_dataset(name, data=values, chunks=chunks, fletcher32=True, **packed)


def _even(rows: int, most: int) -> int:
    """Rows per chunk, at most ``most``, so that all chunks have about one size, as HDF5 pads the last one."""
    return -(-rows // max(1, -(-rows // max(1, most))))


def _link(
    file: h5py.File, path: str, datasets: Mapping[str, h5py.Dataset], attributes: Mapping[str, str | int]
) -> None:
    """Make a group with the ``datasets`` of another, for a layer that reads the same array."""
    alias = file.create_group(path)
    alias.attrs.update(attributes)
    for name, dataset in datasets.items():
        alias[name] = dataset


def _layer_data(records: Sequence[StepRecord], name: str, exact: bool) -> dict[str, NDArray[Any]]:
    """The datasets of one layer over the steps of ``records``."""
    observed = [record.seen[name].statistics for record in records]
    count, moments = np.stack([s.count for s in observed]), stacked_moments(observed)
    return {
        "channel_min": np.stack([s.minimum for s in observed]),
        "channel_max": np.stack([s.maximum for s in observed]),
        "channel_mean": moments.mean(count).astype(np.float32),
        "channel_std": moments.std(count).astype(np.float32),
        "channel_count": count,
        **({"channel_sums": moments.sums.swapaxes(0, 1)} if exact else {}),
        "histogram_keys": np.concatenate([s.histogram.keys for s in observed]),
        "histogram_counts": np.concatenate([s.histogram.counts for s in observed]),
        "histogram_offsets": np.cumsum([0, *(len(s.histogram.keys) for s in observed)]),
        "nan_count": np.asarray([s.nan for s in observed], np.uint64),
        "inf_count": np.asarray([s.inf for s in observed], np.uint64),
        "image_ranges": np.stack([r.seen[name].ranges for r in records]).astype(np.float32),
    }


def _attributes(data: Mapping[str, NDArray[Any]], dtype: str) -> dict[str, str | int]:
    return {
        "encoding-type": "layer-statistics",
        "encoding-version": "2",
        "channels": data["channel_count"].shape[1],
        "count": sum(int(row.sum()) for row in data["channel_count"]),
        "dtype": dtype,
        "encoding": ENCODINGS[dtype],
    }


def _write_layer(
    file: h5py.File, path: str, data: Mapping[str, NDArray[Any]], attributes: Mapping[str, str | int]
) -> h5py.Group:
    group = file.create_group(path)
    group.attrs.update(attributes)
    _add_scale(group, "channel", np.arange(data["channel_count"].shape[1]))
    for field, values in data.items():
        if field in ("nan_count", "inf_count"):
            group[field] = values
        else:
            _chunked(group, field, values, compress=field in COMPRESSED)
    # Each is its own scale, as its length is that of no other axis.
    for field in ("histogram_keys", "histogram_offsets"):
        group[field].make_scale(field)
    return group


def _write_samples(
    file: h5py.File, group: h5py.Group, name: str, source: Records, records: Mapping[int, StepRecord]
) -> None:
    """Write stored activations, (steps, rows, channels), with image, guidance half and token of each row."""
    assert source.samples is not None and source.rows is not None
    steps, entry = list(records), records[next(iter(records))].samples[name]
    channels, tokens = int(group.attrs["channels"]), int(entry["tokens"])
    each = source.samples.rows(tokens)
    rows = RowIdentity.of([block.images for block in source.blocks], source.halves, each)
    _add_scale(group, "sample", np.arange(len(rows.image)))
    chunk = _even(len(rows.image), CHUNK_BYTES // (2 * channels))
    kind = np.uint16 if entry["dtype"] == "bfloat16" else np.float16
    shape = (len(steps), len(rows.image), channels)
    samples = group.create_dataset("samples", shape, kind, chunks=(1, chunk, channels), fletcher32=True)
    samples.attrs.update({"dtype": entry["dtype"], "tokens": tokens})
    for number, step in enumerate(steps):
        first = 0
        for part in source.rows(records[step], name):
            samples[number, first : first + len(part)] = part.view(kind)
            first += len(part)
    kept = {(i, s): source.samples.tokens(source.seed, i, s, tokens) for i in dict.fromkeys(rows.image) for s in steps}
    identity: dict[str, np.ndarray] = {
        "sample_image": rows.image,
        "sample_half": rows.half,
        "sample_token": np.stack([np.concatenate([kept[i, s] for i in rows.image[::each]]) for s in steps]),
    }
    for field, values in identity.items():
        group[field] = values
