"""Replays of the calibration states, in which layers are replaced as they are quantized.

What a part of the transformer is given is kept for all states, so that a replay begins where the last one ended and not
at the first block: the forwards of GPTQ are then two of each of n blocks, where they would be n²/2. A part runs on all
states before the next one does, so that a streamed model reads its weights once in a replay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from calib.activations.batches import Batch, LazyBatch, StoredStates
from calib.activations.taps import TapPoint, tapped
from calib.analysis.kept import Kept
from calib.base.errors import CalibError
from calib.base.progress import note
from calib.models.architecture import Conditioning, Divisible, Part, part_of
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel
from calib.models.packed import Packed
from calib.models.parallel import parts_of, shared_cores, streams_of
from calib.models.streamed import of_rows
from calib.quantization.apply import unpacked
from calib.quantization.quantizer import StepRecorder
from calib.quantization.scratch import folder_for
from calib.quantization.texts import prompts_of

import mlx.core as mx

#: Share of the memory that drawing leaves in which what is kept may stay: Hessians and quantized layers need the rest.
OF_WHAT_IS_LEFT = 1 / 3
#: Bytes that may stay there in any case.
LEAST_ROOM = 50_000_000


class Replays:
    """The function ``replay`` of :class:`~calib.quantization.quantizer.QuantizerInput`, and its ``batches``.

    Args:
        states: returns the calibration set; None where no run is known.
        folder: where what memory has no room for is kept; None: that of temporary files.
    """

    def __init__(self, model: DiffusionModel, states: Callable[[], StoredStates] | None, folder: Path | None = None):
        self._model, self._states, self._folder = model, states, folder
        whole = model.architecture if model.streamed is None else model.streamed.inner
        self._runs_in_parts = whole if isinstance(whole, Divisible) else None
        self._replaced: Mapping[str, Packed] = {}
        self.release()

    def release(self) -> None:
        """Let go of what is kept; the next replay begins at the first block."""
        self._batches: Sequence[LazyBatch] = ()
        self._divisible = self._runs_in_parts  # None: forwards are whole
        #: By batch and its first row what the part ``_reached`` is given, where ``_before`` replaced layers before it.
        self._kept, self._reached, self._before = Kept(), 0, dict[str, Packed]()

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Yield the states; raises a CalibError where no run is known."""
        for batch in self._batches_of(self._stored(), size):
            yield batch()

    def __call__(
        self,
        points: Sequence[TapPoint],
        record: StepRecorder,
        pending: Callable[[], Sequence[mx.array]],
        replaced: Mapping[str, Packed],
    ) -> None:
        if not self._batches:
            self._begin()
        places, self._replaced = [self._place(point.name) for point in points], replaced
        if self._reached > min(places) or _ids(self._replaced_before()) != _ids(self._before):
            self._reached = 0
        with unpacked(self._model.architecture, replaced):
            for place in range(self._reached, min(places)):
                self._run(place, passing=True)
            steps: Sequence[int] = ()  # of the rows whose graph is being built

            def entering(batch: Batch, rows: slice) -> None:
                nonlocal steps
                steps = (batch.steps * (len(batch.x) // len(batch.steps)))[rows]

            def recorded(name: str, x: mx.array) -> mx.array:
                x = record(name, x, steps)
                if self._divisible is not None or self._model.streamed is None:
                    return x
                # In a whole forward of a streamed model nothing of an input may outlast the block that it is in.
                tied: mx.array = mx.depends([x], list(pending()))[0]
                return tied

            with tapped(self._model.architecture, points, recorded):
                for place in range(min(places), max(places) + 1):
                    self._run(place, place < max(places), entering, pending)

    def _replaced_before(self) -> dict[str, Packed]:
        """What is replaced in the parts before the one that is reached."""
        return {name: packed for name, packed in self._replaced.items() if self._place(name) < self._reached}

    def _stored(self) -> StoredStates:
        if self._states is None:
            lost = "this quantizer replays stored states: name the run that collected them, stats=DIR"
            raise CalibError(f"{lost}; quantizer=rtn takes none")
        return self._states()

    def _batches_of(self, stored: StoredStates, size: int | None = None) -> list[LazyBatch]:
        size = size or plan_memory(self._model, stored.manifest.cfg_weight > 0).batch_size
        return stored.batches(self._model, size, mixed=True)

    def _begin(self) -> None:
        """Choose where to keep what parts are given."""
        batches = self._batches_of(stored := self._stored())
        if self._divisible is None:
            self._batches = batches
            return
        plan = plan_memory(self._model, stored.manifest.cfg_weight > 0)
        room = max(LEAST_ROOM, OF_WHAT_IS_LEFT * (plan.memory - plan.peak))
        made, own, passed = list[Batch](), 0, 0
        for lazily in batches:
            sizes = self._bytes_of(batch := lazily())
            own, passed = own + sizes[0], passed + sizes[1]
            made = [*made, batch] if own + passed <= room else []
        if made:
            self._batches = [partial(_itself, batch) for batch in made]
            return
        try:
            folder = folder_for(passed, "what blocks are given", "while layers are quantized", self._folder)
            self._kept = Kept(passed, folder)
        except (CalibError, OSError) as error:
            note(f"{error}; meanwhile each replay begins at the first block, which takes longer")
            self._divisible = None
        self._model.hold(prompts_of(stored, stored.images))  # else they would be encoded again for each part, or replay
        self._batches = batches

    def _bytes_of(self, batch: Batch) -> tuple[int, int]:
        """Bytes of a batch, states and text; and of what passes between parts. Nothing is computed."""
        passed = self._parts(batch.text, batch.timesteps, batch.x.shape)[0]([batch.x])
        own = [batch.x, *batch.text.arrays()]
        return sum(array.nbytes for array in own), sum(array.nbytes for array in passed)

    def _parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> Sequence[Part]:
        """The parts of a forward; one, where the transformer does not run in parts."""
        if self._divisible is not None:
            return self._divisible.parts(text, timestep, shape)
        return [lambda given: [self._model.architecture.velocity(given[0], text, timestep)]]

    def _place(self, name: str) -> int:
        """The number of the part in which a layer runs."""
        return 0 if self._divisible is None else part_of(self._model.architecture, name)

    def _run(
        self,
        place: int,
        passing: bool,
        entering: Callable[[Batch, slice], None] = lambda batch, rows: None,
        pending: Callable[[], Sequence[mx.array]] = lambda: (),
    ) -> None:
        """Run a part on all states; where ``passing`` the next one is given what it passes on, else it is the last."""
        streamed = self._model.streamed
        if passing:
            self._reached = 0  # until it is done
        for number, lazily in enumerate(self._batches):
            batch = lazily()
            self._model.set_clock(batch.timesteps)
            found: list[tuple[tuple[int, int], list[mx.array]]] = []
            with shared_cores(len(batch.x)):
                parts = parts_of(len(batch.x))
                for rows, stream in zip(parts, streams_of(len(parts)), strict=True):
                    with mx.stream(stream):
                        entering(batch, rows)
                        key, x = (number, rows.start), batch.x[rows]
                        given = self._kept.get(key) if place else [x]
                        own = self._parts(batch.text[rows], of_rows(batch.timesteps, rows), x.shape)[place]
                        found.append((key, own(given)))
                wanted = [[*pending()], *(passed for _, passed in found if passing)]
                if streamed is None:
                    mx.eval(wanted)
                else:
                    streamed.compute(wanted, place if passing and not number else -1)  # the next block is read once
            for key, passed in found if passing else ():
                self._kept.put(key, passed)
        if passing:
            self._reached = place + 1
            self._before = self._replaced_before()
            if streamed is not None:
                streamed.release(place - 1)


def _ids(layers: Mapping[str, Packed]) -> dict[str, int]:
    return {name: id(packed) for name, packed in layers.items()}


def _itself(batch: Batch) -> Batch:
    return batch
