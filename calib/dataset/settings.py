"""A dataset's settings: fixed when it is begun, and required to be the same when images are added."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from calib.base.errors import CalibError, ConfigError
from calib.base.progress import counted
from calib.base.values import AtLeast, AtMost
from calib.base.versions import versions
from calib.dataset.images import image_ids
from calib.dataset.load import load_manifest
from calib.dataset.manifest import DEFAULT_NOISE, MANIFEST, Manifest
from calib.dataset.sampling import as_floats, noise_levels
from calib.dataset.shards import Shard, being_written, manifest_lock
from calib.dataset.store import StateDtype, StorageFormat
from calib.models.model import DiffusionModel
from calib.models.parallel import parts_for

import mlx.core as mx

#: Settings that determine the images: all images of a folder share one value of each.
IDENTITY = (
    *("model", "fingerprint", "text_encoders", "num_steps", "cfg_weight", "shift", "seed"),
    *("storage", "dtype", "steps", "latent_shape"),
)
#: Descriptions, for users, of settings whose names in the manifest are not self-explanatory.
SPELT_OUT = {"fingerprint": "weights (or model.dtype)", "text_encoders": "text encoders", "steps": "stored states"}


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the sampler.

    Attributes:
        cfg_weight: weight of classifier-free guidance; 0 switches it off.
        shift: timestep shift. In float32 larger or smaller ones give noise levels that are equal, or not finite.
        batch_size: images per batch; None: as memory allows. A dataset keeps the batch size that it was begun with.
        image_size: height and width, pixels.
    """

    num_steps: Annotated[int, AtLeast(1), AtMost(10_000)] = 50
    cfg_weight: Annotated[float, AtLeast(0), AtMost(1000)] = 3.0
    shift: Annotated[float, AtLeast(0.01), AtMost(100)] = 1.0
    batch_size: Annotated[int | None, AtLeast(1)] = None
    image_size: tuple[int, ...] = (64, 64)


def planned_dataset(
    model: DiffusionModel,
    settings: SamplerSettings,
    default_batch_size: int,
    seed: int,
    storage: StorageFormat,
    dtype: StateDtype,
    steps: Sequence[int] | None,
) -> Manifest:
    """The manifest, without images, of the requested dataset."""
    sigmas = noise_levels(model.sampler, settings.num_steps)
    if not mx.isfinite(sigmas).all().item():
        allowed = f"{model.name} makes noise levels of it that are not finite"
        if model.flow is not None:  # which has no shift of the user's
            raise ConfigError.bad_value("sampler.num_steps", settings.num_steps, allowed)
        raise ConfigError.bad_value("sampler.shift", settings.shift, allowed)
    batch_size = settings.batch_size or default_batch_size
    return Manifest(
        model=model.name,
        fingerprint=model.fingerprint,
        text_encoders=model.text_encoders,
        num_steps=settings.num_steps,
        cfg_weight=settings.cfg_weight,
        shift=settings.shift,
        seed=seed,
        batch_size=batch_size,
        latent_shape=model.latent_shape,
        sigmas=as_floats(sigmas),
        timesteps=as_floats(model.timesteps(sigmas)),
        steps=list(range(settings.num_steps + 1)) if steps is None else sorted(steps),
        storage=storage.value,
        dtype=dtype.value,
        versions=versions(model.transformer),
        parts=parts_for(batch_size * (2 if settings.cfg_weight > 0 else 1)),
        noise=DEFAULT_NOISE if model.flow is None else model.flow.noise_kind,
    )


def open_dataset(data_dir: Path, planned: Manifest, shard: Shard) -> Manifest:
    """The manifest of the dataset in ``data_dir``; where there is none, ``planned`` is written and returned.

    A dataset without images is replaced, unless a shard other than ``shard`` is being drawn.

    Raises:
        CalibError: the dataset has other settings than ``planned``.
    """
    with manifest_lock(data_dir):
        if (data_dir / MANIFEST).exists():
            found = load_manifest(data_dir)
            differences = [name for name in IDENTITY if getattr(found, name) != getattr(planned, name)]
            if not differences:
                return found
            if found.is_older:
                raise read_only_error(data_dir)
            if found.images or being_written(data_dir, besides=shard):
                name = differences[0]
                there, wanted = getattr(found, name), getattr(planned, name)
                what = f"{SPELT_OUT[name]}: {name}" if name in SPELT_OUT else name
                raise CalibError(
                    f"{data_dir}: holds a dataset with other {what}={there}, not {wanted}; choose another data_dir"
                )
        check_manifest_is_there(data_dir)
        planned.save(data_dir)
        return planned


def read_only_error(data_dir: Path) -> CalibError:
    """The error for an attempt to add images to a dataset of the older layout."""
    return CalibError(
        f"{data_dir}: a dataset of the older layout is only read: calib collect data_dir={data_dir}; to draw, name "
        "another data_dir"
    )


def check_manifest_is_there(data_dir: Path) -> None:
    """Raise where ``data_dir`` has images but no manifest, which is written before any image and so was lost."""
    if not (data_dir / MANIFEST).exists() and (found := image_ids(data_dir)):
        raise CalibError(
            f"{data_dir}: holds files of {counted(len(found), 'image')} but no {MANIFEST}; calib rebuild-manifest "
            f"{data_dir} restores it, or name another data_dir"
        )


def check_prompts(data_dir: Path, manifest: Manifest, prompts: Sequence[str]) -> None:
    """Raise where the dataset's images were drawn from prompts other than ``prompts``."""
    for image_id, entry in manifest.images.items():
        wanted = prompts[image_id % len(prompts)]
        if entry.prompt != wanted:
            raise ConfigError(
                f"prompts: {data_dir} shows {entry.prompt!r} in image {image_id}, not {wanted!r}; name another data_dir"
            )
