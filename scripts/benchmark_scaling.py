"""Drawing and collecting by 1, 2, 4, 8 tasks at once, each on processors or a GPU of its own: seconds and efficiency.

    python scripts/benchmark_scaling.py --cores 4                                # tasks of four processors each
    python scripts/benchmark_scaling.py --gpus --tasks 1 2 model=sd3_medium model.use_t5=false

Overrides of the configuration come last. Every task is a process of its own, as a cluster starts it, start-up and
loading counted; the time is that until the last one ends. Efficiency is the speed-up over one task, divided by the
number of tasks. Merged statistics are compared with those of one task: a difference is an error.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

THREADS = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Place:
    """Where a task runs: processors, and one GPU if there is any."""

    cores: Sequence[int]
    gpu: int | None

    def environment(self) -> dict[str, str]:
        own = {name: str(len(self.cores)) for name in THREADS}
        return own if self.gpu is None else {**own, "CUDA_VISIBLE_DEVICES": str(self.gpu)}


def places(tasks: int, cores: int, gpus: bool) -> list[Place]:
    available = sorted(os.sched_getaffinity(0))
    if tasks * cores > len(available):
        raise SystemExit(f"--tasks {tasks} of --cores {cores}: there are {len(available)} processors")
    return [Place(available[i * cores : (i + 1) * cores], i if gpus else None) for i in range(tasks)]


def together(folder: Path, commands: Sequence[Sequence[str]], where: Sequence[Place]) -> float:
    """Seconds until all have ended."""
    start = time.perf_counter()
    started = []
    for number, (command, place) in enumerate(zip(commands, where, strict=True)):
        pinned = ["taskset", "--cpu-list", ",".join(map(str, place.cores)), sys.executable, "-m", "calib", *command]
        with open(folder / f"{command[0]}-{number}.log", "w") as log:
            environment = {**os.environ, **place.environment()}
            started.append(subprocess.Popen(pinned, cwd=folder, env=environment, stdout=log, stderr=log))
    statuses = [process.wait() for process in started]
    seconds = time.perf_counter() - start
    for number, (command, status) in enumerate(zip(commands, statuses, strict=True)):
        if status:
            raise SystemExit((folder / f"{command[0]}-{number}.log").read_text() + f"\nexit status {status}")
    return seconds


def sharded(stage: str, tasks: int, overrides: Sequence[str]) -> list[list[str]]:
    return [
        [
            stage,
            *overrides,
            "data_dir=dataset",
            f"shard.index={i}",
            f"shard.count={tasks}",
            f"hydra.run.dir={stage}/{i}",
        ]
        for i in range(tasks)
    ]


def differences(one: Path, other: Path) -> list[str]:
    """Names of the datasets of two HDF5 files that are not equal bit for bit."""
    found: list[str] = []
    with h5py.File(one) as a, h5py.File(other) as b:

        def visit(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset) and (name not in b or not np.array_equal(item[()], b[name][()])):
                found.append(name)

        a.visititems(visit)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--cores", type=int, default=2, help="processors a task")
    parser.add_argument("--gpus", action="store_true", help="a GPU a task")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    overrides = [*given.overrides, f"num_images={given.images}"]
    print(f"{given.images} images, {given.cores} processors{' and a GPU' if given.gpus else ''} a task")
    print(" tasks  drawing, s  efficiency  collecting, s  efficiency  merging, s")
    first: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory() as name:
        if given.gpus:  # kernels are compiled once a machine
            (warm := Path(name, "warm")).mkdir()
            small = [*given.overrides, f"num_images={given.images // max(given.tasks)}"]
            for stage in ("generate", "collect"):
                together(warm, sharded(stage, 1, small), places(1, given.cores, True))
        for tasks in given.tasks:
            (folder := Path(name, str(tasks))).mkdir()
            where = places(tasks, given.cores, given.gpus)
            drawing = together(folder, sharded("generate", tasks, overrides), where)
            collecting = together(folder, sharded("collect", tasks, overrides), where)
            merging = 0.0
            if tasks > 1:
                merging = together(folder, [["merge", "collect", "--into", "whole"]], where[:1])
            first = first or (drawing * tasks, collecting * tasks)
            drawn, collected = first[0] / tasks / drawing, first[1] / tasks / collecting
            print(
                f"{tasks:6}{drawing:12.1f}{drawn:12.0%}{collecting:15.1f}{collected:12.0%}{merging:12.1f}", flush=True
            )
            one, whole = Path(name, str(given.tasks[0]), "collect/0/activations.h5"), folder / "whole/activations.h5"
            if tasks > 1 and given.tasks[0] == 1 and (differing := differences(one, whole)):
                raise SystemExit(
                    f"{tasks} tasks: {len(differing)} datasets differ from one task's, {differing[0]} first"
                )


if __name__ == "__main__":
    main()
