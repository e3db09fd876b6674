"""Measured sensitivities: against whole forwards; what is kept, what is not, and whichever way it ends."""

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.measure import measure
from calib.analysis.sensitivities import Sensitivities
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import CalibError
from calib.base.locks import locked
from calib.base.progress import note
from calib.dataset.load import load_manifest
from calib.dataset.manifest import Manifest
from calib.models.grids import searched
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, weights_fingerprint

import mlx.core as mx
import numpy as np
import pytest
from damage import restated, set_states
from diffusionkit.mlx.mmdit import MMDiT
from helpers import end, lines_of, run_here, start_process, temporaries, wait_until
from mlx import nn
from tiny_models import draw, tiny_model

Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Tried:
    """Layers of every kind, from the beginning of a network to its end; taps, and the range their inputs have."""

    layers: Sequence[str]
    ranges: Ranges


_SD3 = Tried(
    (
        *("context_embedder", "t_embedder.2", "y_embedder.0", "mm_block_0.image.attn.q_proj", "mm_block_0.text.adaln"),
        *("mm_block_0.text.mlp.fc2", "mm_block_1.text.attn.o_proj", "mm_block_1.image.adaln"),
        *("mm_block_2.image.mlp.fc1", "mm_block_2.text.attn.k_proj", "final_layer.linear", "final_layer.adaln"),
    ),
    {
        "x_embedder": (-3.0, 3.0),
        "t_embedder.2": (-0.3, 1.5),
        "mm_block_0.image.adaln": (-0.3, 2.0),
        "mm_block_1.image.attn.q_proj": (-2.0, 2.5),
        "mm_block_1.text.mlp.fc2": (-0.2, 5.0),
        "mm_block_2.text.attn.q_proj": (-3.0, 3.0),
        "final_layer.linear": (0.5, 8.0),  # which covers zero alone to one side
    },
)
_FLUX = Tried(
    (
        *("context_embedder", "mm_block_0.text.mlp.fc1", "mm_block_1.image.attn.v_proj", "mm_block_1.text.mlp.fc2"),
        *("unified_block_0.adaln", "unified_block_0.attn.q_proj", "unified_block_0.mlp.fc2"),
        *("unified_block_1.attn.o_proj", "unified_block_1.mlp.fc1", "final_layer.linear"),
    ),
    {
        "mm_block_1.text.mlp.fc1": (-2.0, 2.0),
        "unified_block_0.attn.q_proj": (-2.0, 2.0),
        "unified_block_1.mlp.fc2": (-0.2, 2.0),
    },
)
TRIED = {"sd3": _SD3, "flux": _FLUX, "serial": _FLUX, "emoji": _SD3}


def chosen(model: DiffusionModel, names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.architecture.layers().items() if name in names}


def points_of(model: DiffusionModel, ranges: Ranges) -> list[TapPoint]:
    return [point for point in tap_points(model.architecture, TapSelection()) if point.name in ranges]


def states_of(data_dir: Path, images: Sequence[int] = (0, 1), steps: Sequence[int] = (0, 3)) -> StoredStates:
    return StoredStates(data_dir, load_manifest(data_dir), images, steps)


def module_ids(model: DiffusionModel) -> list[int]:
    return [id(module) for module in model.transformer.modules()]


def never() -> DiffusionModel:
    raise AssertionError("the model was loaded")


# Against whole forwards


class Slow:
    """S by whole forwards, one state at a time."""

    def __init__(self, model: DiffusionModel, states: StoredStates):
        self._model, self._states = model, states
        self._plain = self._outputs()

    def _outputs(self) -> dict[tuple[int, int], np.ndarray]:
        """v of every (step, image), both halves of the guidance batch, in float64."""
        model, manifest = self._model, self._states.manifest
        found = {}
        for image in self._states.images:
            text = model.encode([str(manifest.images[image].prompt)], manifest.cfg_weight)
            for step in self._states.steps:
                x = mx.array(read_states(self._states.data_dir, manifest, [image], step))
                timestep = mx.array([manifest.timesteps[step]])
                mx.eval(timestep)
                v = model.architecture.velocity(mx.concatenate([x] * len(text.tokens)), text, timestep)
                found[step, image] = np.array(v).astype(np.float64)
        return found

    def _changed(self) -> list[float]:
        """S at each step, of the model as it is now."""
        changed, found = self._outputs(), []
        for step in self._states.steps:
            lost = sum(np.sum((changed[key] - v) ** 2) for key, v in self._plain.items() if key[0] == step)
            found.append(float(lost / sum(np.sum(v**2) for key, v in self._plain.items() if key[0] == step)))
        return found

    def weights(self, name: str, bits: int, group_size: int) -> list[float]:
        layer = self._model.architecture.layers()[name]
        own = layer.weight
        try:
            layer.weight = searched(own, bits, group_size, mx.float16, rounds=2, each_end=False).dequantize()
            return self._changed()
        finally:
            layer.weight = own

    def inputs(self, names: Sequence[str], low: float, high: float, bits: int) -> list[float]:
        low, high = min(low, 0), max(high, 0)
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale)

        def quantized(name: str, x: mx.array) -> mx.array:
            return (mx.clip(mx.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale

        with tapped(self._model.architecture, [TapPoint(name, "") for name in names], quantized):
            return self._changed()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "serial", "emoji")]


@pytest.fixture(scope="module", params=["sd3", *SLOW])
def drawn(
    request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, DiffusionModel, Path]:
    """A structure, such a model, and three images of four steps that it drew."""
    own = model if request.param == "emoji" else tiny_model(model, request.param)
    return request.param, own, draw(own, tmp_path_factory.mktemp("drawn") / "dataset")


#: Forwards of other shapes differ by 1e-6 of the output: an S of 1e-7 by 1e-9.
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-9}


def test_whole_forwards(drawn: tuple[str, DiffusionModel, Path], tmp_path: Path) -> None:
    """S of weights and inputs, measured from a layer's block on, is that of whole forwards."""
    structure, model, data_dir = drawn
    tried, states, size = TRIED[structure], states_of(data_dir, [2, 0]), 64 if structure == "emoji" else 32
    before, modules, points = weights_fingerprint(model.transformer), module_ids(model), points_of(model, tried.ranges)
    found = measure(lambda: model, chosen(model, tried.layers), points, states, tried.ranges, tmp_path, [size])
    assert weights_fingerprint(model.transformer) == before
    assert module_ids(model) == modules
    assert (found.steps, found.num_steps) == (tuple(states.steps), states.manifest.num_steps)
    assert set(found.weights) == set(found.shapes) == set(tried.layers)
    slow = Slow(model, states)
    for name in tried.layers:
        assert found.shapes[name] == model.architecture.layers()[name].weight.shape
        assert set(found.weights[name]) == {(bits, size) for bits in WEIGHT_BITS}
        for option in ((2, size), (8, size)):
            expected = slow.weights(name, *option)
            assert min(expected) > 0, "every layer matters"
            np.testing.assert_allclose(found.weights[name][option], expected, **CLOSE, err_msg=f"{name} {option}")
        by_bits = [found.weights[name][bits, size].mean() for bits in (2, 4, 8)]
        assert by_bits == sorted(by_bits, reverse=True), "more bits do less"
    assert set(found.activations) == {name for point in points for name in point.names}
    assert len(points) == len(tried.ranges)
    for point in points:
        for bits in (4, 8):
            expected = slow.inputs(point.names, *tried.ranges[point.name], bits)
            assert min(expected) > 0
            for name in point.names:
                np.testing.assert_allclose(found.activations[name][bits], expected, **CLOSE, err_msg=f"{name} {bits}")


def test_an_architecture_that_cannot_resume(sd3: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    """Whole forwards give the same."""

    class Plain(MMDiTArchitecture):
        keeping = None

    plain = replace(sd3, architecture=Plain(sd3.transformer))
    given = [states_of(data_dir, [0], [3]), FEW_RANGES]
    found = [
        measure(lambda m=m: m, chosen(m, FEW), points_of(m, FEW_RANGES), *given, tmp_path / m.name, [64])
        for m in (sd3, replace(plain, name="plain"))
    ]
    for name in FEW:
        for option, s in found[0].weights[name].items():
            np.testing.assert_allclose(found[1].weights[name][option], s, rtol=1e-3)


def test_groups_that_divide(sd3: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    layers = chosen(sd3, ["x_embedder", "context_embedder"])
    narrow = {**layers, "narrow": nn.Linear(48, 8)}
    found = measure(lambda: sd3, layers, [], states_of(data_dir, [0], [3]), {}, tmp_path)
    assert set(found.shapes) == {"context_embedder"}, "a convolution is no layer that MLX quantizes"
    assert {size for _, size in found.weights["context_embedder"]} == {32, 64, 128}
    assert found.shapes["context_embedder"] == (64, 256)
    again = measure(never, narrow, [], states_of(data_dir, [0], [3]), {}, tmp_path)
    assert set(again.shapes) == {"context_embedder"}


# What is kept

FEW = ("mm_block_2.image.mlp.fc1", "context_embedder")
FEW_RANGES: Ranges = {"final_layer.linear": (-3.0, 8.0)}


@pytest.fixture(scope="module")
def sd3(model: DiffusionModel) -> DiffusionModel:
    return tiny_model(model, "sd3")


@pytest.fixture(scope="module")
def data_dir(sd3: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of four steps; tests copy what they change."""
    return draw(sd3, tmp_path_factory.mktemp("sd3") / "dataset")


Ask = Callable[..., Sensitivities]


@pytest.fixture
def ask(sd3: DiffusionModel, data_dir: Path, tmp_path: Path) -> Ask:
    """Two layers and one input, of one state, into a cache of its own."""

    def call(load: Callable[[], DiffusionModel] = lambda: sd3, **given: Any) -> Sensitivities:
        wanted = {"layers": FEW, "ranges": FEW_RANGES, "states": states_of(data_dir, [0], [3]), "sizes": [64]} | given
        points = wanted.get("points", points_of(sd3, wanted["ranges"]))
        layers, place = chosen(sd3, wanted["layers"]), (wanted["states"], wanted["ranges"], tmp_path)
        return measure(load, layers, points, *place, wanted["sizes"], wanted.get("drawn_by"))

    note.cache_clear()
    return call


def trials(capsys: pytest.CaptureFixture[str]) -> int:
    """How many trials were announced."""
    words = [line.split() for line in capsys.readouterr().err.splitlines() if " trials in " not in line]
    (line,) = [line for line in words if line[:2] == ["measure", "sensitivities:"]]
    return int(line[2])


def check_same(found: Sensitivities, expected: Sensitivities) -> None:
    """Bit for bit."""
    assert (found.steps, found.num_steps, found.shapes) == (expected.steps, expected.num_steps, expected.shapes)
    for own, other in ((found.weights, expected.weights), (found.activations, expected.activations)):
        assert {name: list(by) for name, by in own.items()} == {name: list(by) for name, by in other.items()}
        assert all(np.array_equal(own[name][key], other[name][key]) for name in own for key in own[name])


def cached(folder: Path) -> Path:
    (path,) = (folder / "sensitivity").glob("*.json")
    return path


def test_nothing_is_measured_twice(ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured needs no model."""
    first = ask()
    assert trials(capsys) == 2 * 6 + 3
    content, time = cached(tmp_path).read_bytes(), cached(tmp_path).stat().st_mtime_ns
    check_same(ask(never), first)
    assert capsys.readouterr().err == ""
    assert (cached(tmp_path).read_bytes(), cached(tmp_path).stat().st_mtime_ns) == (content, time)


def test_what_is_missing_is_measured(ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ask()
    capsys.readouterr()
    (half := cached(tmp_path).with_name(f".{cached(tmp_path).name}.x.tmp")).write_text("of a killed process")
    more = ask(layers=(*FEW, "mm_block_1.text.attn.q_proj"))
    assert not half.exists()
    assert trials(capsys) == 6, "another layer"
    groups = ask(sizes=[32, 64])
    assert trials(capsys) == 2 * 6, "another group size"
    other = ask(ranges={"final_layer.linear": (-3.0, 7.0)})
    assert trials(capsys) == 3, "an input over another range"
    assert not np.array_equal(other.activations["final_layer.linear"][4], first.activations["final_layer.linear"][4])
    for name in FEW:
        for bits in (2, 8):
            assert more.weights[name][bits, 64] == groups.weights[name][bits, 64] == first.weights[name][bits, 64]
    check_same(ask(never), first)
    assert temporaries(tmp_path) == set()


def test_an_input_of_several_layers(ask: Ask) -> None:
    """All that read it are tried at once: what one alone does is less."""
    q, *others = (f"mm_block_2.image.attn.{which}_proj" for which in "qkv")
    ranges = {q: (-2.0, 2.0)}
    alone, together = (TapPoint(q, "modulated", aliases) for aliases in ((), tuple(others)))
    first = ask(points=[alone], ranges=ranges)
    second = ask(points=[together], ranges=ranges)
    assert set(second.activations) == {q, *others}
    assert np.all(first.activations[q][4] < second.activations[q][4])
    check_same(ask(never, points=[alone], ranges=ranges), first)


def test_other_states(ask: Ask, data_dir: Path, tmp_path: Path) -> None:
    first = ask()
    for states in (states_of(data_dir, [1], [3]), states_of(data_dir, [0], [2]), states_of(data_dir, [0, 1], [3])):
        with pytest.raises(AssertionError, match="the model was loaded"):
            ask(never, states=states)
    shutil.copytree(data_dir, tmp_path / "copy")
    check_same(ask(never, states=states_of(tmp_path / "copy", [0], [3])), first)
    set_states(tmp_path / "copy" / "samples/0000.h5", lambda x: x.__setitem__(3, x[3] * 2))
    restated(tmp_path / "copy")
    with pytest.raises(AssertionError, match="the model was loaded"):
        ask(never, states=states_of(tmp_path / "copy", [0], [3]))


def older(manifest: Manifest) -> Manifest:
    """As an older dataset says it: neither the model nor checksums."""
    images = {i: replace(entry, checksums={}) for i, entry in manifest.images.items()}
    return replace(manifest, fingerprint=None, text_encoders=None, images=images)


def test_older_datasets(ask: Ask, sd3: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    """They have no checksums, and do not say which model drew them: other states or models are another measurement."""
    shutil.copytree(data_dir, tmp_path / "copy")
    set_states(tmp_path / "copy" / "samples/0000.h5", lambda x: x.__setitem__(3, x[3] * 2))
    one, other = (
        StoredStates(folder, older(load_manifest(folder)), [0], [3]) for folder in (data_dir, tmp_path / "copy")
    )
    own = {"drawn_by": (sd3.fingerprint, sd3.text_encoders)}
    first, second = ask(states=one, **own), ask(states=other, **own)
    assert first.weights[FEW[0]][2, 64] != second.weights[FEW[0]][2, 64]
    another = replace(sd3, architecture=MMDiTArchitecture(MMDiT(sd3.transformer.config)))
    third = ask(lambda: another, states=one, drawn_by=(another.fingerprint, another.text_encoders))
    assert first.weights[FEW[0]][2, 64] != third.weights[FEW[0]][2, 64]
    check_same(ask(never, states=one, **own), first)


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda document: [],
    "nothing": lambda document: None,
    "no weights": lambda document: {**document, "weights": None},
    "no inputs": lambda document: {"weights": document["weights"]},
    "a layer of text": lambda document: {**document, "weights": {FEW[0]: "x"}},
    "too many steps": lambda document: {**document, "weights": {FEW[0]: {"4x64": [0.1, 0.2]}}},
    "text for numbers": lambda document: {**document, "weights": {FEW[0]: {"4x64": ["x"]}}},
    "not a number": lambda document: {**document, "weights": {FEW[0]: {"4x64": [float("nan")]}}},
    "less than nothing": lambda document: {**document, "inputs": {FEW[0]: {"4": [-0.1]}}},
}


@pytest.mark.parametrize("case", [*DAMAGE, "cut short", "empty", "no text"])
def test_a_damaged_cache_is_measured_again(
    ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    layers = {"layers": FEW[:1], "ranges": {}}
    first = ask(**layers)
    path = cached(tmp_path)
    whole = path.read_bytes()
    damaged = {"cut short": whole[:-40], "empty": b"", "no text": b"\xff\xfe"}
    path.write_bytes(damaged[case] if case in damaged else json.dumps(DAMAGE[case](json.loads(whole))).encode())
    capsys.readouterr()
    check_same(ask(**layers), first)
    (line,) = lines_of(err := capsys.readouterr().err)
    assert line.startswith(f"note: {path}: cannot be used (")
    assert line.endswith("sensitivities are measured again")
    assert "measure sensitivities: 6 trials\n" in err
    assert path.read_bytes() == whole


def test_a_lost_state_is_named(ask: Ask, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path / "copy")
    (tmp_path / "copy" / "samples/0001.h5").unlink()
    with pytest.raises(CalibError, match=r"samples/0001\.h5 is missing"):
        ask(never, states=states_of(tmp_path / "copy", [0, 1], [3]))
    assert not list((tmp_path / "sensitivity").glob("*.json"))


def test_an_output_that_is_not_finite(ask: Ask, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path / "copy")
    set_states(tmp_path / "copy" / "samples/0000.h5", lambda x: x.__setitem__((3, 2, 2, 2), np.nan))
    restated(tmp_path / "copy")
    with pytest.raises(CalibError, match="step 3") as error:
        ask(states=states_of(tmp_path / "copy", [0], [3]))
    assert "\n" not in str(error.value)
    assert temporaries(tmp_path) == set()


@contextmanager
def ending(model: DiffusionModel, error: type[BaseException], where: str) -> Iterator[None]:
    """Within the context a forward raises while the weights, or the input, of the last layer are tried."""
    layer, forward = model.transformer.final_layer.linear, MMDiT.__call__
    own = layer.weight

    def failing(transformer: MMDiT, *arguments: Any) -> Any:
        if (layer.weight is not own) if where == "weights" else (transformer.final_layer.linear is not layer):
            raise error
        return forward(transformer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMDiT, "__call__", failing)
        yield


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("where", "left"), [("weights", 6 + 3), ("input", 3)])
def test_however_it_ends(
    ask: Ask,
    sd3: DiffusionModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
    where: str,
    left: int,
) -> None:
    """The model is the loaded one again, and finished layers are kept."""
    layers = {"layers": (FEW[0], "final_layer.linear")}
    before, fingerprint = module_ids(sd3), weights_fingerprint(sd3.transformer)
    with ending(sd3, error, where), pytest.raises(error):
        ask(**layers)
    assert module_ids(sd3) == before
    assert weights_fingerprint(sd3.transformer) == fingerprint
    assert not any("_modulation_params" in module for _, module in sd3.transformer.named_modules())
    capsys.readouterr()
    ask(**layers)
    assert trials(capsys) == left
    assert temporaries(tmp_path) == set()


def test_another_is_waited_for(ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it finds in the meantime is not measured again."""
    first = ask()
    content = cached(tmp_path).read_bytes()
    cached(tmp_path).unlink()
    capsys.readouterr()
    held, found = threading.Event(), []

    def other() -> None:
        with locked(cached_path.with_suffix(".lock"), lambda: None):
            held.set()
            while "waiting" not in "".join(heard):
                heard.append(capsys.readouterr().err)
            cached_path.write_bytes(content)

    cached_path, heard = next(iter((tmp_path / "sensitivity").glob("*.lock"))).with_suffix(".json"), [""]
    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    found.append(ask(never))
    thread.join()
    check_same(found[0], first)
    assert "waiting for the process that measures the same sensitivities" in "".join(heard)


# Whole jobs

SENSITIVITY = (
    *("analysis=sensitivity", "sensitivity.method=trials", "sensitivity.of=output"),
    *("sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[64]"),
)


def measured(folder: Path) -> dict[str, Any]:
    """What the cache below ``folder`` holds so far."""
    paths = list(folder.glob("calibration_cache/sensitivity/*.json"))
    return json.loads(paths[0].read_text()) if paths else {"weights": {}, "inputs": {}}


def test_interrupted(
    tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MMDiT.__call__

    def interrupted(transformer: MMDiT, *arguments: Any) -> Any:
        if len(measured(folder)["weights"]) >= 2:
            raise KeyboardInterrupt
        return forward(transformer, *arguments)

    monkeypatch.setattr(MMDiT, "__call__", interrupted)
    given = [f"stats={tiny_run}", f"data_dir={tiny_run.parent / 'dataset'}", "hydra.run.dir=run"]
    outcome = run_here(["analyze", *given, *SENSITIVITY], capsys)
    assert outcome.status == 130, outcome.err
    (line,) = lines_of(outcome.err)
    assert line.startswith("interrupted; ") and "the same command goes on" in line
    assert len(measured(folder)["weights"]) == 2
    assert temporaries(folder) == set()
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "failed"


@pytest.fixture(scope="module")
def collected(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of a quarter of the emoji model's layers."""
    folder = tmp_path_factory.mktemp("collected")
    data_dir = draw(model, folder / "dataset")
    taps = "taps.include=['mm_block_[23].image.*','final_layer.*']"
    given = ["collect", f"data_dir={data_dir}", "sampler.num_steps=4", "timestep_schedule=quarters", taps]
    process = start_process(folder, *given, "hydra.run.dir=run")
    status, err = end(process)
    assert status == 0, err
    return folder / "run"


@pytest.mark.slow
def test_killed(collected: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["analyze", f"stats={collected}", *SENSITIVITY]
    first = start_process(folder, *given, "hydra.run.dir=one")
    second = None
    try:
        wait_until(lambda: len(measured(folder)["weights"]) >= 3, first)
        first.send_signal(signal.SIGSTOP)
        second = start_process(folder, *given, "hydra.run.dir=two")
        assert second.stderr is not None
        assert "waiting for the process that measures the same sensitivities" in second.stderr.readline()
        assert second.poll() is None
        before = measured(folder)
        assert json.loads((folder / "one" / "status.json").read_text())["state"] == "running"
        first.kill()
        status, err = end(second)
        assert (first.wait(timeout=60), status) == (-signal.SIGKILL, 0), err
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()
    done = sum(len(own) for kind in ("weights", "inputs") for own in before[kind].values())
    whole = tmp_path / "undisturbed"
    whole.mkdir()
    outcome = run_here([*given, f"hydra.run.dir={whole / 'run'}", f"cache_dir={whole / 'calibration_cache'}"], capsys)
    assert outcome.status == 0, outcome.err
    assert measured(folder) == measured(whole), "to the bit"
    total = sum(len(own) for kind in ("weights", "inputs") for own in measured(whole)[kind].values())
    assert 0 < done < total
    assert f"measure sensitivities: {total} trials\n" in outcome.err
    assert f"measure sensitivities: {total - done} trials\n" in err
    for name in ("quantization_config.json", "timestep_config.json", "analysis.txt"):
        assert (folder / "two" / name).read_bytes() == (whole / "run" / name).read_bytes()
    assert temporaries(folder) == set()
    outcome = run_here([*given, "hydra.run.dir=three"], capsys)
    assert (outcome.status, outcome.err) == (0, ""), "all was in the cache"
    assert "loaded emoji" not in (folder / "three" / "run.log").read_text()


@pytest.mark.slow
def test_interrupted_by_the_keyboard(collected: Path, folder: Path) -> None:
    process = start_process(folder, "analyze", f"stats={collected}", *SENSITIVITY, "hydra.run.dir=run")
    wait_until(lambda: len(measured(folder)["weights"]) >= 2, process)
    process.send_signal(signal.SIGINT)
    status, err = end(process)
    assert status == 130, err
    (line,) = lines_of(err)
    assert line.startswith("interrupted; ") and "the same command goes on" in line
    assert len(measured(folder)["weights"]) >= 2
    assert temporaries(folder) == set()
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "failed"
