"""What backward passes found, as arrays in a file: the rounding errors of every option, weighted by the gradients."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias
from zipfile import BadZipFile

from calib.analysis.adjoint import Gradients
from calib.base.files import write_bytes
from calib.base.progress import Progress
from calib.dataset.arrays import open_npz
from calib.models.grids import left_by_search
from calib.models.packed import Packed, half_of

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

#: Errors by option and by tap (steps, bit-widths), by layer how errors of outputs at each step reach the picture, and
#: the reach of each state.
KEYS = ("weights", "inputs", "outputs", "reach")
#: Rows of a layer on which searched grids are compared with MLX's.
SAMPLED_ROWS = 32
#: About how many weights are searched together: few launches on a GPU, and what a CPU's cache holds.
SEARCHED = 1 << 19

Table: TypeAlias = Mapping[str, NDArray[np.float64]]


def shares_of(layers: Mapping[str, nn.Module], options: Sequence[tuple[str, int, int]]) -> list[mx.array]:
    """By option the share of MLX's rounding error that searched grids leave, on some rows."""
    some: dict[str, mx.array] = {}
    alike: dict[tuple[int, int, mx.Dtype, int], list[str]] = {}
    for name, bits, group_size in options:
        weight = layers[name].weight
        if name not in some:
            some[name] = mx.contiguous(weight[:: max(1, len(weight) // SAMPLED_ROWS)])
            mx.eval(some[name])  # a copy, as all weights may not fit into memory
        alike.setdefault((bits, group_size, weight.dtype, weight.shape[1]), []).append(name)
    shares = {}
    with Progress("rounding errors", len(options), "option", delay=2) as progress:
        for (bits, group_size, dtype, columns), names in alike.items():
            at_once = max(1, SEARCHED // (SAMPLED_ROWS * columns))
            for first in range(0, len(names), at_once):
                part = names[first : first + at_once]
                found = left_by_search([some[name] for name in part], bits, group_size, half_of(dtype))
                shares.update({(name, bits, group_size): share for name, share in zip(part, found, strict=True)})
                progress.advance(len(part))
            mx.eval(shares)
    return [shares[option] for option in options]


def option_errors(
    gradients: Sequence[mx.array], weight: mx.array, bits: int, group_size: int, share: mx.array
) -> list[mx.array]:
    """Σ G² ΔW² of each of ``gradients``, for one option; lazy."""
    nearest = weight - Packed.nearest(weight, bits, group_size, half_of(weight.dtype)).dequantize()
    # ** 2 would call powf on a CPU.
    return [mx.square(gradient * nearest).sum() * share for gradient in gradients]


def reducing(
    layers: Mapping[str, nn.Module], options: Sequence[tuple[str, int, int]], shares: Sequence[mx.array]
) -> Callable[[str, mx.array], mx.array]:
    """A function of a layer's name and gradient that returns the errors of its options, (options,)."""
    own: dict[str, list[tuple[int, int, mx.array]]] = {}
    for (name, bits, group_size), share in zip(options, shares, strict=True):
        own.setdefault(name, []).append((bits, group_size, share))

    def reduce(name: str, gradient: mx.array) -> mx.array:
        errors = []
        for option in own.get(name, ()):
            errors += option_errors([gradient], layers[name].weight, *option)
            mx.eval(errors[-1])
        return mx.stack(errors) if errors else mx.zeros((0,))

    return reduce


def tables_of(
    found: Sequence[Gradients],
    layers: Mapping[str, nn.Module],
    options: Sequence[tuple[str, int, int]],
    shares: Sequence[mx.array],
) -> list[Table]:
    """Σ G² ΔW² for each option, with the inputs' errors and the reach, of each of several passes.

    ΔW is the error of searched grids, as quantizers make them: MLX's rounding times what a search leaves of it,
    ``shares``. A gradient may have been reduced to the errors of its layer's options, in their order.
    """
    errors = []
    seen: dict[str, int] = {}
    for (name, bits, group_size), share in zip(options, shares, strict=True):
        gradients, place = [each.weights[name] for each in found], seen.get(name, 0)
        seen[name] = place + 1
        if gradients[0].ndim == 1:
            errors.append(mx.stack([reduced[place] for reduced in gradients]))
        else:
            errors.append(mx.stack(option_errors(gradients, layers[name].weight, bits, group_size, share)))
        mx.eval(errors[-1])  # one rounded copy of a layer at a time
    by_pass = np.array([np.array(each) for each in errors], np.float64).T
    return [
        {
            "weights": weights,
            "inputs": np.stack(list(each.inputs.values())),
            "outputs": np.stack([each.outputs[name] for name in dict.fromkeys(name for name, *_ in options)]),
            "reach": each.reach,
        }
        for each, weights in zip(found, by_pass, strict=True)
    ]


def read_table(path: Path) -> Table | None:
    """What a pass found; None where there is no sound file."""
    with suppress(OSError, ValueError, KeyError, BadZipFile), open_npz(path) as file:
        return {key: file[key] for key in KEYS}
    return None


def write_table(path: Path, table: Table) -> None:
    """Write what a pass found, whole or not at all."""
    content = io.BytesIO()
    # NumPy's types let any keyword be its allow_pickle, which no key of a table is.
    np.savez(content, **table)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())
