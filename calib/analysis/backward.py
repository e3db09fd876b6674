"""One backward pass through the transformer: gradients of its weights, of the inputs of its layers, and of its state.

In one piece it keeps the activations of all blocks. By parts it keeps what passes from block to block, and computes the
activations of a block once more when its turn comes: the memory of a forward pass, and the gradients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from calib.activations.taps import TapPoint
from calib.analysis.watch import Watch, Zeros, in_float32, input_errors
from calib.base.errors import CalibError
from calib.models.architecture import Conditioning, Divisible
from calib.models.model import DiffusionModel

import mlx.core as mx
from mlx import nn


@dataclass(frozen=True)
class Rows:
    """What a forward pass takes, in float32: states (rows, height, width, channels), their text, and one timestep."""

    x: mx.array
    text: Conditioning
    timestep: mx.array


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
        self._places = {point.name: {self._place(name) for name in point.names} for point in points}
        whole = model.architecture if model.streamed is None else model.streamed.inner
        by_parts = by_parts or model.streamed is not None
        self._divided = whole if by_parts and isinstance(whole, Divisible) else None

    @contextmanager
    def running(self) -> Iterator["Backward"]:
        """Tap the model for the time of the context, and hold its weights in float32 unless it runs by parts."""
        with self._watch, in_float32(self._model, lambda path: self._divided is None):
            yield self

    def no_gradients(self) -> dict[str, mx.array]:
        """Sums of gradients before the first pass: zeros by layer, (rows, columns) float32."""
        return {name: mx.zeros(layer.weight.shape) for name, layer in self._layers.items()}

    def run(
        self,
        rows: Rows,
        loss: Callable[[mx.array], mx.array],
        ranges: Callable[[str], tuple[float, float]],
        total: dict[str, mx.array],
    ) -> Found:
        """Add the gradients of ``loss(v)``, a number, to ``total``; v is the output for ``rows``.

        Lazy, but for a pass by parts.

        Args:
            ranges: the range over which the input of a tap would be quantized.
        """
        compute = self._whole if self._divided is None else self._by_parts
        return compute(rows, loss, ranges, total)

    def check(self, found: Found, total: Mapping[str, mx.array], rows: Rows, what: str) -> None:
        """Raise where a gradient of ``what``, found in a pass over ``rows``, is not finite, with the layer's name."""
        if not found.finite.item():
            raise CalibError(f"the gradient of {what} is not finite, first {self._origin(rows, total)}")

    def _whole(
        self,
        rows: Rows,
        loss: Callable[[mx.array], mx.array],
        ranges: Callable[[str], tuple[float, float]],
        total: dict[str, mx.array],
    ) -> Found:
        def run(given: list[mx.array]) -> mx.array:
            return loss(self._model.velocity(given[0], rows.text, rows.timestep))

        inputs, outputs, (of_rows,) = self._add(self._layers, run, [rows.x], total)
        errors = {tap: input_errors(x, g, *ranges(tap)) for tap, (x, g) in inputs.items()}
        order = [x for x, _ in inputs.values()]
        for point in sorted(self._points, key=lambda p: list(inputs).index(p.name), reverse=True):
            order += [errors[point.name], *(total[name] for name in point.names if name in total)]
        return Found.of(of_rows, errors, outputs, total, order)

    def _by_parts(
        self,
        rows: Rows,
        loss: Callable[[mx.array], mx.array],
        ranges: Callable[[str], tuple[float, float]],
        total: dict[str, mx.array],
    ) -> Found:
        assert self._divided is not None
        parts = self._divided.parts(rows.text, rows.timestep, rows.x.shape)
        self._model.set_clock(rows.timestep)
        given = [[rows.x]]
        for place, part in enumerate(parts):
            with self._in_float32(place), self._watch.given({}, Zeros()):
                given.append(part(given[-1]))
                mx.eval(given[-1])
            self._release(place)
        (v,) = given.pop()
        passed = [mx.grad(loss)(v)]
        shared: dict[str, tuple[mx.array, mx.array]] = {}
        errors: dict[str, mx.array] = {}
        outputs: dict[str, mx.array] = {}
        for place in reversed(range(len(parts))):
            own = {name: layer for name, layer in self._layers.items() if self._place(name) == place}

            def run(given: list[mx.array], place: int = place, passed: list[mx.array] = passed) -> mx.array:
                return sum(((y * g).sum() for y, g in zip(parts[place](given), passed, strict=True)), mx.array(0.0))

            with self._in_float32(place):
                inputs, of_outputs, passed = self._add(own, run, given.pop(), total)
                outputs |= of_outputs
                for tap, (x, g) in inputs.items():
                    if self._places[tap] == {place}:
                        errors[tap] = input_errors(x, g, *ranges(tap))
                    elif place in self._places[tap]:  # the gradient of what several parts read is the sum of theirs
                        shared[tap] = (x, shared[tap][1] + g if tap in shared else g)
                mx.eval({name: total[name] for name in own}, errors, outputs, shared, passed)
            if self._reduce is not None:
                total |= {name: self._reduce(name, total[name]) for name in own}
                mx.eval({name: total[name] for name in own})
            self._release(place)
        errors |= {tap: input_errors(x, g, *ranges(tap)) for tap, (x, g) in shared.items()}
        mx.eval(errors)
        return Found.of(passed[0], errors, outputs, total)

    def _add(
        self,
        layers: Mapping[str, nn.Module],
        loss: Callable[[list[mx.array]], mx.array],
        given: list[mx.array],
        total: dict[str, mx.array],
    ) -> tuple[dict[str, tuple[mx.array, mx.array]], dict[str, mx.array], list[mx.array]]:
        """Add the gradients of ``loss(given)`` by the weights of ``layers`` to ``total``; lazy.

        Returns the inputs of taps with their gradients, mean squares of the gradients by outputs of ``layers``, and the
        gradients by ``given``.
        """
        watch = self._watch

        def run(
            own: dict[str, mx.array], inputs: dict[str, mx.array], outputs: dict[str, mx.array], given: list[mx.array]
        ) -> tuple[mx.array, dict[str, mx.array]]:
            with watch.given(own, Zeros(inputs, outputs)):
                return loss(given), watch.inputs()

        own = {name: layer.weight for name, layer in layers.items()}
        run(own, {}, {}, given)  # nothing is computed: for the shapes of inputs and outputs
        zeros = watch.zeros(layers)
        (_, seen), (of_weights, of_inputs, of_outputs, of_given) = mx.value_and_grad(run, argnums=(0, 1, 2, 3))(
            own, zeros.inputs, zeros.outputs, given
        )
        for name, gradient in of_weights.items():
            total[name] = total[name] + gradient
        squares = {name: mx.square(g.astype(mx.float32)).mean() for name, g in of_outputs.items()}
        return {tap: (x, of_inputs[tap]) for tap, x in seen.items()}, squares, of_given

    def _release(self, place: int) -> None:
        """Free the weights of a part, where the model is streamed."""
        if self._model.streamed is not None:
            self._model.streamed.release(place - 1)

    def _place(self, name: str) -> int:
        """The part in which a layer runs: 0 before the blocks."""
        block = self._model.architecture.block_of(name)
        return 0 if block is None else block + 1

    @contextmanager
    def _in_float32(self, place: int) -> Iterator[None]:
        """Hold the weights of one part in float32, in the context."""
        architecture = self._model.architecture
        blocks = [f"{architecture.path(name)}." for name in architecture.blocks()]
        own = tuple(blocks[place - 1 : place]) if 0 < place <= len(blocks) else None

        def chosen(path: str) -> bool:
            return path.startswith(own) if own is not None else not path.startswith(tuple(blocks))

        with in_float32(self._model, chosen):
            yield

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
