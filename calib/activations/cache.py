"""Cache of statistics shared by runs: one file per step, in a folder named by a hash of everything they depend on.

``<cache_dir>/activations/<key>/`` holds ``about.json`` (the hashed document), ``step_<i>.npz`` and, while images are
collected in parts, ``step_<i>.part_<k>.npz``; each has a ``.samples`` file beside it where activations are kept. A file
that is damaged or of another version is reported and made again.
"""

import json
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from calib.activations.record import StepRecord, pack, unpack
from calib.activations.samples import joined, shifted
from calib.base.errors import CalibError, check_format, reason_of
from calib.base.files import remove_abandoned, replacing, short_hash, write_bytes, write_json
from calib.base.locks import locked, refuse_unsettled
from calib.base.progress import note, say
from calib.dataset.arrays import open_npz

import numpy as np

FORMAT, FORMAT_VERSION = "calib-step-statistics", 1


def check_size(path: Path, table: Mapping[str, Any], taps: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a file of samples is missing, or its length differs from that in its ``table``."""
    widths = {tap["name"]: tap["channels"] for tap in taps}
    counts = {name: [rows for _, rows, _ in entry["segments"]] for name, entry in table.items()}
    if any(rows < 0 for own in counts.values() for rows in own):
        raise ValueError("a segment of fewer than no rows")
    rows = sum(widths[name] * sum(own) for name, own in counts.items())
    if not path.exists() or path.stat().st_size != 2 * rows:
        raise ValueError(f"{path.name} is not there, or cut off")


class StepCache:
    """The cached steps of one key; ``identity`` is the JSON-able document that the key is a hash of."""

    def __init__(self, cache_dir: Path, identity: Mapping[str, Any]):
        self.identity = dict(identity)
        self.folder = cache_dir / "activations" / short_hash(self.identity, digits=16)

    def path(self, step: int, part: int | None = None) -> Path:
        return self.folder / (f"step_{step:04d}.npz" if part is None else f"step_{step:04d}.part_{part:03d}.npz")

    def samples_path(self, step: int, part: int | None = None) -> Path:
        return self.path(step, part).with_suffix(".samples")

    def has(self, step: int, part: int | None = None) -> bool:
        """Whether the step is cached in a sound file; an unusable file is reported."""
        return self.load(step, part, names=()) is not None

    def load(self, step: int, part: int | None = None, names: Collection[str] | None = None) -> StepRecord | None:
        """The record of a step, with all taps or those in ``names``; None where there is no usable file."""
        path = self.path(step, part)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            refuse_unsettled(path, error)
            raise CalibError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            if names == () and zipfile.ZipFile(BytesIO(content)).testzip() is not None:
                raise ValueError("its checksum does not hold")  # reading an array checks that array alone
            with open_npz(BytesIO(content)) as archive:
                header = json.loads(archive["header"].tobytes())
                check_format("its header", header, FORMAT, (FORMAT_VERSION,), "written by another version of calib")
                arrays = {} if names == () else {name: archive[name] for name in archive.files if name != "header"}
            if header["samples"]:
                check_size(self.samples_path(step, part), header["samples"], header["taps"])
            return unpack(header, arrays, names)
        except Exception as error:  # readers of damaged files raise errors of any class
            refuse_unsettled(path, error)
            note(f"{path}: cannot be used ({reason_of(error)}); step {step} is collected again")
            return None

    def header(self, step: int) -> dict[str, Any]:
        """The header of a step's file, which includes its taps with their counts of NaN and infinity."""
        try:
            with open_npz(self.path(step)) as archive:
                header: dict[str, Any] = json.loads(archive["header"].tobytes())
        except Exception as error:  # as above
            refuse_unsettled(self.path(step), error)
            raise CalibError(f"{self.path(step)}: was damaged just now; run the same command again") from error
        return header

    def forget(self, step: int) -> None:
        """Remove the files of a damaged step."""
        self.path(step).unlink(missing_ok=True)
        self.samples_path(step).unlink(missing_ok=True)

    def save(self, record: StepRecord, part: int | None = None) -> None:
        """Write the record of a step, whole or not at all."""
        if not (self.folder / "about.json").exists():
            write_json(self.folder / "about.json", self.identity)
        header, arrays = pack(record)
        stamped = {"format": FORMAT, "format_version": FORMAT_VERSION, **header}
        archive = BytesIO()
        content: dict[str, Any] = {"header": np.frombuffer(json.dumps(stamped).encode(), np.uint8), **arrays}
        np.savez(archive, **content)
        write_bytes(self.path(record.step, part), archive.getvalue())

    def join_parts(self, step: int, parts: int) -> None:
        """Merge the parts 0 … ``parts`` - 1 of a step into its record, and remove them."""
        merged: StepRecord | None = None
        tables = []
        for part in range(parts):  # one at a time: a hundred thousand images have hundreds of parts
            record = self.load(step, part)
            if record is None:
                raise CalibError(f"{self.path(step, part)}: was damaged just now; run the same command again")
            tables.append(record.samples)
            merged = record if merged is None else merged.merge(record)
        assert merged is not None
        if tables[0]:
            merged.samples = self._join_samples(step, tables)
        self.save(merged)
        for part in range(parts):
            self.path(step, part).unlink(missing_ok=True)
            self.samples_path(step, part).unlink(missing_ok=True)

    def _join_samples(self, step: int, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
        moved = []
        with replacing(self.samples_path(step)) as temporary, open(temporary, "wb") as whole:
            for part, table in enumerate(tables):
                moved.append(shifted(table, whole.tell()))
                with open(self.samples_path(step, part), "rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 24)
        return joined(moved)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the key's lock for writing; where another process holds it, report that and wait."""
        waiting = f"waiting for the process that collects the same statistics ({self.folder})"
        with locked(self.folder / ".lock", lambda: say(waiting)):
            remove_abandoned(self.folder)
            yield
