"""Versions of the software that a result depends on."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from calib.base import VERSION

BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")
#: Counted for its own models: other models' results do not depend on it.
MFLUX = "mflux"
PACKAGES = ("mlx", *BACKENDS, "diffusionkit", "numpy", "h5py", "hydra-core", "omegaconf", "pillow", "transformers")


def versions(network: object = None) -> dict[str, str]:
    """Versions of Python, calib and its dependencies; 'absent' if not installed, absent backends of MLX left out.

    With mflux's where ``network`` is a module of its.
    """
    found = {"python": platform.python_version(), "calib": VERSION}
    for package in (*PACKAGES, MFLUX) if _is_mfluxs(network) else PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package not in BACKENDS:
                found[package] = "absent"
    return found


def _is_mfluxs(network: object) -> bool:
    return type(network).__module__.partition(".")[0] == MFLUX


def numerics(network: object) -> str:
    """Versions of what computes ``network``: of MLX, and of mflux for its models; for keys of caches."""
    return numerics_of(versions(network))


def numerics_of(found: Mapping[str, str]) -> str:
    """The same of :func:`versions` that were recorded, mflux's of another process, with this one's MLX."""
    mlx = importlib.metadata.version("mlx")
    return f"{mlx} {MFLUX} {found[MFLUX]}" if MFLUX in found else mlx


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
