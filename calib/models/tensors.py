"""Read safetensors by MLX alone; errors are one clear line."""

from pathlib import Path

from calib.base.errors import CalibError, first_line
from calib.base.files import utf8_name

import mlx.core as mx

_MOST_CHARACTERS = 120


def read_weights(path: str) -> dict[str, mx.array]:
    """Tensors of a safetensors file by name; MLX reads each when it is first used."""
    try:
        with utf8_name(Path(path).expanduser()) as name:
            weights = mx.load(name, format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise CalibError(f"{path}: not a readable safetensors file ({first_line(error)[:_MOST_CHARACTERS]})") from None
    assert isinstance(weights, dict)
    return weights
