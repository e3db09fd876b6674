"""Trajectories on disk: one HDF5 file per image, or one ``.npz`` per state (the layout of older datasets)."""

import json
from collections.abc import Mapping
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from calib.base import hdf5
from calib.base.errors import CalibError, reason_of
from calib.base.files import write_bytes
from calib.base.locks import refuse_unsettled
from calib.dataset.arrays import check_dataset, most_bytes, open_npz
from calib.dataset.manifest import Manifest

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mlx.core as mx

SAMPLES = "samples"
TRAJECTORY_FORMAT, TRAJECTORY_FORMAT_VERSION = "calib-trajectory", 2


class UnstorableLatents(CalibError):
    """Latents or pixels of one image are not finite, or would not be in the stored type."""


class StorageFormat(StrEnum):
    """Layout of trajectories on disk."""

    HDF5 = "hdf5"
    NPZ = "npz"


class StateDtype(StrEnum):
    """Type in which states are stored; bfloat16, which HDF5 and NumPy lack, is stored as its bits, uint16."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def bytes(self) -> int:
        return 4 if self is StateDtype.FLOAT32 else 2

    def pack(self, x: "mx.array") -> NDArray[Any]:
        """Convert ``x`` to its stored form."""
        import mlx.core as mx  # for drawing alone: who reads a dataset need not load it

        if self is StateDtype.BFLOAT16:
            return np.array(x.astype(mx.bfloat16).view(mx.uint16))
        return np.array(x.astype(mx.float16 if self is StateDtype.FLOAT16 else mx.float32))

    def unpack(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The values of a stored array: bfloat16 as float32, other types unchanged."""
        if self is StateDtype.BFLOAT16:
            return cast("NDArray[Any]", (stored.astype(np.uint32) << 16).view(np.float32))
        return stored


def sample_files(image_id: int, manifest: Manifest) -> list[str]:
    """Names, relative to the dataset's folder, of the files of one image's states."""
    if manifest.storage == StorageFormat.HDF5:
        return [f"{SAMPLES}/{image_id:04d}.h5"]
    return [f"{SAMPLES}/{image_id:04d}_{step:03d}.npz" for step in manifest.steps]


def write_trajectory(
    data_dir: Path, image_id: int, stored: NDArray[Any], manifest: Manifest, facts: Mapping[str, Any]
) -> list[str]:
    """Store the states of one image; returns the files' names.

    Args:
        stored: (len(manifest.steps), height, width, channels), packed as ``manifest.dtype``.
        facts: the image's metadata, written as attributes of its HDF5 file.

    Raises:
        UnstorableLatents: a state is not finite in the stored type.
    """
    names = sample_files(image_id, manifest)
    if not np.isfinite(StateDtype(manifest.dtype).unpack(stored)).all():
        raise UnstorableLatents(f"latents beyond {manifest.dtype}'s range")
    if manifest.storage == StorageFormat.HDF5:
        write_bytes(data_dir / names[0], _hdf5(stored, manifest, facts))
        return names
    for step, name, x in zip(manifest.steps, names, stored, strict=True):
        archive = BytesIO()
        np.savez(
            archive,
            x=x[None],
            timestep=np.float32(manifest.timesteps[step]),
            sigma=np.float32(manifest.sigmas[step]),
            step_index=np.int64(step),
            image_id=np.int64(image_id),
            is_final=np.bool_(step == manifest.num_steps),
        )
        write_bytes(data_dir / name, archive.getvalue())
    return names


def _hdf5(stored: NDArray[Any], manifest: Manifest, facts: Mapping[str, Any]) -> bytes:
    """An HDF5 file, made in memory: a full disk ends the process under HDF5, but raises under a plain write."""
    steps = manifest.steps
    with hdf5.in_memory() as file:
        file.attrs.update({"format": TRAJECTORY_FORMAT, "format_version": TRAJECTORY_FORMAT_VERSION, **facts})
        file.attrs["dataset"] = json.dumps(manifest.settings(), ensure_ascii=False)
        # One state per chunk, as states are read one by one; 16-bit latents do not compress.
        x = file.create_dataset("x", data=stored, chunks=(1, *stored.shape[1:]), fletcher32=True)
        x.attrs["dtype"] = manifest.dtype
        file["step_index"] = np.asarray(steps)
        file["sigma"] = np.asarray([manifest.sigmas[step] for step in steps], np.float32)
        file["timestep"] = np.asarray([manifest.timesteps[step] for step in steps], np.float32)
        file.flush()
        return cast(bytes, file.id.get_file_image())


def read_state(data_dir: Path, manifest: Manifest, image_id: int, step: int) -> NDArray[Any]:
    """The latent (height, width, channels) of one image before model call ``step``, in its stored type.

    No lock is taken, as a dataset's checksums were compared before: who opens a file meanwhile disturbs no collection.

    Raises:
        CalibError: the file is damaged or its state has another shape; the message names the file.
        Unsettled: it cannot be read now; it is not damaged.
    """
    entry, row = manifest.images[image_id], manifest.row(step)
    single = manifest.storage == StorageFormat.HDF5
    path = data_dir / entry.samples[0 if single else row]
    try:
        if single:
            most = most_bytes(path)
            with open(path, "rb") as raw, hdf5.opened(raw) as file:
                check_dataset(file["x"], most)
                stored: NDArray[Any] = file["x"][row]
        else:
            with open_npz(path) as archive:
                stored = archive["x"][0]
        state = StateDtype(manifest.dtype).unpack(stored)
        if state.shape != manifest.latent_shape:
            raise ValueError(f"shape {state.shape}, not {manifest.latent_shape}")
    except Exception as error:  # readers of damaged files raise errors of any class
        refuse_unsettled(path, error)
        mend = f"calib generate draws it again, calib verify {data_dir} says what else is wrong"
        raise CalibError(f"{path}: cannot be read ({reason_of(error)}); {mend}") from None
    return state
