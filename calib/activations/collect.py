"""Replay stored states through the tapped transformer, and keep what was seen for every run that asks again.

Images go in blocks, each prompt is encoded once, and no image is drawn again. What is collected at a step is written
to the cache at once: an interrupted collection goes on from there, and another run that wants the step finds it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from calib.activations.cache import StepCache
from calib.activations.format import Block
from calib.activations.record import StepRecord
from calib.activations.replay import traced_shapes
from calib.activations.samples import Samples, SampleSettings, read_rows
from calib.activations.states import check_states, identity_of
from calib.activations.step import CollectSettings, Setup, replayed
from calib.activations.store import Records
from calib.activations.taps import Halves, TapPoint
from calib.base.errors import CalibError
from calib.base.files import device_of, free_bytes
from calib.base.progress import Progress, readable_bytes, say
from calib.base.versions import versions
from calib.dataset.manifest import Manifest
from calib.dataset.shards import Shard
from calib.models.architecture import Architecture
from calib.models.memory import nbytes
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: While all steps are replayed the prompts of so many images stay encoded as take this share of the weights' memory:
#: with SD3, 40 of 10 MB each with T5, 170 without.
TEXT_SHARE = 0.1


class Collection:
    """Statistics of one subset of a dataset's images, step by step, in the cache or yet to be collected.

    Args:
        architecture: the model's, or one of its shape without weights.
        model: loads the model; called only if a step is not in the cache.
        shard: the part of the blocks that is collected.
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
        if manifest.cfg_weight <= 0:  # no halves to keep apart
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
        more = (self.batch_size, self.stride, self.cache.samples_path)
        self._setup = Setup(data_dir, manifest, points, streams, settings, *more)

    def _identity(self, architecture: Architecture) -> dict[str, Any]:
        """What the statistics of a step follow from."""
        manifest = self.manifest
        # An older dataset does not say what drew it: the model that replays it does.
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
            "mlx": versions()["mlx"],
        }

    def missing(self, steps: Sequence[int]) -> list[int]:
        """Steps that the cache does not hold."""
        return [step for step in steps if not self.cache.has(step)]

    def collect(self, steps: Sequence[int], into: Path | None = None) -> None:
        """Have all of ``steps`` in the cache; what is kept of activations is to be copied to the folder ``into``.

        Raises:
            CalibError: the dataset was made by another model, states are missing or damaged, or the disk cannot hold
                the activations that are to be kept.
        """
        if not self.missing(steps):
            return
        with self.cache.lock():
            todo = self.missing(steps)  # another process may have been at it
            if todo:
                check_states(self.data_dir, self.manifest, self.images, todo)
                model = self._model()
                if self.settings.samples.kind is not Samples.NONE:
                    self._check_room(model, len(todo), len(steps), into)
                self._collect(model, todo)

    def records(self, steps: Sequence[int], names: Sequence[str] | None = None) -> dict[int, StepRecord]:
        """What was seen at ``steps``, at all taps or at ``names``."""
        found = {}
        for step in steps:
            record = self.cache.load(step, names=names)
            if record is None:
                raise CalibError(f"{self.cache.path(step)}: was damaged just now; run the same command again")
            found[step] = record
        return found

    def lazy(self, steps: Sequence[int]) -> "LazyRecords":
        """:meth:`records`, each read when it is asked for and not held."""
        return LazyRecords(self, steps)

    def source(self, steps: Sequence[int]) -> Records:
        """What is in the cache of ``steps``, for a file of activations."""
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
        """Say how much the activations to be kept will take, and raise where the disk cannot hold them."""
        rows = len(self.images) * (2 if self.manifest.cfg_weight > 0 else 1)
        shapes = traced_shapes(model, self.points).values()
        each = sum(2 * rows * self.settings.samples.rows(tokens) * channels for tokens, channels in shapes)
        folder = self.cache.folder
        # In the cache; where images are collected in parts a step is there twice for a moment. HDF5 adds a little.
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
        """Blocks whose prompts are encoded together."""
        halves = 2 if self.manifest.cfg_weight > 0 else 1
        text = halves * model.text_length * model.architecture.text_widths()[0] * model.dtype.size
        each = max(1, int(TEXT_SHARE * nbytes(model.transformer) / text) // self.batch_size)
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
                for record in replayed(model, self._setup, part, left, number, progress):
                    for done in saving:
                        done.result()
                    saving = [writer.submit(self._save, record, number, len(parts))]
            for done in saving:
                done.result()
        for step in self.missing(steps):  # whose last part was there already
            self.cache.join_parts(step, len(parts))

    def _has_part(self, step: int, number: int, part: Sequence[Block]) -> bool:
        """Whether this part of a step was collected before; on another machine parts may be others."""
        record = self.cache.load(step, number, names=())
        return record is not None and record.images == [i for block in part for i in block.images]

    def _save(self, record: StepRecord, number: int | None, parts: int) -> None:
        self.cache.save(record, number)
        if number is not None and number == parts - 1:
            self.cache.join_parts(record.step, parts)


class LazyRecords(Mapping[int, StepRecord]):
    """Records of a collection by step, one in memory at a time."""

    def __init__(self, collection: Collection, steps: Sequence[int]):
        self._collection, self._steps = collection, steps

    def __getitem__(self, step: int) -> StepRecord:
        return self._collection.records([step])[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def checked_model(
    data_dir: Path, manifest: Manifest, model: Callable[[], DiffusionModel]
) -> Callable[[], DiffusionModel]:
    """``model``, which raises where what it loads cannot have drawn the dataset."""

    @cache
    def checked() -> DiffusionModel:
        loaded = model()
        check_model(data_dir, manifest, loaded)
        return loaded

    return checked


def check_model(data_dir: Path, manifest: Manifest, model: DiffusionModel) -> None:
    """Raise where ``model`` cannot have drawn the dataset; one of the older layout does not name its weights."""
    if manifest.fingerprint not in (None, model.fingerprint):
        raise CalibError(
            f"{data_dir}: made by {manifest.model} with other weights ({manifest.fingerprint}, not {model.fingerprint})"
        )
    if manifest.text_encoders not in (None, model.text_encoders):
        raise CalibError(
            f"{data_dir}: its prompts were encoded by {manifest.text_encoders}, not {model.text_encoders}; set the "
            "model's options as they were when it was drawn"
        )
    if manifest.latent_shape != model.latent_shape:
        raise CalibError(
            f"{data_dir}: holds latents of shape {manifest.latent_shape}, {model.name} has {model.latent_shape}; set "
            "model and sampler.image_size as they were when it was drawn"
        )


def histogram_stride(
    architecture: Architecture, manifest: Manifest, batch_size: int, histogram_rows: int | None
) -> int:
    """Every how many rows one is counted, so that a full forward's image stream gives ``histogram_rows``.

    Coprime to the number of tokens, or the same places of every image would be sampled.
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
