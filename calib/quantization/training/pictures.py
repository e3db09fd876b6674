"""The loss of a changed transformer's pictures, and its gradient by weights through the sampler's own trajectory.

With the same noise and prompts the full-precision weights draw a picture y and the changed ones y'. The loss of a
picture is log(mean (y' - y)²), so that the mean over pictures is their mean PSNR. Its gradient goes back over the
states that the changed weights drew (the adjoint of docs/METHODS.md, there of the full-precision ones).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from calib.analysis.backward import Backward, along
from calib.analysis.by_parts import Rows
from calib.base.device import cores, on_gpu
from calib.base.errors import CalibError
from calib.base.progress import note, readable_bytes
from calib.dataset.generate import trajectory_from
from calib.dataset.sampling import as_floats, noise_levels
from calib.models.architecture import Conditioning
from calib.models.backward_memory import BackwardPlan, plan_backward
from calib.models.memory import decoding_bytes, device_memory
from calib.models.model import DiffusionModel
from calib.models.parallel import compute_in_turn, shared_cores, streams_of

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

#: Mean squared errors below this, 90 dB, are rounding.
LEAST_ERROR = 1e-9
#: Memory of decoding a picture and of going back through it, in units of decoding alone.
DECODED_TWICE = 4


def plan_pictures(
    model: DiffusionModel, layers: Mapping[str, nn.Linear], guidance: float, size: int, beside: int = 0
) -> BackwardPlan:
    """The plan of up to ``size`` pictures with changed weights in float32 and ``beside`` bytes held beside it."""
    held = beside + sum(4 * int(layer.weight.size) for layer in layers.values())
    shape, text_length = model.latent_shape, model.text_length
    memory = device_memory() - held
    plan = plan_backward(model.architecture, shape, guidance > 0, size, text_length, memory, largest=size)
    return replace(plan, nbytes=plan.nbytes + held)


@contextmanager
def picture_loss(
    model: DiffusionModel, layers: Mapping[str, nn.Linear], guidance: float, size: int, beside: int = 0
) -> Iterator["PictureLoss"]:
    """The loss of up to ``size`` pictures, on as many passes at once as this device runs best, for the context.

    Args:
        beside: bytes that are held meanwhile.
    """
    plan = plan_pictures(model, layers, guidance, size, beside)
    if plan.nbytes > device_memory():
        less = (
            "quantizer.rounding=false takes less, and so does quantizer=gptq"
            if beside
            else "quantizer=gptq takes less,"
        )
        note(
            f"gradients of pictures take about {readable_bytes(plan.nbytes)}, of {readable_bytes(device_memory())}: "
            f"this may be slow or killed; {less} without pictures"
        )
    at_once, side_by_side = (plan.batch_size, 1) if on_gpu() or plan.by_parts else (1, min(cores(), size))
    backward = Backward(model, layers, [], plan.by_parts)
    with backward.running(), shared_cores(side_by_side, side_by_side):
        decoded = _decoded_at_once(model, device_memory() - plan.nbytes) if on_gpu() else 1
        loss = PictureLoss(model, backward, layers, guidance, at_once, side_by_side, decoded)
        try:
            yield loss
        finally:
            loss.restore()


def _decoded_at_once(model: DiffusionModel, left: int) -> int:
    """Number of latents to decode, and to go back through, in ``left`` bytes."""
    needed = model.decoding_bytes or decoding_bytes(model.decoder, model.latent_shape[:2])
    return max(1, left // (DECODED_TWICE * needed)) if needed else 1


def psnr_of(error: float) -> float:
    """Of a mean squared error, dB."""
    return float(-10 * np.log10(error + LEAST_ERROR))


@dataclass(frozen=True)
class Drawn:
    """Pictures to draw: prompts, a seed each, in how many steps."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    num_steps: int


@dataclass
class _Pass:
    """A backward pass over some pictures: ``adjoint`` is the gradient by their states of the step reached."""

    text: Conditioning
    states: list[mx.array]
    adjoint: mx.array
    total: dict[str, mx.array]


class PictureLoss:
    """Draws pictures of a model with given weights in place of those of ``layers``, and differentiates their loss.

    To be used within :meth:`Backward.running` of ``backward``, which is of the same layers, in a
    :func:`calib.models.parallel.shared_cores` context: see :func:`picture_loss`.

    Args:
        guidance: the weight of guidance.
        at_once: pictures of a pass; side_by_side: passes at once, more than one on a CPU alone.
        decoded: pictures decoded at once.
    """

    def __init__(
        self,
        model: DiffusionModel,
        backward: Backward,
        layers: Mapping[str, nn.Linear],
        guidance: float,
        at_once: int,
        side_by_side: int,
        decoded: int = 1,
    ):
        self._model, self._backward, self._layers, self._guidance = model, backward, layers, guidance
        self._at_once, self._side_by_side, self._decoded = at_once, side_by_side, decoded
        self._exact = {name: layer.weight for name, layer in layers.items()}

    def draw(self, wanted: Drawn, weights: Mapping[str, mx.array] | None = None) -> list[mx.array]:
        """States 0 … num_steps, each (pictures, height, width, channels); None: at full precision."""
        self._set(self._exact if weights is None else weights)
        each, drawn = self._at_once * self._side_by_side, []
        for first in range(0, len(wanted.prompts), each):
            text = self._model.encode(wanted.prompts[first : first + each], self._guidance)
            given = (self._model, text, wanted.seeds[first : first + each], wanted.num_steps, self._guidance)
            states = trajectory_from(*given, parts=self._side_by_side)
            drawn.append([state.x.astype(mx.float32) for state in states])
        return [mx.concatenate(list(parts)) for parts in zip(*drawn, strict=True)]

    def gradients(
        self, wanted: Drawn, weights: Mapping[str, mx.array]
    ) -> tuple[NDArray[np.float64], dict[str, mx.array]]:
        """Mean squared errors of the pictures, (pictures,), and the mean gradient of their loss by weights, by layer.

        Raises:
            CalibError: a gradient is not finite; the message names the step and a layer, or the decoder.
        """
        each, size = self._at_once, len(wanted.prompts)
        groups = [slice(first, first + each) for first in range(0, size, each)]
        errors: list[float] = []
        total: dict[str, mx.array] = {}
        exact, changed = self.draw(wanted)[-1], self.draw(wanted, weights)
        for first in range(0, len(groups), self._side_by_side):
            passes = []
            for part in groups[first : first + self._side_by_side]:
                own, adjoint = self._of_pictures(exact[part], changed[-1][part])
                errors += own
                text = self._model.encode(wanted.prompts[part], self._guidance).astype(mx.float32)
                passes.append(_Pass(text, [x[part] for x in changed], adjoint, self._backward.no_gradients()))
            self._back(passes, wanted.num_steps)
            for one in passes:
                total = {name: total.get(name, 0) + g for name, g in one.total.items()}
                mx.eval(total)
        return np.array(errors), {name: g / size for name, g in total.items()}

    def directions(self, wanted: Drawn, seed: int) -> Iterator[dict[str, mx.array]]:
        """Yield, for each picture at full precision, the gradient of a random direction in it by weights, by layer."""
        for first in range(0, len(wanted.prompts), self._side_by_side):
            part = slice(first, first + self._side_by_side)
            # No more at once than go back at once: memory does not grow with the number of pictures.
            states = self.draw(Drawn(wanted.prompts[part], wanted.seeds[part], wanted.num_steps))
            passes = []
            for i, prompt in enumerate(wanted.prompts[part]):
                own, key = [x[i : i + 1] for x in states], mx.random.key(seed + first + i)
                direction = mx.random.normal(self._picture(own[-1]).shape, key=key)
                _, (adjoint,) = mx.vjp(lambda z: [self._picture(z)], own[-1:], [direction])
                text = self._model.encode([prompt], self._guidance).astype(mx.float32)
                passes.append(_Pass(text, own, adjoint, self._backward.no_gradients()))
            self._back(passes, wanted.num_steps)
            yield from (one.total for one in passes)

    def errors(self, exact: mx.array, changed: mx.array) -> list[float]:
        """Mean squared errors of the pictures of two batches of latents."""
        found = list[float]()
        for part in self._decodings(len(exact)):
            error = mx.square(self._picture(exact[part]) - self._picture(changed[part])).mean(axis=(1, 2, 3))
            found += np.array(error).tolist()
        return found

    def _back(self, passes: Sequence[_Pass], num_steps: int) -> None:
        """Carry the passes over all steps."""
        levels = noise_levels(self._model.sampler, num_steps)
        sigmas, times = as_floats(levels), as_floats(self._model.timesteps(levels))
        for step in reversed(range(num_steps)):
            founds, given = [], []
            for one, stream in zip(passes, streams_of(len(passes)), strict=True):
                with mx.stream(stream):
                    x = one.states[step]
                    x = mx.concatenate([x, x]) if self._guidance > 0 else x
                    rows = Rows(x, one.text, mx.array([times[step]]))
                    ahead = one.adjoint * (sigmas[step + 1] - sigmas[step])
                    loss = partial(along, self._model, ahead, self._guidance)
                    founds.append(self._backward.run(rows, loss, _no_range, one.total))
                    given.append(rows)
            compute_in_turn(
                [[*reversed(one.total.values()), f.rows, f.finite] for one, f in zip(passes, founds, strict=True)]
            )
            for one, rows, found in zip(passes, given, founds, strict=True):
                self._backward.check(found, one.total, rows, f"the pictures at step {step} of {num_steps}")
                one.adjoint = one.adjoint + found.rows.reshape(-1, *one.adjoint.shape).sum(axis=0)

    def _of_pictures(self, exact: mx.array, changed: mx.array) -> tuple[list[float], mx.array]:
        """Mean squared errors of pictures of two batches of latents, and the loss's gradient by the second's."""
        errors, gradients = list[float](), []
        for part in self._decodings(len(exact)):  # few at once: activations of a picture's size are kept
            y = self._picture(exact[part])

            def loss(z: mx.array, y: mx.array = y) -> tuple[mx.array, mx.array]:
                error = mx.square(self._picture(z) - y).mean(axis=(1, 2, 3))
                return mx.log(error + LEAST_ERROR).sum(), error

            (_, error), gradient = mx.value_and_grad(loss)(changed[part])
            mx.eval(error, gradient)
            errors += np.array(error).tolist()
            gradients.append(gradient)
        found = mx.concatenate(gradients)
        if not mx.isfinite(found).all().item():
            raise CalibError("the gradient of the picture is not finite, first in the decoder")
        return errors, found

    def _decodings(self, pictures: int) -> Iterator[slice]:
        """Those of ``pictures`` that are decoded at once."""
        yield from (slice(first, first + self._decoded) for first in range(0, pictures, self._decoded))

    def _picture(self, z: mx.array) -> mx.array:
        # Not clipped: a value beyond white is moved back into the picture by an error as large.
        decoded: mx.array = self._model.decode_latents(self._model.latent_format.process_out(z))
        return decoded.astype(mx.float32) / 2

    def restore(self) -> None:
        """Put the layers' own weights back."""
        self._set(self._exact)

    def _set(self, weights: Mapping[str, mx.array]) -> None:
        for name, weight in weights.items():
            self._layers[name].weight = weight


def _no_range(tap: str) -> tuple[float, float]:
    raise AssertionError(f"no tap is watched, not {tap}")
