"""Rebuild ``manifest.json`` from the metadata that every picture and HDF5 file carries."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from calib.base import hdf5
from calib.base.errors import CalibError, Unsettled, reason_of
from calib.base.files import checksum, write_json
from calib.base.interrupts import in_threads
from calib.base.locks import refuse_unsettled, settled
from calib.base.progress import Progress
from calib.dataset.arrays import most_bytes
from calib.dataset.checks import Finding, Kind, canonical_files
from calib.dataset.images import IMAGES, image_ids, open_picture
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, ImageEntry, Manifest
from calib.dataset.rebuild_older import older_document
from calib.dataset.repair import exclusive, timestamp
from calib.dataset.store import SAMPLES
from calib.dataset.verify import check_images


@dataclass(frozen=True)
class Rebuilt:
    """The result of :func:`rebuild_manifest`.

    Attributes:
        images: number of images in the new manifest.
        left_out: the faults of images that were left out.
        unknown: facts that an older dataset's files do not record, each with the remedy, a line each.
        kept: the previous manifest under its new name; None where there was none.
    """

    images: int
    left_out: list[Finding]
    unknown: list[str]
    kept: Path | None


def rebuild_manifest(data_dir: Path, force: bool = False) -> Rebuilt:
    """Write ``manifest.json`` from the files of the dataset in ``data_dir``.

    For a dataset of calib's layout it is byte for byte the lost one, without images whose files are missing or damaged;
    for the older layout it holds the known facts, the rest is null. A previous manifest is renamed.

    Raises:
        CalibError: there are no such files, another process writes, or the manifest is readable and ``force`` not set.
        Unsettled: a file cannot be read now; nothing was changed.
    """
    ids = image_ids(data_dir)
    if not ids:
        what = "no images there to restore a manifest from" if data_dir.is_dir() else "no such folder"
        raise CalibError(f"{data_dir}: {what}")
    path = data_dir / MANIFEST
    with exclusive(data_dir):
        readable = _is_readable(data_dir)
        if readable and not force:
            raise CalibError(f"{path}: is there and readable; --force makes it anew and keeps this one beside it")
        settings = _settings_of(data_dir, ids)
        if settings is None:
            document, unknown = older_document(data_dir)
            kept = _keep(path, readable)
            write_json(path, document)
            return Rebuilt(len(document["images"]), [], unknown, kept)
        manifest, left_out = _restore(data_dir, settings, ids)
        kept = _keep(path, readable)
        manifest.save(data_dir)
        return Rebuilt(len(manifest.images), left_out, [], kept)


def _is_readable(data_dir: Path) -> bool:
    try:
        load_manifest(data_dir)
    except Unsettled:
        raise
    except CalibError:
        return False
    return True


def _keep(path: Path, readable: bool) -> Path | None:
    if not path.exists():
        return None
    kept = path.with_name(f"{path.name}.{'old' if readable else 'damaged'}-{timestamp()}")
    while kept.exists():
        kept = kept.with_name(f"{kept.name}-2")
    return path.rename(kept)


def _settings_of(data_dir: Path, ids: Sequence[int]) -> str | None:
    """The settings that most files carry, as JSON text; None where no file has settings."""
    names = [f"{folder}/{i:04d}.{suffix}" for i in ids for folder, suffix in ((SAMPLES, "h5"), (IMAGES, "png"))]
    names = [name for name in names if (data_dir / name).exists()]
    with in_threads() as pool, Progress("read settings", len(names), "file", delay=1) as progress:
        found: Counter[str] = Counter()
        for facts in pool.map(partial(_facts, data_dir), names):
            found.update([str(facts["dataset"])] if _is_settings(facts.get("dataset")) else [])
            progress.advance()
    return found.most_common(1)[0][0] if found else None


def _facts(data_dir: Path, name: str) -> dict[str, Any]:
    """Metadata of a file; empty where it cannot be read."""
    try:
        if name.endswith(".h5"):
            most_bytes(data_dir / name)
            with settled(data_dir / name) as raw, hdf5.opened(raw) as file:
                return dict(file.attrs)
        with open_picture(data_dir / name) as picture:
            return {str(key): value for key, value in picture.info.items()}
    except Exception as error:  # readers of damaged files raise errors of any class; the checks report the file later
        refuse_unsettled(data_dir / name, error)
        return {}


def _is_settings(text: Any) -> bool:
    try:
        Manifest.from_settings(loads(text))
    except (JSONDecodeError, KeyError, TypeError, ValueError):
        return False
    return True


def _restore(data_dir: Path, settings: str, ids: Sequence[int]) -> tuple[Manifest, list[Finding]]:
    """The manifest with every complete image, and the faults of the others."""
    manifest = Manifest.from_settings(loads(settings))
    with in_threads() as pool, Progress("hash files", len(ids), "image", delay=1) as progress:
        results = []
        for result in pool.map(partial(_entry, data_dir, manifest), ids):
            results.append(result)
            progress.advance()
    left_out = [result for result in results if isinstance(result, Finding)]
    entries = {result.image_id: result for result in results if isinstance(result, ImageEntry)}
    checked = check_images(data_dir, manifest, list(entries.values()), "check images")
    left_out += [finding for one in checked.values() for finding in one.findings]
    if unsettled := [finding for finding in left_out if finding.kind is Kind.UNSETTLED]:
        raise Unsettled(data_dir / unsettled[0].file, unsettled[0].detail)
    manifest.images = {i: entry for i, entry in entries.items() if not checked[i].findings}
    return manifest, left_out


def _entry(data_dir: Path, manifest: Manifest, image_id: int) -> ImageEntry | Finding:
    """The entry of an image, or the fault that prevents one."""
    picture, latent, *samples = canonical_files(image_id, manifest)
    for name in (picture, latent, *samples):
        if not (data_dir / name).exists():
            return Finding(Kind.MISSING, image_id, name, "no such file")
    facts = _facts(data_dir, picture)
    try:
        return ImageEntry(
            image_id=image_id,
            prompt=facts["prompt"],
            seed=int(facts["seed"]),
            cfg_weight=manifest.cfg_weight,
            num_steps=manifest.num_steps,
            filename=picture,
            latent_filename=latent,
            samples=samples,
            checksums={name: checksum(data_dir / name) for name in (picture, latent, *samples)},
        )
    except (KeyError, ValueError, OSError) as error:
        refuse_unsettled(data_dir / picture, error)
        return Finding(Kind.UNREADABLE, image_id, picture, f"does not say how it was made ({reason_of(error)})")
