"""Versions of what a result depends on."""

import importlib.metadata
import platform

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
