"""Trajectories on disk: one HDF5 file an image, or one ``.npz`` a state (the layout of older datasets)."""

from enum import StrEnum
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from calib.dataset.manifest import ImageEntry, Manifest
from calib.errors import CalibError
from calib.files import replacing

import h5py
import numpy as np
from numpy.typing import NDArray

SAMPLES = "samples"


class StorageFormat(StrEnum):
    """Layout of trajectories on disk."""

    HDF5 = "hdf5"
    NPZ = "npz"


class StateDtype(StrEnum):
    """Type in which states are stored."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


def sample_files(image_id: int, num_states: int, storage: StorageFormat) -> list[str]:
    """Names, relative to the dataset, of the files that hold one image's trajectory."""
    if storage is StorageFormat.HDF5:
        return [f"{SAMPLES}/{image_id:04d}.h5"]
    return [f"{SAMPLES}/{image_id:04d}_{step:03d}.npz" for step in range(num_states)]


def write_trajectory(
    data_dir: Path, image_id: int, states: NDArray[Any], manifest: Manifest, attributes: dict[str, Any]
) -> list[str]:
    """Store ``states`` (num_steps + 1, height, width, channels) of one image; returns the files' names."""
    storage = StorageFormat(manifest.storage)
    names = sample_files(image_id, len(states), storage)
    with np.errstate(over="ignore"):  # what overflows is reported in the next line
        stored = states.astype(manifest.dtype)
    if not np.isfinite(stored).all():
        raise CalibError(f"image {image_id}: NaN or infinite latents in {manifest.dtype}; try dataset.dtype=float32")
    if storage is StorageFormat.HDF5:
        with replacing(data_dir / names[0]) as temporary:
            _write_hdf5(temporary, stored, manifest, attributes)
        return names
    for step, (name, x) in enumerate(zip(names, stored, strict=True)):
        with replacing(data_dir / name) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                x=x[None],
                timestep=np.float32(manifest.timesteps[step]),
                sigma=np.float32(manifest.sigmas[step]),
                step_index=np.int64(step),
                image_id=np.int64(image_id),
                is_final=np.bool_(step == manifest.num_steps),
            )
    return names


def _write_hdf5(path: Path, states: NDArray[Any], manifest: Manifest, attributes: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "calib-trajectory", "format_version": 1, **attributes})
        # One state a chunk, as states are read one by one; 16-bit latents do not compress.
        file.create_dataset("x", data=states, chunks=(1, *states.shape[1:]), fletcher32=True)
        file["step_index"] = np.arange(len(states))
        file["sigma"] = np.asarray(manifest.sigmas, np.float32)
        file["timestep"] = np.asarray(manifest.timesteps, np.float32)


def read_state(data_dir: Path, entry: ImageEntry, step: int) -> NDArray[Any]:
    """The latent (height, width, channels) of one image before model call ``step``, in its stored type."""
    single = len(entry.samples) == 1
    path = data_dir / (entry.samples[0] if single else entry.samples[step])
    try:
        if single:
            with h5py.File(path, "r") as file:
                state: NDArray[Any] = file["x"][step]
        else:
            with np.load(path) as archive:
                state = archive["x"][0]
    except (OSError, EOFError, KeyError, IndexError, ValueError, BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise CalibError(f"{path}: cannot be read ({reason}); remove it and run calib generate again") from None
    return state
