"""Exchange the results of a run directory for those of a later job; the old ones stay until the new ones exist.

The later job writes into the folder ``NEXT``. Once its status there says complete, the exchange is decided: if the
process is killed while it moves files, whoever opens the directory next moves the rest.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from calib.base.errors import CalibError
from calib.base.files import read_json, sync_folder, write_json
from calib.base.layout import EVALUATION, EXCHANGE, HYDRA, LOCK, METRICS, NEXT, PAGE, PRODUCTS, STATUS
from calib.base.locks import take_lock

#: Folders that are exchanged whole; of others, such as images/, single entries are.
_WHOLE = (HYDRA, *PRODUCTS["quantize"], *EVALUATION)
#: The only names that are ever removed, as the list of obsolete ones is read from a file.
_REMOVABLE = {PAGE, METRICS, *(name for names in PRODUCTS.values() for name in names)}


def prepare(home: Path, stale: Sequence[str]) -> None:
    """Record the results in ``home`` that an exchange is to remove; a complete status in ``NEXT`` then decides it."""
    write_json(home / NEXT / EXCHANGE, {"stale": [name for name in stale if not (home / NEXT / name).exists()]})


def is_decided(home: Path) -> bool:
    """Whether new results are complete, and still to be moved to their places."""
    with suppress(CalibError, OSError, KeyError, TypeError):
        return bool((home / NEXT / STATUS).exists() and read_json(home / NEXT / STATUS)["state"] == "complete")
    return False


def exchange(home: Path) -> None:
    """Move new results to their places, obsolete ones removed; the caller holds the directory's lock.

    May be repeated after an interruption at any point.
    """
    later = home / NEXT
    remove(home, _stale(later))
    moves = sorted(_entries(later, later), key=lambda name: name == STATUS)  # the decision stands to the last
    for name in moves:
        target = home / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(later / name, target)
    for folder in {(home / name).parent for name in moves}:
        sync_folder(folder)
    shutil.rmtree(later, ignore_errors=True)


def settle(home: Path) -> None:
    """Finish an exchange in ``home`` whose process was killed; without effect where another process is at it."""
    if is_decided(home):
        # A disk that cannot be written, or another process: the job that comes next says so.
        with suppress(OSError), open(home / LOCK, "a") as lock:
            if take_lock(lock, wait=False) and is_decided(home):
                exchange(home)


def discard(home: Path) -> None:
    """Remove what a failed or killed job left in ``NEXT``; the caller holds the directory's lock."""
    shutil.rmtree(home / NEXT, ignore_errors=True)


def remove(home: Path, names: Sequence[str]) -> None:
    """Remove files and folders of ``home``, and folders in it that are then empty."""
    for name in names:
        path = home / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent != home:
            with suppress(OSError):  # it holds other files, or is gone
                path.parent.rmdir()


def _stale(later: Path) -> list[str]:
    try:
        return [name for name in read_json(later / EXCHANGE)["stale"] if name in _REMOVABLE]
    except (CalibError, KeyError, TypeError):  # gone: removed with the rest of the folder, after the moves
        return []


def _entries(folder: Path, top: Path) -> Iterator[str]:
    """Names of what is exchanged, relative to ``top``: files, and folders that are exchanged whole."""
    for entry in sorted(folder.iterdir()):
        name = entry.relative_to(top).as_posix()
        if entry.is_dir() and not entry.is_symlink() and name not in _WHOLE:
            yield from _entries(entry, top)
        elif name != EXCHANGE:
            yield name
