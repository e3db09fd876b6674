"""Run directories that the command line names: themselves, by the folder of their sweep, or by a pattern."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from calib.errors import ConfigError
from calib.runs.layout import CONFIG, METRICS, STATUS
from calib.runs.record import RunRecord, read_run

#: A folder is a run directory if one of these is in it; a half deleted one may have lost any of them.
_MARKS = (STATUS, CONFIG, METRICS)


def read_runs(arguments: Sequence[str]) -> list[RunRecord]:
    """The run directories that ``arguments`` name, each once, in their order; below a folder, by name.

    Raises:
        ConfigError: an argument names no folder, or none that holds a run directory.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        runs = [run for folder in _folders(argument) for run in run_directories(folder)]
        if not runs:
            raise ConfigError(f"{argument}: holds no run directory; name a run's folder, a sweep's, or a pattern")
        found |= {run.resolve(): run for run in runs}
    paths = list(found.values())
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def _folders(argument: str) -> list[Path]:
    if Path(argument).is_dir():
        return [Path(argument)]
    matches = [Path(name) for name in sorted(glob.glob(argument, recursive=True)) if Path(name).is_dir()]
    if not matches:
        raise ConfigError(f"{argument}: no such folder; name a run's folder, a sweep's, or a pattern")
    return matches


def run_directories(folder: Path) -> Iterator[Path]:
    """``folder``, if it is one, or all below it; what is hidden is not looked into."""
    if any((folder / mark).is_file() for mark in _MARKS):
        yield folder
        return
    if not folder.is_dir():
        return
    try:
        below = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror})") from None
    for name in below:
        yield from run_directories(folder / name)


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
