"""Benchmarks run, in small: what they call has not moved away."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, environment

#: Arguments with which each takes seconds.
SMALL = {
    "benchmark_collect": ("--emoji", "--batch", "2", "--forwards", "1", "--steps", "1", "--rounds", "1"),
    "benchmark_features": ("--pictures", "4"),
    "benchmark_gptq": ("--heads", "2", "--columns", "512", "--size", "64", "--states", "2"),
    "benchmark_metrics": (
        *("--images", "4", "--calibration", "4", "--only", "W2"),
        *("sampler.num_steps=2", "subset.num_images=2", "timestep_schedule=all"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_in_small(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "scripts" / f"{name}.py"), *SMALL[name]]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " | " in done.stdout or "ms each" in done.stdout
