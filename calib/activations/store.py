"""Writes ``activations.h5``; docs/FORMAT.md is its specification, :mod:`calib.activations.reader` reads it."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from calib.activations.record import Block, StepRecord
from calib.activations.samples import RowIdentity, SampleSettings, read_rows
from calib.activations.taps import TapPoint
from calib.activations.weights import WEIGHT_BITS
from calib.dataset.manifest import Manifest
from calib.files import replacing, take_room

import h5py
import numpy as np

FORMAT, FORMAT_VERSION = "calib-activations", 2
FILE = "activations.h5"
CHUNK_BYTES = 1 << 20
RANGE_STATISTICS = ("min", "max", "p01", "p99")
#: Records of all steps are held for so many bytes' worth of taps at a time.
HELD_BYTES = 256 << 20
ENCODINGS = {"float32": "ordered-bfloat16-midpoint", "float16": "ordered-float16", "bfloat16": "ordered-bfloat16"}


@dataclass(frozen=True)
class Source:
    """Where the statistics of a file come from.

    Attributes:
        names: every tap, halves among them as ``<tap>/conditional``.
        load: the records of all steps with some of the taps.
        nbytes: of all taps and steps in memory, about.
        blocks: of images, in the order of every record's ranges.
        halves: of the guidance batch: 2 with guidance, else 1.
        samples: which activations were kept as they are; None where none.
        samples_path: the file that holds them, by step.
        seed: what they were drawn by.
    """

    names: Sequence[str]
    load: Callable[[Sequence[str]], Mapping[int, StepRecord]]
    nbytes: int
    blocks: Sequence[Block]
    halves: int
    samples: SampleSettings | None = None
    samples_path: Callable[[int], Path] | None = None
    seed: int = 0

    def groups(self) -> Iterator[tuple[Sequence[str], Mapping[int, StepRecord]]]:
        """Some taps with their records at a time, a tap always together with its halves."""
        taps = [name for name in self.names if "/" not in name]
        count = max(1, -(-self.nbytes // HELD_BYTES))
        for part in np.array_split(np.arange(len(taps)), min(count, len(taps))):
            chosen = [taps[i] for i in part]
            with_halves = [name for name in self.names if name.partition("/")[0] in set(chosen)]
            yield with_halves, self.load(with_halves)


def write_activations(
    path: Path,
    source: Source,
    points: Sequence[TapPoint],
    manifest: Manifest,
    steps: Sequence[int],
    weight_sqnr: Mapping[str, Mapping[int, float]],
    attributes: Mapping[str, str | int | float],
    exact: bool = False,
) -> None:
    """Write what was seen at ``steps``; ``attributes`` become root attributes beside format and version.

    ``exact`` keeps the moments in full precision too, so that files of shards merge to that of the whole.
    """
    by_name = {point.name: point for point in points}
    with _new_file(path, source.nbytes + _sample_bytes(source, steps)) as file:
        own = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_steps": manifest.num_steps}
        file.attrs.update(own | dict(attributes))
        _write_axes(file, source.blocks, manifest, steps)
        for names, records in source.groups():
            for name in names:
                group = _write_layer(file, name, [records[step] for step in steps], exact)
                if name in records[steps[0]].samples:
                    _write_samples(file, group, name, source, records)
                tap, _, half = name.partition("/")
                point = by_name.get(tap) or TapPoint(tap, "block")
                group.attrs["kind"] = point.kind
                for alias in point.aliases:
                    _link(file, f"layers/{alias}{half and '/' + half}", group)
        for name, sqnr in weight_sqnr.items():
            if sqnr and f"layers/{name}" in file:
                values = np.asarray([sqnr[bits] for bits in WEIGHT_BITS])
                dataset = file[f"layers/{name}"].create_dataset("weight_sqnr", data=values)
                dataset.dims[0].attach_scale(file["weight_bits"])


@contextmanager
def _new_file(path: Path, nbytes: int) -> Iterator[h5py.File]:
    """A new file, whole or not at all; its room is taken first, as a disk that fills under HDF5 ends the process."""
    # Unlocked by HDF5: the temporary file is locked already.
    with replacing(path) as temporary:
        with h5py.File(temporary, "w", locking=False) as file:
            with open(temporary, "r+b") as raw:
                take_room(raw, nbytes + CHUNK_BYTES)
            yield file
            file.flush()
            size = file.id.get_filesize()
        os.truncate(temporary, size)


def _write_axes(file: h5py.File, blocks: Sequence[Block], manifest: Manifest, steps: Sequence[int]) -> None:
    """Dimension scales, and what lies along the steps."""
    _add_scale(file, "step_index", np.asarray(steps, np.int64))
    file.create_group("layers", track_order=True)
    _add_scale(file, "weight_bits", np.asarray(WEIGHT_BITS, np.int64))
    _add_scale(file, "image_id", np.asarray([i for block in blocks for i in block.images], np.int64))
    file["image_block"] = np.asarray([block.number for block in blocks for _ in block.images], np.int64)
    file["image_block"].dims[0].attach_scale(file["image_id"])
    _add_scale(file, "range_statistic", np.asarray(RANGE_STATISTICS, h5py.string_dtype()))
    along_steps = {
        "sigma": np.asarray([manifest.sigmas[step] for step in steps], np.float32),
        "timestep": np.asarray([manifest.timesteps[step] for step in steps], np.float32),
        "evaluated_by_sampler": np.asarray([step < manifest.num_steps for step in steps]),
    }
    for name, values in along_steps.items():
        file[name] = values
        file[name].dims[0].attach_scale(file["step_index"])


def _add_scale(group: h5py.Group, name: str, values: np.ndarray) -> None:
    group[name] = values
    group[name].make_scale(name)


def _chunked(group: h5py.Group, name: str, values: np.ndarray, compress: bool = False) -> h5py.Dataset:
    """With a checksum; compressed where that pays: counts do, floats do not."""
    rows = max(1, CHUNK_BYTES // max(1, values[:1].nbytes))
    chunks = (max(1, min(rows, len(values))), *values.shape[1:])
    packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if compress else {}
    return group.create_dataset(name, data=values, chunks=chunks, fletcher32=True, **packed)


def _link(file: h5py.File, path: str, group: h5py.Group) -> None:
    """A layer that reads the same array: a group of its own with the same datasets."""
    alias = file.create_group(path)
    alias.attrs.update(group.attrs)
    for name, item in group.items():
        if isinstance(item, h5py.Dataset):
            alias[name] = item


def _write_layer(file: h5py.File, name: str, records: Sequence[StepRecord], exact: bool) -> h5py.Group:
    observed = [record.seen[name].statistics for record in records]
    dtype = records[0].seen[name].dtype
    group = file.create_group(f"layers/{name}")
    group.attrs.update(
        {
            "encoding-type": "layer-statistics",
            "encoding-version": "2",
            "channels": observed[0].channels,
            "count": sum(int(s.count.sum()) for s in observed),
            "dtype": dtype,
            "encoding": ENCODINGS[dtype],
        }
    )
    _add_scale(group, "channel", np.arange(observed[0].channels))
    per_channel: dict[str, np.ndarray] = {
        "channel_min": np.stack([s.minimum for s in observed]),
        "channel_max": np.stack([s.maximum for s in observed]),
        "channel_mean": np.stack([s.mean for s in observed]).astype(np.float32),
        "channel_std": np.stack([s.std for s in observed]).astype(np.float32),
        "channel_count": np.stack([s.count for s in observed]),
    }
    for field, values in per_channel.items():
        dataset = _chunked(group, field, values, compress=field == "channel_count")
        dataset.dims[0].attach_scale(file["step_index"])
        dataset.dims[1].attach_scale(group["channel"])
    if exact:
        _chunked(group, "channel_sums", np.stack([s.moments.sums for s in observed]))
    offsets = np.cumsum([0, *(len(s.histogram.keys) for s in observed)])
    _chunked(group, "histogram_keys", np.concatenate([s.histogram.keys for s in observed]), compress=True)
    _chunked(group, "histogram_counts", np.concatenate([s.histogram.counts for s in observed]), compress=True)
    group["histogram_offsets"] = offsets
    for field in ("nan", "inf"):
        group[f"{field}_count"] = np.asarray([getattr(s, field) for s in observed], np.uint64)
        group[f"{field}_count"].dims[0].attach_scale(file["step_index"])
    ranges = _chunked(group, "image_ranges", np.stack([r.seen[name].ranges for r in records]).astype(np.float32))
    for axis, scale in enumerate(("step_index", "image_id", "range_statistic")):
        ranges.dims[axis].attach_scale(file[scale])
    return group


def _sample_bytes(source: Source, steps: Sequence[int]) -> int:
    if source.samples_path is None or source.samples is None:
        return 0
    return sum(source.samples_path(step).stat().st_size for step in steps)


def _write_samples(
    file: h5py.File, group: h5py.Group, name: str, source: Source, records: Mapping[int, StepRecord]
) -> None:
    """Rows that were kept, (steps, rows, channels), and what each is: image, guidance half and token."""
    assert source.samples is not None and source.samples_path is not None
    steps, entry = list(records), records[next(iter(records))].samples[name]
    channels, tokens = int(group.attrs["channels"]), int(entry["tokens"])
    each = source.samples.rows(tokens)
    rows = RowIdentity.of([block.images for block in source.blocks], source.halves, each)
    _add_scale(group, "sample", np.arange(len(rows.image)))
    chunk = max(1, min(len(rows.image), CHUNK_BYTES // (2 * channels)))
    kind = np.uint16 if entry["dtype"] == "bfloat16" else np.float16
    shape = (len(steps), len(rows.image), channels)
    samples = group.create_dataset("samples", shape, kind, chunks=(1, chunk, channels), fletcher32=True)
    samples.attrs["dtype"] = entry["dtype"]
    for number, step in enumerate(steps):
        first = 0
        for part in read_rows(source.samples_path(step), records[step].samples[name], channels):
            samples[number, first : first + len(part)] = part.view(kind)
            first += len(part)
    for axis, scale in enumerate((file["step_index"], group["sample"], group["channel"])):
        samples.dims[axis].attach_scale(scale)
    kept = {(i, s): source.samples.tokens(source.seed, i, s, tokens) for i in dict.fromkeys(rows.image) for s in steps}
    identity: dict[str, np.ndarray] = {
        "sample_image": rows.image,
        "sample_half": rows.half,
        "sample_token": np.stack([np.concatenate([kept[i, s] for i in rows.image[::each]]) for s in steps]),
    }
    for field, values in identity.items():
        group[field] = values
        group[field].dims[values.ndim - 1].attach_scale(group["sample"])
        if values.ndim == 2:
            group[field].dims[0].attach_scale(file["step_index"])
