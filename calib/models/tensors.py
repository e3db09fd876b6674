"""Read safetensors by MLX alone; errors are one clear line."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from calib.base.errors import CalibError, first_line
from calib.base.files import utf8_name

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

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


def fingerprint_of(weights: Iterable[tuple[str, mx.array]]) -> str:
    """Hash of names, shapes, types and bytes in the given order (16 hex digits of SHA-256)."""
    digest = hashlib.sha256()
    for name, value in weights:
        digest.update(f"{name}{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(np.array(value.view(mx.uint8))).data)
    return digest.hexdigest()[:16]


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    source: str,
    unused: Sequence[str] = (),
) -> None:
    """Raise unless ``source`` has tensors of the ``wanted`` names and shapes; ``unused`` as in :func:`checked`."""
    given = {name: shape for name, shape in shapes.items() if not any(part in name for part in unused)}
    for name in sorted(wanted.keys() ^ given.keys()):
        state = "lacks" if name in wanted else "has an unknown"
        raise CalibError(f"{source}: {state} tensor {name!r}; is it the right checkpoint?")
    for name, shape in given.items():
        if shape != wanted[name]:
            raise CalibError(f"{source}: tensor {name!r} has shape {shape}, not {wanted[name]}")


def checked(
    module: nn.Module, weights: Mapping[str, mx.array], source: str, unused: Sequence[str] = ()
) -> dict[str, mx.array]:
    """Those of ``weights`` that ``module`` has, all of which must be there with its shapes, and no others; lazy.

    ``unused`` lists parts of names of tensors to ignore, which the module is known to lack.
    """
    given = {name: w for name, w in weights.items() if not any(part in name for part in unused)}
    wanted = {name: w.shape for name, w in dict(tree_flatten(module.parameters())).items()}
    check_tensors({name: w.shape for name, w in given.items()}, wanted, source)
    return given


def set_weights(module: nn.Module, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> None:
    """Give ``module`` these weights by path, as ``dtype``; lazy. Others stay as they are."""
    module.load_weights([(path, weight.astype(dtype)) for path, weight in weights.items()], strict=False)


def evaluate(module: nn.Module, source: str) -> None:
    """Read the weights of ``module``, which are of the file ``source``."""
    try:
        mx.eval(module.parameters())
    except RuntimeError as error:
        cause = first_line(error)[:_MOST_CHARACTERS]
        raise CalibError(f"{source}: cannot be read to its end ({cause}); download it again") from None
