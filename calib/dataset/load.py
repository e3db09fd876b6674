"""Open a dataset of calib's own layout or of the older one."""

from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, Unsettled
from calib.base.files import read_json
from calib.dataset.manifest import MANIFEST, MOST_BATCH, MOST_BYTES, ImageEntry, Manifest, parse_manifest
from calib.dataset.older import parse_older_manifest
from calib.dataset.store import StateDtype, StorageFormat


def load_manifest(data_dir: Path) -> Manifest:
    """Read the manifest of the dataset in ``data_dir``.

    Raises:
        CalibError: it is missing or damaged; the message names the remedy.
        Unsettled: it cannot be read now.
    """
    path = data_dir / MANIFEST
    if not path.exists():
        raise CalibError(
            f"{data_dir}: no dataset there (no {MANIFEST}); make one with calib generate, or, if its images are there, "
            f"calib rebuild-manifest {data_dir}"
        )
    try:
        document: Any = read_json(path, MOST_BYTES)
    except Unsettled:
        raise
    except CalibError as error:
        raise CalibError(f"{error}; calib rebuild-manifest {data_dir} restores it from the files") from None
    if isinstance(document, dict) and "format" not in document and "images" in document:
        manifest = parse_older_manifest(data_dir, document)
    else:
        manifest = parse_manifest(path, document)
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: Manifest) -> None:
    """Raise where a value of the manifest is impossible."""
    try:
        StateDtype(manifest.dtype), StorageFormat(manifest.storage)
        batch_size = manifest.batch_size or 1
        if manifest.num_steps < 1 or (manifest.seed or 0) < 0 or not 1 <= batch_size <= MOST_BATCH:
            raise ValueError(f"num_steps {manifest.num_steps}, seed {manifest.seed}, batch {manifest.batch_size}")
        if not 1 <= manifest.parts <= MOST_BATCH:
            raise ValueError(f"parts {manifest.parts}")
        states = manifest.num_steps + 1
        if not len(manifest.sigmas) == len(manifest.timesteps) == states:
            raise ValueError(f"{len(manifest.sigmas)} sigmas for {states} states")
        if not manifest.steps or not set(manifest.steps) <= set(range(states)):
            raise ValueError(f"steps {manifest.steps} of {states} states")
        for image_id, entry in manifest.images.items():
            if not _is_well_formed(entry):
                raise ValueError(f"the entry of image {image_id!r}")
    except (TypeError, ValueError) as error:
        what = "no states to be found" if manifest.is_older and not manifest.steps else f"damaged manifest ({error})"
        again = f"calib rebuild-manifest {path.parent} makes it anew from the files"
        raise CalibError(f"{path}: {what}; {again}") from None


def _is_well_formed(entry: ImageEntry) -> bool:
    return (
        all(isinstance(value, int) for value in (entry.image_id, entry.num_steps))
        and entry.image_id >= 0
        and isinstance(entry.cfg_weight, int | float)
        and isinstance(entry.prompt, str | None)
        and isinstance(entry.seed, int | None)
        and isinstance(entry.samples, list)
        and all(isinstance(name, str) for name in entry.files)
        and isinstance(entry.checksums, dict)
    )
