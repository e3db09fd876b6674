"""Save and load a quantized transformer as a folder, bit for bit.

``model.safetensors`` has every parameter by the path that it has after ``nn.quantize``, so that MLX alone can load it.
``phases.safetensors`` has further copies of weights for phases, where a plan has them. ``config.json`` has bits and
group size of each layer, the rules for activations, and the model's origin.
"""

import errno
import os
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calib.analysis.plan import UNQUANTIZED
from calib.analysis.ranges import ranges_from_json, ranges_to_json
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import CalibError, check_format, lacks_or_garbles, reason_of
from calib.base.files import checksum, free_bytes, read_json, write_json
from calib.models.former import former_name
from calib.models.model import DiffusionModel
from calib.models.packed import Packed
from calib.models.rotation import BLOCKS
from calib.models.tensors import read_weights
from calib.quantization.model import InputRule, QuantizedModel

import mlx.core as mx

#: Version 2 has inputs that are divided or shifted, 3 has rotated ones: their model is another without that.
FORMAT, FORMAT_VERSIONS = "calib-quantized-model", (1, 2, 3)
CHECKPOINT, WEIGHTS, COPIES = "config.json", "model.safetensors", "phases.safetensors"
_PARTS = ("weight", "scales", "biases")
#: Attributes of an :class:`InputRule` for each channel.
MOVED = ("divisors", "shifts")
_AGAIN = "run calib quantize again"


def origin_of(model: DiffusionModel) -> dict[str, Any]:
    """The origin stored with a quantized model, JSON-able: the model's name, fingerprint and configuration."""
    return {"model": model.name, "fingerprint": model.fingerprint, **model.architecture.describe()}


def save(quantized: QuantizedModel, folder: Path) -> None:
    """Write ``folder``, whole or not at all; an existing one is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*"):  # of killed processes, as the caller holds the run directory
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as place:
        made = Path(place) / "made"
        made.mkdir()
        files = {WEIGHTS: _write(made / WEIGHTS, quantized.parameters(), folder)}
        if quantized.copies:
            files[COPIES] = _write(made / COPIES, _copies_of(quantized), folder)
        write_json(made / CHECKPOINT, {**_document(quantized), "files": files})
        if folder.exists():
            folder.rename(Path(place) / "before")
        made.rename(folder)


def _write(path: Path, arrays: dict[str, mx.array], folder: Path) -> str:
    """Write ``arrays``; returns the file's checksum. Errors name the file by its final path in ``folder``."""
    needed = sum(array.nbytes for array in arrays.values())
    if free_bytes(path.parent) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / path.name))
    try:
        with open(path, "wb") as file:  # by MLX itself it would have to be named in UTF-8
            mx.save_safetensors(file, arrays, metadata={"format": "mlx"})
    except OSError as error:
        error.filename = str(folder / path.name)
        raise
    except RuntimeError as error:
        raise CalibError(f"{folder / path.name}: cannot be written ({reason_of(error)})") from None
    return checksum(path)


def _shape(layer: Packed) -> dict[str, int]:
    rotation = {"rotation": layer.rotation} if layer.rotation else {}
    return {"bits": layer.bits, "group_size": layer.group_size} | rotation


def _copies_of(quantized: QuantizedModel) -> dict[str, mx.array]:
    return {
        f"{phase}.{quantized.paths[name]}.{part}": getattr(layer, part)
        for phase, layers in quantized.copies.items()
        for name, layer in layers.items()
        for part in _PARTS
    }


def _document(quantized: QuantizedModel) -> dict[str, Any]:
    paths = quantized.paths
    moved = {
        name: {key: list(values) for key in MOVED if (values := getattr(rule, key))}
        for name, rule in quantized.inputs.items()
        if rule.divisors or rule.shifts
    }
    packed = [*quantized.layers.values(), *(p for copies in quantized.copies.values() for p in copies.values())]
    turned = {name: rule.rotation for name, rule in quantized.inputs.items() if rule.rotation}
    version = 3 if turned or any(p.rotation for p in packed) else 2 if moved else 1
    return {
        "format": FORMAT,
        "format_version": version,
        **quantized.about,
        "layers": {paths[name]: _shape(layer) for name, layer in quantized.layers.items()},
        "names": {path: name for name, path in paths.items()},
        "copies": {
            phase: {paths[name]: _shape(layer) for name, layer in layers.items()}
            for phase, layers in quantized.copies.items()
        },
        "phases": {phase: list(bounds) for phase, bounds in quantized.phases.items()},
        "timesteps": list(quantized.timesteps),
        "activation_ranges": ranges_to_json({name: rule.ranges for name, rule in quantized.inputs.items()}),
        "activation_bits": {name: list(rule.bits) for name, rule in quantized.inputs.items()},
        **({"activation_channels": moved} if moved else {}),
        **({"activation_rotation": turned} if turned else {}),
    }


def _check_files(folder: Path, document: Mapping[str, Any]) -> None:
    for name, expected in document["files"].items():
        if not (folder / name).exists():
            raise CalibError(f"{folder / name}: is missing; {_AGAIN}")
        if checksum(folder / name) != expected:
            raise CalibError(f"{folder / name}: is damaged; {_AGAIN}")


@dataclass(frozen=True)
class Description:
    """What a saved model was made from: the hash of its plan, None where unknown, and weight bits by layer."""

    plan: str | None
    bits: dict[str, int]


def describe(folder: Path, thorough: bool = False) -> Description:
    """Read what :func:`save` recorded of a model's origin; raises as :func:`load` does.

    The weights are not read, or only for their checksums where ``thorough``.
    """
    document = read_json(folder / CHECKPOINT)
    check_format(folder / CHECKPOINT, document, FORMAT, FORMAT_VERSIONS, _AGAIN)
    try:
        if thorough:
            _check_files(folder, document)
        names = _names(document)
        plan = document.get("made_from", {}).get("plan")
        return Description(plan, {names[path]: shape["bits"] for path, shape in document["layers"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise lacks_or_garbles(folder / CHECKPOINT, error, _AGAIN) from None


def _names(document: Mapping[str, Any]) -> dict[str, str]:
    """Layers' names by path; checkpoints of calib 0.1.0, which were all of MMDiTs, do not have them."""
    former = {path: former_name(path) for path in document["layers"]}
    return former | dict(document.get("names", {}))


def load(folder: Path) -> QuantizedModel:
    """Load what :func:`save` wrote.

    Raises:
        CalibError: a file is missing, damaged, or of another version.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise CalibError(f"{folder}: no quantized model there (no {CHECKPOINT}); calib quantize makes one")
    document = read_json(path)
    check_format(path, document, FORMAT, FORMAT_VERSIONS, _AGAIN)
    try:
        _check_files(folder, document)
        return _quantized(path, document, _arrays(folder / WEIGHTS), _arrays(folder / COPIES))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise lacks_or_garbles(path, error, _AGAIN) from None


def _arrays(path: Path) -> dict[str, mx.array]:
    return read_weights(str(path)) if path.exists() else {}


def _whole(value: Any, allowed: Container[int]) -> int:
    """An integer that is allowed; raises a ValueError for any other value."""
    if type(value) is not int or value not in allowed:
        raise ValueError(f"{value!r}, where an integer must be")
    return value


def _of_channels(entry: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Divisors and shifts of an input's channels, finite numbers, divisors not 0; raises a ValueError for others."""
    found = {key: tuple(map(float, values)) for key, values in entry.items()}
    for key, values in found.items():
        if key not in MOVED or not all(map(isfinite, values)) or (key == MOVED[0] and 0 in values):
            raise ValueError(f"{key} of channels that are no finite numbers")
    return found


def _quantized(
    path: Path, document: Mapping[str, Any], arrays: dict[str, mx.array], copies: dict[str, mx.array]
) -> QuantizedModel:

    def packed(source: dict[str, mx.array], prefix: str, shape: Mapping[str, int]) -> Packed:
        weight, scales, biases = (source.pop(f"{prefix}.{part}") for part in _PARTS)
        bits, size = _whole(shape["bits"], WEIGHT_BITS), _whole(shape["group_size"], GROUP_SIZES)
        groups = (weight.shape[0], weight.shape[-1] * 32 // bits // size)
        if weight.ndim != 2 or weight.dtype != mx.uint32 or not scales.shape == biases.shape == groups:
            raise ValueError(f"the shapes of {prefix}")
        return Packed(weight, scales, biases, bits, size, _whole(shape.get("rotation", 0), (0, *BLOCKS)))

    names = _names(document)
    layers = {names[path]: packed(arrays, path, shape) for path, shape in document["layers"].items()}
    held = {
        phase: {names[path]: packed(copies, f"{phase}.{path}", shape) for path, shape in own.items()}
        for phase, own in document["copies"].items()
    }
    timesteps = tuple(float(t) for t in document["timesteps"])
    ranges = ranges_from_json(document["activation_ranges"], path, len(timesteps))
    bits_of = {name: tuple(_whole(b, range(2, 17)) for b in document["activation_bits"][name]) for name in ranges}
    moved, turned = document.get("activation_channels", {}), document.get("activation_rotation", {})
    inputs = {
        name: InputRule(
            own,
            bits_of[name] or (UNQUANTIZED,),
            **_of_channels(moved.get(name, {})),
            rotation=_whole(turned.get(name, 0), (0, *BLOCKS)),
        )
        for name, own in ranges.items()
    }
    phases = {phase: (int(first), int(last)) for phase, (first, last) in document["phases"].items()}
    if lacking := held.keys() - phases.keys():
        raise ValueError(f"the steps of phase {lacking.pop()!r}")
    made = {"format", "format_version", "layers", "names", "copies", "phases", "timesteps", "files"}
    made |= {"activation_ranges", "activation_bits", "activation_channels", "activation_rotation"}
    about = {key: value for key, value in document.items() if key not in made}
    paths = {names[path]: path for path in document["layers"]}
    return QuantizedModel(layers, arrays, inputs, timesteps, paths, held, phases, about)
