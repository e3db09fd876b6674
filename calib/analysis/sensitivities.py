"""Measured sensitivities: the error of the model's output with one layer quantized; helpers for heuristics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import LayerPlan
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import CalibError, suggest

import numpy as np
from numpy.typing import NDArray

#: The reason given for a layer whose weights are not quantized.
KEPT_AT_16_BITS = "kept, MLX cannot quantize it"
#: Predicted PSNRs in dB below which errors are too large for a prediction of first order, lowest first, and how much
#: less was drawn on the shipped model (docs/METHODS.md §9).
UNTRUSTED = ((24.0, "4 to 8 dB"), (30.0, "1 to 3 dB"))
#: Bit-widths at which gradients tell the error of an input.
INPUT_BITS = (4, 5, 6, 7, 8)
#: Bits above the average from which a layer counts as sensitive, and bits up to which it counts as aggressive.
SENSITIVE_ABOVE, AGGRESSIVE_AT = 1.5, 4
#: How the figure of a layer begins whose S is of pictures.
_ALONE = "alone "


class Of(StrEnum):
    """What errors are measured in: the finished picture or latent, through all steps, or single steps' outputs."""

    PICTURE = "picture"
    LATENT = "latent"
    OUTPUT = "output"


@dataclass(frozen=True)
class Reach:
    """How much of an error, squared, is left at the end, where the same error in the finished latent counts 1.

    Attributes:
        latent: of an error in the latent before each step, and in the finished one, (num_steps + 1,).
        output: of an error in the output of the model at each step, guidance included, (num_steps,).
    """

    latent: NDArray[np.float64]
    output: NDArray[np.float64]

    def to_json(self) -> dict[str, list[float]]:
        return {key: [float(f"{x:.4g}") for x in getattr(self, key)] for key in ("latent", "output")}


@dataclass(frozen=True)
class Sensitivities:
    """S = ‖v - v_q‖² / ‖v‖² of the model's output v, with one layer quantized at a time, on stored states.

    Of the picture: the mean squared error of the finished picture's values, 0 to 1. Of the latent: ‖Δz‖² / ‖z‖² of the
    finished latent z.

    Attributes:
        steps: indices of the measured steps, ascending.
        num_steps: number of steps of the trajectory.
        weights: S at each measured step, (steps,) float64, by layer and (bits, group size).
        activations: S at each measured step, by layer and bits, with the layer's input quantized.
        shapes: (rows, columns) of each layer's weight; without layers that MLX cannot quantize.
        of: what errors are of. Those of a picture or latent are of all steps together: of weights the same at each
            step, of inputs times the number of steps, so that means over the steps are the whole of the error.
        reach: how much of an error at each step reaches the picture or latent; None for outputs.
        doubt: standard error of a predicted PSNR in dB, by its spread over pictures; None where one alone was measured.
        importance: by layer, how much an error of its output at each step reaches the picture or latent, (num_steps,):
            the mean square over outputs and tokens of the gradient; empty for outputs.
        taps: layers that read one array, by the first of them; a layer in none reads an array of its own.
    """

    steps: tuple[int, ...]
    num_steps: int
    weights: dict[str, dict[tuple[int, int], NDArray[np.float64]]]
    activations: dict[str, dict[int, NDArray[np.float64]]]
    shapes: dict[str, tuple[int, int]]
    of: Of = Of.OUTPUT
    reach: Reach | None = None
    doubt: float | None = None
    importance: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    taps: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def of_picture(self) -> bool:
        return self.of is Of.PICTURE

    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The layers that read each measured input, by the first of them."""
        shared = {name: tuple(n for n in names if n in self.activations) for name, names in self.taps.items()}
        known = {name for names in shared.values() for name in names}
        alone = {name: (name,) for name in self.activations if name not in known}
        return {names[0]: names for names in shared.values() if names} | alone


def usable_options(
    layers: Mapping[str, LayerSummary],
    sensitivities: Sensitivities,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    group_sizes: Sequence[int] = GROUP_SIZES,
) -> dict[str, dict[tuple[int, int], NDArray[np.float64]]]:
    """S at each step by layer and option, for options that the layer's width allows, in the order of ``layers``.

    Raises:
        CalibError: a number or a layer is missing, or a value is no finite, non-negative number.
    """
    _check(layers, sensitivities)
    usable = {}
    for name in filter(sensitivities.shapes.__contains__, layers):
        columns = sensitivities.shapes[name][1]
        usable[name] = {
            (bits, group_size): values
            for (bits, group_size), values in sensitivities.weights.get(name, {}).items()
            if bits in weight_bits and group_size in group_sizes and columns % group_size == 0
        }
        if not usable[name]:
            wanted = f"{_listed(weight_bits)} bits in groups of {_listed(group_sizes)}"
            raise CalibError(f"layer {name!r} of {columns} columns has no sensitivity measured at {wanted}")
    if not usable:
        why = "they are blocks, which have no weights of their own, or their widths are no multiples of 32"
        raise CalibError(f"MLX can quantize none of these layers: {why}; analysis=range plans them all the same")
    return usable


def _check(layers: Mapping[str, LayerSummary], sensitivities: Sensitivities) -> None:
    for name in (*sensitivities.shapes, *sensitivities.weights, *sensitivities.activations):
        if name not in layers:
            hint = suggest(name, layers, list_all=False)
            raise CalibError(f"sensitivities name layer {name!r}, which the statistics do not have.{hint}")
    if not sensitivities.steps:
        raise CalibError("sensitivities were measured at no step")
    found = {
        f"weights of layer {name!r} at {bits} bits in groups of {group_size}": s
        for name, own in sensitivities.weights.items()
        for (bits, group_size), s in own.items()
    } | {
        f"input of layer {name!r} at {bits} bits": s
        for name, own in sensitivities.activations.items()
        for bits, s in own.items()
    }
    count = len(sensitivities.steps)
    for what, s in found.items():
        if s.shape != (count,) or not (np.isfinite(s) & (s >= 0)).all():
            raise CalibError(f"sensitivities of the {what} must be {count} finite numbers, none negative")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def option_bytes(shape: tuple[int, int], bits: int, group_size: int) -> int:
    """Bytes of a packed weight: its integers, and a 16-bit scale and bias per group."""
    rows, columns = shape
    return rows * columns * bits // 8 + rows * (columns // group_size) * 4


def held_bits(bits: int, group_size: int) -> float:
    """Bits per weight, including its share of scale and bias."""
    return bits + 32 / group_size


def judged(plan: LayerPlan, average: float) -> LayerPlan:
    """``plan`` marked sensitive or aggressive, never both, relative to ``average`` bits per weight with scales."""
    above = held_bits(plan.weight_bits, plan.group_size) - average
    sensitive = plan.weight_bits >= 8 or above >= SENSITIVE_ABOVE
    return replace(plan, sensitive=sensitive, aggressive=plan.weight_bits <= AGGRESSIVE_AT and not sensitive)


def decibels(error: float) -> float:
    """PSNR of pictures with values from 0 to 1 whose mean squared error is ``error``; infinite where it is 0."""
    return -10 * math.log10(error) if error > 0 else math.inf


def error_text(error: float, of_picture: bool) -> str:
    """The sum of errors for people."""
    return f"PSNR = {decibels(error):.2f} dB" if of_picture else f"ΣS = {error:.3g}"


def predicted(found: Sensitivities, error: float, nbytes: int, weights: int) -> list[str]:
    """The notes on a plan's predicted error and size, and on how far to trust it."""
    size = f"{8 * nbytes / weights:.3f} bits a weight, scales and biases counted, {nbytes / 1e6:.2f} MB"
    if not found.of_picture:
        return [
            f"predicted error {error_text(error, False)}{' of the finished latent' * (found.of is Of.LATENT)} at {size}"
        ]
    doubt = f" ± {found.doubt:.1f}" if found.doubt is not None and error > 0 else ""
    psnr = f"PSNR = {decibels(error):.2f}{doubt} dB"
    return [
        f"predicted {psnr}, weights alone, rounded to nearest, at {size}",
        *trust_note(decibels(error)),
    ]


def trust_note(psnr: float) -> list[str]:
    """The note on a predicted PSNR so low that it promises too much; empty where it can be trusted."""
    for below, less in UNTRUSTED:
        if psnr < below:
            return [f"errors are too large to be predicted well: below {below:g} dB expect {less} less"]
    return []


def with_inputs_note(weights: float, inputs: float | None, of_picture: bool) -> list[str]:
    """The note on the predicted error with inputs quantized too, where it is known."""
    if inputs is None:
        return []
    return [f"with inputs quantized as planned, {error_text(weights + inputs, of_picture)}"]


def figure(error: float, of_picture: bool) -> str:
    """The number behind a layer's bits: S, or the PSNR of pictures with this layer alone quantized."""
    if not of_picture:
        return f"S = {error:.1e}"
    return f"{_ALONE}{decibels(error):.1f} dB" if error > 0 else "of no effect on the picture"


def alone_psnr(layer: LayerPlan) -> float | None:
    """The PSNR of pictures with this layer alone quantized, in dB; None where S is not of pictures, or not known."""
    of_picture = layer.figure.startswith(_ALONE) and layer.sensitivity
    return decibels(layer.sensitivity) if of_picture and layer.sensitivity else None


def reach_note(sensitivities: Sensitivities) -> list[str]:
    """The note on how much of an early state's error is left in the picture, where that is known."""
    reach = sensitivities.reach
    if reach is None or not reach.latent.min() > 0:
        return []
    middle = sensitivities.num_steps // 2
    left = (100 * reach.latent[step] for step in (0, middle))
    first, half = (f"{share:.0f}%" if share >= 10 else f"{share:.2g}%" for share in left)
    return [
        f"the {sensitivities.of} keeps {first} of a squared error before step 0, {half} of one before step {middle}, "
        "all of one in the finished latent"
    ]


def kept_note(layers: Mapping[str, LayerSummary], sensitivities: Sensitivities) -> list[str]:
    """The note on layers that MLX cannot quantize and no budget counts; empty where there are none."""
    kept = len(layers) - len(sensitivities.shapes)
    note = f"weights are kept and not counted, as MLX cannot quantize them: {kept} of {len(layers)} layers"
    return [note] if kept else []
