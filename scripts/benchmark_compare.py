"""How long `calib compare` takes over many runs: whole processes, start-up counted.

    python scripts/benchmark_compare.py RUN [--runs 200]

RUN is a run directory that calib made; copies of it, with other figures, are compared. Prints seconds, medians of five.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def copies(run: Path, count: int, into: Path) -> None:
    """``count`` run directories that differ in a setting and in their figures; large files are left out."""
    ignored = shutil.ignore_patterns("*.h5", "*.safetensors", "report.html", "images")
    for number in range(count):
        copy = Path(shutil.copytree(run, into / f"seed={number}", ignore=ignored))
        if (run / "images").exists():
            (copy / "images").symlink_to(run.resolve() / "images")
        config = (copy / "config.resolved.yaml").read_text()
        (copy / "config.resolved.yaml").write_text(config.replace("\nseed: 0\n", f"\nseed: {number}\n"))
        metrics = json.loads((copy / "metrics.json").read_text())
        changed = {key: value * (1 + number / count) for key, value in metrics.items()}
        (copy / "metrics.json").write_text(json.dumps(changed))


def seconds(arguments: list[str], times: int = 5) -> float:
    """Median time of a process of its own."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "calib", "compare", *arguments], check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copies(given.run, given.runs, folder / "sweep")
        sweep = str(folder / "sweep")
        print(f"{given.runs} runs, a table:          {seconds([sweep]):.2f} s")
        files = [f"--json={folder}/x.json", f"--csv={folder}/x.csv"]
        print(f"{given.runs} runs, --json and --csv: {seconds([sweep, *files]):.2f} s")
        print(f"{given.runs} runs, --html:           {seconds([sweep, f'--html={folder}/x.html'], 3):.2f} s")
        print(f"one run:                      {seconds([str(folder / 'sweep' / 'seed=0')]):.2f} s")


if __name__ == "__main__":
    main()
