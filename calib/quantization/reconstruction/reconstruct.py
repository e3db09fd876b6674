"""Reconstruct a transformer block by block: train what rounds a block until its output is the full model's again.

By blocks as in BRECQ (Li et al. 2021, arXiv 2102.05426), with QDrop's mixed inputs (Wei et al. 2022, arXiv 2203.05740).
The parts of a forward pass (:class:`~calib.models.architecture.Divisible`) are taken in network order. A part reads
what the quantized parts before it pass on, and is trained to pass on what the full model does. How its layers are
quantized, and what of that is trained, is a :class:`Method`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from calib.base.errors import ConfigError
from calib.base.files import remove_abandoned, short_hash
from calib.base.locks import locked
from calib.base.progress import Progress, say
from calib.base.seeds import generator
from calib.models.architecture import Divisible
from calib.quantization.quantizer import QuantizerInput
from calib.quantization.reconstruction.kept import Kept
from calib.quantization.reconstruction.parts import PlannedPart, in_float32, planned_parts
from calib.quantization.reconstruction.rounded import Rounded, by_row
from calib.quantization.reconstruction.rows import Rows, States
from calib.quantization.unfinished import unfinished

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from numpy.typing import NDArray

#: Trainable arrays by group, then by name.
Parameters: TypeAlias = dict[str, dict[str, mx.array]]
#: Called as see(name, x, steps) with the input of a layer, for rows of these steps.
See: TypeAlias = Callable[[str, mx.array, NDArray[np.intp]], None]
#: A training is compared with its best so far as often as this.
CHECKS = 8
#: Of the procedure; to be raised where it makes something else of the same work.
VERSION = 1


@dataclass(frozen=True)
class Training:
    """How a part is trained; keys of a quantizer.

    Attributes:
        iterations: of each phase of a method.
        batch_size: rows of an iteration; with guidance a state has two.
        qdrop: share of the numbers a part reads that are the full model's instead.
        held_out: share of the calibration images, the last ones, by which the best iterate is chosen.
        memory_gb: for what parts read and pass on, 10⁹ bytes; beyond it that is kept in files.
    """

    iterations: int = 200
    batch_size: int = 16
    qdrop: float = 0.5
    held_out: float = 0.2
    seed: int = 0
    memory_gb: float = 2.0

    def check(self) -> None:
        """Raise where a value is out of range."""
        for key, holds, allowed in (
            ("iterations", self.iterations >= 0, "must be 0 (rounding to nearest) or more"),
            ("batch_size", self.batch_size >= 1, "must be 1 or more"),
            ("qdrop", 0 <= self.qdrop < 1, "must be 0 (off) or more, and less than 1"),
            ("held_out", 0 < self.held_out < 1, "must be more than 0, and less than 1"),
            ("seed", self.seed >= 0, "must be 0 or more"),
            ("memory_gb", self.memory_gb >= 0, "must be 0 (files alone) or more"),
        ):
            if not holds:
                raise ConfigError.bad_value(f"quantizer.{key}", getattr(self, key), allowed)


@dataclass
class Draw:
    """Of one iteration: the rows' steps, a key for random numbers, how far the training is (0 … 1), what is trained."""

    steps: NDArray[np.intp]
    key: mx.array
    progress: float
    trained: Mapping[str, float]

    def chosen(self, share: float, like: mx.array) -> mx.array:
        """Booleans like an array, each true with this probability."""
        self.key, own = mx.random.split(self.key)
        return mx.random.uniform(shape=like.shape, key=own) < share


class Method(Protocol):
    """How the layers of a part are quantized, and what is trained of that.

    Attributes:
        phases: learning rates of the groups of parameters that are trained, in turn; others stay as they are.
    """

    phases: Sequence[Mapping[str, float]]

    def begin(self, names: Sequence[str], observe: Callable[[See], None]) -> Parameters:
        """The parameters of a part's layers before training; ``observe(see)`` shows their inputs as they are."""

    def values(self, own: Parameters, draw: Draw) -> Any:
        """What follows from parameters once an iteration, for the calls below."""

    def run(self, values: Any, draw: Draw, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """The output of a layer in training."""

    def penalty(self, values: Any, draw: Draw) -> mx.array:
        """A number to add to the error, which is 1 before training."""

    def finish(self, own: Parameters) -> Rounded:
        """The part as it is saved."""


def reconstruct(work: QuantizerInput, method: Method, training: Training, made_by: Mapping[str, Any]) -> Rounded:
    """Quantize ``work.layers``, and the inputs of planned layers, as ``method`` trains them.

    Where ``work.scratch`` is a folder each part is kept there when it is done, under a hash of all that it depends on:
    the same work goes on where it was interrupted, to the same bits, and with other parameters it is another work.

    Args:
        made_by: the method's own parameters.

    Raises:
        ConfigError: the transformer does not run in parts, or the run's training was interrupted by other parameters.
        CalibError: too few images to hold some out, too little room on disk, or numbers that 16 bits cannot hold.
    """
    work.refuse_streamed(f"parts, which quantizer={made_by.get('method', type(method).__name__)} trains,")
    if not isinstance(work.architecture, Divisible):
        kind = type(work.architecture).__name__
        raise ConfigError(f"quantizer: {kind} does not run in parts (Divisible), which are trained; choose another")
    if not work.layers:
        return Rounded()
    folder = _folder(work, training, made_by)
    with unfinished(work, type(method).__name__, {**made_by, **asdict(training)}):
        if folder is None:
            return _reconstructed(work, method, training, None)
        wait = f"waiting for the process that trains the same ({folder})"
        with locked(folder.with_suffix(".lock"), lambda: say(wait)):
            return _reconstructed(work, method, training, folder)


def _reconstructed(work: QuantizerInput, method: Method, training: Training, folder: Path | None) -> Rounded:
    architecture = work.architecture
    found, parts = Rounded(), planned_parts(architecture, work.plan)
    paths = [None if folder is None else folder / f"{number:03d}.safetensors" for number in range(len(parts))]
    todo = [
        bool(layers) and (path is None or not path.exists()) for (_, layers), path in zip(parts, paths, strict=True)
    ]
    states = States.of(work, training.held_out, training.memory_gb * 1e9)
    full = given = states.x
    with Progress(
        "reconstruct", sum(todo) * len(method.phases) * training.iterations, "iteration", delay=2
    ) as progress:
        for number, (name, layers) in enumerate(parts):
            progress.describe(name)
            part, path = PlannedPart(architecture, number, name, layers, states), paths[number]
            with in_float32(architecture, number):
                targets = part.passed(full, lambda steps, n, layer, x: layer(x))
                rounded = Rounded() if not layers else None if path is None else Rounded.load(path)
                if rounded is None:
                    shares = _shares(work, layers, states)
                    rounded = _Trainer(part, method, training, given, full, targets, shares).train(progress)
                    if path is not None:
                        rounded.save(path)
                full = targets  # before the next: what this part read of the full model is let go (rows.COPIES)
                if number + 1 < len(parts):
                    given = part.passed(given, rounded.run)
            found = found.joined(rounded)
    return found


def _folder(work: QuantizerInput, training: Training, made_by: Mapping[str, Any]) -> Path | None:
    """The folder of what is done, by what that depends on beside weights, states and statistics (``work.scratch``)."""
    if work.scratch is None:
        return None
    plan = {name: [asdict(layer), work.input_bits(name)] for name, layer in work.plan.items()}
    own = {key: value for key, value in asdict(training).items() if key != "memory_gb"}  # of no effect on results
    folder = work.scratch / short_hash([VERSION, dict(made_by), own, sorted(work.layers), plan], digits=16)
    remove_abandoned(folder)  # what a killed process was writing
    return folder


def _shares(work: QuantizerInput, layers: Mapping[str, nn.Module], states: States) -> NDArray[np.float64]:
    """How much an error of a part counts in each row, (rows,), 1 at the mean: the mean importance of its layers."""
    known = [share for name in layers if (share := work.importance(name)) is not None]
    shares = np.mean(known, axis=0)[states.steps] if known else np.ones(len(states.steps))
    return shares / shares.mean() if shares.mean() > 0 else np.ones(len(states.steps))


class _Trainer:
    """Trains a part to pass on ``targets`` where it reads ``given``, what the quantized parts before it pass on."""

    def __init__(
        self,
        part: PlannedPart,
        method: Method,
        training: Training,
        given: Kept,
        full: Kept,
        targets: Kept,
        shares: NDArray[np.float64],
    ):
        self._part, self._method, self._training, self._states = part, method, training, part.states
        self._given, self._full, self._targets, self._shares = given, full, targets, shares
        squares = [
            [mx.square(a).mean().item() for a in targets.get(rows)] for rows in self._states.batches(self._states.seen)
        ]
        self._scales = np.maximum(np.mean(squares, axis=0), 1e-30)

    def train(self, progress: Progress) -> Rounded:
        """The part with the least error of what was held out."""
        method, training = self._method, self._training
        own = best = method.begin(list(self._part.layers), self._observe)
        start = least = self._held_out(method.finish(best))
        notes = []
        random = generator("quantizer.seed", training.seed, self._part.number)
        for phase in method.phases if start > 0 else ():
            phase = {group: rate for group, rate in phase.items() if best[group]}
            if not phase:  # the part has no such parameters
                progress.advance(training.iterations)
                continue
            own, state = best, {group: _adam(rate, training.iterations) for group, rate in phase.items()}
            for i in range(training.iterations):
                rows = random.choice(self._states.seen, min(training.batch_size, len(self._states.seen)), replace=False)
                key = mx.random.key(int(random.randint(1 << 31)))
                draw = Draw(self._states.steps[rows], key, i / training.iterations, phase)
                loss, gradients = self._gradients(own, rows, draw, start)
                own = own | {group: state[group].apply_gradients(g, own[group]) for group, g in gradients.items()}
                mx.eval(loss, own, [adam.state for adam in state.values()])
                progress.advance()
                if not np.isfinite(loss.item()):
                    what = f"the loss of iteration {i + 1} is not finite: the best before it is kept"
                    notes.append(f"{self._part.name}: {what}")
                    progress.advance(training.iterations - i - 1)
                    break
                if (i + 1) % max(1, training.iterations // CHECKS) == 0:
                    now = self._held_out(method.finish(own))
                    if now < least:
                        best, least = own, now
        rounded = method.finish(best)
        rounded.errors[self._part.name] = (start, least)
        rounded.notes += notes
        return rounded

    def _gradients(self, own: Parameters, rows: Rows, draw: Draw, start: float) -> tuple[mx.array, Parameters]:
        """The loss, 1 before training but for the penalty, and its gradients by what is trained; lazy."""
        given, full = self._given.get(rows), self._full.get(rows)
        if self._training.qdrop:
            given = [mx.where(draw.chosen(self._training.qdrop, a), b, a) for a, b in zip(given, full, strict=True)]

        def loss(trained: Parameters) -> mx.array:
            values = self._method.values(own | trained, draw)
            outputs = self._part.outputs(rows, given, partial(self._method.run, values, draw))
            return self._error(rows, given, outputs) / start + self._method.penalty(values, draw)

        found: tuple[mx.array, Parameters] = mx.value_and_grad(loss)({group: own[group] for group in draw.trained})
        return found

    def _error(self, rows: Rows, given: list[mx.array], outputs: list[mx.array]) -> mx.array:
        """The squared error of what the part changes, relative to its size, rows weighted by their shares; lazy."""
        total = mx.array(0.0)
        for array, target, scale in zip(outputs, self._targets.get(rows), self._scales, strict=True):
            if not any(array is one for one in given):  # the embedding of the timestep passes as it is
                total = total + (by_row(array, self._shares[rows] / scale) * mx.square(array - target)).mean()
        return total

    def _held_out(self, rounded: Rounded) -> float:
        total = 0.0
        for rows in self._states.batches(self._states.held):
            given = self._given.get(rows)
            outputs = self._part.outputs(rows, given, partial(rounded.run, self._states.steps[rows]))
            total += len(rows) * float(np.array(self._error(rows, given, outputs)))
        return total / len(self._states.held)

    def _observe(self, see: See) -> None:
        """Run the part at full precision on what it reads."""

        def run(steps: NDArray[np.intp], name: str, layer: nn.Module, x: mx.array) -> mx.array:
            see(name, x, steps)
            y: mx.array = layer(x)
            return y

        for rows in self._states.batches(self._states.seen):
            mx.eval(self._part.outputs(rows, self._given.get(rows), partial(run, self._states.steps[rows])))


def _adam(rate: float, iterations: int) -> optimizers.Adam:
    return optimizers.Adam(optimizers.cosine_decay(rate, max(1, iterations)), bias_correction=True)
