"""Merge the files of shards into the statistics of the whole collection, the same as without shards."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from calib.activations.format import Block
from calib.activations.observer import TapResult
from calib.activations.reader import ActivationFile
from calib.activations.record import StepRecord
from calib.activations.samples import Samples, SampleSettings
from calib.activations.store import Records, write_activations
from calib.activations.taps import TapPoint
from calib.base.errors import MOST_NAMES, ConfigError, lacks_or_garbles
from calib.base.layout import ACTIVATIONS
from calib.base.progress import counted
from calib.dataset.store import StateDtype

import numpy as np
from numpy.typing import NDArray


class Shards:
    """Open files of all shards of one collection, ascending by shard; use as a context.

    Raises:
        ConfigError: the files are not the shards of one collection, or not all of them.
    """

    def __init__(self, runs: Sequence[Path]):
        self._stack = ExitStack()
        try:
            opened = [self._stack.enter_context(ActivationFile(run / ACTIVATIONS)) for run in runs]
            try:
                _check(opened)
                self.collection: dict[str, Any] = json.loads(opened[0].attributes["collection"])
            except (KeyError, TypeError, ValueError) as error:
                raise lacks_or_garbles(opened[0].path, error, "run the shards' calib collect again") from None
        except BaseException:
            self._stack.close()
            raise
        self.files = sorted(opened, key=lambda file: int(file.attributes["shard_index"]))
        first = self.files[0]
        self.attributes, self.steps = first.attributes, first.steps
        blocks = [(block, number) for number, file in enumerate(self.files) for block in file.blocks()]
        self._order = sorted(blocks, key=lambda item: item[0].number)
        self.blocks = [block for block, _ in self._order]
        images = [i for file in self.files for i in file.images]
        places = {image: place for place, image in enumerate(images)}
        self._permutation = np.array([places[i] for block in self.blocks for i in block.images])

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def points(self) -> list[TapPoint]:
        """The taps, each with the layers that share its input."""
        file = self.files[0]
        names: dict[str, list[str]] = {}
        for layer in file.layers:
            names.setdefault(file.same_data(layer), []).append(layer)
        return [TapPoint(name, file.kind(name), tuple(rest[1:])) for name, rest in names.items()]

    def source(self) -> Records:
        """The merged statistics, for :func:`calib.activations.store.write_activations`."""
        file = self.files[0]
        names = [name for point in self.points() for name in (point.name, *file.halves(point.name))]
        settings = self.collection["settings"]
        kept = settings["samples"]
        samples = SampleSettings(
            Samples(kept["kind"]), kept["rows_per_image"], StateDtype(kept["dtype"]) if kept["dtype"] else None
        )
        size = sum(one.path.stat().st_size for one in self.files)
        return Records(
            names=names,
            load=self._load,
            nbytes=2 * size,  # counts are stored compressed
            blocks=self.blocks,
            halves=2 if self.attributes["cfg_weight"] > 0 else 1,
            samples=samples if samples.kind is not Samples.NONE else None,
            rows=self._rows,
            seed=settings["seed"],
        )

    def _load(self, names: Sequence[str]) -> Mapping[int, StepRecord]:
        images = [i for block in self.blocks for i in block.images]
        records = {step: StepRecord(step, images) for step in self.steps}
        for name in names:
            parts = [file.by_step(name) for file in self.files]
            ranges = np.concatenate([file.image_ranges(name) for file in self.files], axis=1)[:, self._permutation]
            info = None if "/" in name else self.files[0].sample_info(name)
            for row, step in enumerate(self.steps):
                statistics = parts[0][step]
                for part in parts[1:]:
                    statistics = statistics.merge(part[step])
                dtype = statistics.histogram.dtype
                records[step].seen[name] = TapResult(dtype, statistics, ranges[row].astype(np.float64))
                if info is not None:
                    records[step].samples[name] = info
        return records

    def _rows(self, record: StepRecord, name: str) -> Iterator[NDArray[np.uint16]]:
        """Yield the kept rows, block by block, from whichever shard has the block."""
        rows = [file.samples(name, record.step).view(np.uint16) for file in self.files]
        each = [len(own) // len(file.images) for own, file in zip(rows, self.files, strict=True)]
        done = [0] * len(rows)
        for block, number in self._order:
            count = each[number] * len(block.images)
            yield rows[number][done[number] : done[number] + count]
            done[number] += count

    def weight_sqnr(self) -> dict[str, dict[int, float]]:
        """SQNR of the model's weights, as measured by the first shard."""
        return {layer: self.files[0].weight_sqnr(layer) for layer in self.files[0].layers}


def _check(files: Sequence[ActivationFile]) -> None:
    """Raise unless ``files`` are all shards of one collection, each once."""
    first = files[0]
    for file in files:
        if int(file.attributes.get("shard_count", 1)) < 2:
            raise ConfigError(f"{file.path}: is not of a shard; calib collect shard.index=0 shard.count=2 makes one")
    count = int(first.attributes["shard_count"])
    for file in files[1:]:
        for key, what in (
            ("shard_count", "number of shards"),
            ("fingerprint", "model"),
            ("collection", "images, steps, taps or settings"),
        ):
            if file.attributes[key] != first.attributes[key]:
                raise ConfigError(
                    f"{file.path}: is of another {what} than {first.path}; merge shards of one collection"
                )
    found: dict[int, Path] = {}
    for file in files:
        index = int(file.attributes["shard_index"])
        if index in found:
            raise ConfigError(f"{file.path}: is shard {index}, as is {found[index]}; name each once")
        found[index] = file.path
    if missing := list(islice((index for index in range(count) if index not in found), MOST_NAMES)):
        number = count - sum(index in range(count) for index in found)
        listed = ", ".join([*map(str, missing), *(["…"] if number > len(missing) else [])])
        raise ConfigError(
            f"{counted(number, 'shard')} of {count} missing: {listed}; "
            f"calib collect shard.index={missing[0]} shard.count={count} makes the first"
        )


def merge_shards(runs: Sequence[Path], into: Path) -> list[Block]:
    """Write ``activations.h5`` into the folder ``into`` from those in ``runs``; returns the blocks of images."""
    with Shards(runs) as shards:
        file = shards.files[0]
        attributes = {key: value for key, value in file.attributes.items() if key not in ("format", "format_version")}
        attributes |= {"shard_index": 0, "shard_count": 1}
        where = (into / ACTIVATIONS, shards.source(), shards.points(), file.levels(), shards.steps)
        write_activations(*where, shards.weight_sqnr(), attributes, file.order)
        return shards.blocks
