"""The sampler backwards for several pictures at once, a part of the transformer at a time: for a streamed model.

As states are stored, the forwards of all steps and pictures go through the parts together; what each part is given is
kept. Then step by step backwards, without gradients of weights: what is kept is the gradient by what each part passes
on. At the first step, the last to come, both are there for all steps, and the gradients of a part's weights are summed
over them while it is in memory. So weights are read once, and once more for each step, and no gradient of weights
outlasts its part. What is added up, and in which order, is the same as picture by picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calib.analysis.backward import Found
from calib.analysis.by_parts import Back, ByParts, Ranges, Rows
from calib.analysis.kept import Kept
from calib.base.errors import CalibError
from calib.base.files import free_bytes
from calib.base.progress import counted, readable_bytes
from calib.models.architecture import Part
from calib.models.memory import device_memory

import mlx.core as mx

#: Share of the memory in which what is kept may stay, and of the free disk that it may take.
OF_MEMORY, OF_DISK = 1 / 8, 0.9


@dataclass(frozen=True)
class Way:
    """A picture's way through the sampler.

    Attributes:
        rows: what the transformer is given at a step.
        loss: the loss of its output at a step; asked for once the step that follows is done.
        ranges: those of a step.
        done: takes what the pass of a step gave, the last step first.
        total: by layer what is kept of its gradient; there once the first step is done.
    """

    rows: Callable[[int], Rows]
    loss: Callable[[int], Callable[[mx.array], mx.array]]
    ranges: Callable[[int], Ranges]
    done: Callable[[int, Found], None]
    total: dict[str, mx.array] = field(default_factory=dict)


@dataclass(frozen=True)
class Room:
    """Passes that go together, the bytes that are kept of them, and the folder that these go to; None: memory."""

    passes: int
    nbytes: int = 0
    folder: Path | None = None

    def kept(self) -> Kept:
        return Kept(self.nbytes, self.folder)

    def describe(self) -> str:
        """Where, in words."""
        where = "in memory" if self.folder is None else f"in {self.folder}, until they are done"
        return f"{counted(self.passes, 'picture')} at once: keeps {readable_bytes(self.nbytes)} {where}"


def rooms(needs: Sequence[int], folder: Path, instead: str) -> list[Room]:
    """Divide pictures that need so many bytes each into as few sweeps as there is room for, on disk or in memory.

    Args:
        instead: what needs less, for the error.

    Raises:
        CalibError: one picture is too much for the disk.
    """
    if sum(needs) <= OF_MEMORY * device_memory():
        return [Room(len(needs), sum(needs), None)]
    room, found = int(OF_DISK * free_bytes(folder)), list[Room]()
    for need in needs:
        if need > room:
            free = f"{readable_bytes(need)} at {folder}, of whose disk {readable_bytes(room / OF_DISK)} are free"
            raise CalibError(f"gradients of one picture keep {free}; name a cache_dir with more, or {instead}")
        before = found.pop() if found and found[-1].nbytes + need <= room else Room(0)
        found.append(Room(before.passes + 1, before.nbytes + need, folder))
    return found


def nbytes_of(parts: ByParts, rows: Rows, num_steps: int) -> int:
    """What is kept for a picture, of whose steps ``rows`` is one; nothing is computed."""
    passed, size = [rows.x], 0
    for part in parts.of(rows):
        passed = part(passed)
        size += 4 * sum(array.size for array in passed)
    return size * (2 * num_steps - 1)


def units_of(parts: ByParts, num_steps: int) -> int:
    """How often :func:`sweep` advances for a picture."""
    return parts.count * (3 * num_steps - 1)


def sweep(
    parts: ByParts,
    ways: Sequence[Way],
    num_steps: int,
    kept: Kept,
    reduce: Callable[[str, mx.array], mx.array] | None,
    advance: Callable[[], None],
) -> None:
    """Go all ``ways``; ``reduce(name, gradient)`` is put into ``total`` of the gradient of a layer's weights."""
    _Sweep(parts, ways, num_steps, kept, advance).run(reduce)


class _Sweep:
    """Keeps by (way, step, part) what a part is given, and by (way, step, part, ∂) gradients by what it passes on."""

    def __init__(self, parts: ByParts, ways: Sequence[Way], num_steps: int, kept: Kept, advance: Callable[[], None]):
        self._parts, self._ways, self._steps, self._kept, self._advance = parts, ways, num_steps, kept, advance
        self._own: dict[tuple[int, int], list[Part]] = {}

    def run(self, reduce: Callable[[str, mx.array], mx.array] | None) -> None:
        """Forwards, then step after step back."""
        self._forwards()
        for step in reversed(range(self._steps)):
            losses = [way.loss(step) for way in self._ways]
            outputs = [self._given(i, step, self._parts.count)[0] for i in range(len(self._ways))]
            backs = [Back([mx.grad(loss)(v)]) for loss, v in zip(losses, outputs, strict=True)]
            mx.eval([back.passed for back in backs])
            for place in reversed(range(self._parts.count)):
                if step:
                    self._back(step, place, backs)
                else:
                    self._back_and_sum(place, backs, reduce)
                self._parts.release(place)
            for way, back in zip(self._ways, backs, strict=True):
                errors = self._parts.errors(back, way.ranges(step))
                way.done(step, Found.of(back.passed[0], errors, back.outputs, {} if step else way.total))

    def _forwards(self) -> None:
        """Of all steps, a part after the other."""
        for place in range(self._parts.count):
            with self._parts.at(place, place + 1):
                for i in range(len(self._ways)):
                    for step in range(self._steps):
                        given = self._given(i, step, place)
                        self._kept.put((i, step, place + 1), self._parts.forward(self._part(i, step, place), given))
                        self._advance()
            self._parts.release(place)

    def _back(self, step: int, place: int, backs: Sequence[Back]) -> None:
        """Back over a part at one step."""
        with self._parts.at(place, place - 1):
            for i, (way, back) in enumerate(zip(self._ways, backs, strict=True)):
                self._kept.put((i, step, place, "∂"), back.passed)
                given = self._given(i, step, place)
                self._parts.back(place, self._part(i, step, place), given, back, way.ranges(step))
                self._advance()

    def _back_and_sum(
        self, place: int, backs: Sequence[Back], reduce: Callable[[str, mx.array], mx.array] | None
    ) -> None:
        """Back over a part at step 0, with the sums of gradients over all steps, one picture at a time."""
        parts = self._parts
        for i, (way, back) in enumerate(zip(self._ways, backs, strict=True)):
            with parts.at(place, place - 1):
                way.total.update(parts.no_gradients(place))
                for step in reversed(range(1, self._steps)):
                    passed = self._kept.get((i, step, place, "∂"))
                    given = self._given(i, step, place)
                    parts.by_weights(place, self._part(i, step, place), given, passed, way.total)
                    self._advance()
                given = self._given(i, 0, place)
                parts.back(place, self._part(i, 0, place), given, back, way.ranges(0), way.total)
            parts.reduced(place, way.total, reduce)
            self._advance()

    def _given(self, way: int, step: int, place: int) -> list[mx.array]:
        """What a part is given; or the output, for one past the last."""
        return self._kept.get((way, step, place)) if place else [self._ways[way].rows(step).x]

    def _part(self, way: int, step: int, place: int) -> Part:
        if (way, step) not in self._own:
            self._own[way, step] = self._parts.of(self._ways[way].rows(step))
        return self._own[way, step][place]
