"""Replays that go on where the last one ended: every tap sees what it would in whole forwards."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from calib.activations.batches import StoredStates
from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import static
from calib.analysis.steps import StepPlan
from calib.dataset.load import load_manifest
from calib.models import encoding
from calib.models.model import DiffusionModel
from calib.models.packed import Packed
from calib.models.parallel import parts_of, shared_cores
from calib.quantization import gptq, replays, scratch
from calib.quantization.apply import unpacked
from calib.quantization.build import Calibration, quantize_layers
from calib.quantization.replays import Replays

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from tiny_models import draw, tiny_model

#: What taps saw: by tap the steps of rows, and their numbers.
Seen: TypeAlias = dict[str, list[tuple[list[int], np.ndarray]]]


class Undivided:
    """A transformer that does not run in parts."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, key: str) -> Any:
        if key == "parts":
            raise AttributeError(key)
        return getattr(self._inner, key)


#: Small models, and one of them hidden that it runs in parts.
CASES, FURTHER = ("sd3", "flux bfloat16", "zimage", "undivided"), "qwen bfloat16"


@pytest.fixture(scope="module")
def case(
    request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffusionModel, StoredStates]:
    structure, _, kind = request.param.replace("undivided", "sd3").partition(" ")
    own = tiny_model(model, structure, mx.bfloat16 if kind else mx.float32)
    data_dir = draw(own, tmp_path_factory.mktemp("replays") / "dataset")
    if request.param == "undivided":
        own = replace(own, architecture=Undivided(own.architecture))
    return own, StoredStates(data_dir, load_manifest(data_dir), [0, 1, 2], (0, 2))


def keep(seen: Seen, name: str, x: mx.array, steps: Sequence[int]) -> mx.array:
    seen[name].append((list(steps), x))
    return x


def values(seen: Seen) -> Seen:
    return {tap: [(steps, np.array(x.astype(mx.float32))) for steps, x in own] for tap, own in seen.items()}


def whole(
    model: DiffusionModel, states: StoredStates, points: Sequence[TapPoint], packed: Mapping[str, Packed]
) -> Seen:
    """What taps see in whole forwards."""
    seen: Seen = defaultdict(list)
    steps: list[int] = []

    def record(name: str, x: mx.array) -> mx.array:
        return keep(seen, name, x, steps)

    with unpacked(model.architecture, packed), tapped(model.architecture, points, record):
        for batch in Replays(model, lambda: states).batches():

            def entering(rows: slice, of: Any = batch) -> None:
                steps[:] = (of.steps * (len(of.x) // len(of.steps)))[rows]

            with shared_cores(len(batch.x)):
                mx.eval(model.velocities(batch.x, batch.text, batch.timesteps, parts_of(len(batch.x)), entering))
    return values(seen)


def seen_by(replay: Replays, points: Sequence[TapPoint], packed: Mapping[str, Packed]) -> Seen:
    """What taps see in a replay."""
    seen: Seen = defaultdict(list)

    def record(name: str, x: mx.array, steps: Sequence[int]) -> mx.array:
        return keep(seen, name, x, steps)

    replay(points, record, lambda: [x for own in seen.values() for _, x in own], packed)
    return values(seen)


def equal(one: Seen, other: Seen) -> bool:
    return one.keys() == other.keys() and all(
        steps == others and np.array_equal(x, y)
        for tap in one
        for (steps, x), (others, y) in zip(one[tap], other[tap], strict=True)
    )


def calls(model: DiffusionModel, count: int) -> Iterator[tuple[list[TapPoint], dict[str, Packed]]]:
    """Taps, mostly of one part and each time a later one; and layers that are replaced, some by others in between."""
    random, taken = np.random.RandomState(0), dict[str, Packed]()
    taps = tap_points(model.architecture, TapSelection())
    layers = {name: x for name, x in model.architecture.layers().items() if isinstance(x, nn.Linear)}
    names = [name for name, layer in layers.items() if layer.weight.shape[1] % 32 == 0]
    first = 0
    for number in range(count):
        if random.rand() < 0.2:
            first = 0
        points = taps[first : first + 1 + random.randint(3)]
        yield points, dict(taken)
        first = min(first + random.randint(len(taps) // 3), len(taps) - 1)
        chosen = names[: names.index(min(names, key=lambda n: abs(names.index(n) - first * len(names) // len(taps))))]
        for name in chosen:
            if name not in taken or number % 5 == 4:
                taken[name] = Packed.nearest(layers[name].weight, 2 + number % 3, 32, mx.float16)


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing of what parts are given stay in memory."""
    monkeypatch.setattr(replays, "OF_WHAT_IS_LEFT", 0.0)
    monkeypatch.setattr(replays, "LEAST_ROOM", 0)


@pytest.mark.parametrize(
    ("case", "where"),
    [(c, "memory") for c in CASES]
    + [("flux bfloat16", "file"), pytest.param(FURTHER, "memory", marks=pytest.mark.slow)],
    indirect=["case"],
)
def test_taps_see_what_they_do_in_whole_forwards(
    where: str,
    case: tuple[DiffusionModel, StoredStates],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever replays precede: of later parts, of others in their places, of several parts."""
    model, states = case
    if where != "memory":
        no_memory(monkeypatch)
    if where == "nowhere":
        monkeypatch.setattr(scratch, "free_bytes", lambda folder: 1000)
    replay = Replays(model, lambda: states, tmp_path)
    differ = set()
    for points, packed in calls(model, 9):
        seen = seen_by(replay, points, packed)
        assert equal(seen, whole(model, states, points, packed))
        differ |= {float(np.sum([x.astype(float).sum() for _, x in own])) for own in seen.values()}
    assert len(differ) > 5
    assert not list(tmp_path.iterdir())
    err = capsys.readouterr().err
    assert ("of what blocks are given are kept in" in err) == (where == "file")
    said = "are to be kept there, and 1.0 kB are free; choose another cache_dir, or fewer calibration.images"
    assert (said in err and "each replay begins at the first block" in err) == (where == "nowhere")


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_one_that_failed_leaves_nothing_to_go_on_from(case: tuple[DiffusionModel, StoredStates]) -> None:
    """Nor does one after a release."""
    model, states = case
    replay, taps = Replays(model, lambda: states), tap_points(model.architecture, TapSelection())
    late = [tap for tap in taps if tap.name.startswith("mm_block_2")][:1]
    layer = model.architecture.layers()["mm_block_0.image.attn.q_proj"]
    packed = {"mm_block_0.image.attn.q_proj": Packed.nearest(layer.weight, 2, 32, mx.float16)}

    def fail(*_: Any) -> mx.array:
        raise ZeroDivisionError

    for replaced in (packed, {}, packed):
        with pytest.raises(ZeroDivisionError):
            replay(late, fail, tuple, packed)
        if replaced:
            replay.release()
        assert equal(seen_by(replay, late, replaced), whole(model, states, late, replaced))


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_texts_are_encoded_once(
    case: tuple[DiffusionModel, StoredStates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few are kept by default, and though batches are read anew for each part."""
    model, states = case
    encoded: list[str] = []

    def encode(text: str) -> Any:
        encoded.append(text)
        return model.encode_text(text)

    own = replace(model, encode_text=encode)
    own._kept = 1
    monkeypatch.setattr(encoding, "ROWS_KEPT", 1)
    no_memory(monkeypatch)
    replay = Replays(own, lambda: states, tmp_path)
    replay._begin()
    encoded.clear()
    seen_by(replay, tap_points(model.architecture, TapSelection())[-1:], {})
    assert not encoded


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_gptq_runs_a_block_twice(case: tuple[DiffusionModel, StoredStates], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to see what its layers read, and once to pass on; the first also for what all blocks read."""
    model, states = case
    runs, own = dict[int, int](), type(model.architecture).parts

    def counted(self: Any, *arguments: Any) -> Any:
        def run(number: int, part: Any, given: Any) -> Any:
            runs[number] = runs.get(number, 0) + 1
            return part(given)

        return [lambda given, n=n, part=part: run(n, part, given) for n, part in enumerate(own(self, *arguments))]

    monkeypatch.setattr(type(model.architecture), "parts", counted)
    plan = {name: LayerPlan(4, 16) for name in model.architecture.layers()}
    source = Calibration(None, static, lambda: states)
    quantize_layers(model, plan, StepPlan(states.manifest.timesteps[:4]), gptq.quantize, source, {})
    parts = sum(len(parts_of(len(batch.x))) for batch in Replays(model, lambda: states).batches())
    blocks = len(model.architecture.blocks())
    runs[0] -= len(list(Replays(model, lambda: states).batches()))  # for the size of what passes
    assert runs == {0: 2 * parts, 1: 3 * parts} | {n: 2 * parts for n in range(2, blocks + 1)} | {blocks + 1: parts}
