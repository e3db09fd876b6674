"""Features of a dataset's images, by which subsets compare images: their final latents."""

from collections.abc import Sequence
from pathlib import Path

from calib.base.errors import CalibError, reason_of
from calib.base.locks import refuse_unsettled
from calib.dataset.arrays import read_npy
from calib.dataset.manifest import Manifest

import numpy as np
from numpy.typing import NDArray

#: Larger latents are averaged over squares: coarse features suffice, and those of a thousand images must fit in memory.
LARGEST_SIDE = 16


def features(data_dir: Path, manifest: Manifest, image_ids: Sequence[int]) -> NDArray[np.float32]:
    """The final latent of each image, (images, features), averaged to at most 16 × 16 positions.

    Raises:
        CalibError: a latent cannot be read.
    """
    return np.stack([_feature(data_dir, manifest, i) for i in image_ids])


def _feature(data_dir: Path, manifest: Manifest, image_id: int) -> NDArray[np.float32]:
    path = data_dir / manifest.images[image_id].latent_filename
    try:
        latent = read_npy(path).astype(np.float32).reshape(manifest.latent_shape)
    except Exception as error:  # readers of damaged files raise errors of any class
        refuse_unsettled(path, error)
        raise CalibError(
            f"{path}: cannot be read ({reason_of(error)}); calib verify {data_dir} says what else is wrong"
        ) from None
    height, width, channels = latent.shape
    by = -(-max(height, width) // LARGEST_SIDE)
    rows, columns = height // by, width // by
    squares = latent[: rows * by, : columns * by].reshape(rows, by, columns, by, channels)
    coarse: NDArray[np.float32] = squares.mean(axis=(1, 3)).reshape(-1)
    return coarse
