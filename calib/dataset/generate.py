"""Draw the images of a dataset and keep every state on the way.

Work goes in fixed blocks of image ids, the last one padded, so that the arithmetic of an image does not depend on
how many were asked for or where an earlier run stopped: the same configuration gives the same bytes.
"""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.dataset.manifest import FILE, ImageEntry, Manifest
from calib.dataset.store import StateDtype, StorageFormat, write_trajectory
from calib.errors import CalibError, ConfigError
from calib.files import checksum, replacing
from calib.models.model import DiffusionModel
from calib.progress import Progress
from calib.sampling import State, as_floats, euler, initial_noise, initial_state, noise_levels, timesteps_of
from calib.seeds import image_seed
from calib.versions import versions

import mlx.core as mx
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn.

    Attributes:
        cfg_weight: classifier-free guidance; 0 switches it off.
        batch_size: images drawn side by side.
        image_size: height and width, pixels.
    """

    num_steps: int = 50
    cfg_weight: float = 3.0
    shift: float = 1.0
    batch_size: int = 10
    image_size: tuple[int, ...] = (64, 64)


@contextmanager
def dataset_lock(data_dir: Path, announce: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the dataset for writing; waits, and says so, while another process does. Dies with its process."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"waiting for another process that writes {data_dir}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def missing_images(data_dir: Path, num_images: int) -> list[int]:
    """Ids below ``num_images`` that the dataset has no entry for, or whose files are gone."""
    if not (data_dir / FILE).exists():
        return list(range(num_images))
    images = Manifest.load(data_dir).images
    return [i for i in range(num_images) if i not in images or not files_exist(data_dir, images[i])]


def check_prompts(data_dir: Path, manifest: Manifest, prompts: Sequence[str]) -> None:
    """Raise where the dataset's images show other prompts than those asked for."""
    for image_id, entry in manifest.images.items():
        wanted = prompts[image_id % len(prompts)]
        if entry.prompt != wanted:
            raise ConfigError(
                f"prompts: {data_dir} shows {entry.prompt!r} in image {image_id}, not {wanted!r}; name another data_dir"
            )


def files_exist(data_dir: Path, entry: ImageEntry) -> bool:
    """Whether every file that ``entry`` names is there."""
    return all((data_dir / name).exists() for name in (entry.filename, entry.latent_filename, *entry.samples))


def trajectory(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], settings: SamplerSettings
) -> Iterator[State]:
    """States 0 … num_steps of a batch of images."""
    sigmas = noise_levels(model.sampler, settings.num_steps)
    text = model.encode(prompts, settings.cfg_weight)
    noise = mx.stack([initial_noise(seed, model.latent_shape) for seed in seeds])

    def denoise(x: mx.array, timestep: mx.array, sigma: mx.array) -> mx.array:
        return model.denoise(x, timestep, sigma, text, settings.cfg_weight)

    return euler(denoise, initial_state(noise, model.sampler, sigmas), sigmas, model.dtype)


def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    num_images: int,
    data_dir: Path,
    settings: SamplerSettings,
    seed: int = 0,
    storage: StorageFormat = StorageFormat.HDF5,
    dtype: StateDtype = StateDtype.FLOAT16,
) -> Manifest:
    """Make images 0 … num_images - 1 of the dataset in ``data_dir``; those it has are kept.

    Image i is drawn from ``prompts[i % len(prompts)]`` with the seed of (``seed``, i).
    """
    if settings.cfg_weight > 0 and not model.supports_guidance:
        raise ConfigError.bad_value("sampler.cfg_weight", settings.cfg_weight, f"{model.name} takes only 0")
    with dataset_lock(data_dir):
        manifest = _open_manifest(model, data_dir, settings, seed, storage, dtype)
        check_prompts(data_dir, manifest, prompts)
        todo = set(missing_images(data_dir, num_images))
        size = manifest.batch_size
        blocks = sorted({image_id // size for image_id in todo})
        total = len(blocks) * settings.num_steps
        with Progress(f"generate {len(todo)} images", total, "step") as progress:
            for block in blocks:
                ids = range(block * size, (block + 1) * size)
                entries = _draw_block(model, prompts, ids, todo, data_dir, manifest, settings, progress)
                manifest.images.update({entry.image_id: entry for entry in entries})
                manifest.save(data_dir)
    return manifest


def _open_manifest(
    model: DiffusionModel,
    data_dir: Path,
    settings: SamplerSettings,
    seed: int,
    storage: StorageFormat,
    dtype: StateDtype,
) -> Manifest:
    sigmas = noise_levels(model.sampler, settings.num_steps)
    fresh = Manifest(
        model=model.name,
        fingerprint=model.fingerprint,
        num_steps=settings.num_steps,
        cfg_weight=settings.cfg_weight,
        shift=settings.shift,
        seed=seed,
        batch_size=settings.batch_size,
        latent_shape=model.latent_shape,
        sigmas=as_floats(sigmas),
        timesteps=as_floats(timesteps_of(sigmas, model.dtype)),
        storage=storage.value,
        dtype=dtype.value,
        versions=versions(),
    )
    if not (data_dir / FILE).exists():
        return fresh
    found = Manifest.load(data_dir)
    for name in (
        "model",
        "fingerprint",
        "num_steps",
        "cfg_weight",
        "shift",
        "seed",
        "storage",
        "dtype",
        "latent_shape",
    ):
        there, wanted = getattr(found, name), getattr(fresh, name)
        if there != wanted:
            raise CalibError(f"{data_dir}: holds a dataset with {name}={there}, not {wanted}; choose another data_dir")
    return found


def _draw_block(
    model: DiffusionModel,
    prompts: Sequence[str],
    ids: Sequence[int],
    todo: set[int],
    data_dir: Path,
    manifest: Manifest,
    settings: SamplerSettings,
    progress: Progress,
) -> list[ImageEntry]:
    """Draw one block and store those of its images that are asked for; the others only fill the batch."""
    texts = [prompts[i % len(prompts)] for i in ids]
    seeds = [image_seed(manifest.seed, i) for i in ids]
    states = []
    for state in trajectory(model, texts, seeds, settings):
        states.append(np.array(state.x))
        if state.step_index:
            progress.advance()
    wanted = [position for position, image_id in enumerate(ids) if image_id in todo]
    final = mx.array(states[-1])
    images = np.array(model.decode(final))
    latents = np.array(model.latent_format.process_out(final))
    entries = []
    for k in wanted:
        facts: dict[str, Any] = {
            "image_id": ids[k],
            "prompt": texts[k],
            "seed": seeds[k],
            "cfg_weight": settings.cfg_weight,
        }
        attributes = {**facts, "model": model.name, "fingerprint": model.fingerprint, "num_steps": settings.num_steps}
        trajectory_k = np.stack([state[k] for state in states])
        samples = write_trajectory(data_dir, ids[k], trajectory_k, manifest, attributes)
        picture, latent = f"images/{ids[k]:04d}.png", f"latents/{ids[k]:04d}.npy"
        _write_png(data_dir / picture, images[k], attributes)
        with replacing(data_dir / latent) as temporary, open(temporary, "wb") as file:
            np.save(file, latents[k])
        sums = {name: checksum(data_dir / name) for name in (picture, latent, *samples)}
        entries.append(
            ImageEntry(
                **facts,
                num_steps=settings.num_steps,
                filename=picture,
                latent_filename=latent,
                samples=samples,
                checksums=sums,
            )
        )
    return entries


def _write_png(path: Path, image: np.ndarray, attributes: dict[str, object]) -> None:
    """``image`` (height, width, 3) in [0, 1]; the attributes become PNG text, so that a picture explains itself."""
    info = PngInfo()
    for name, value in attributes.items():
        info.add_itxt(name, str(value))
    with replacing(path) as temporary:
        # DiffusionKit truncates (x * 255), it does not round: the same seed gives its very pixels.
        Image.fromarray((image * 255).astype(np.uint8)).save(temporary, format="PNG", pnginfo=info)
