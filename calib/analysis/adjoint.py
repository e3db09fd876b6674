"""Gradients of the final picture with respect to weights and layer inputs, by the adjoint of the sampler.

Euler's step is z' = z + d v(z), where d is the change of sigma and v the guided velocity. For a picture y = decode(z)
of the last state and a random r, λ = (∂y/∂z)ᵀ r is carried back over the stored states, λ ← λ + d (∂v/∂z)ᵀ λ, and the
gradient of a layer's weights is G = Σ d (∂v/∂W)ᵀ λ over the steps (docs/METHODS.md). States are read, not computed.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.activations.step import prompt_of
from calib.activations.taps import TapPoint
from calib.analysis.backward import Backward, Found, along
from calib.analysis.by_parts import ByParts, Ranges, Rows
from calib.analysis.kept import Kept
from calib.analysis.sensitivities import INPUT_BITS, Of
from calib.analysis.sweep import Way, nbytes_of, sweep, units_of
from calib.base.device import cores, on_gpu
from calib.base.errors import CalibError, reason_of
from calib.models.architecture import Conditioning
from calib.models.model import DiffusionModel
from calib.models.parallel import compute_in_turn, streams_of

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray


@dataclass(frozen=True)
class Gradients:
    """What one probe of one batch of images gives; sums over the images.

    Attributes:
        weights: G by layer, (rows, columns) float32, or what it was reduced to. With r ~ N(0, 1/size of y), E⟨G, ΔW⟩²
            is the mean squared error of the pictures after a small change ΔW of the weights; of latents, the relative
            squared error.
        inputs: Σ (∂/∂x)² Δx² by tap, (num_steps, bit-widths): the same for the input of a tap, quantized at that step.
        outputs: mean of (d ∂/∂y)² by layer, (num_steps,), over the outputs, tokens and rows of y at that step: how much
            an error of the layer's output reaches the picture or latent.
        reach: ‖λ‖² at each state, (num_steps + 1,): how much an error of that state reaches the picture or latent.
    """

    weights: dict[str, mx.array]
    inputs: dict[str, NDArray[np.float64]]
    outputs: dict[str, NDArray[np.float64]]
    reach: NDArray[np.float64]


#: What directions are in, for errors.
WHAT = {Of.PICTURE: "the picture", Of.LATENT: "the finished latent"}


@dataclass(frozen=True)
class Probe:
    """Images, the key of their random direction, and their conditioning; None: their prompts are encoded."""

    images: Sequence[int]
    key: mx.array
    text: Conditioning | None = None


class _Carried:
    """What one probe has found so far; ``adjoint`` is λ of the states reached, ``total`` the sum of gradients."""

    def __init__(
        self, images: Sequence[int], text: Conditioning, adjoint: mx.array, total: dict[str, mx.array], num_steps: int
    ):
        self.images, self.text, self.adjoint, self.total = images, text, adjoint, total
        self._inputs: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros((num_steps, len(INPUT_BITS))))
        self._outputs: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(num_steps))
        self._reach = np.zeros(num_steps + 1)
        self._reach[-1] = _squared(adjoint)

    def add(self, step: int, found: Found) -> None:
        """Add what the pass of ``step`` found, and carry λ on."""
        # With guidance there are two rows of one state.
        self.adjoint = self.adjoint + found.rows.reshape(-1, *self.adjoint.shape).sum(axis=0)
        for tap, errors in found.inputs.items():
            self._inputs[tap][step] = np.array(errors)
        for name, square in found.outputs.items():
            self._outputs[name][step] = np.array(square)
        self._reach[step] = _squared(self.adjoint)

    def gradients(self, points: Sequence[TapPoint]) -> Gradients:
        """All of it, by taps in the order of ``points``."""
        by_tap = {point.name: self._inputs[point.name] for point in points}
        return Gradients(self.total, by_tap, dict(self._outputs), self._reach)


class Adjoint:
    """Backward passes through the sampler, over the stored states of a dataset.

    Args:
        layers: linear layers by canonical name, whose weights' gradients are wanted.
        points: taps whose inputs may be quantized.
        ranges: ``ranges(tap, step)`` is the range, (low, high), over which its input would be.
        by_parts, reduce: whether a pass through the transformer goes block by block, and what it keeps of gradients of
            weights: see :class:`Backward`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        states: StoredStates,
        layers: Mapping[str, nn.Module],
        points: Sequence[TapPoint],
        ranges: Callable[[str, int], tuple[float, float]],
        by_parts: bool = False,
        reduce: Callable[[str, mx.array], mx.array] | None = None,
    ):
        self._model, self._states, self._points, self._ranges = model, states, points, ranges
        self._reduce, self._backward = reduce, partial(Backward, model, layers, points, by_parts, reduce)

    def of_picture(self, images: Sequence[int], key: mx.array) -> Gradients:
        """One probe of the pictures of ``images``: see :meth:`carried`."""
        (found,) = self.carried(Of.PICTURE, [Probe(images, key)])
        return found

    def carried(
        self,
        of: Of,
        probes: Sequence[Probe],
        advance: Callable[[], None] = lambda: None,
        kept: Kept | None = None,
    ) -> list[Gradients]:
        """Carry random directions in pictures, or finished latents z, back to the first step; ``probes`` side by side.

        Of latents E⟨G, ΔW⟩² is ‖Δz‖² / ‖z‖². All states must be stored
        (:func:`calib.analysis.passes.check_complete`). Several probes are for a CPU, in a
        :func:`calib.models.parallel.shared_cores` context, or for a streamed model (:mod:`calib.analysis.sweep`).

        Args:
            advance: called after each step of each probe; :meth:`units` times for each.
            kept: for a streamed model, what has room for :meth:`kept_bytes` of all probes; None: in memory.

        Raises:
            CalibError: a gradient is not finite; the message names the step and a layer, or the decoder.
        """
        num_steps, what = self._states.manifest.num_steps, WHAT[of]
        begin = self._of_pictures if of is Of.PICTURE else self._of_latents
        with self._backward().running() as backward:
            sweeps = self._swept(backward)
            passes = [
                _Carried(
                    probe.images,
                    self._text_of(probe),
                    begin(probe.images, probe.key),
                    backward.no_gradients() if sweeps is None else {},
                    num_steps,
                )
                for probe in probes
            ]
            if not all(mx.isfinite(each.adjoint).all().item() for each in passes):
                raise CalibError(f"the gradient of {what} is not finite, first in the decoder")
            if sweeps is not None:
                ways = [self._way(backward, each, what) for each in passes]
                sweep(sweeps, ways, num_steps, Kept() if kept is None else kept, self._reduce, advance)
            else:
                at_once = 1 if on_gpu() else cores()
                for step in reversed(range(num_steps)):
                    for first in range(0, len(passes), at_once):
                        self._step_back(backward, passes[first : first + at_once], step, what, advance)
        return [each.gradients(self._points) for each in passes]

    def units(self) -> int:
        """How often :meth:`carried` advances for each probe."""
        parts, num_steps = self._swept(self._backward()), self._states.manifest.num_steps
        return num_steps if parts is None else units_of(parts, num_steps)

    def kept_bytes(self, probe: Probe) -> int:
        """What is kept of a probe where the model is streamed, else 0."""
        parts = self._swept(self._backward())
        rows = self._rows(probe.images, 0, self._text_of(probe))
        return 0 if parts is None else nbytes_of(parts, rows, self._states.manifest.num_steps)

    def _swept(self, backward: Backward) -> ByParts | None:
        """The parts of a streamed model."""
        return None if self._model.streamed is None else backward.parts

    def _way(self, backward: Backward, each: _Carried, what: str) -> Way:
        rows = partial(self._rows, each.images, text=each.text)

        def done(step: int, found: Found) -> None:
            backward.check(found, {} if step else each.total, rows(step), f"{what} at step {step}")
            each.add(step, found)

        return Way(rows, partial(self._loss, each), self._range_at, done, each.total)

    def _loss(self, each: _Carried, step: int) -> Callable[[mx.array], mx.array]:
        """Of the output at ``step``, once λ of the state that follows is known."""
        sigmas = self._states.manifest.sigmas
        ahead = each.adjoint * (sigmas[step + 1] - sigmas[step])
        return partial(along, self._model, ahead, self._states.manifest.cfg_weight)

    def _step_back(
        self, backward: Backward, passes: Sequence[_Carried], step: int, what: str, advance: Callable[[], None]
    ) -> None:
        """Carry λ of ``passes`` over one step."""
        founds = []
        given = [self._rows(each.images, step, each.text) for each in passes]
        for each, rows, stream in zip(passes, given, streams_of(len(passes)), strict=True):
            with mx.stream(stream):
                founds.append(backward.run(rows, self._loss(each, step), self._range_at(step), each.total))
        compute_in_turn([found.order for found in founds])
        mx.eval([each.total for each in passes])
        for each, rows, found in zip(passes, given, founds, strict=True):
            backward.check(found, each.total, rows, f"{what} at step {step}")
            each.add(step, found)
            advance()

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

    def of_output(self, step: int, probe: Probe) -> Gradients:
        """One probe of the model's output at ``step``: E⟨G, ΔW⟩² is ‖Δv‖² / ‖v‖² over both guidance halves.

        ``inputs`` has one row, ``outputs`` and ``reach`` have one number.
        """

        def along(v: mx.array) -> mx.array:
            direction = mx.random.normal(v.shape, key=probe.key) / mx.sqrt(mx.square(v).sum())
            return (v * mx.stop_gradient(direction)).sum()

        rows = self._rows(probe.images, step, self._text_of(probe))
        with self._backward().running() as backward:
            total = backward.no_gradients()
            found = backward.run(rows, along, self._range_at(step), total)
            mx.eval(found.order, total)
            backward.check(found, total, rows, f"the output at step {step}")
        inputs = {point.name: np.array(found.inputs[point.name])[None] for point in self._points}
        outputs = {name: np.array(g)[None] for name, g in found.outputs.items()}
        return Gradients(total, inputs, outputs, np.zeros(1))

    def _range_at(self, step: int) -> Ranges:
        return lambda tap: self._ranges(tap, step)

    def _text_of(self, probe: Probe) -> Conditioning:
        """In float32."""
        manifest, text = self._states.manifest, probe.text
        if text is None:
            prompts = [prompt_of(self._states.data_dir, manifest.images[i]) for i in probe.images]
            text = self._model.encode(prompts, manifest.cfg_weight)
        return text.astype(mx.float32)

    def _rows(self, images: Sequence[int], step: int, text: Conditioning) -> Rows:
        """States of ``images``, with guidance twice."""
        manifest = self._states.manifest
        x = mx.array(read_states(self._states.data_dir, manifest, images, step))
        x = mx.concatenate([x, x]) if manifest.cfg_weight > 0 else x
        rows = Rows(x, text, mx.array([manifest.timesteps[step]]))
        mx.eval(rows.x, rows.text.arrays(), rows.timestep)
        return rows

    def _last(self, images: Sequence[int]) -> mx.array:
        """The finished latents, (images, height, width, channels)."""
        manifest = self._states.manifest
        return mx.array(read_states(self._states.data_dir, manifest, images, manifest.num_steps))

    def _of_latents(self, images: Sequence[int], key: mx.array) -> mx.array:
        """λ of the last states for random directions in them."""
        last = self._last(images)
        return mx.random.normal(last.shape, key=key) / mx.sqrt(mx.square(last).sum(axis=(1, 2, 3), keepdims=True))

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
    return cast(float, mx.square(x.astype(mx.float32)).sum().item())
