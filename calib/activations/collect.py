"""Collect statistics: replay stored states through the tapped transformer, and cache the results by step.

Images are replayed in blocks, each prompt is encoded once, and no image is drawn again. The statistics of a step are
written to the cache as soon as they are complete, so that an interrupted collection continues from there and other
runs reuse them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calib.activations.cache import StepCache
from calib.activations.format import Block
from calib.activations.record import StepRecord
from calib.activations.replay import traced_shapes
from calib.activations.samples import Samples, SampleSettings, read_rows
from calib.activations.states import check_states, identity_of
from calib.activations.step import CollectionSetup, CollectSettings, prompt_of, replayed
from calib.activations.store import Records
from calib.activations.taps import Halves, TapPoint
from calib.base.errors import CalibError
from calib.base.files import device_of, free_bytes
from calib.base.progress import Progress, readable_bytes, say
from calib.base.versions import numerics
from calib.dataset.check_model import checked_model
from calib.dataset.manifest import Manifest
from calib.dataset.shards import Shard
from calib.models.architecture import Architecture
from calib.models.memory import device_memory, nbytes
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Share of the weights' memory for prompts that stay encoded while all steps are replayed: with SD3, 40 images of 10 MB
#: each with T5, 170 without.
TEXT_SHARE = 0.1


class Collection:
    """Statistics of one subset of a dataset's images by step, in the cache or yet to be collected.

    Args:
        architecture: the model's, or one of the same shapes without weights.
        model: loads the model; called only if a step is not in the cache.
        shard: the share of the blocks to collect.
    """

    def __init__(
        self,
        architecture: Architecture,
        model: Callable[[], DiffusionModel],
        data_dir: Path,
        manifest: Manifest,
        image_ids: Sequence[int],
        points: Sequence[TapPoint],
        settings: CollectSettings,
        cache_dir: Path,
        shard: Shard | None = None,
    ):
        if manifest.cfg_weight <= 0:  # there are no guidance halves
            settings = replace(settings, cfg_halves=Halves.POOLED)
        if settings.samples.kind is Samples.NONE:
            settings = replace(settings, samples=SampleSettings())
        self.data_dir, self.manifest, self.points, self.settings = data_dir, manifest, points, settings
        self._model = checked_model(data_dir, manifest, model)
        self.batch_size = settings.batch_size or manifest.batch_size or 1
        self.stride = histogram_stride(architecture, manifest, self.batch_size, settings.histogram_rows)
        shard = shard or Shard()
        blocks = [Block(i, ids) for i, ids in enumerate(batched_ids(image_ids, self.batch_size))]
        self.blocks = [block for block in blocks if shard.owns(block.number)]
        self.images = [i for block in self.blocks for i in block.images]
        self.cache = StepCache(cache_dir, self._identity(architecture))
        streams = {point.name: architecture.streams(point.name) for point in points if point.kind == "block"}
        kept = settings.samples.kind is not Samples.NONE
        beside = [prompt_of(data_dir, manifest.images[i]) for i in image_ids] if kept else ()
        more = (self.batch_size, self.stride, self.cache.samples_path, beside)
        self._setup = CollectionSetup(data_dir, manifest, points, streams, settings, *more)

    def _identity(self, architecture: Architecture) -> dict[str, Any]:
        """Everything that the statistics of a step depend on, JSON-able."""
        manifest = self.manifest
        # An older dataset does not record its model: the one that replays it counts.
        model = self._model() if manifest.fingerprint is None else None
        return {
            "dataset": {
                "model": manifest.model,
                "fingerprint": manifest.fingerprint if model is None else model.fingerprint,
                "text_encoders": manifest.text_encoders if model is None else model.text_encoders,
                "num_steps": manifest.num_steps,
                "cfg_weight": manifest.cfg_weight,
                "latent_shape": list(manifest.latent_shape),
                "timesteps": [
                    f"{sigma:.9g} {t:.9g}" for sigma, t in zip(manifest.sigmas, manifest.timesteps, strict=True)
                ],
            },
            "states": [
                [block.number, [identity_of(self.data_dir, manifest.images[i]) for i in block.images]]
                for block in self.blocks
            ],
            "taps": [asdict(point) for point in self.points],
            "depth": list(architecture.depth),
            "settings": {**asdict(self.settings), "batch_size": self.batch_size},
            "device": mx.default_device().type.name,
            "mlx": numerics(architecture.module),
        }

    def missing(self, steps: Sequence[int]) -> list[int]:
        """Steps that are not in the cache."""
        return [step for step in steps if not self.cache.has(step)]

    def collect(self, steps: Sequence[int], into: Path | None = None) -> None:
        """Collect those of ``steps`` that are not in the cache.

        Args:
            into: the folder that kept activations will be copied to, for a check of its free space.

        Raises:
            CalibError: the dataset was made by another model, states are missing or damaged, or the disk cannot hold
                the activations to keep.
        """
        if not self.missing(steps):
            return
        with self.cache.lock():
            todo = self.missing(steps)  # another process may have collected some meanwhile
            if todo:
                check_states(self.data_dir, self.manifest, self.images, todo)
                model = self._model()
                if self.settings.samples.kind is not Samples.NONE:
                    self._check_room(model, len(todo), len(steps), into)
                self._collect(model, todo)

    def records(self, steps: Sequence[int], names: Sequence[str] | None = None) -> dict[int, StepRecord]:
        """Records of ``steps`` from the cache, with all taps or those in ``names``."""
        found = {}
        for step in steps:
            record = self.cache.load(step, names=names)
            if record is None:
                raise CalibError(f"{self.cache.path(step)}: was damaged just now; run the same command again")
            found[step] = record
        return found

    def lazy(self, steps: Sequence[int]) -> "LazyRecords":
        """:meth:`records`, each read at access and not held in memory."""
        return LazyRecords(self, steps)

    def source(self, steps: Sequence[int]) -> Records:
        """The cached statistics of ``steps``, for :func:`calib.activations.store.write_activations`."""
        kept = self.settings.samples.kind is not Samples.NONE
        return Records(
            names=[tap["name"] for tap in self.cache.header(steps[0])["taps"]],
            load=lambda names: self.records(steps, names),
            nbytes=sum(self.cache.path(step).stat().st_size for step in steps),
            blocks=self.blocks,
            halves=2 if self.manifest.cfg_weight > 0 else 1,
            samples=self.settings.samples if kept else None,
            rows=self._kept_rows,
            sample_bytes=sum(self.cache.samples_path(step).stat().st_size for step in steps) if kept else 0,
            seed=self.settings.seed,
        )

    def _kept_rows(self, record: StepRecord, name: str) -> Iterator[NDArray[np.uint16]]:
        channels = record.seen[name].statistics.channels
        try:
            yield from read_rows(self.cache.samples_path(record.step), record.samples[name], channels)
        except ValueError as error:
            self.cache.forget(record.step)
            again = f"the same command collects step {record.step} again"
            raise CalibError(f"{self.cache.samples_path(record.step)}: {error}; {again}") from None

    def _check_room(self, model: DiffusionModel, todo: int, steps: int, into: Path | None) -> None:
        """Report the space that the activations to keep will take, and raise where the disk cannot hold them."""
        rows = len(self.images) * (2 if self.manifest.cfg_weight > 0 else 1)
        shapes = traced_shapes(model, self.points).values()
        each = sum(2 * rows * self.settings.samples.rows(tokens) * channels for tokens, channels in shapes)
        folder = self.cache.folder
        # One step more in the cache, as merging the parts of a step holds it twice for a moment; HDF5 adds a little.
        kept, copied = (todo + 1) * each, steps * each * 11 // 10
        if into is None:
            needs = {folder: kept}
        elif device_of(into) == device_of(folder):
            needs = {folder: kept + copied}
        else:
            needs = {folder: kept, into: copied}
        free = {place: free_bytes(place) for place in needs}
        say(
            f"activations to keep: {readable_bytes(each)} a step, {readable_bytes(todo * each)} in cache_dir and "
            f"{readable_bytes(steps * each)} in the run's file; {readable_bytes(min(free.values()))} free"
        )
        for place, need in needs.items():
            if need > free[place]:
                sizes = f"activations to keep need {readable_bytes(need)}, {readable_bytes(free[place])} are free"
                raise CalibError(f"{place}: {sizes}; choose fewer taps, steps or images, or make room")

    def _parts(self, model: DiffusionModel) -> list[list[Block]]:
        """The blocks in parts whose prompts stay encoded together."""
        halves = 2 if self.manifest.cfg_weight > 0 else 1
        text = halves * model.text_length * model.architecture.text_widths()[0] * model.dtype.size
        each = max(1, int(TEXT_SHARE * min(nbytes(model.transformer), device_memory()) / text) // self.batch_size)
        return [self.blocks[i : i + each] for i in range(0, len(self.blocks), each)]

    def _collect(self, model: DiffusionModel, steps: Sequence[int]) -> None:
        parts = self._parts(model)
        numbers: list[int | None] = [None] if len(parts) == 1 else [*range(len(parts))]
        todo = [
            (part, number, [s for s in steps if number is None or not self._has_part(s, number, part)])
            for part, number in zip(parts, numbers, strict=True)
        ]
        forwards = sum(len(part) * len(left) for part, _, left in todo)
        label = f"collect {len(self.images)} images at {len(steps)} steps"
        with Progress(label, forwards, "forward") as progress, ThreadPoolExecutor(1) as writer:
            saving: list[Future[None]] = []
            for part, number, left in todo:
                for make in replayed(model, self._setup, part, left, number, progress):
                    for done in saving:
                        done.result()
                    saving = [writer.submit(self._save, make, number, len(parts))]
            for done in saving:
                done.result()
        if len(parts) > 1:
            for step in self.missing(steps):  # steps whose last part was collected before
                self.cache.join_parts(step, len(parts))

    def _has_part(self, step: int, number: int, part: Sequence[Block]) -> bool:
        """Whether this part of a step was collected before; parts of another machine may hold other images."""
        record = self.cache.load(step, number, names=())
        return record is not None and record.images == [i for block in part for i in block.images]

    def _save(self, make: Callable[[], StepRecord], number: int | None, parts: int) -> None:
        record = make()
        self.cache.save(record, number)
        if number is not None and number == parts - 1:
            self.cache.join_parts(record.step, parts)


class LazyRecords(Mapping[int, StepRecord]):
    """Records of a collection by step, each read from the cache at access."""

    def __init__(self, collection: Collection, steps: Sequence[int]):
        self._collection, self._steps = collection, steps

    def __getitem__(self, step: int) -> StepRecord:
        return self._collection.records([step])[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def histogram_stride(
    architecture: Architecture, manifest: Manifest, batch_size: int, histogram_rows: int | None
) -> int:
    """Sampling stride of rows for histograms: about ``histogram_rows`` per forward pass in an image stream.

    The stride is coprime to the number of tokens, as otherwise the same positions of every image would be sampled.
    """
    if histogram_rows is None:
        return 1
    tokens = architecture.tokens(manifest.latent_shape[:2])
    rows = tokens * batch_size * (2 if manifest.cfg_weight > 0 else 1)
    stride = max(1, rows // histogram_rows)
    while math.gcd(stride, tokens) > 1:
        stride += 1
    return stride


def batched_ids(image_ids: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Consecutive blocks of at most ``size`` ids."""
    for start in range(0, len(image_ids), size):
        yield tuple(image_ids[start : start + size])
