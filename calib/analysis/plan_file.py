"""Read ``quantization_config.json``, which people edit: the one schema of the file, checked wherever it is read."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calib.analysis.plan import NO_CLIP, LayerPlan, fault_of
from calib.base.affine import DEFAULT_GROUP_SIZE
from calib.base.errors import CalibError, suggest
from calib.base.files import read_edited_json


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


#: The keys of a layer, those first that every layer has, with what each must be.
KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "suggested_weight_bits": (_is_whole, "an integer"),
    "suggested_activation_bits": (_is_whole, "an integer"),
    "use_percentile_clipping": (_is_flag, "true or false"),
    "clip_percentile": (_is_pair, "two numbers, [low, high]"),
    "group_size": (_is_whole, "an integer"),
    "reason": (_is_text, "text"),
    "figure": (_is_text, "text"),
    "sensitive": (_is_flag, "true or false"),
    "aggressive": (_is_flag, "true or false"),
    "sensitivity": (_is_number, "a finite number"),
    "bytes": (_is_whole, "an integer"),
    "outlier_channels": (lambda value: isinstance(value, list) and all(map(_is_whole, value)), "a list of integers"),
}
REQUIRED = tuple(KEYS)[:4]


def read_plan(path: Path) -> dict[str, LayerPlan]:
    """The layers of a ``quantization_config.json`` that MLX can run.

    Raises:
        CalibError: as :func:`read_layers`, or a layer has what MLX cannot run.
    """
    layers = read_layers(path)
    for name, layer in layers.items():
        if fault := fault_of(layer):
            raise CalibError(f"{path}: layer {name!r} has {fault}")
    return layers


def read_layers(path: Path) -> dict[str, LayerPlan]:
    """The layers of a ``quantization_config.json`` as planned, whether MLX can run them or not.

    Raises:
        CalibError: the file is missing or damaged, or a layer lacks a key, or has an unknown one or another type.
    """
    return {name: read_layer(path, name, entry) for name, entry in read_entries(path).items()}


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a ``quantization_config.json`` by layer, unchecked; comments, whose keys begin with _, left out.

    Raises:
        CalibError: the file is missing or damaged, or has a layer, or a key of a layer, twice.
    """
    document = read_edited_json(path)
    if not isinstance(document, dict) or not document:
        raise CalibError(f"{path}: holds no layers; calib analyze writes a plan")
    return document


def read_layer(path: Path, name: str, entry: Any) -> LayerPlan:
    """The layer ``name`` of the plan in ``path``, from its ``entry`` there; a CalibError where it is no layer's."""
    where = f"{path}: layer {name!r}"
    if not isinstance(entry, dict):
        raise CalibError(f"{where} is {json.dumps(entry)[:40]}: must be an object with {', '.join(REQUIRED)}")
    for key, value in entry.items():
        if key not in KEYS:
            raise CalibError(f"{where} has {key}, which is no key of a plan.{suggest(key, KEYS)}")
        holds, what = KEYS[key]
        if not holds(value):
            raise CalibError(f"{where} has {key}={json.dumps(value)[:40]}: must be {what}")
    if lacking := [key for key in REQUIRED if key not in entry]:
        raise CalibError(f"{where} lacks {lacking[0]}, {KEYS[lacking[0]][1]}; calib analyze writes a plan")
    low, high = entry["clip_percentile"]
    return LayerPlan(
        entry["suggested_weight_bits"],
        entry["suggested_activation_bits"],
        (float(low), float(high)) if entry["use_percentile_clipping"] else NO_CLIP,
        entry.get("reason", ""),
        entry.get("sensitive", False),
        entry.get("aggressive", False),
        entry.get("group_size", DEFAULT_GROUP_SIZE),
        entry.get("figure", ""),
        entry.get("sensitivity"),
        entry.get("bytes"),
    )
