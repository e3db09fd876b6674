"""One step under observation: replayed block after block, what was seen gathered image by image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from calib.activations.format import Block
from calib.activations.observer import Observer, Seen
from calib.activations.observer_mlx import PHASES
from calib.activations.record import StepRecord, merge_halves, over_rows
from calib.activations.replay import Replay, new_observer, shared_cores
from calib.activations.samples import Samples, SampleSettings, SampleWriter
from calib.activations.states import ahead, read_states
from calib.activations.taps import Halves, TapPoint
from calib.base.errors import CalibError
from calib.base.progress import Progress, note
from calib.base.seeds import generator
from calib.dataset.manifest import MANIFEST, ImageEntry, Manifest
from calib.models.architecture import Conditioning
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


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


@dataclass(frozen=True)
class Setup:
    """What all steps of a collection have in common.

    Attributes:
        streams: of blocks that return several arrays, their names, by block.
        stride: every how many rows one enters the histogram.
        samples_path: where activations of a step, and of a part of its images, are kept.
    """

    data_dir: Path
    manifest: Manifest
    points: Sequence[TapPoint]
    streams: Mapping[str, Sequence[str]]
    settings: CollectSettings
    batch_size: int
    stride: int
    samples_path: Callable[[int, int | None], Path]


def replayed(
    model: DiffusionModel,
    setup: Setup,
    blocks: Sequence[Block],
    steps: Sequence[int],
    part: int | None,
    progress: Progress,
) -> Iterator[StepRecord]:
    """The record of each step over ``blocks``; while one is read from the device the next is computed already."""
    if not steps:
        return
    data_dir, manifest = setup.data_dir, setup.manifest
    memory = plan_memory(model, manifest.cfg_weight > 0, setup.batch_size)
    prompts = [[prompt_of(data_dir, manifest.images[i]) for i in block.images] for block in blocks]
    texts = list(model.encode_batches(prompts, manifest.cfg_weight, memory.keep_text))
    timesteps = {step: mx.array(manifest.timesteps[step]).astype(model.dtype) for step in steps}
    mx.eval(list(timesteps.values()))  # here, as it waits for all that is being computed
    replay = Replay(model, setup.points, setup.settings.cfg_halves is Halves.APART)
    rows = len(blocks[0].images) * (2 if manifest.cfg_weight > 0 else 1)
    finished: Watched | None = None
    watched: Watched | None = None
    try:
        # Only now: prompts are encoded as they are for drawing, or their last bits would differ.
        with shared_cores(rows), ThreadPoolExecutor(1) as reader, replay:
            work = [(step, number) for step in steps for number in range(len(blocks))]
            states = ahead(reader, data_dir, manifest, [(blocks[number].images, step) for step, number in work])
            for (step, number), x in zip(work, states, strict=True):
                if number == 0:
                    finished, watched = watched, Watched(setup, blocks, step, timesteps[step], part)
                assert watched is not None
                watched.forward(replay, blocks[number], x, texts[number], finished)
                progress.advance()
                if finished is not None:
                    yield finished.record(replay, texts)
                    finished = None
            assert watched is not None
            yield watched.record(replay, texts)
    except BaseException as error:
        for one in (finished, watched):
            if one is not None:
                one.abandon(error)
        raise


class Watched:
    """One step under observation."""

    def __init__(self, setup: Setup, blocks: Sequence[Block], step: int, timestep: mx.array, part: int | None):
        self._setup, self._blocks, self._step, self._timestep = setup, blocks, step, timestep
        self._observer: Observer = new_observer(setup.stride)
        self._finite: list[mx.array] = []
        settings = setup.settings
        self._sampler: SampleWriter | None = None
        if settings.samples.kind is not Samples.NONE:
            path = setup.samples_path(step, part)
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
        manifest, seed = self._setup.manifest, self._setup.settings.seed
        phase = int(generator("seed", seed, block.number, self._step).randint(PHASES))
        fetch = before._observer.fetch if before is not None else lambda: None
        more = (manifest.cfg_weight > 0, phase, block.images, self._sampler, fetch)
        self._finite.append(replay.forward(self._observer, mx.array(x), text, self._timestep, *more))

    def abandon(self, error: BaseException) -> None:
        """Leave nothing half-written."""
        if self._sampler is not None:
            self._sampler.abandon(error)

    def record(self, replay: Replay, texts: Sequence[Conditioning]) -> StepRecord:
        """What was seen; where NaN or infinity went by, all is replayed once more with those left out and counted."""
        setup, step = self._setup, self._step
        seen = self._observer.results()
        table = self._sampler.finish() if self._sampler is not None else {}
        self._sampler = None
        if not self._observer.sound:
            self._observer = new_observer(setup.stride, finite_only=True)
            for block, text in zip(self._blocks, texts, strict=True):
                x = read_states(setup.data_dir, setup.manifest, block.images, step)
                self.forward(replay, block, x, text)
            seen = self._observer.results()
            _tell_non_finite(step, seen)
        sizes = [len(block.images) for block in self._blocks]
        halves = 2 if setup.manifest.cfg_weight > 0 else 1
        by_image = {name: _of_images(own, sizes, 1 if "/" in name else halves) for name, own in seen.items()}
        images = [i for block in self._blocks for i in block.images]
        merged = _pooled_streams(merge_halves(by_image), setup.streams)
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


def _pooled_streams(seen: dict[str, Seen], blocks: Mapping[str, Sequence[str]]) -> dict[str, Seen]:
    """With blocks of several ``streams``: all of a block's together, under the block's own name."""
    pooled = {}
    for block, streams in blocks.items():
        for half in ("", "/conditional", "/unconditional"):
            names = [f"{block}.{stream}{half}" for stream in streams]
            if parts := [seen[name] for name in names if name in seen]:
                statistics = parts[0].statistics
                for other in parts[1:]:
                    statistics = statistics.merge(other.statistics)
                ranges = over_rows(np.stack([part.ranges for part in parts]))
                pooled[block + half] = Seen(parts[0].dtype, statistics, ranges)
    return seen | pooled


def prompt_of(data_dir: Path, entry: ImageEntry) -> str:
    """The prompt of one image; an older dataset may not say."""
    if entry.prompt is None:
        raise CalibError(f"{data_dir}: the prompt of image {entry.image_id} is unknown; write it into {MANIFEST}")
    return entry.prompt
