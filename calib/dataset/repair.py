"""Move the bad images of a dataset aside, so that ``generate`` draws them again; nothing is deleted.

Entries are removed from the manifest before files are moved: if the process is killed in between, the remaining files
are orphans, which the next repair moves.
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
from calib.dataset.checks import ASIDE, Kind, stays_inside
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, MOST_BYTES
from calib.dataset.shards import Shard, being_written, manifest_lock, shard_lock
from calib.dataset.verify import DatasetReport, manifest_remedy, verify


@dataclass(frozen=True)
class Repair:
    """The result of :func:`repair`.

    Attributes:
        before: the report before the repair; without ``images`` and ``moved`` the dataset is sound.
        images: ids that the manifest no longer lists.
        aside: the folder, in the dataset, of the ``moved`` files and of the previous manifest.
    """

    before: DatasetReport
    images: list[int]
    aside: Path
    moved: list[str]


@contextmanager
def exclusive(data_dir: Path) -> Iterator[Shard]:
    """Lock ``data_dir`` against all other writers, and yield the shard that is held.

    A process that starts to write later waits for the manifest's lock before it looks at any file.

    Raises:
        CalibError: another process is writing.
    """
    own = Shard()
    with ExitStack() as stack:
        stack.enter_context(shard_lock(data_dir, own, wait=False))
        stack.enter_context(manifest_lock(data_dir))
        if being_written(data_dir, besides=own):
            raise CalibError(f"{data_dir}: another process is drawing this dataset; let it finish")
        yield own


def timestamp() -> str:
    """The current local time, for file names."""
    return f"{datetime.now():%Y%m%d-%H%M%S}"


def repair(data_dir: Path) -> Repair | None:
    """Verify the dataset and move all bad files into ``aside/<time>/``; None where there is nothing to move.

    Files that are in use stay, and with them their images: they cannot be judged.

    A dataset of the older layout keeps its own manifest without the bad images, which calib cannot draw again.

    Raises:
        CalibError: there is no dataset, another process writes to it, or its manifest is at fault.
    """
    load_manifest(data_dir)  # before lock files are made: a folder that is no dataset stays unchanged
    with exclusive(data_dir) as own:
        report = verify(data_dir, besides=own)
        if len(report.unsettled) == len(report.findings):
            return None
        if report.manifest_is_wrong:
            remedy = manifest_remedy(data_dir, report.manifest)
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


def _files_to_move(report: DatasetReport) -> list[str]:
    """Files of bad images that no good image names, and files of no image."""
    bad, images = report.bad_images, report.manifest.images
    kept = {name for image_id, entry in images.items() if image_id not in bad for name in entry.files}
    names = {name for image_id in bad for name in images[image_id].files if stays_inside(name)}
    names |= {f.file for f in report.findings if f.image_id is None and f.kind is not Kind.UNSETTLED}
    return sorted(name for name in names - kept if (report.data_dir / name).exists())


def _new_folder(parent: Path) -> Path:
    """Make a new folder named by the current time."""
    parent.mkdir(exist_ok=True)
    name = timestamp()
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            folder.mkdir()
            return folder
    raise AssertionError


def _drop_entries(data_dir: Path, report: DatasetReport, bad: set[int]) -> None:
    if not report.manifest.is_older:
        manifest = load_manifest(data_dir)
        manifest.images = {i: entry for i, entry in manifest.images.items() if i not in bad}
        manifest.save(data_dir)
        return
    document = read_json(data_dir / MANIFEST, MOST_BYTES)
    entries = {int(entry["image_id"]): entry for entry in document["images"]}
    document["images"] = [entry for image_id, entry in entries.items() if image_id not in bad]
    # Unlike calib's own files it may hold NaN, which is kept.
    write_text(data_dir / MANIFEST, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
