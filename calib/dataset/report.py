"""Format the report of :func:`calib.dataset.verify.verify` as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from calib.base.encoding import aligned
from calib.base.progress import counted, readable_bytes
from calib.dataset.checks import Finding
from calib.dataset.manifest import MANIFEST
from calib.dataset.verify import DatasetReport

#: Number of findings of one kind that are printed; --json has all.
EXAMPLES = 3


def report_text(report: DatasetReport, end: str) -> str:
    """The report as text: the dataset, a table of findings, a table of storage, notes, and ``end`` as the last line."""
    manifest = report.manifest
    head = f"{report.data_dir}: {counted(report.images, 'image')} by {manifest.model}, {manifest.num_steps} steps, "
    head += f"{len(manifest.steps)} states each in {manifest.storage} {manifest.dtype}"
    layout = [] if not manifest.is_older else ["note: older layout, without checksums: contents are judged by reading"]
    notes = [*layout, *(f"note: {note}" for note in report.notes)]
    parts = [head, *findings_table(report.findings), "", *_storage_table(report), "", *notes, end]
    return "\n".join(parts) + "\n"


def findings_table(findings: Sequence[Finding]) -> list[str]:
    """Lines of a table: a group per kind, with the number of images or files and the first few findings."""
    rows = [("finding", "images", "files", "for example")]
    for kind, group in groupby(sorted(findings, key=lambda f: f.kind), key=lambda f: f.kind):
        of_kind = list(group)
        images = len({f.image_id for f in of_kind} - {None})
        for i, finding in enumerate(of_kind[:EXAMPLES]):
            files = len({(f.image_id, f.file) for f in of_kind}) if finding.file != MANIFEST else 0
            first = (kind.value, str(images or "–"), str(files or "–"))
            rows.append((*(first if i == 0 else ("", "", "")), f"{_where(finding)}: {finding.detail}"))
        if len(of_kind) > EXAMPLES:
            rows.append(("", "", "", f"… and {len(of_kind) - EXAMPLES} more; --json has all"))
    return ["", *aligned(rows, "<>>")] if findings else []


def _where(finding: Finding) -> str:
    return finding.file if finding.image_id is None else f"image {finding.image_id}, {finding.file}"


def _storage_table(report: DatasetReport) -> list[str]:
    rows = [("storage", "files", "size", "per image")]
    for name, part in report.storage.items():
        each = readable_bytes(part.bytes / report.images) if report.images and part.files else "–"
        rows.append((name, str(part.files), readable_bytes(part.bytes), each))
    return aligned(rows, "<>>>")


def report_json(report: DatasetReport) -> dict[str, Any]:
    """The whole report, JSON-able."""
    count = report.images
    return {
        "data_dir": str(report.data_dir),
        "sound": report.sound,
        "verdict": report.verdict,
        "images": count,
        "bad_images": sorted(report.bad_images),
        "findings": [asdict(finding) for finding in report.findings],
        "storage": {
            name: {**asdict(part), "bytes_per_image": part.bytes / count if count else None}
            for name, part in report.storage.items()
        },
        "notes": report.notes,
    }
