"""Share one dataset among several processes: the assignment of blocks, and locks.

Locks are the operating system's and are released when their process ends. For processes on different hosts the shared
folder's file system must support ``flock`` (NFS, SMB 3 and Lustre mounted with ``flock`` do).
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from calib.base.errors import CalibError
from calib.base.locks import ATTEMPTS, PAUSE_SECONDS, is_locked, take_lock
from calib.base.progress import say
from calib.dataset.load import load_manifest
from calib.dataset.manifest import ImageEntry

LOCK_PREFIX = ".lock-"


@dataclass(frozen=True)
class Shard:
    """Shard ``index`` of ``count``: every ``count``-th block of images, so that shards of any dataset are balanced."""

    index: int = 0
    count: int = 1

    def owns(self, block: int) -> bool:
        return block % self.count == self.index


def _open_lock(data_dir: Path, name: str) -> IO[str]:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return open(data_dir / f"{LOCK_PREFIX}{name}", "w")
    except OSError as error:
        raise CalibError(f"{data_dir}: cannot be written ({error.strerror})") from None


def _acquire_soon(file: IO[str], alone: bool) -> bool:
    """Take the lock of ``file``; False where it stays held over some attempts, as testing a lock holds it briefly."""
    for _ in range(ATTEMPTS):
        if take_lock(file, wait=False, alone=alone):
            return True
        time.sleep(PAUSE_SECONDS)
    return False


def _lock_name(shard: Shard) -> str:
    return f"shard-{shard.index}-of-{shard.count}"


@contextmanager
def shard_lock(data_dir: Path, shard: Shard, wait: bool) -> Iterator[None]:
    """Hold the lock of one shard.

    Where another process holds it: report that and wait or, unless ``wait``, raise a CalibError; so, too, where shards
    share a file system without locks.
    """
    with _open_lock(data_dir, _lock_name(shard)) as file:
        if not _acquire_soon(file, alone=shard.count == 1):
            which = f"shard {shard.index} of {shard.count} of " if shard.count > 1 else ""
            if not wait:
                raise CalibError(f"{data_dir}: another process is drawing {which}this dataset; let it finish")
            say(f"waiting for the process that draws {which}{data_dir}")
            take_lock(file, wait=True)
        yield


@contextmanager
def manifest_lock(data_dir: Path) -> Iterator[None]:
    """Hold the lock of the manifest, for the time of a change."""
    with _open_lock(data_dir, "manifest") as file:
        take_lock(file, wait=True)
        yield


def being_written(data_dir: Path, besides: Shard | None = None) -> bool:
    """Whether a living process holds a shard of the dataset, other than ``besides``."""
    own = None if besides is None else LOCK_PREFIX + _lock_name(besides)
    return any(is_locked(path) for path in data_dir.glob(f"{LOCK_PREFIX}shard-*") if path.name != own)


def add_entries(data_dir: Path, entries: Iterable[ImageEntry]) -> None:
    """Add images to the manifest on disk, besides those that other shards have added meanwhile."""
    with manifest_lock(data_dir):
        manifest = load_manifest(data_dir)
        manifest.images.update({entry.image_id: entry for entry in entries})
        manifest.save(data_dir)
