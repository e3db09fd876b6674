"""Gradients of the final picture with respect to weights and layer inputs, by the adjoint of the sampler.

Euler's step is z' = z + d v(z), where d is the change of sigma and v the guided velocity. For a picture y = decode(z)
of the last state and a random r, λ = (∂y/∂z)ᵀ r is carried back over the stored states, λ ← λ + d (∂v/∂z)ᵀ λ, and the
gradient of a layer's weights is G = Σ d (∂v/∂W)ᵀ λ over the steps (docs/METHODS.md). States are read, not computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.activations.step import prompt_of
from calib.activations.taps import TapPoint
from calib.analysis.sensitivities import INPUT_BITS
from calib.analysis.watch import Watch, in_float32, input_errors
from calib.base.errors import CalibError, ConfigError
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
            the pictures after a small change ΔW of the weights.
        inputs: Σ (∂/∂x)² Δx² by tap, (num_steps, bit-widths): the same for the input of a tap, quantized at that step.
        reach: ‖λ‖² at each state, (num_steps + 1,): how much an error of that state reaches the picture.
    """

    weights: dict[str, mx.array]
    inputs: dict[str, NDArray[np.float64]]
    reach: NDArray[np.float64]


def check_complete(data_dir: Path, manifest: Manifest) -> None:
    """Raise where the dataset lacks a state or a noise level, as a gradient of the picture goes through all of them."""
    if not np.isfinite([*manifest.sigmas, *manifest.timesteps]).all():
        raise ConfigError(
            f"sensitivity.of=picture: {data_dir}, of the older layout, does not record all noise levels; "
            "draw another data_dir, or set sensitivity.of=output"
        )
    if lacking := sorted(set(range(manifest.num_steps + 1)) - set(manifest.steps)):
        raise ConfigError(
            f"sensitivity.of=picture: {data_dir} keeps {len(manifest.steps)} of {manifest.num_steps + 1} states, not "
            f"state {lacking[0]}; draw another data_dir with dataset.steps=all, or set sensitivity.of=output"
        )


@dataclass(frozen=True)
class _Found:
    """Gradients of one forward pass: by weights, errors of inputs by tap, and by the state."""

    weights: dict[str, mx.array]
    inputs: dict[str, mx.array]
    state: mx.array


class Adjoint:
    """Backward passes through the sampler, over the stored states of a dataset.

    Args:
        layers: linear layers by canonical name, whose weights' gradients are wanted.
        points: taps whose inputs may be quantized.
        ranges: ``ranges(tap, step)`` is the range, (low, high), over which its input would be.
    """

    def __init__(
        self,
        model: DiffusionModel,
        states: StoredStates,
        layers: Mapping[str, nn.Module],
        points: Sequence[TapPoint],
        ranges: Callable[[str, int], tuple[float, float]],
    ):
        self._model, self._states, self._layers = model, states, layers
        self._points, self._ranges = points, ranges

    def of_picture(self, images: Sequence[int], key: mx.array, advance: Callable[[], None] = lambda: None) -> Gradients:
        """One probe of ``images``: a random direction in each of their pictures, carried back to the first step.

        All states must be stored: see :func:`check_complete`.

        Args:
            key: of MLX's random numbers.
            advance: called after each step.

        Raises:
            CalibError: a gradient is not finite; the message names the step and a layer.
        """
        manifest, model = self._states.manifest, self._model
        text = self._text(images)
        with in_float32(model), Watch(model, self._layers, self._points) as watch:
            adjoint = self._last(images, key)
            total = {name: mx.zeros(layer.weight.shape) for name, layer in self._layers.items()}
            inputs = np.zeros((len(self._points), manifest.num_steps, len(INPUT_BITS)))
            reach = np.zeros(manifest.num_steps + 1)
            reach[-1] = _squared(adjoint)
            for step in reversed(range(manifest.num_steps)):
                change = manifest.sigmas[step + 1] - manifest.sigmas[step]
                found = self._pass(watch, images, text, step, adjoint * change)
                total = {name: total[name] + g for name, g in found.weights.items()}
                adjoint = adjoint + found.state
                mx.eval(total, adjoint, found.inputs)
                inputs[:, step] = [np.array(found.inputs[p.name]) for p in self._points]
                reach[step] = _squared(adjoint)
                if not np.isfinite(reach[step]):
                    raise CalibError(f"the gradient of the picture is not finite at step {step}{_lost(total)}")
                advance()
        by_tap = {point.name: inputs[i] for i, point in enumerate(self._points)}
        return Gradients(total, by_tap, reach)

    def of_output(self, images: Sequence[int], step: int, key: mx.array) -> Gradients:
        """One probe of the model's output at ``step``: E⟨G, ΔW⟩² is ‖Δv‖² / ‖v‖² over both guidance halves.

        ``inputs`` has one row, and ``reach`` one number.
        """
        text = self._text(images)
        with in_float32(self._model), Watch(self._model, self._layers, self._points) as watch:
            found = self._pass(watch, images, text, step, None, key)
            mx.eval(found.weights, found.inputs)
            inputs = {p.name: np.array(found.inputs[p.name])[None] for p in self._points}
        return Gradients(found.weights, inputs, np.zeros(1))

    def _text(self, images: Sequence[int]) -> Conditioning:
        manifest = self._states.manifest
        prompts = [prompt_of(self._states.data_dir, manifest.images[i]) for i in images]
        return self._model.encode(prompts, manifest.cfg_weight).astype(mx.float32)

    def _last(self, images: Sequence[int], key: mx.array) -> mx.array:
        """λ of the last states, (images, height, width, channels), for random directions in the pictures."""
        manifest, model = self._states.manifest, self._model
        last = mx.array(read_states(self._states.data_dir, manifest, images, manifest.num_steps))

        def picture(z: mx.array) -> list[mx.array]:
            # Not clipped: a value beyond white is moved back into the picture by an error as large.
            return [model.decode_latents(model.latent_format.process_out(z)).astype(mx.float32) / 2]

        shape = picture(last)[0].shape
        directions = mx.random.normal(shape, key=key) / np.sqrt(np.prod(shape[1:]))
        adjoint: mx.array = mx.vjp(picture, [last], [directions])[1][0]
        mx.eval(adjoint)
        return adjoint

    def _pass(
        self,
        watch: Watch,
        images: Sequence[int],
        text: Conditioning,
        step: int,
        carried: mx.array | None,
        key: mx.array | None = None,
    ) -> _Found:
        """Gradients of ⟨carried, v⟩ with guidance, or of a random direction in the output, one of its length; lazy."""
        manifest, model = self._states.manifest, self._model
        x = mx.array(read_states(self._states.data_dir, manifest, images, step))
        timestep = mx.array([manifest.timesteps[step]])
        mx.eval(x, timestep)

        def reached(
            own: dict[str, mx.array], zeros: dict[str, mx.array], x: mx.array
        ) -> tuple[mx.array, dict[str, mx.array]]:
            rows = mx.concatenate([x, x]) if manifest.cfg_weight > 0 else x
            with watch.given(own, zeros):
                v = model.velocity(rows, text, timestep)
            if carried is None:
                direction = mx.random.normal(v.shape, key=key) / mx.sqrt((v**2).sum())
                return (v * mx.stop_gradient(direction)).sum(), watch.inputs()
            if manifest.cfg_weight > 0:
                conditional, unconditional = mx.split(v, 2)
                v = unconditional + manifest.cfg_weight * (conditional - unconditional)
            return (v * carried).sum(), watch.inputs()

        reached(watch.weights(), {}, x)  # nothing is computed: for the shapes of the inputs
        found = mx.value_and_grad(reached, argnums=(0, 1, 2))(watch.weights(), watch.zeros(), x)
        (_, seen), (weights, gradients, state) = found
        errors = {tap: input_errors(seen[tap], gradients[tap], *self._ranges(tap, step)) for tap in seen}
        return _Found(weights, errors, state)


def _squared(x: mx.array) -> float:
    return cast(float, (x.astype(mx.float32) ** 2).sum().item())


def _lost(total: Mapping[str, mx.array]) -> str:
    """The first layer whose gradient is not finite, for the error."""
    return next((f", in {name} first" for name, g in total.items() if not mx.isfinite(g).all().item()), "")
