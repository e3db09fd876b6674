"""Versions of what a result depends on."""

import importlib.metadata
import platform

import calib

PACKAGES = ("mlx", "diffusionkit", "numpy", "h5py", "hydra-core", "omegaconf", "pillow", "transformers")


def versions() -> dict[str, str]:
    """Version of Python, calib and each package it builds on; 'absent' where one is not installed."""
    found = {"python": platform.python_version(), "calib": calib.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
