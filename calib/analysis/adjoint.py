"""Gradients of the final picture with respect to weights and layer inputs, by the adjoint of the sampler.

Euler's step is z' = z + d v(z), where d is the change of sigma and v the guided velocity. For a picture y = decode(z)
of the last state and a random r, λ = (∂y/∂z)ᵀ r is carried back over the stored states, λ ← λ + d (∂v/∂z)ᵀ λ, and the
gradient of a layer's weights is G = Σ d (∂v/∂W)ᵀ λ over the steps (docs/METHODS.md). States are read, not computed.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.activations.step import prompt_of
from calib.activations.taps import TapPoint
from calib.analysis.backward import Backward, Rows
from calib.analysis.sensitivities import INPUT_BITS, Of
from calib.base.errors import CalibError, ConfigError, reason_of
from calib.dataset.manifest import Manifest
from calib.models.architecture import Conditioning
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray


@dataclass(frozen=True)
class Gradients:
    """What one probe of one batch of images gives; sums over the images.

    Attributes:
        weights: G by layer, (rows, columns) float32. With r ~ N(0, 1/size of y), E⟨G, ΔW⟩² is the mean squared error of
            the pictures after a small change ΔW of the weights; of latents, the relative squared error.
        inputs: Σ (∂/∂x)² Δx² by tap, (num_steps, bit-widths): the same for the input of a tap, quantized at that step.
        outputs: mean of (d ∂/∂y)² by layer, (num_steps,), over the outputs, tokens and rows of y at that step: how much
            an error of the layer's output reaches the picture or latent.
        reach: ‖λ‖² at each state, (num_steps + 1,): how much an error of that state reaches the picture or latent.
    """

    weights: dict[str, mx.array]
    inputs: dict[str, NDArray[np.float64]]
    outputs: dict[str, NDArray[np.float64]]
    reach: NDArray[np.float64]


def check_complete(data_dir: Path, manifest: Manifest, of: Of = Of.PICTURE) -> None:
    """Raise where the dataset lacks a state or a noise level, as a gradient of the picture goes through all of them."""
    if not np.isfinite([*manifest.sigmas, *manifest.timesteps]).all():
        raise ConfigError(
            f"sensitivity.of={of}: {data_dir}, of the older layout, does not record all noise levels; "
            "draw another data_dir, or set sensitivity.of=output"
        )
    if lacking := sorted(set(range(manifest.num_steps + 1)) - set(manifest.steps)):
        raise ConfigError(
            f"sensitivity.of={of}: {data_dir} keeps {len(manifest.steps)} of {manifest.num_steps + 1} states, not "
            f"state {lacking[0]}; draw another data_dir with dataset.steps=all, or set sensitivity.of=output"
        )


class Adjoint:
    """Backward passes through the sampler, over the stored states of a dataset.

    Args:
        layers: linear layers by canonical name, whose weights' gradients are wanted.
        points: taps whose inputs may be quantized.
        ranges: ``ranges(tap, step)`` is the range, (low, high), over which its input would be.
        by_parts: whether a pass through the transformer goes block by block: see :class:`Backward`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        states: StoredStates,
        layers: Mapping[str, nn.Module],
        points: Sequence[TapPoint],
        ranges: Callable[[str, int], tuple[float, float]],
        by_parts: bool = False,
    ):
        self._model, self._states, self._points, self._ranges = model, states, points, ranges
        self._backward = partial(Backward, model, layers, points, by_parts)

    def of_picture(
        self,
        images: Sequence[int],
        key: mx.array,
        advance: Callable[[], None] = lambda: None,
        text: Conditioning | None = None,
    ) -> Gradients:
        """One probe of ``images``: a random direction in each of their pictures, carried back to the first step.

        All states must be stored: see :func:`check_complete`.

        Args:
            key: of MLX's random numbers.
            advance: called after each step.
            text: conditioning of the images; None: their prompts are encoded.

        Raises:
            CalibError: a gradient is not finite; the message names the step and a layer, or the decoder.
        """
        adjoint = self._of_pictures(images, key)
        if not mx.isfinite(adjoint).all().item():
            raise CalibError("the gradient of the picture is not finite, first in the decoder")
        return self._carried(images, text, adjoint, "the picture", advance)

    def of_latent(
        self,
        images: Sequence[int],
        key: mx.array,
        advance: Callable[[], None] = lambda: None,
        text: Conditioning | None = None,
    ) -> Gradients:
        """:meth:`of_picture` for the finished latents z: E⟨G, ΔW⟩² is ‖Δz‖² / ‖z‖²."""
        last = self._last(images)
        norms = mx.sqrt((last**2).sum(axis=(1, 2, 3), keepdims=True))
        adjoint = mx.random.normal(last.shape, key=key) / norms
        return self._carried(images, text, adjoint, "the finished latent", advance)

    def undecodable(self) -> str | None:
        """Why the decoder cannot be differentiated, tried on the first image; None where it can be."""
        images = self._states.images[:1]
        try:
            found = self._of_pictures(images, mx.random.key(0))
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            return reason_of(error)
        if not mx.isfinite(found).all().item():
            return "its gradient is not finite"
        return None if found.any().item() else "no gradient reaches the latent"

    def of_output(self, images: Sequence[int], step: int, key: mx.array, text: Conditioning | None = None) -> Gradients:
        """One probe of the model's output at ``step``: E⟨G, ΔW⟩² is ‖Δv‖² / ‖v‖² over both guidance halves.

        ``inputs`` has one row, ``outputs`` and ``reach`` have one number.
        """

        def along(v: mx.array) -> mx.array:
            direction = mx.random.normal(v.shape, key=key) / mx.sqrt((v**2).sum())
            return (v * mx.stop_gradient(direction)).sum()

        rows = self._rows(images, step, text or self._text(images))
        with self._backward().running() as backward:
            found = backward.run(rows, along, self._range_at(step), f"the output at step {step}")
        inputs = {point.name: np.array(found.inputs[point.name])[None] for point in self._points}
        outputs = {name: np.array(g)[None] for name, g in found.outputs.items()}
        return Gradients(backward.total, inputs, outputs, np.zeros(1))

    def _carried(
        self,
        images: Sequence[int],
        text: Conditioning | None,
        adjoint: mx.array,
        what: str,
        advance: Callable[[], None],
    ) -> Gradients:
        """Carry ``adjoint``, λ of the last states, back to the first step."""
        manifest, text = self._states.manifest, text or self._text(images)
        inputs = np.zeros((len(self._points), manifest.num_steps, len(INPUT_BITS)))
        outputs: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(manifest.num_steps))
        reach = np.zeros(manifest.num_steps + 1)
        reach[-1] = _squared(adjoint)
        with self._backward().running() as backward:
            for step in reversed(range(manifest.num_steps)):
                along = partial(self._along, adjoint * (manifest.sigmas[step + 1] - manifest.sigmas[step]))
                rows = self._rows(images, step, text)
                found = backward.run(rows, along, self._range_at(step), f"{what} at step {step}")
                # With guidance there are two rows of one state.
                adjoint = adjoint + found.rows.reshape(-1, *adjoint.shape).sum(axis=0)
                inputs[:, step] = [np.array(found.inputs[p.name]) for p in self._points]
                for name, square in found.outputs.items():
                    outputs[name][step] = np.array(square)
                reach[step] = _squared(adjoint)
                advance()
        by_tap = {point.name: inputs[i] for i, point in enumerate(self._points)}
        return Gradients(backward.total, by_tap, dict(outputs), reach)

    def _along(self, carried: mx.array, v: mx.array) -> mx.array:
        """⟨carried, v⟩, with guidance."""
        weight = self._states.manifest.cfg_weight
        if weight > 0:
            conditional, unconditional = mx.split(v, 2)
            v = unconditional + weight * (conditional - unconditional)
        return (v * carried).sum()

    def _range_at(self, step: int) -> Callable[[str], tuple[float, float]]:
        return lambda tap: self._ranges(tap, step)

    def _text(self, images: Sequence[int]) -> Conditioning:
        manifest = self._states.manifest
        prompts = [prompt_of(self._states.data_dir, manifest.images[i]) for i in images]
        return self._model.encode(prompts, manifest.cfg_weight)

    def _rows(self, images: Sequence[int], step: int, text: Conditioning) -> Rows:
        """States of ``images``, with guidance twice."""
        manifest = self._states.manifest
        x = mx.array(read_states(self._states.data_dir, manifest, images, step))
        x = mx.concatenate([x, x]) if manifest.cfg_weight > 0 else x
        rows = Rows(x, text.astype(mx.float32), mx.array([manifest.timesteps[step]]))
        mx.eval(rows.x, rows.text.arrays(), rows.timestep)
        return rows

    def _last(self, images: Sequence[int]) -> mx.array:
        """The finished latents, (images, height, width, channels)."""
        manifest = self._states.manifest
        return mx.array(read_states(self._states.data_dir, manifest, images, manifest.num_steps))

    def _of_pictures(self, images: Sequence[int], key: mx.array) -> mx.array:
        """λ of the last states, (images, height, width, channels), for random directions in the pictures."""
        model = self._model

        def picture(z: mx.array) -> list[mx.array]:
            # Not clipped: a value beyond white is moved back into the picture by an error as large.
            return [model.decode_latents(model.latent_format.process_out(z)).astype(mx.float32) / 2]

        found = []
        last = self._last(images)
        shape = (len(images), *picture(last[:1])[0].shape[1:])
        directions = mx.random.normal(shape, key=key) / np.sqrt(np.prod(shape[1:]))
        for i in range(len(images)):  # one at a time, as they are decoded: activations of a picture's size are kept
            found.append(mx.vjp(picture, [last[i : i + 1]], [directions[i : i + 1]])[1][0])
            mx.eval(found[-1])
        return mx.concatenate(found)


def _squared(x: mx.array) -> float:
    return cast(float, (x.astype(mx.float32) ** 2).sum().item())
