"""Replay stored states through the tapped transformer, and keep what was seen for every run that asks again.

Images go in blocks, each prompt is encoded once, and no image is drawn again. What is collected at a step is written
to the cache at once: an interrupted collection goes on from there, and another run that wants the step finds it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from calib.activations.cache import StepCache
from calib.activations.observer import Observer, Seen
from calib.activations.plain import PHASES
from calib.activations.record import Block, StepRecord, merge_halves, over_rows
from calib.activations.replay import Replay, new_observer, shared_cores, traced_shapes
from calib.activations.samples import Samples, SampleSettings, SampleWriter, read_rows
from calib.activations.states import ahead, check_states, read_states
from calib.activations.store import Source
from calib.activations.taps import Halves, TapPoint
from calib.dataset.manifest import FILE, ImageEntry, Manifest
from calib.dataset.shards import Shard
from calib.errors import CalibError
from calib.files import device_of, free_bytes
from calib.models.memory import nbytes, plan_memory
from calib.models.model import Conditioning, DiffusionModel
from calib.progress import Progress, note, readable_bytes, say
from calib.seeds import generator
from calib.versions import versions

import mlx.core as mx
import numpy as np
from diffusionkit.mlx.mmdit import MMDiT
from numpy.typing import NDArray

#: While all steps are replayed the prompts of so many images stay encoded as take this share of the weights' memory:
#: with SD3, 40 of 10 MB each with T5, 170 without.
TEXT_SHARE = 0.1


@dataclass(frozen=True)
class CollectSettings:
    """How statistics are gathered.

    Attributes:
        batch_size: images replayed side by side; None for as many as were drawn side by side.
        histogram_rows: about how many rows of an image stream enter the histogram in one full forward; other
            activations are sampled at the same rate. None for all. Extremes and moments always see every value.
        seed: shifts the sampled rows from forward to forward.
    """

    batch_size: int | None = None
    histogram_rows: int | None = 256
    seed: int = 0
    cfg_halves: Halves = Halves.POOLED
    samples: SampleSettings = field(default_factory=SampleSettings)


class Collection:
    """Statistics of one subset of a dataset's images, step by step, in the cache or yet to be collected.

    Args:
        transformer: the model's, or one of its shape without weights.
        model: loads the model; called only if a step is not in the cache.
        shard: the part of the blocks that is collected.
    """

    def __init__(
        self,
        transformer: MMDiT,
        model: Callable[[], DiffusionModel],
        data_dir: Path,
        manifest: Manifest,
        image_ids: Sequence[int],
        points: Sequence[TapPoint],
        settings: CollectSettings,
        cache_dir: Path,
        shard: Shard | None = None,
    ):
        self.data_dir, self.manifest, self.points, self.settings = data_dir, manifest, points, settings
        self._model = model
        self.batch_size = settings.batch_size or manifest.batch_size or 1
        self.stride = histogram_stride(transformer, manifest, self.batch_size, settings.histogram_rows)
        shard = shard or Shard()
        blocks = [Block(i, ids) for i, ids in enumerate(batched_ids(image_ids, self.batch_size))]
        self.blocks = [block for block in blocks if shard.owns(block.number)]
        self.images = [i for block in self.blocks for i in block.images]
        self.cache = StepCache(cache_dir, self._identity(transformer))

    def _identity(self, transformer: MMDiT) -> dict[str, Any]:
        """What the statistics of a step follow from."""
        manifest = self.manifest
        return {
            "dataset": {
                "model": manifest.model,
                "fingerprint": manifest.fingerprint or str(self.data_dir.absolute()),
                "text_encoders": manifest.text_encoders,
                "cfg_weight": manifest.cfg_weight,
                "latent_shape": list(manifest.latent_shape),
                "timesteps": [
                    f"{sigma:.9g} {t:.9g}" for sigma, t in zip(manifest.sigmas, manifest.timesteps, strict=True)
                ],
            },
            "states": [[block.number, [self._states_of(i) for i in block.images]] for block in self.blocks],
            "taps": [asdict(point) for point in self.points],
            "depth": [transformer.config.depth_multimodal, transformer.config.depth_unified],
            "settings": {**asdict(self.settings), "batch_size": self.batch_size},
            "device": mx.default_device().type.name,
            "mlx": versions()["mlx"],
        }

    def _states_of(self, image_id: int) -> list[str]:
        """Prompt and content of one image's states; of an older dataset, without checksums, size and time."""
        entry = self.manifest.images[image_id]
        if entry.checksums:
            return [str(entry.prompt), *(entry.checksums.get(name, "") for name in entry.samples)]
        stats = [(self.data_dir / name) for name in entry.samples]
        found = [path.stat() for path in stats if path.exists()]
        return [str(entry.prompt), *(f"{s.st_size} {s.st_mtime_ns}" for s in found)]

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
                check_model(self.data_dir, self.manifest, model)
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

    def source(self, steps: Sequence[int]) -> Source:
        """What is in the cache of ``steps``, for a file of activations."""
        kept = self.settings.samples.kind is not Samples.NONE
        return Source(
            names=list(self.records(steps[:1])[steps[0]].seen),
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
        return read_rows(self.cache.samples_path(record.step), record.samples[name], channels)

    def _check_room(self, model: DiffusionModel, todo: int, steps: int, into: Path | None) -> None:
        """Say how much the activations to be kept will take, and raise where the disk cannot hold them."""
        rows = len(self.images) * (2 if self.manifest.cfg_weight > 0 else 1)
        shapes = traced_shapes(model, self.points).values()
        each = sum(2 * rows * self.settings.samples.rows(tokens) * channels for tokens, channels in shapes)
        folder = self.cache.folder
        needs = {folder: todo * each, into or folder: steps * each}
        if into is not None and device_of(into) == device_of(folder):
            needs = {folder: (todo + steps) * each}
        free = {place: free_bytes(place) for place in needs}
        say(
            f"activations to keep: {readable_bytes(each)} a step, {readable_bytes(steps * each)} in the run's file and "
            f"as much in cache_dir; {readable_bytes(min(free.values()))} free"
        )
        for place, need in needs.items():
            if need > free[place]:
                sizes = f"activations to keep need {readable_bytes(need)}, {readable_bytes(free[place])} are free"
                raise CalibError(f"{place}: {sizes}; choose fewer taps, steps or images, or make room")

    def _parts(self, model: DiffusionModel) -> list[list[Block]]:
        """Blocks whose prompts are encoded together."""
        halves = 2 if self.manifest.cfg_weight > 0 else 1
        text = halves * model.text_length * model.transformer.config.token_level_text_embed_dim * model.dtype.size
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
        rows = min(self.batch_size, len(self.images)) * (2 if self.manifest.cfg_weight > 0 else 1)
        label = f"collect {len(self.images)} images at {len(steps)} steps"
        with Progress(label, forwards, "forward") as progress, shared_cores(rows), ThreadPoolExecutor(1) as writer:
            saving: list[Future[None]] = []
            for part, number, left in todo:
                for record in _replayed(model, self, part, left, number, progress):
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


def _replayed(
    model: DiffusionModel,
    collection: Collection,
    blocks: Sequence[Block],
    steps: Sequence[int],
    part: int | None,
    progress: Progress,
) -> Iterator[StepRecord]:
    """The record of each step over ``blocks``; while one is read from the device the next is computed already."""
    if not steps:
        return
    data_dir, manifest = collection.data_dir, collection.manifest
    memory = plan_memory(model, manifest.cfg_weight > 0, collection.batch_size)
    prompts = [[_prompt(data_dir, manifest.images[i]) for i in block.images] for block in blocks]
    texts = list(model.encode_batches(prompts, manifest.cfg_weight, memory.keep_text))
    timesteps = {step: mx.array(manifest.timesteps[step]).astype(model.dtype) for step in steps}
    mx.eval(list(timesteps.values()))  # here, as it waits for all that is being computed
    replay = Replay(model, collection.points, collection.settings.cfg_halves is Halves.APART)
    with ThreadPoolExecutor(1) as reader, replay:
        work = [(step, number) for step in steps for number in range(len(blocks))]
        states = ahead(reader, data_dir, manifest, [(blocks[number].images, step) for step, number in work])
        watched: Watched | None = None
        for (step, number), x in zip(work, states, strict=True):
            if number == 0:
                finished, watched = watched, Watched(collection, blocks, step, timesteps[step], part)
            else:
                finished = None
            assert watched is not None
            watched.forward(replay, blocks[number], x, texts[number], finished)
            progress.advance()
            if finished is not None:
                yield finished.record(replay, texts)
        assert watched is not None
        yield watched.record(replay, texts)


class Watched:
    """One step under observation."""

    def __init__(
        self, collection: Collection, blocks: Sequence[Block], step: int, timestep: mx.array, part: int | None
    ):
        self._collection, self._blocks, self._step, self._timestep = collection, blocks, step, timestep
        self._observer: Observer = new_observer(collection.stride)
        self._finite: list[mx.array] = []
        settings = collection.settings
        self._sampler: SampleWriter | None = None
        if settings.samples.kind is not Samples.NONE:
            path = collection.cache.samples_path(step, part)
            self._sampler = SampleWriter(path, settings.samples, settings.seed, step)

    def forward(
        self,
        replay: Replay,
        block: Block,
        x: NDArray[np.float32],
        text: Conditioning,
        before: "Watched | None" = None,
    ) -> None:
        """Start the forward of ``block``; what ``before`` has seen is brought to the host first."""
        manifest, seed = self._collection.manifest, self._collection.settings.seed
        phase = int(generator("seed", seed, block.number, self._step).randint(PHASES))
        fetch = before._observer.fetch if before is not None else lambda: None
        more = (manifest.cfg_weight > 0, phase, block.images, self._sampler, fetch)
        self._finite.append(replay.forward(self._observer, mx.array(x), text, self._timestep, *more))

    def record(self, replay: Replay, texts: Sequence[Conditioning]) -> StepRecord:
        """What was seen; where NaN or infinity went by, all is replayed once more with those left out and counted."""
        collection, step = self._collection, self._step
        seen = self._observer.results()
        table = self._sampler.finish() if self._sampler is not None else {}
        self._sampler = None
        if not self._observer.sound:
            self._observer = new_observer(collection.stride, finite_only=True)
            for block, text in zip(self._blocks, texts, strict=True):
                x = read_states(collection.data_dir, collection.manifest, block.images, step)
                self.forward(replay, block, x, text)
            seen = self._observer.results()
            _tell_non_finite(step, seen)
        sizes = [len(block.images) for block in self._blocks]
        halves = 2 if collection.manifest.cfg_weight > 0 else 1
        by_image = {name: _of_images(own, sizes, 1 if "/" in name else halves) for name, own in seen.items()}
        images = [i for block in self._blocks for i in block.images]
        merged = _pooled_streams(merge_halves(by_image), collection.points)
        return StepRecord(step, images, merged, all(bool(finite.item()) for finite in self._finite), table)


def _tell_non_finite(step: int, seen: Mapping[str, Seen]) -> None:
    bad = [name for name, own in seen.items() if own.statistics.nan or own.statistics.inf]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        note(
            f"step {step}: NaN or infinity at {bad[0]}{more}; left out of the statistics and counted, see "
            "non_finite in collection_metadata.json"
        )


def _of_images(seen: Seen, sizes: Sequence[int], halves: int) -> Seen:
    """``seen`` with a range for each image; its rows are those of blocks of ``sizes`` images, each with its halves."""
    parts, first = [], 0
    for size, run in groupby(sizes):
        blocks = len(list(run))
        rows = seen.ranges[first : first + blocks * halves * size].reshape(blocks, halves, size, 4)
        parts.append(over_rows(rows.swapaxes(0, 1)).reshape(-1, 4))
        first += blocks * halves * size
    return Seen(seen.dtype, seen.statistics, np.concatenate(parts))


def _pooled_streams(seen: dict[str, Seen], points: Sequence[TapPoint]) -> dict[str, Seen]:
    """With blocks of an image and a text stream: both together, under the block's own name."""
    pooled = {}
    for point in points:
        for half in ("", "/conditional", "/unconditional"):
            names = [f"{point.name}.{stream}{half}" for stream in ("image", "text")]
            streams = [seen[name] for name in names if name in seen]
            if point.kind == "block" and streams:
                statistics = streams[0].statistics
                for other in streams[1:]:
                    statistics = statistics.merge(other.statistics)
                ranges = over_rows(np.stack([stream.ranges for stream in streams]))
                pooled[point.name + half] = Seen(streams[0].dtype, statistics, ranges)
    return seen | pooled


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


def _prompt(data_dir: Path, entry: ImageEntry) -> str:
    if entry.prompt is None:
        raise CalibError(f"{data_dir}: the prompt of image {entry.image_id} is unknown; write it into {FILE}")
    return entry.prompt


def histogram_stride(transformer: MMDiT, manifest: Manifest, batch_size: int, histogram_rows: int | None) -> int:
    """Every how many rows one is counted, so that a full forward's image stream gives ``histogram_rows``.

    Coprime to the number of tokens, or the same places of every image would be sampled.
    """
    if histogram_rows is None:
        return 1
    height, width, _ = manifest.latent_shape
    tokens = height * width // int(transformer.config.patch_size) ** 2
    rows = tokens * batch_size * (2 if manifest.cfg_weight > 0 else 1)
    stride = max(1, rows // histogram_rows)
    while math.gcd(stride, tokens) > 1:
        stride += 1
    return stride


def batched_ids(image_ids: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Consecutive blocks of at most ``size`` ids."""
    for start in range(0, len(image_ids), size):
        yield tuple(image_ids[start : start + size])
