"""Versions of the software that a result depends on."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from calib.base import VERSION

BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")
#: Counted where it is used: other models' results do not depend on it.
MFLUX = "mflux"
PACKAGES = ("mlx", *BACKENDS, "diffusionkit", "numpy", "h5py", "hydra-core", "omegaconf", "pillow", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python, calib and its dependencies; 'absent' if not installed, absent backends of MLX left out."""
    found = {"python": platform.python_version(), "calib": VERSION}
    for package in (*PACKAGES, MFLUX) if MFLUX in sys.modules else PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package not in BACKENDS:
                found[package] = "absent"
    return found


def numerics() -> str:
    """Versions of what computes: of MLX, and of mflux where a model of its is loaded; for keys of caches."""
    found = versions()
    return f"{found['mlx']} {MFLUX} {found[MFLUX]}" if MFLUX in found else found["mlx"]


def git_commit() -> str:
    """Commit of the checkout that calib runs from; 'unknown' for an installed wheel."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
