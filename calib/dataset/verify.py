"""Verify a dataset against its manifest: every file of every image, and files that belong to no image."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from calib.base.errors import Unsettled
from calib.base.files import TEMPORARY_SUFFIX, abandoned_temporaries, read_json
from calib.base.interrupts import in_threads
from calib.base.locks import refuse_unsettled
from calib.base.progress import Progress, counted, readable_bytes
from calib.dataset.checks import ASIDE, Checked, Finding, Kind, check_image
from calib.dataset.images import FOLDERS
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, MOST_BYTES, ImageEntry, Manifest
from calib.dataset.shards import Shard, being_written

#: Findings that rewriting the manifest repairs; the image need not be drawn again.
REPAIRED_BY_REWRITING = (Kind.DUPLICATE,)


@dataclass(frozen=True)
class Storage:
    """Number of files of one component of a dataset, and their bytes."""

    files: int
    bytes: int


@dataclass(frozen=True)
class DatasetReport:
    """The result of :func:`verify`.

    Attributes:
        storage: by component: samples, latents, images, manifest, other (and aside, where it exists).
        notes: observations that are no faults.
    """

    data_dir: Path
    manifest: Manifest
    findings: list[Finding]
    storage: dict[str, Storage]
    notes: list[str]

    @property
    def images(self) -> int:
        """Number of images that the manifest lists."""
        return len(self.manifest.images)

    @property
    def sound(self) -> bool:
        return not self.findings

    @property
    def unsettled(self) -> list[Finding]:
        """Files that could not be judged: in use, or out of reach for now."""
        return [finding for finding in self.findings if finding.kind is Kind.UNSETTLED]

    @property
    def bad_images(self) -> set[int]:
        """Ids of images whose files or entries are wrong; not of those that could not be judged as a whole."""
        bad = {f.image_id for f in self.findings if f.image_id is not None and f.kind not in REPAIRED_BY_REWRITING}
        return bad - {finding.image_id for finding in self.unsettled}

    @property
    def manifest_is_wrong(self) -> bool:
        """Whether most images disagree with the manifest's settings, so that the manifest is at fault."""
        return 2 * len({f.image_id for f in self.findings if f.kind is Kind.SETTINGS}) > self.images

    @property
    def good(self) -> int:
        """Number of images without a fault, and without a file that could not be judged."""
        return self.images - len(self.bad_images | ({finding.image_id for finding in self.unsettled} - {None}))

    @property
    def not_judged(self) -> str:
        """How many files could not be judged, the first by name, and the remedy; empty where there are none."""
        if not self.unsettled:
            return ""
        first = self.unsettled[0]
        return f"{counted(len(self.unsettled), 'file')} not judged ({first.file}: {first.detail})"

    @property
    def verdict(self) -> str:
        """One line: sound or not, and the remedy."""
        if self.sound:
            size = sum(part.bytes for name, part in self.storage.items() if name != ASIDE)
            return f"sound: {counted(self.images, 'image')}, {readable_bytes(size)}"
        if self.manifest_is_wrong:
            remedy = manifest_remedy(self.data_dir, self.manifest)
            return f"NOT sound: most images disagree with {MANIFEST} itself; {remedy}"
        if len(self.unsettled) == len(self.findings):
            return f"NOT known to be sound: {counted(self.good, 'image')} good, {self.not_judged}"
        remedy = f"calib verify {self.data_dir} --repair moves what is wrong aside"
        if not self.bad_images:
            verdict = f"NOT sound: {counted(self.good, 'image')} good, but other files lie there; {remedy}"
        else:
            again = "" if self.manifest.is_older else ", calib generate draws it again"
            verdict = f"NOT sound: {len(self.bad_images)} of {counted(self.images, 'image')} bad; {remedy}{again}"
        return "; ".join(filter(None, [verdict, self.not_judged]))


def manifest_remedy(data_dir: Path, manifest: Manifest) -> str:
    """The remedy, for a message, where most images disagree with the manifest's settings."""
    if manifest.is_older:
        return f"correct num_steps and cfg_scale in {data_dir / MANIFEST}"
    return f"calib rebuild-manifest {data_dir} --force makes it anew from the files"


def verify(data_dir: Path, besides: Shard | None = None) -> DatasetReport:
    """Read every file of the dataset in ``data_dir`` and compare everything that must agree; nothing is written.

    Args:
        besides: a shard whose lock the caller itself holds.

    Raises:
        CalibError: there is no dataset, or its manifest is damaged.
    """
    written = being_written(data_dir, besides)
    manifest = load_manifest(data_dir)
    checked = check_images(data_dir, manifest, [manifest.images[i] for i in sorted(manifest.images)], "verify")
    findings = [finding for one in checked.values() for finding in one.findings]
    findings += _odd_sizes(manifest, checked)
    findings += _duplicates(data_dir)
    notes = _gaps(manifest)
    if written or being_written(data_dir, besides):
        notes.append("another process is adding images: files that no entry names are not judged")
    else:
        findings += orphans(data_dir)
    findings.sort(key=lambda f: (f.image_id is None, f.image_id or 0))
    return DatasetReport(data_dir, manifest, findings, _storage(data_dir), notes)


def check_images(data_dir: Path, manifest: Manifest, entries: Sequence[ImageEntry], label: str) -> dict[int, Checked]:
    """Check ``entries`` in parallel; results by image id. Hashing and decompression release Python's lock."""
    with in_threads() as pool, Progress(label, len(entries), "image", delay=1) as progress:
        checked = {}
        results = pool.map(partial(check_image, data_dir, manifest), entries)
        for entry, result in zip(entries, results, strict=True):
            checked[entry.image_id] = result
            progress.advance()
    return checked


def _odd_sizes(manifest: Manifest, checked: dict[int, Checked]) -> Iterable[Finding]:
    """Yield a finding for every picture whose size differs from most."""
    sizes = Counter(one.picture_size for one in checked.values() if one.picture_size)
    usual = sizes.most_common(1)[0][0] if sizes else None
    for image_id, one in checked.items():
        if one.picture_size and one.picture_size != usual:
            detail = f"{one.picture_size} pixels, the other pictures have {usual}"
            yield Finding(Kind.DISAGREES, image_id, manifest.images[image_id].filename, detail)


def _duplicates(data_dir: Path) -> Iterable[Finding]:
    """Yield a finding for every id that the manifest lists more than once; loading it keeps the last entry."""
    counts = Counter(int(entry["image_id"]) for entry in read_json(data_dir / MANIFEST, MOST_BYTES)["images"])
    for image_id, count in counts.items():
        if count > 1:
            yield Finding(Kind.DUPLICATE, image_id, MANIFEST, f"{count} entries; the last one counts")


def _gaps(manifest: Manifest) -> list[str]:
    highest = max(manifest.images, default=0)
    number = highest - sum(i < highest for i in manifest.images)
    if not number:
        return []
    missing = islice((i for i in range(highest) if i not in manifest.images), 5)
    shown = ", ".join(map(str, missing)) + (", …" if number > 5 else "")
    return [f"{counted(number, 'image')} not drawn below the highest id ({shown})"]


def orphans(data_dir: Path) -> list[Finding]:
    """Files that no entry names and partial files of killed processes; other hidden files (.DS_Store) are ignored."""
    paths = [path for folder in FOLDERS for path in sorted((data_dir / folder).rglob("*")) if not path.is_dir()]
    # Read after the files are listed: a writer adds an image's entry last.
    named = {name for entry in load_manifest(data_dir).images.values() for name in entry.files}
    findings = []
    for path in paths:
        name = path.relative_to(data_dir).as_posix()
        if name not in named and not path.name.startswith("."):
            findings.append(_orphan(path, name))
    for place in (data_dir, *(data_dir / folder for folder in FOLDERS)):
        for path in abandoned_temporaries(place):
            name = path.relative_to(data_dir).as_posix()
            findings.append(Finding(Kind.TEMPORARY, None, name, "left by a killed process"))
    return findings


def _orphan(path: Path, name: str) -> Finding:
    try:
        refuse_unsettled(path)
    except Unsettled as cause:
        return Finding(Kind.UNSETTLED, None, name, cause.advice)
    return Finding(Kind.ORPHAN, None, name, "no entry names it")


def _storage(data_dir: Path) -> dict[str, Storage]:
    parts: dict[str, list[int]] = {name: [] for name in (*FOLDERS, "manifest", "other")}
    for parent, _, names in os.walk(data_dir):
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") and not name.endswith(TEMPORARY_SUFFIX):
                continue
            with suppress(FileNotFoundError):  # a live writer has just renamed it
                parts.setdefault(_part(path.relative_to(data_dir)), []).append(path.stat().st_size)
    return {name: Storage(len(sizes), sum(sizes)) for name, sizes in parts.items()}


def _part(path: Path) -> str:
    if path == Path(MANIFEST):
        return "manifest"
    return path.parts[0] if path.parts[0] in (*FOLDERS, ASIDE) else "other"
