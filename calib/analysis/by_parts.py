"""Passes through the transformer that go part by part, forwards and back: the memory of one part.

What passes from part to part is kept, and the activations of a part are computed once more when its turn comes. The
weights of one part at a time are in float32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeAlias

from calib.activations.taps import TapPoint
from calib.analysis.watch import Watch, Zeros, in_float32, input_errors
from calib.models.architecture import Conditioning, Divisible, Part, part_of
from calib.models.model import DiffusionModel

import mlx.core as mx
from mlx import nn

#: The range, (low, high), over which the input of a tap would be quantized.
Ranges: TypeAlias = Callable[[str], tuple[float, float]]


@dataclass(frozen=True)
class Rows:
    """What a forward pass takes, in float32: states (rows, height, width, channels), their text, and one timestep."""

    x: mx.array
    text: Conditioning
    timestep: mx.array


@dataclass
class Back:
    """What a pass has found on its way back.

    Attributes:
        passed: gradients by what a part passed on, or by what it was given.
        errors: Σ gradient² Δx² of inputs by tap, for each of the bit-widths.
        outputs: the mean square of the gradient by a layer's output, by layer.
        shared: inputs that several parts read, with the sum of their gradients so far, by tap.
    """

    passed: list[mx.array]
    errors: dict[str, mx.array] = field(default_factory=dict)
    outputs: dict[str, mx.array] = field(default_factory=dict)
    shared: dict[str, tuple[mx.array, mx.array]] = field(default_factory=dict)


class ByParts:
    """Runs a model's parts, of which 0 precedes the blocks and the last follows them; ``watch`` is its context."""

    def __init__(
        self,
        model: DiffusionModel,
        whole: Divisible,
        layers: Mapping[str, nn.Module],
        points: Sequence[TapPoint],
        watch: Watch,
    ):
        self._model, self._whole, self._watch = model, whole, watch
        self._blocks = [f"{model.architecture.path(name)}." for name in model.architecture.blocks()]
        self._layers: list[dict[str, nn.Module]] = [{} for _ in range(self.count)]
        for name, layer in layers.items():
            self._layers[part_of(model.architecture, name)][name] = layer
        own = model.architecture
        self._places = {point.name: {part_of(own, name) for name in point.names} for point in points}

    @property
    def count(self) -> int:
        """Number of parts."""
        return len(self._blocks) + 2

    def of(self, rows: Rows) -> list[Part]:
        """The parts of a pass of ``rows``."""

        def at_its_time(part: Part) -> Part:
            def run(given: list[mx.array]) -> list[mx.array]:
                self._model.set_clock(rows.timestep)
                return part(given)

            return run

        return [at_its_time(part) for part in self._whole.parts(rows.text, rows.timestep, rows.x.shape)]

    @contextmanager
    def at(self, place: int, following: int) -> Iterator[None]:
        """Hold the weights of a part in float32 in the context; meanwhile a streamed model reads ``following``'s."""
        blocks, streamed = self._blocks, self._model.streamed
        own = tuple(blocks[place - 1 : place]) if 0 < place <= len(blocks) else None

        def chosen(path: str) -> bool:
            return path.startswith(own) if own is not None else not path.startswith(tuple(blocks))

        with in_float32(self._model, chosen), nullcontext() if streamed is None else streamed.reading():
            if streamed is not None:
                streamed.read_ahead(following - 1)
            yield

    def release(self, place: int) -> None:
        """Free the weights of a part, where the model is streamed."""
        if self._model.streamed is not None:
            self._model.streamed.release(place - 1)

    def forward(self, part: Part, given: list[mx.array]) -> list[mx.array]:
        """What a part passes on."""
        with self._watch.given({}, Zeros()):
            passed = part(given)
        mx.eval(passed)
        return passed

    def back(
        self,
        place: int,
        part: Part,
        given: list[mx.array],
        back: Back,
        ranges: Ranges,
        total: dict[str, mx.array] | None = None,
    ) -> None:
        """Go back over a part that was ``given`` this; add the gradients of its layers' weights to ``total``."""
        passed = back.passed
        found = self._watch.gradients(
            self._layers[place], lambda given: _along(part(given), passed), given, of_weights=total is not None
        )
        back.outputs |= found.outputs
        for tap, (x, g) in found.inputs.items():
            if self._places[tap] == {place}:
                back.errors[tap] = input_errors(x, g, *ranges(tap))
            elif place in self._places[tap]:  # the gradient of what several parts read is the sum of theirs
                back.shared[tap] = (x, back.shared[tap][1] + g if tap in back.shared else g)
        back.passed = found.given
        added = self._add(place, found.weights, total)
        del found  # the gradients, which are not to outlast their sums
        mx.eval(added, back.errors, back.outputs, back.shared, back.passed)

    def by_weights(
        self, place: int, part: Part, given: list[mx.array], passed: list[mx.array], total: dict[str, mx.array]
    ) -> None:
        """Add to ``total`` the gradients by a part's weights alone, where ``passed`` are those by what it passes on."""

        def run(own: dict[str, mx.array]) -> mx.array:
            with self._watch.given(own, Zeros()):
                return _along(part(given), passed)

        own = {name: layer.weight for name, layer in self._layers[place].items()}
        mx.eval(self._add(place, mx.grad(run)(own) if own else {}, total))

    def no_gradients(self, place: int) -> dict[str, mx.array]:
        """Sums of gradients of a part's layers before the first: zeros, (rows, columns) float32."""
        return no_gradients(self._layers[place])

    def reduced(
        self, place: int, total: dict[str, mx.array], reduce: Callable[[str, mx.array], mx.array] | None
    ) -> None:
        """Put in place of the gradients of a part's layers what is kept of them."""
        if reduce is not None:
            total |= {name: reduce(name, total[name]) for name in self._layers[place]}
            mx.eval({name: total[name] for name in self._layers[place]})

    def errors(self, back: Back, ranges: Ranges) -> dict[str, mx.array]:
        """Those of all taps, once the first part is done."""
        found = back.errors | {tap: input_errors(x, g, *ranges(tap)) for tap, (x, g) in back.shared.items()}
        mx.eval(found)
        return found

    def _add(
        self, place: int, gradients: Mapping[str, mx.array], total: dict[str, mx.array] | None
    ) -> dict[str, mx.array]:
        """Add gradients to ``total``; returns those of its sums that changed."""
        if total is None:
            return {}
        total |= {name: total[name] + gradient for name, gradient in gradients.items()}
        return {name: total[name] for name in self._layers[place]}


def no_gradients(layers: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """Sums of gradients of ``layers`` before the first: zeros by layer, (rows, columns) float32."""
    # Column after column, as a matrix product's gradient lies in memory: other sums take a CPU six times as long.
    return {name: mx.zeros(layer.weight.shape[::-1]).T for name, layer in layers.items()}


def _along(passed: Sequence[mx.array], gradients: Sequence[mx.array]) -> mx.array:
    return sum(((y * g).sum() for y, g in zip(passed, gradients, strict=True)), mx.array(0.0))
