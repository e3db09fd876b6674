"""Check stored states before they are replayed, and read them in advance."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import checksum, short_hash
from calib.base.interrupts import in_threads
from calib.base.locks import refuse_unsettled
from calib.base.progress import Progress
from calib.dataset.manifest import ImageEntry, Manifest
from calib.dataset.store import StorageFormat, read_state

import numpy as np
from numpy.typing import NDArray

MOST_NAMED = 3


def check_states(data_dir: Path, manifest: Manifest, images: Sequence[int], steps: Sequence[int]) -> None:
    """Raise where files of ``steps`` of ``images`` are missing, damaged or in use; the message names them.

    For an older dataset, which has no checksums, only the existence of files is checked.
    """
    single = manifest.storage == StorageFormat.HDF5
    wanted = []
    for i in images:
        entry = manifest.images[i]
        names = entry.samples if single else [entry.samples[manifest.row(step)] for step in steps]
        wanted += [(name, entry.checksums.get(name)) for name in names]

    def fault(file: tuple[str, str | None]) -> str | None:
        name, expected = file
        try:
            if expected is None:
                return None if (data_dir / name).is_file() else f"{name} is missing"
            return None if checksum(data_dir / name) == expected else f"{name} is damaged"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            refuse_unsettled(data_dir / name, error)
            return f"{name} cannot be read ({error.strerror})"

    with in_threads() as pool, Progress("check states", len(wanted), "file", delay=2) as progress:
        faults = []
        for found in pool.map(fault, wanted):
            progress.advance()
            faults += [found] if found else []
    if faults:
        more = f" and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        again = "" if manifest.is_older else "; calib generate draws them again"
        verify = f"calib verify {data_dir} says what else is wrong"
        raise CalibError(f"{data_dir}: {', '.join(faults[:MOST_NAMED])}{more}; {verify}{again}")


def identity_of(data_dir: Path, entry: ImageEntry) -> list[str]:
    """Prompt and checksums of one image's states; size and time of the files in an older dataset without checksums."""
    if entry.checksums:
        return [str(entry.prompt), *(entry.checksums.get(name, "") for name in entry.samples)]
    found = [path.stat() for name in entry.samples if (path := data_dir / name).exists()]
    return [str(entry.prompt), *(f"{s.st_size} {s.st_mtime_ns}" for s in found)]


def image_hashes(data_dir: Path, manifest: Manifest, images: Sequence[int]) -> list[str | None]:
    """A hash of each image's prompt and states; None for images of an older dataset, which has no checksums."""
    entries = [manifest.images[i] for i in images]
    return [short_hash(identity_of(data_dir, e), digits=16) if e.checksums else None for e in entries]


def read_states(data_dir: Path, manifest: Manifest, images: Sequence[int], step: int) -> NDArray[np.float32]:
    """States of ``images`` before model call ``step``, (images, height, width, channels)."""
    return np.stack([read_state(data_dir, manifest, i, step) for i in images]).astype(np.float32)


def ahead(
    reader: ThreadPoolExecutor, data_dir: Path, manifest: Manifest, work: Sequence[tuple[Sequence[int], int]]
) -> Iterator[NDArray[Any]]:
    """Yield the states of each (images, step) of ``work``; the next are read in the background."""
    coming = reader.submit(read_states, data_dir, manifest, *work[0])
    for following in [*work[1:], None]:
        states = coming.result()
        if following is not None:
            coming = reader.submit(read_states, data_dir, manifest, *following)
        yield states
