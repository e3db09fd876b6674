"""Ways to collect in tests: observers at work, and what went by kept beside what was made of it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from calib.activations import step
from calib.activations.collect import Collection
from calib.activations.format import Block
from calib.activations.observer import Observer, TapResult
from calib.activations.record import StepRecord
from calib.activations.statistics import Statistics, merge_all
from calib.activations.step import CollectSettings
from calib.activations.store import write_activations
from calib.activations.taps import Recorder, TapKind, TapSelection, tap_points
from calib.dataset.load import load_manifest
from calib.dataset.shards import Shard
from calib.models.architecture import names_in_order
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from helpers import float64
from numpy.typing import NDArray

EVERY_TAP = TapSelection(kind=TapKind.ALL)
#: Some of each kind, so that a collection takes a tenth of a second a step.
FEW = TapSelection(kind=TapKind.ALL, include=("x_embedder", "mm_block_1.*.mlp.fc2", "t_embedder.0", "mm_block_1"))

#: Activations of a forward's taps by name; a list of them for a forward in several parts.
Activations: TypeAlias = Mapping[str, mx.array]


def watch(
    observer: Observer, forwards: Sequence[Activations | Sequence[Activations]], phases: Sequence[int] = (0,)
) -> dict[str, TapResult]:
    """What ``observer`` says of several forwards; each has a phase, in turn."""
    for number, forward in enumerate(forwards):
        last = []
        for part in [forward] if isinstance(forward, Mapping) else forward:
            observer.begin(phases[number % len(phases)])
            for name, x in part.items():
                observer.see(name, x)
                last.append(observer.tie(x))
        mx.eval(observer.end_forward(), last)
        observer.settle()
    return observer.results()


def keep(seen: dict[str, mx.array]) -> Recorder:
    """A recorder that keeps every activation that goes by."""

    def record(name: str, x: mx.array) -> mx.array:
        seen[name] = x
        return x

    return record


def collection_of(
    model: DiffusionModel,
    data_dir: Path,
    cache_dir: Path,
    image_ids: Sequence[int],
    selection: TapSelection = TapSelection(),  # noqa: B008  (immutable)
    shard: Shard | None = None,
    load: Callable[[], DiffusionModel] | None = None,
    **settings: Any,
) -> Collection:
    """Of ``image_ids``; ``settings`` are those of :class:`CollectSettings`, ``load`` gives the model where needed."""
    points = tap_points(model.architecture, selection)
    own = CollectSettings(**{"batch_size": 2, "cfg_halves": selection.cfg_halves} | settings)
    place = (data_dir, load_manifest(data_dir), image_ids, points, own, cache_dir, shard)
    return Collection(model.architecture, load or (lambda: model), *place)


def write_collected(
    path: Path, model: DiffusionModel, collection: Collection, steps: Sequence[int], **given: Any
) -> Path:
    """An ``activations.h5`` of what is in the cache; ``given`` are arguments of :func:`write_activations`."""
    order = {name: place for place, name in enumerate(names_in_order(model.architecture))}
    own: dict[str, Any] = {"weight_sqnr": {}, "attributes": {}} | given
    write_activations(path, collection.source(steps), collection.points, collection.manifest, steps, order=order, **own)
    return path


def in_parts(patch: pytest.MonkeyPatch, *sizes: int) -> None:
    """Collect so many blocks at a time, one part through all steps after the other, as with very many images."""

    def parts(collection: Collection, model: DiffusionModel) -> list[list[Block]]:
        assert len(collection.blocks) == sum(sizes)
        bounds = np.cumsum([0, *sizes]).tolist()
        return [collection.blocks[first:last] for first, last in pairwise(bounds)]

    patch.setattr(Collection, "_parts", parts)


def collected(collection: Collection, steps: Sequence[int]) -> dict[int, StepRecord]:
    """The records of ``steps``, collected where they are missing."""
    collection.collect(steps)
    return collection.records(steps)


def pooled(records: Mapping[int, StepRecord], name: str) -> Statistics:
    """All steps of a layer, merged."""
    return merge_all([record.seen[name].statistics for record in records.values()])


class Recording:
    """An observer that keeps what it sees, too: by tap one array a forward or part of one."""

    def __init__(self, inner: Observer):
        self._inner = inner
        self.kept: dict[str, list[mx.array]] = {}

    def see(self, name: str, x: mx.array, *place: Any) -> None:
        self.kept.setdefault(name, []).append(x)
        self._inner.see(name, x, *place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def values(self) -> dict[str, NDArray[np.float64]]:
        """What went by at each tap, (rows, tokens, channels), all forwards one after the other."""
        return {name: np.concatenate([by_row(x) for x in arrays]) for name, arrays in self.kept.items()}


def by_row(x: mx.array) -> NDArray[np.float64]:
    """(rows, tokens, channels)."""
    values = float64(x)
    return values.reshape(len(values), -1, values.shape[-1])


@contextmanager
def recording() -> Iterator[list[Recording]]:
    """Within the context collections record what goes by; one observer a step, in the order of steps."""
    observers: list[Recording] = []

    def recorded(*settings: Any, **more: Any) -> Recording:
        observers.append(Recording(new_observer(*settings, **more)))
        return observers[-1]

    new_observer = step.new_observer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "new_observer", recorded)
        yield observers


@dataclass(frozen=True)
class Whole:
    """Every tap over all four images of the shared dataset: what was collected, and what went by.

    Attributes:
        activations: (rows, tokens, channels), by step and tap.
    """

    collection: Collection
    records: dict[int, StepRecord]
    activations: dict[int, dict[str, NDArray[np.float64]]]


def check_equal(found: Statistics, expected: Statistics) -> None:
    """Bit for bit."""
    for field in ("minimum", "maximum", "count", "mean", "std"):
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field
    assert np.array_equal(found.histogram.keys, expected.histogram.keys)
    assert np.array_equal(found.histogram.counts, expected.histogram.counts)
    assert (found.nan, found.inf) == (expected.nan, expected.inf)


def relabelled(data_dir: Path, folder: Path, model: DiffusionModel) -> Path:
    """The dataset as if ``model`` had drawn it."""
    (folder / "dataset").mkdir()
    for path in data_dir.iterdir():
        if path.name != "manifest.json" and not path.name.startswith("."):
            (folder / "dataset" / path.name).symlink_to(path)
    manifest = (data_dir / "manifest.json").read_text()
    own = json.loads(manifest)["fingerprint"]
    (folder / "dataset" / "manifest.json").write_text(manifest.replace(own, model.fingerprint))
    return folder / "dataset"
