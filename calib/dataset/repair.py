"""Move what is wrong with a dataset aside, so that ``generate`` makes it again; nothing is ever deleted.

First the manifest loses its bad entries, then files move: killed in between, what still lies there is an orphan, which
the next repair moves.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from calib.base.errors import CalibError
from calib.base.files import read_json, write_text
from calib.dataset.checks import ASIDE, stays_inside
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST
from calib.dataset.shards import Shard, being_written, manifest_lock, shard_lock
from calib.dataset.verify import Report, mend_manifest, verify


@dataclass(frozen=True)
class Repair:
    """What :func:`repair` did.

    Attributes:
        before: what was found; its dataset is sound without ``images`` and ``moved``.
        images: ids that the manifest no longer lists.
        aside: the folder, in the dataset, that holds the ``moved`` files and the manifest as it was.
    """

    before: Report
    images: list[int]
    aside: Path
    moved: list[str]


@contextmanager
def exclusive(data_dir: Path) -> Iterator[Shard]:
    """Keep every other writer out of ``data_dir``; raises where one is at work. Yields the shard that is held.

    Who starts to write later waits for the manifest before looking at any file.
    """
    own = Shard()
    with ExitStack() as stack:
        stack.enter_context(shard_lock(data_dir, own, wait=False))
        stack.enter_context(manifest_lock(data_dir))
        if being_written(data_dir, besides=own):
            raise CalibError(f"{data_dir}: another process is drawing this dataset; let it finish")
        yield own


def timestamp() -> str:
    """Now, for file names."""
    return f"{datetime.now():%Y%m%d-%H%M%S}"


def repair(data_dir: Path) -> Repair | None:
    """Verify the dataset and move whatever is wrong into ``aside/<time>/``; None where it is sound.

    An older dataset keeps its own manifest, less the bad images; what its files lack calib cannot draw again.

    Raises:
        CalibError: there is no dataset, another process writes to it, or its manifest is what is wrong.
    """
    load_manifest(data_dir)  # before a lock is made: a folder that is no dataset stays as it is
    with exclusive(data_dir) as own:
        report = verify(data_dir, besides=own)
        if report.sound:
            return None
        if report.manifest_is_wrong:
            remedy = mend_manifest(data_dir, report.manifest)
            raise CalibError(
                f"{data_dir}: most images disagree with {MANIFEST}; moving them aside would not help: {remedy}"
            )
        bad = sorted(report.bad_images)
        moved = _files_to_move(report)
        aside = _new_folder(data_dir / ASIDE)
        shutil.copy2(data_dir / MANIFEST, aside / MANIFEST)
        _drop_entries(data_dir, report, set(bad))
        for name in moved:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(data_dir / name, aside / name)
        return Repair(report, bad, aside, moved)


def _files_to_move(report: Report) -> list[str]:
    """Files of bad images that no good one names, and those of nobody."""
    bad, images = report.bad_images, report.manifest.images
    kept = {name for image_id, entry in images.items() if image_id not in bad for name in entry.files}
    names = {name for image_id in bad for name in images[image_id].files if stays_inside(name)}
    names |= {finding.file for finding in report.findings if finding.image_id is None}
    return sorted(name for name in names - kept if (report.data_dir / name).exists())


def _new_folder(parent: Path) -> Path:
    """A folder of this moment that nobody else has."""
    parent.mkdir(exist_ok=True)
    name = timestamp()
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            folder.mkdir()
            return folder
    raise AssertionError


def _drop_entries(data_dir: Path, report: Report, bad: set[int]) -> None:
    if not report.manifest.is_older:
        manifest = load_manifest(data_dir)
        manifest.images = {i: entry for i, entry in manifest.images.items() if i not in bad}
        manifest.save(data_dir)
        return
    document = read_json(data_dir / MANIFEST)
    entries = {int(entry["image_id"]): entry for entry in document["images"]}
    document["images"] = [entry for image_id, entry in entries.items() if image_id not in bad]
    # Unlike calib's own files it may hold NaN, and keeps it.
    write_text(data_dir / MANIFEST, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
