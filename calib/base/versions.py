"""Versions of what a result depends on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import calib

BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")
PACKAGES = ("mlx", *BACKENDS, "diffusionkit", "numpy", "h5py", "hydra-core", "omegaconf", "pillow", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python, calib and what it builds on: 'absent' if not installed, of MLX's backends the installed."""
    found = {"python": platform.python_version(), "calib": calib.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package not in BACKENDS:
                found[package] = "absent"
    return found


def git_commit() -> str:
    """Commit of the checkout that calib runs from; 'unknown' where it runs from an installed wheel."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
