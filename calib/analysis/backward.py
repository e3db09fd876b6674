"""One backward pass through the transformer: gradients of its weights, of the inputs of its layers, and of its state.

In one piece it keeps the activations of all blocks; by parts (:mod:`calib.analysis.by_parts`) it takes the memory of a
forward pass, and the gradients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from calib.activations.taps import TapPoint
from calib.analysis.by_parts import Back, ByParts, Ranges, Rows, no_gradients
from calib.analysis.watch import Watch, Zeros, in_float32, input_errors
from calib.base.errors import CalibError
from calib.models.architecture import Divisible
from calib.models.model import DiffusionModel

import mlx.core as mx
from mlx import nn


@dataclass(frozen=True)
class Found:
    """What a pass gives, yet to be computed.

    Attributes:
        rows: the gradient by its rows.
        inputs: Σ gradient² Δx² of inputs by tap, for each of the bit-widths.
        outputs: the mean square of the gradient by a layer's output, by layer.
        finite: whether all gradients are finite.
        order: arrays on the way, in the order in which they are best computed.
    """

    rows: mx.array
    inputs: dict[str, mx.array]
    outputs: dict[str, mx.array]
    finite: mx.array
    order: list[mx.array]

    @classmethod
    def of(
        cls,
        rows: mx.array,
        inputs: dict[str, mx.array],
        outputs: dict[str, mx.array],
        total: Mapping[str, mx.array],
        order: Sequence[mx.array] = (),
    ) -> "Found":
        """Of these and the sums of gradients ``total``."""
        sums = [g.sum() for g in (*total.values(), *inputs.values(), rows)]
        finite = mx.isfinite(mx.stack(sums)).all()
        return cls(rows, inputs, outputs, finite, [*order, rows, *inputs.values(), *outputs.values(), finite])


def along(model: DiffusionModel, carried: mx.array, guidance: float, v: mx.array) -> mx.array:
    """⟨``carried``, v_g⟩ of an output v, whose second half is unconditional where there is guidance."""
    return (model.guided(v, guidance) * carried).sum()


class Backward:
    """Backward passes of a model; enter the context first.

    Args:
        layers: linear layers by canonical name, whose weights' gradients are wanted.
        points: taps whose inputs may be quantized.
        by_parts: whether a pass goes block by block, where the architecture is :class:`Divisible`; of a streamed model
            it always does.
        reduce: ``reduce(name, gradient)`` is kept of the gradient of a layer's weights, once its part has run; for a
            single pass by parts. None: the gradient.
    """

    def __init__(
        self,
        model: DiffusionModel,
        layers: Mapping[str, nn.Module],
        points: Sequence[TapPoint],
        by_parts: bool = False,
        reduce: Callable[[str, mx.array], mx.array] | None = None,
    ):
        self._model, self._layers, self._points, self._reduce = model, layers, points, reduce
        self._watch = Watch(model, layers, points)
        whole = model.architecture if model.streamed is None else model.streamed.inner
        divided = (by_parts or model.streamed is not None) and isinstance(whole, Divisible)
        #: Runs the parts where a pass goes block by block.
        self.parts = ByParts(model, cast(Divisible, whole), layers, points, self._watch) if divided else None

    @contextmanager
    def running(self) -> Iterator["Backward"]:
        """Tap the model for the time of the context, and hold its weights in float32 unless it runs by parts."""
        with self._watch, in_float32(self._model, lambda path: self.parts is None):
            yield self

    def no_gradients(self) -> dict[str, mx.array]:
        """Sums of gradients before the first pass."""
        return no_gradients(self._layers)

    def run(
        self,
        rows: Rows,
        loss: Callable[[mx.array], mx.array],
        ranges: Ranges,
        total: dict[str, mx.array],
    ) -> Found:
        """Add the gradients of ``loss(v)``, a number, to ``total``; v is the output for ``rows``.

        Lazy, but for a pass by parts.

        Args:
            ranges: the range over which the input of a tap would be quantized.
        """
        if self.parts is not None:
            return self._by_parts(self.parts, rows, loss, ranges, total)
        return self._whole(rows, loss, ranges, total)

    def check(self, found: Found, total: Mapping[str, mx.array], rows: Rows, what: str) -> None:
        """Raise where a gradient of ``what``, found in a pass over ``rows``, is not finite, with the layer's name."""
        if not found.finite.item():
            raise CalibError(f"the gradient of {what} is not finite, first {self._origin(rows, total)}")

    def _whole(
        self,
        rows: Rows,
        loss: Callable[[mx.array], mx.array],
        ranges: Ranges,
        total: dict[str, mx.array],
    ) -> Found:
        def run(given: list[mx.array]) -> mx.array:
            return loss(self._model.velocity(given[0], rows.text, rows.timestep))

        found = self._watch.gradients(self._layers, run, [rows.x])
        total |= {name: total[name] + gradient for name, gradient in found.weights.items()}
        errors = {tap: input_errors(x, g, *ranges(tap)) for tap, (x, g) in found.inputs.items()}
        order = [x for x, _ in found.inputs.values()]
        for point in sorted(self._points, key=lambda p: list(found.inputs).index(p.name), reverse=True):
            order += [errors[point.name], *(total[name] for name in point.names if name in total)]
        return Found.of(found.given[0], errors, found.outputs, total, order)

    def _by_parts(
        self,
        parts: ByParts,
        rows: Rows,
        loss: Callable[[mx.array], mx.array],
        ranges: Ranges,
        total: dict[str, mx.array],
    ) -> Found:
        own, given = parts.of(rows), [[rows.x]]
        for place, part in enumerate(own):
            with parts.at(place, place + 1):
                given.append(parts.forward(part, given[-1]))
            parts.release(place)
        back = Back([mx.grad(loss)(*given.pop())])
        for place in reversed(range(parts.count)):
            with parts.at(place, place - 1):
                parts.back(place, own[place], given.pop(), back, ranges, total)
            parts.reduced(place, total, self._reduce)
            parts.release(place)
        return Found.of(back.passed[0], parts.errors(back, ranges), back.outputs, total)

    def _origin(self, rows: Rows, total: Mapping[str, mx.array]) -> str:
        """Where the numbers cease to be finite, in words: in the forward pass, or else in the backward pass."""
        with self._watch.given({}, Zeros()):
            self._model.velocity(rows.x, rows.text, rows.timestep)
            inputs = self._watch.inputs()
        for tap, x in inputs.items():
            if not mx.isfinite(x).all().item():
                return f"the input of {tap}"
        names = {point.name: point.names for point in self._points}
        for tap in reversed(inputs):  # in the order in which they ran
            for name in names[tap]:
                if name in total and not mx.isfinite(total[name]).all().item():
                    return f"in {name}"
        for name, gradient in total.items():  # of layers in no tap
            if not mx.isfinite(gradient).all().item():
                return f"in {name}"
        return "in the state"
