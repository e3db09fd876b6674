"""Find run directories by their own path, the folder of their sweep, or a pattern."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json
from calib.base.layout import CONFIG, ENVIRONMENT, HYDRA, METRICS, PLAN, STATUS, SWEEP
from calib.runs.record import RunRecord, read_run

#: A folder is a run directory if it holds one of these; a half deleted one may have lost any of them.
_MARKS = {STATUS, CONFIG, METRICS, ENVIRONMENT, PLAN, HYDRA}


def read_runs(arguments: Sequence[str]) -> list[RunRecord]:
    """Read the run directories that ``arguments`` name, each once, in their order; those below a folder by name.

    Raises:
        ConfigError: an argument names no folder, or one without a run directory.
    """
    # A shell's `sweep/*` includes the files beside the jobs.
    folders = [argument for argument in arguments if not Path(argument).is_file()]
    found: dict[Path, Path] = {}
    for argument in folders or arguments:
        runs = [run for folder in _folders(argument) for run in run_directories(folder)]
        if not runs:
            raise ConfigError(f"{argument}: holds no run directory; name a run's folder, a sweep's, or a pattern")
        found |= {run.resolve(): run for run in runs}
    paths = list(found.values())
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def _folders(argument: str) -> list[Path]:
    if Path(argument).is_dir():
        return [Path(argument)]
    matches = [Path(name) for name in sorted(glob.glob(argument, recursive=True), key=_natural) if Path(name).is_dir()]
    if not matches:
        what = "is a file, not a folder" if Path(argument).exists() else "no such folder"
        raise ConfigError(f"{argument}: {what}; name a run's folder, a sweep's, or a pattern")
    return matches


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key with numbers in their order: 4.5 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def run_directories(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield ``folder`` if it is a run directory, else all below it, hidden folders left out.

    A folder that cannot be looked into is yielded as well, as it may be one. ``above`` holds the folders on the way.
    """
    if not folder.is_dir():
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:
        yield folder
        return
    if _MARKS & {entry.name for entry in entries}:
        yield folder
        return
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    for name in sorted((e.name for e in entries if not e.name.startswith(".") and e.is_dir()), key=_natural):
        yield from run_directories(folder / name, above | {real})
    if any(entry.name == SWEEP for entry in entries):
        yield from _not_begun(folder)


def _not_begun(sweep: Path) -> list[Path]:
    """Folders of a sweep's jobs that were not begun."""
    try:
        jobs = read_json(sweep / SWEEP)["jobs"]
        return [
            sweep / name
            for name in sorted(map(str, jobs), key=_natural)
            if Path(name).name == name and not (sweep / name).exists()
        ]
    except (CalibError, OSError, KeyError, TypeError, ValueError):
        return []  # damaged: the jobs that are there are found without it


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path, by whole folders, that no other one has."""
    parts = [path.resolve().parts for path in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(own[-n:]) for own, n in zip(parts, depth, strict=True)]
        clashing = {name for name in names if names.count(name) > 1}
        grown = [
            n + 1 if name in clashing and n < len(own) else n for name, n, own in zip(names, depth, parts, strict=True)
        ]
        if grown == depth:
            return names
        depth = grown
