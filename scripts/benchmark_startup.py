"""CPU-seconds (user and system) that starting calib, its imports, a page and a tiny job take, each a new process.

    python scripts/benchmark_startup.py [--python OTHER/.venv/bin/python …] [--run RUN] [--times 5]

Prints medians, a column for each environment: this one, then those of the other checkouts. They take turns, so that
what else the machine does slows all of them alike. A tiny dataset and run directory are made first, by this one. RUN is
a run directory whose page is drawn (a copy's; the tiny one's unless it is given).
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

#: A job that makes a dataset to verify and a run to compare.
JOB = (
    *("num_images=2", "sampler.num_steps=2", "sampler.batch_size=2", "timestep_schedule=all", "evaluation=none"),
    *("report=none", "data_dir=dataset", "cache_dir=cache", "hydra.run.dir=run"),
)
#: The module that imports what a job needs, also in checkouts from before it had its present name.
JOB_MODULE = "'calib.stages.stages' if importlib.util.find_spec('calib.stages') else 'calib.pipeline'"
#: Draws a page, also in checkouts from before.
PAGE = """import pathlib
try:
    from calib.runs.pages.run import write_page
except ImportError:
    from calib.report.run import write_report as write_page
write_page(pathlib.Path("../drawn"))"""
#: Two images of four steps to a measured plan by calib 0.3.0's defaults; nothing is cached.
TINY = (
    *("num_images=2", "sampler.num_steps=4", "timestep_schedule=quarters", "evaluation.num_images=2"),
    *("analysis=range", "ranges=static", "quantizer=rtn"),
)
#: Each process has a new working directory, in one that holds dataset/, run/ and drawn/.
MEASURED = {
    "calib --version": ("-m", "calib", "--version"),
    "calib --help": ("-m", "calib", "--help"),
    "calib verify DIR": ("-m", "calib", "verify", "../dataset"),
    "calib compare DIR": ("-m", "calib", "compare", "../run"),
    "import calib.activations.reader": ("-c", "import calib.activations.reader"),
    "import what a job imports": ("-c", f"import importlib.util; __import__({JOB_MODULE})"),
    "calib --cfg job": ("-m", "calib", "--cfg", "job"),
    "a run's page": ("-c", PAGE),
    "a tiny job": ("-m", "calib", *TINY),
}


def cpu_seconds(command: list[str], folder: Path) -> float:
    """User and system time of one process with its children, run in a new folder within ``folder``."""
    directory = tempfile.mkdtemp(dir=folder)
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {error}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=[], metavar="PATH", help="interpreters of other environments")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run directory whose page is drawn")
    parser.add_argument("--times", type=int, default=5, help="processes to take the median of")
    given = parser.parse_args()
    # Not resolved: an environment's interpreter is a link, and known by where the link lies.
    pythons = [str(Path(python).absolute()) for python in (sys.executable, *given.python)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([pythons[0], "-m", "calib", *JOB], cwd=folder, check=True, capture_output=True)
        shutil.copytree(given.run or folder / "run", folder / "drawn")
        print(f"{'CPU-seconds':32}" + "".join(f"{number:>8}" for number in range(len(pythons))))
        for label, arguments in MEASURED.items():
            taken = [[cpu_seconds([python, *arguments], folder) for python in pythons] for _ in range(given.times)]
            medians = [statistics.median(column) for column in zip(*taken, strict=True)]
            print(f"{label:32}" + "".join(f"{median:8.2f}" for median in medians), flush=True)
        print("\n".join(f"{number}: {python}" for number, python in enumerate(pythons)))


if __name__ == "__main__":
    main()
