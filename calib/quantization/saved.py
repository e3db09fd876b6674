"""What long work has done so far, in a file: arrays by name, and whatever else is JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.base.files import replacing
from calib.models.tensors import read_weights

import mlx.core as mx
import numpy as np

#: The tensor that holds all that is no tensor, as JSON.
_REST = "rest"


def save(path: Path, arrays: Mapping[str, mx.array], rest: Any) -> None:
    """Write both to a file, whole or not at all."""
    text = mx.array(np.frombuffer(json.dumps(rest).encode(), np.uint8))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        mx.save_safetensors(file, {**arrays, _REST: text})


def load(path: Path) -> tuple[dict[str, mx.array], Any]:
    """The arrays, evaluated, and the rest; CalibError, KeyError, ValueError or RuntimeError where it is damaged."""
    arrays = read_weights(str(path))
    rest = json.loads(bytes(np.array(arrays.pop(_REST))))
    mx.eval(arrays)
    return arrays, rest
