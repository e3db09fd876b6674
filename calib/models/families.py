"""The families of transformers, by the key under which one describes itself in a quantized model."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.base.errors import ConfigError

import mlx.core as mx

if TYPE_CHECKING:
    from calib.models.mflux.folder import Folder

#: Modules of the families that mflux loads, each with a ``FAMILY``.
MFLUX = {
    "z_image": "calib.models.mflux.zimage",
    "flux2": "calib.models.mflux.flux2",
    "qwen_image": "calib.models.mflux.qwen",
    "flux1_dev": "calib.models.mflux.flux1.dev",
    "flux1_schnell": "calib.models.mflux.flux1.schnell",
}


def paths_of(about: Mapping[str, Any]) -> str | None:
    """Whose module paths a quantized model's weights have; None where that is not known."""
    return "DiffusionKit" if "mmdit" in about else "mflux" if about.keys() & MFLUX.keys() else None


def check_mflux(model: str, about: Mapping[str, Any]) -> str:
    """The key of a quantized model's family, which mflux loads; raises for others', and where mflux is missing."""
    key = next((key for key in MFLUX if key in about), None)
    if key is None:
        allowed = f"holds models of mflux's alone, and {model} is none; --format mlx holds it"
        raise ConfigError(f"--format mflux: {allowed}")
    importlib.import_module("calib.models.mflux")
    return key


def mflux_folder(
    about: Mapping[str, Any],
    weights: Path,
    arrays: Mapping[str, mx.array],
    base: Path | None,
    repository: str | None,
    bits: float,
) -> "Folder":
    """The checked folder of a quantized model for mflux; see :mod:`calib.models.mflux.folder`.

    Args:
        repository: of the hub, for a ``base`` that is not given.
    """
    key = check_mflux(str(about.get("model")), about)
    from calib.models.mflux import folder

    family = importlib.import_module(MFLUX[key]).FAMILY
    return folder.folder_for(family, about[key], weights, arrays, folder.base_of(family, base, repository), bits)
