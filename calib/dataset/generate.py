"""Draw the images of a dataset and store the states of every denoising step.

Images are drawn in fixed blocks of image ids, the last one padded, so that the arithmetic of an image does not depend
on the number of images, on the process that draws it or on where an earlier run stopped: the same configuration gives
the same bytes. While one block is drawn, the previous one is written.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.base.errors import ConfigError
from calib.base.files import checksum, remove_abandoned
from calib.base.interrupts import in_threads
from calib.base.locks import refuse_unsettled
from calib.base.progress import Progress, note, say
from calib.base.seeds import image_seed
from calib.dataset.images import DrawnImage
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, ImageEntry, Manifest
from calib.dataset.preflight import check_disk, note_long_prompts, numbers, time_left
from calib.dataset.sampling import State, as_floats, euler, initial_noise, initial_state, noise_levels
from calib.dataset.settings import SamplerSettings, check_prompts, open_dataset, planned_dataset
from calib.dataset.shards import Shard, shard_lock
from calib.dataset.store import StateDtype, StorageFormat
from calib.dataset.writer import writing
from calib.models.architecture import Conditioning
from calib.models.memory import MemoryPlan, plan_memory
from calib.models.model import DiffusionModel
from calib.models.noise import Flow
from calib.models.parallel import shared_cores

import mlx.core as mx
import numpy as np


def missing_images(
    data_dir: Path,
    num_images: int,
    shard: Shard | None = None,
    thorough: bool = False,
    among: Sequence[int] | None = None,
) -> list[int]:
    """Ids below ``num_images`` of images that are not complete.

    Args:
        shard: restrict to ids that this shard draws.
        thorough: read all files and compare checksums, rather than check that the files exist.
        among: restrict to these ids.
    """
    wanted = list(range(num_images) if among is None else among)
    if not (data_dir / MANIFEST).exists():
        return wanted
    manifest = load_manifest(data_dir)
    if shard is not None and manifest.batch_size is not None:
        wanted = [i for i in wanted if shard.owns(i // manifest.batch_size)]
    listed = [manifest.images[i] for i in wanted if i in manifest.images]
    if thorough:
        with in_threads() as pool, Progress("check files", len(listed), "image", delay=2) as progress:
            whole = set()
            for entry, sound in zip(listed, pool.map(lambda e: is_whole(data_dir, e), listed), strict=True):
                progress.advance()
                if sound:
                    whole.add(entry.image_id)
    else:
        whole = {e.image_id for e in listed if all((data_dir / name).exists() for name in e.files)}
    return [i for i in wanted if i not in whole]


def is_whole(data_dir: Path, entry: ImageEntry) -> bool:
    """Whether every file of ``entry`` exists with the content that was written; Unsettled where that is not known."""
    for name in entry.files:
        try:
            if checksum(data_dir / name) != entry.checksums.get(name):
                return False
        except OSError as error:
            refuse_unsettled(data_dir / name, error)
            return False
    return True


def trajectory(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], settings: SamplerSettings, parts: int = 1
) -> Iterator[State]:
    """Yield states 0 … num_steps of a batch of images, one for each prompt and seed; see :func:`trajectory_from`."""
    text = model.encode(prompts, settings.cfg_weight)
    return trajectory_from(model, text, seeds, settings.num_steps, settings.cfg_weight, parts)


def trajectory_from(
    model: DiffusionModel, text: Conditioning, seeds: Sequence[int], num_steps: int, cfg_weight: float, parts: int = 1
) -> Iterator[State]:
    """Yield states 0 … num_steps of a batch of images whose prompts are encoded as ``text``.

    ``parts`` of the batch's rows are computed side by side, best in a :func:`calib.models.parallel.shared_cores`
    context.
    """
    sigmas = noise_levels(model.sampler, num_steps)
    times, flow = as_floats(model.timesteps(sigmas)), model.flow

    def after(i: int, x: mx.array) -> mx.array:
        sigma = sigmas[i]
        if flow is not None:
            return flow.step(x, model.guided_velocity(x, times[i], text, cfg_weight, parts), sigma, sigmas[i + 1])
        derivative = (x - model.denoise(x, times[i], sigma, text, cfg_weight, parts)) / sigma
        following: mx.array = x + derivative * (sigmas[i + 1] - sigma)
        return following

    return euler(after, _first_states(model, seeds, sigmas), as_floats(sigmas), times)


def _first_states(model: DiffusionModel, seeds: Sequence[int], sigmas: mx.array) -> mx.array:
    """State 0 of each seed."""
    sampler = model.sampler
    if isinstance(sampler, Flow):
        return mx.stack([sampler.noise(seed, model.latent_shape) for seed in seeds])
    noise = mx.stack([initial_noise(seed, model.latent_shape) for seed in seeds])
    return initial_state(noise, sampler, sigmas)


def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    num_images: int,
    data_dir: Path,
    settings: SamplerSettings,
    seed: int = 0,
    storage: StorageFormat = StorageFormat.HDF5,
    dtype: StateDtype = StateDtype.FLOAT16,
    steps: Sequence[int] | None = None,
    shard: Shard | None = None,
    wait: bool = False,
    known_missing: Sequence[int] | None = None,
) -> int:
    """Draw the missing images among 0 … num_images - 1 of the dataset in ``data_dir``, or of one shard of it.

    Returns the number of images drawn. Image i is drawn from ``prompts[i % len(prompts)]`` with the seed of
    (``seed``, i).

    Args:
        steps: states to store; None for all.
        wait: wait for another process that draws the same shard, rather than raise.
        known_missing: a thorough result of :func:`missing_images`; other images are not checked again.

    Raises:
        CalibError: the folder holds another dataset, the disk is full, another process is at work, the device failed,
            or latents of some images cannot be stored; finished images are kept.
        KeyboardInterrupt: its message reports the finished images; the same call continues.
    """
    if settings.cfg_weight > 0 and not model.supports_guidance:
        raise ConfigError.bad_value("sampler.cfg_weight", settings.cfg_weight, f"{model.name} takes only 0")
    shard = shard or Shard()
    guidance = settings.cfg_weight > 0
    memory = plan_memory(model, guidance, settings.batch_size)
    planned = planned_dataset(model, settings, memory.batch_size, seed, storage, dtype, steps)
    check_disk(data_dir, planned, settings.image_size, missing_images(data_dir, num_images, among=known_missing))
    with shard_lock(data_dir, shard, wait):
        manifest = open_dataset(data_dir, planned, shard)
        check_prompts(data_dir, manifest, prompts)
        todo = missing_images(data_dir, num_images, shard, thorough=True, among=known_missing)
        if todo:
            _clean(data_dir)
            memory = plan_memory(model, guidance, manifest.batch_size, parts=manifest.parts)
            check_disk(data_dir, manifest, settings.image_size, todo, announce=True)
            say(f"generate: {memory.warning or memory.describe()}")
            _note_surprises(model, settings, manifest)
            note_long_prompts(model, prompts, todo)
            _draw_missing(model, prompts, todo, data_dir, manifest, memory)
    return len(todo)


def _note_surprises(model: DiffusionModel, settings: SamplerSettings, manifest: Manifest) -> None:
    if settings.batch_size not in (None, manifest.batch_size):
        note(f"the dataset was begun with sampler.batch_size={manifest.batch_size}, which is kept")
    if model.dtype == mx.bfloat16 and manifest.dtype == StateDtype.FLOAT16:
        note("a bfloat16 model is replayed without loss from dataset.dtype=bfloat16, at the same size as float16")


def _clean(data_dir: Path) -> None:
    """Remove partial files of killed processes."""
    for folder in (data_dir, *(path for path in data_dir.iterdir() if path.is_dir())):
        remove_abandoned(folder)


@dataclass(frozen=True)
class _Block:
    """Image ids that are drawn in one batch, and the image of each row of the batch.

    Rows of images that are not wanted repeat a wanted one: they only pad the batch and do not affect other rows.
    """

    ids: range
    wanted: list[int]
    positions: list[int]
    rows: list[int]

    @classmethod
    def of(cls, number: int, size: int, todo: set[int]) -> "_Block":
        ids = range(number * size, (number + 1) * size)
        wanted = [i for i in ids if i in todo]
        return cls(ids, wanted, [i - ids.start for i in wanted], [i if i in todo else wanted[0] for i in ids])


def _draw_missing(
    model: DiffusionModel,
    prompts: Sequence[str],
    todo: Sequence[int],
    data_dir: Path,
    manifest: Manifest,
    memory: MemoryPlan,
) -> None:
    assert manifest.batch_size is not None
    size, wanted = manifest.batch_size, set(todo)
    blocks = [_Block.of(number, size, wanted) for number in sorted({i // size for i in todo})]
    shown = [[prompts[i % len(prompts)] for i in block.rows] for block in blocks]
    beside = [[prompts[i % len(prompts)] for i in block.ids] for block in blocks]
    start = time.monotonic()
    with (
        Progress("generate", len(blocks) * manifest.num_steps, "step") as progress,
        writing(data_dir, manifest, len(todo), model) as writer,
    ):
        texts = model.encode_batches(shown, manifest.cfg_weight, memory.keep_text, beside)
        for block, text in zip(blocks, texts, strict=True):
            done = writer.submitted
            progress.describe(f"image {numbers(done + 1, done + len(block.wanted))} of {len(todo)}")
            # Prompts were encoded before, as other BLAS threads would change them in the last bits.
            with shared_cores(len(text.tokens), manifest.parts):
                drawn = _draw_block(model, prompts, block, text, manifest, progress, memory.decoders)
            writer.submit(drawn)
            if not done and len(blocks) > 1:
                progress.say(time_left(time.monotonic() - start, len(block.wanted), len(blocks), len(todo)))


def _draw_block(
    model: DiffusionModel,
    prompts: Sequence[str],
    block: _Block,
    text: Conditioning,
    manifest: Manifest,
    progress: Progress,
    decoders: int,
) -> list[DrawnImage]:
    """Draw one block; returns its wanted images, on the host."""
    assert manifest.seed is not None
    dtype, keep = StateDtype(manifest.dtype), set(manifest.steps)
    seeds = [image_seed(manifest.seed, i) for i in block.rows]
    states = []
    for state in trajectory_from(model, text, seeds, manifest.num_steps, manifest.cfg_weight, manifest.parts):
        if state.step_index in keep:
            states.append(dtype.pack(state.x))
        if state.step_index:
            progress.advance()
        final = state.x
    pictures = model.decode_each(final[mx.array(block.positions)], decoders)
    drawn = []
    for image_id, row, picture in zip(block.wanted, block.positions, pictures, strict=True):
        drawn.append(
            DrawnImage(
                image_id,
                prompts[image_id % len(prompts)],
                seeds[row],
                np.stack([state[row] for state in states]),
                np.array(model.latent_format.process_out(final[row : row + 1]))[0],
                picture,
            )
        )
    return drawn
