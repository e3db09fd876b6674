"""Observe one denoising step: replay it block by block, and assemble its statistics by image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from calib.activations.format import Block
from calib.activations.observer import Observer, TapResult
from calib.activations.observer_mlx import PHASES
from calib.activations.record import StepRecord, merge_halves, over_rows
from calib.activations.replay import Replay, new_observer
from calib.activations.samples import Samples, SampleSettings, SampleWriter
from calib.activations.states import ahead, read_states
from calib.activations.taps import Halves, TapPoint
from calib.base.errors import CalibError
from calib.base.layout import METADATA
from calib.base.progress import Progress, note
from calib.base.seeds import generator
from calib.dataset.manifest import MANIFEST, ImageEntry, Manifest
from calib.models.architecture import Conditioning
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel
from calib.models.parallel import shared_cores

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CollectSettings:
    """Settings of the collection of statistics.

    Attributes:
        batch_size: images replayed in one batch; None: the dataset's batch size.
        histogram_rows: approximate number of rows of an image stream counted in the histogram per full forward pass;
            other activations are sampled at the same rate. None: all. Extremes and moments always cover every value.
        seed: seed of the random shift of the sampled rows between forward passes.
    """

    batch_size: int | None = None
    histogram_rows: int | None = 256
    seed: int = 0
    cfg_halves: Halves = Halves.POOLED
    samples: SampleSettings = field(default_factory=SampleSettings)


@dataclass(frozen=True)
class CollectionSetup:
    """Data and settings that all steps of a collection share.

    Attributes:
        streams: names of the arrays of blocks that return several, by block.
        stride: stride of the rows that are counted in histograms.
        samples_path: path of the stored activations of a step and, optionally, of a part of its images.
        beside: texts that every batch has room for, where texts differ in length: of stored activations all images have
            as many tokens.
    """

    data_dir: Path
    manifest: Manifest
    points: Sequence[TapPoint]
    streams: Mapping[str, Sequence[str]]
    settings: CollectSettings
    batch_size: int
    stride: int
    samples_path: Callable[[int, int | None], Path]
    beside: Sequence[str] = ()


def replayed(
    model: DiffusionModel,
    setup: CollectionSetup,
    blocks: Sequence[Block],
    steps: Sequence[int],
    part: int | None,
    progress: Progress,
) -> Iterator[Callable[[], StepRecord]]:
    """Yield, for each step over ``blocks``, a function that makes its record, in NumPy alone and so in any thread.

    The next step is computed while one is read from the device.
    """
    if not steps:
        return
    data_dir, manifest = setup.data_dir, setup.manifest
    memory = plan_memory(model, manifest.cfg_weight > 0, setup.batch_size)
    prompts = [[prompt_of(data_dir, manifest.images[i]) for i in block.images] for block in blocks]
    beside = [setup.beside] * len(prompts)
    texts = list(model.encode_batches(prompts, manifest.cfg_weight, memory.keep_text, beside))
    replay = Replay(model, setup.points, setup.settings.cfg_halves is Halves.APART)
    rows = len(blocks[0].images) * (2 if manifest.cfg_weight > 0 else 1)
    finished: ObservedStep | None = None
    watched: ObservedStep | None = None
    try:
        # After encoding the prompts, which other BLAS threads would change in the last bits.
        with shared_cores(rows), ThreadPoolExecutor(1) as reader, replay:
            work = [(step, number) for step in steps for number in range(len(blocks))]
            states = ahead(reader, data_dir, manifest, [(blocks[number].images, step) for step, number in work])
            for (step, number), x in zip(work, states, strict=True):
                if number == 0:
                    finished, watched = watched, ObservedStep(setup, blocks, step, part)
                assert watched is not None
                watched.forward(replay, blocks[number], x, texts[number])
                progress.advance()
                if finished is not None:
                    yield finished.read(replay, texts)
                    finished = None
            assert watched is not None
            yield watched.read(replay, texts)
    except BaseException as error:
        for one in (finished, watched):
            if one is not None:
                one.abandon(error)
        raise


class ObservedStep:
    """One step that is being observed."""

    def __init__(self, setup: CollectionSetup, blocks: Sequence[Block], step: int, part: int | None):
        self._setup, self._blocks, self._step = setup, blocks, step
        self._observer: Observer = new_observer(setup.stride)
        self._finite: list[mx.array] = []
        settings = setup.settings
        self._sampler: SampleWriter | None = None
        if settings.samples.kind is not Samples.NONE:
            path = setup.samples_path(step, part)
            self._sampler = SampleWriter(path, settings.samples, settings.seed, step)

    def forward(self, replay: Replay, block: Block, x: NDArray[np.float32], text: Conditioning) -> None:
        """Start the forward pass of ``block``."""
        manifest, seed = self._setup.manifest, self._setup.settings.seed
        phase = int(generator("seed", seed, block.number, self._step).randint(PHASES))
        more = (manifest.timesteps[self._step], manifest.cfg_weight > 0, phase, block.images, self._sampler)
        self._finite.append(replay.forward(self._observer, mx.array(x), text, *more))

    def abandon(self, error: BaseException) -> None:
        """Remove partial files after ``error``."""
        if self._sampler is not None:
            self._sampler.abandon(error)

    def read(self, replay: Replay, texts: Sequence[Conditioning]) -> Callable[[], StepRecord]:
        """Copy the statistics to the host; returns a function that makes the step's record of them.

        Where NaN or infinity occurred, the step is replayed with those left out and counted.
        """
        setup, step = self._setup, self._step
        self._observer.fetch()
        table = self._sampler.finish() if self._sampler is not None else {}
        self._sampler = None
        if not self._observer.sound:
            self._observer = new_observer(setup.stride, finite_only=True)
            for block, text in zip(self._blocks, texts, strict=True):
                x = read_states(setup.data_dir, setup.manifest, block.images, step)
                self.forward(replay, block, x, text)
            self._observer.fetch()
            _report_non_finite(step, self._observer.results())
        finite = all(bool(finite.item()) for finite in self._finite)
        self._finite = []
        return lambda: self._record(finite, table)

    def _record(self, finite: bool, table: dict[str, Any]) -> StepRecord:
        setup, seen = self._setup, self._observer.results()
        sizes = [len(block.images) for block in self._blocks]
        halves = 2 if setup.manifest.cfg_weight > 0 else 1
        by_image = {name: _of_images(own, sizes, 1 if "/" in name else halves) for name, own in seen.items()}
        images = [i for block in self._blocks for i in block.images]
        merged = _pooled_streams(merge_halves(by_image), setup.streams)
        return StepRecord(self._step, images, merged, finite, table)


def _report_non_finite(step: int, seen: Mapping[str, TapResult]) -> None:
    bad = [name for name, own in seen.items() if own.statistics.nan or own.statistics.inf]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        note(
            f"step {step}: NaN or infinity at {bad[0]}{more}; left out of the statistics and counted, see "
            f"non_finite in {METADATA}"
        )


def _of_images(seen: TapResult, sizes: Sequence[int], halves: int) -> TapResult:
    """``seen`` with one range per image, from rows of blocks of ``sizes`` images with ``halves`` guidance halves."""
    parts, first = [], 0
    for size, run in groupby(sizes):
        blocks = len(list(run))
        rows = seen.ranges[first : first + blocks * halves * size].reshape(blocks, halves, size, 4)
        parts.append(over_rows(rows.swapaxes(0, 1)).reshape(-1, 4))
        first += blocks * halves * size
    return TapResult(seen.dtype, seen.statistics, np.concatenate(parts))


def _pooled_streams(seen: dict[str, TapResult], blocks: Mapping[str, Sequence[str]]) -> dict[str, TapResult]:
    """``seen`` with an entry for each of ``blocks`` that merges its streams."""
    pooled = {}
    for block, streams in blocks.items():
        for half in ("", "/conditional", "/unconditional"):
            names = [f"{block}.{stream}{half}" for stream in streams]
            if parts := [seen[name] for name in names if name in seen]:
                statistics = parts[0].statistics
                for other in parts[1:]:
                    statistics = statistics.merge(other.statistics)
                ranges = over_rows(np.stack([part.ranges for part in parts]))
                pooled[block + half] = TapResult(parts[0].dtype, statistics, ranges)
    return seen | pooled


def prompt_of(data_dir: Path, entry: ImageEntry) -> str:
    """The prompt of one image; raises where an older dataset does not record it."""
    if entry.prompt is None:
        raise CalibError(f"{data_dir}: the prompt of image {entry.image_id} is unknown; write it into {MANIFEST}")
    return entry.prompt
