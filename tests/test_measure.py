"""Measured sensitivities: forwards that begin in the middle, each against the whole; what is kept, and what is not."""

import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.measure import measure
from calib.analysis.sensitivities import Sensitivities
from calib.base.errors import CalibError
from calib.base.progress import note
from calib.dataset.generate import generate
from calib.dataset.load import load_manifest
from calib.dataset.manifest import Manifest
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StateDtype
from calib.models.mmdit.modulation import modulated
from helpers import velocity
from calib.models.mmdit.resume import Output, block_count, block_of, keeping, resumed
from calib.models.model import DiffusionModel, weights_fingerprint

import mlx.core as mx
import numpy as np
import pytest
from damage import restated, set_states
from diffusionkit.mlx.mmdit import MMDiT
from helpers import PROMPTS, end, lines_of, run_here, start_process, temporaries, wait_until
from mlx import nn
from tiny_flux import flux_model
from watching import keep

Ranges = Mapping[str, tuple[float, float]]

#: Of every kind, and from the beginning of the network to its end.
LAYERS = (
    *("context_embedder", "t_embedder.2", "y_embedder.0", "mm_block_0.image.attn.q_proj", "mm_block_0.text.adaln"),
    *("mm_block_0.text.mlp.fc2", "mm_block_1.text.attn.o_proj", "mm_block_2.image.adaln", "mm_block_3.image.mlp.fc1"),
    *("mm_block_3.text.attn.k_proj", "final_layer.linear", "final_layer.adaln"),
)
#: Taps and the range their inputs are quantized over; the last one covers zero alone to one side.
RANGES: Ranges = {
    "x_embedder": (-3.0, 3.0),
    "t_embedder.2": (-0.3, 1.5),
    "mm_block_0.image.adaln": (-0.3, 2.0),
    "mm_block_1.image.attn.q_proj": (-2.0, 2.5),
    "mm_block_2.text.mlp.fc2": (-0.2, 5.0),
    "mm_block_3.text.attn.q_proj": (-3.0, 3.0),
    "final_layer.linear": (0.5, 8.0),
}
FLUX_LAYERS = (
    *("context_embedder", "mm_block_0.text.mlp.fc1", "mm_block_1.image.attn.v_proj", "mm_block_1.text.mlp.fc2"),
    *("unified_block_0.adaln", "unified_block_0.attn.q_proj", "unified_block_0.mlp.fc2", "unified_block_1.attn.o_proj"),
    *("unified_block_1.mlp.fc1", "final_layer.linear"),
)
FLUX_RANGES: Ranges = {
    "mm_block_1.text.mlp.fc1": (-2.0, 2.0),
    "unified_block_0.attn.q_proj": (-2.0, 2.0),
    "unified_block_1.mlp.fc2": (-0.2, 2.0),
}


def chosen(model: DiffusionModel, names: Sequence[str]) -> dict[str, nn.Module]:
    layers = model.architecture.layers()
    return {name: layers[name] for name in layers if name in names}


def points_of(model: DiffusionModel, ranges: Ranges) -> list[TapPoint]:
    return [point for point in tap_points(model.architecture, TapSelection()) if point.name in ranges]


def states_of(data_dir: Path, images: Sequence[int] = (0, 1), steps: Sequence[int] = (0, 5)) -> StoredStates:
    return StoredStates(data_dir, load_manifest(data_dir), images, steps)


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
                rows = mx.concatenate([x] * len(text.tokens))
                timestep = mx.array([manifest.timesteps[step]])
                v = velocity(model.transformer, rows, text.tokens, text.pooled, timestep)
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
        packed, scales, biases = mx.quantize(own.astype(mx.float16), group_size=group_size, bits=bits)
        try:
            both = (scales.astype(mx.float32), biases.astype(mx.float32))
            layer.weight = mx.dequantize(packed, *both, group_size=group_size, bits=bits)
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


def check_against_whole_forwards(
    model: DiffusionModel, states: StoredStates, layers: Sequence[str], ranges: Ranges, size: int, cache_dir: Path
) -> Sensitivities:
    before, points = weights_fingerprint(model.transformer), points_of(model, ranges)
    modules = [id(module) for module in model.transformer.modules()]
    found = measure(lambda: model, chosen(model, layers), points, states, ranges, cache_dir, [size])
    assert weights_fingerprint(model.transformer) == before
    assert [id(module) for module in model.transformer.modules()] == modules
    assert (found.steps, found.num_steps) == (tuple(states.steps), states.manifest.num_steps)
    assert set(found.weights) == set(found.shapes) == set(layers)
    slow = Slow(model, states)
    for name in layers:
        assert found.shapes[name] == model.architecture.layers()[name].weight.shape
        assert set(found.weights[name]) == {(bits, size) for bits in (2, 3, 4, 5, 6, 8)}
        for option in ((2, size), (8, size)):
            expected = slow.weights(name, *option)
            assert min(expected) > 0, "every layer matters"
            np.testing.assert_allclose(found.weights[name][option], expected, rtol=1e-3, err_msg=f"{name} {option}")
    assert {name for point in points for name in point.names} == set(found.activations)
    for point in points:
        for bits in (4, 8):
            expected = slow.inputs(point.names, *ranges[point.name], bits)
            assert min(expected) > 0
            for name in point.names:
                np.testing.assert_allclose(found.activations[name][bits], expected, rtol=1e-3, err_msg=f"{name} {bits}")
    return found


def test_sensitivities_are_those_of_whole_forwards(model: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    found = check_against_whole_forwards(model, states_of(data_dir), LAYERS, RANGES, 64, tmp_path)
    assert len(found.activations) == 1 + 1 + 9 + 3 + 1 + 3 + 1
    for name in LAYERS:
        by_bits = [found.weights[name][bits, 64].mean() for bits in (2, 3, 4, 5, 6, 8)]
        assert by_bits == sorted(by_bits, reverse=True), "more bits do less"


@pytest.fixture(scope="module", params=[True, False], ids=["parallel", "serial"])
def flux(
    request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffusionModel, Path]:
    """A small FLUX and what it drew: three images of four steps, without guidance."""
    small, folder = flux_model(model, request.param), tmp_path_factory.mktemp("flux") / "dataset"
    settings = SamplerSettings(num_steps=4, cfg_weight=0, batch_size=3)
    generate(small, PROMPTS, 3, folder, settings, dtype=StateDtype.FLOAT32)
    return small, folder


def test_sensitivities_of_unified_blocks_are_those_of_whole_forwards(
    flux: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    small, folder = flux
    states = states_of(folder, [0, 2, 1], [0, 3])
    check_against_whole_forwards(small, states, FLUX_LAYERS, FLUX_RANGES, 32, tmp_path)


def test_only_groups_that_divide_a_width_are_tried(model: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    layers = chosen(model, ["x_embedder", "final_layer.linear"])
    narrow = {**layers, "narrow": nn.Linear(48, 8)}
    found = measure(lambda: model, layers, [], states_of(data_dir, [0], [3]), {}, tmp_path)
    assert set(found.shapes) == {"final_layer.linear"}, "a convolution is no layer that MLX quantizes"
    assert {size for _, size in found.weights["final_layer.linear"]} == {32, 64, 128}
    assert found.shapes["final_layer.linear"] == (64, 256)
    again = measure(never, narrow, [], states_of(data_dir, [0], [3]), {}, tmp_path)
    assert set(again.shapes) == {"final_layer.linear"}


# Beginning in the middle


class Begun:
    """Forwards of two rows through one transformer, whole or begun after a block."""

    def __init__(self, transformer: MMDiT, x: mx.array, tokens: mx.array, pooled: mx.array):
        self.transformer, self._x, self._tokens, self._pooled = transformer, x, tokens, pooled
        self.blocks = block_count(transformer)

    def forward(self, block: int = -1, output: Output | None = None) -> np.ndarray:
        with modulated(self.transformer, self._pooled, mx.array(400.0), len(self._x)) as key:
            assert output is not None or block < 0
            with resumed(self.transformer, block, output, self._tokens.shape[1]):
                return np.array(self.transformer(self._x, self._tokens[:, :, None, :], key))

    def kept(self, block: int, after: int = -1, output: Output | None = None) -> Output:
        """What ``block`` gives in a forward begun after an earlier one."""
        found: list[Any] = []
        with keeping(self.transformer, block, found.append):
            self.forward(after, output)
        (kept,) = found
        return kept

    def modules(self) -> list[int]:
        return [id(module) for module in self.transformer.modules()]


@pytest.fixture(scope="module", params=["emoji", "parallel", "serial"])
def begun(request: pytest.FixtureRequest, model: DiffusionModel) -> Begun:
    """The emoji model, and a small FLUX as it is and with its MLP after the attention."""
    own = model if request.param == "emoji" else flux_model(model, request.param == "parallel")
    text = model.encode(["red apple", "rocket"], 0)
    random = np.random.RandomState(0)
    return Begun(own.transformer, mx.array(random.randn(2, 16, 16, 16).astype(np.float32)), text.tokens, text.pooled)


def test_blocks_are_numbered_through(begun: Begun) -> None:
    config = begun.transformer.config
    multimodal = config.depth_multimodal
    assert begun.blocks == multimodal + config.depth_unified
    for name in begun.architecture.layers():
        kind, _, number = name.split(".")[0].rpartition("_")
        first = {"mm_block": 0, "unified_block": multimodal}.get(kind)
        if name.startswith("final_layer"):
            assert block_of(name, begun.transformer) == begun.blocks
        else:
            assert block_of(name, begun.transformer) == (None if first is None else first + int(number)), name


def test_a_forward_from_any_block_on_gives_what_the_whole_does(begun: Begun) -> None:
    plain, modules = begun.forward(), begun.modules()
    for block in range(begun.blocks):
        assert np.array_equal(begun.forward(block, begun.kept(block)), plain), block
    assert begun.modules() == modules
    assert np.array_equal(begun.forward(), plain)


def test_outputs_of_later_blocks_are_those_kept_in_the_whole_forward(begun: Begun) -> None:
    first = begun.kept(0)
    for block in range(1, begun.blocks):
        expected, found = begun.kept(block), begun.kept(block, 0, first)
        pairs = [(found, expected)] if isinstance(found, mx.array) else list(zip(found, expected, strict=True))
        for own, other in pairs:
            assert (own is None) == (other is None), "the last multimodal block of SD3 has no text stream"
            assert own is None or mx.array_equal(own, other), block


def test_what_lies_before_is_not_run(begun: Begun) -> None:
    points = tap_points(begun.architecture, TapSelection())
    place = {point.name: block_of(point.name, begun.transformer) for point in points}
    for block in range(begun.blocks):
        output = begun.kept(block)
        seen: dict[str, mx.array] = {}
        with tapped(begun.architecture, points, keep(seen)):
            begun.forward(block, output)
        # Embedders and modulations come ahead of all blocks.
        ahead = {name for name, own in place.items() if own is None or name.endswith(".adaln")}
        assert set(seen) == ahead | {name for name, own in place.items() if own is not None and own > block}


def test_blocks_are_put_back_when_a_forward_fails(begun: Begun) -> None:
    modules, output = begun.modules(), begun.kept(1)

    def fail(_: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), keeping(begun.transformer, begun.blocks - 1, fail):
        begun.forward(1, output)
    assert begun.modules() == modules


# What is kept

FEW = ("mm_block_3.image.mlp.fc1", "final_layer.linear")
FEW_RANGES: Ranges = {"final_layer.linear": (-3.0, 8.0)}


@pytest.fixture
def ask(model: DiffusionModel, data_dir: Path, tmp_path: Path) -> Callable[..., Sensitivities]:
    """Two layers and one input, of one state, into a cache of its own."""

    def call(load: Callable[[], DiffusionModel] = lambda: model, **given: Any) -> Sensitivities:
        wanted = {"layers": FEW, "ranges": FEW_RANGES, "states": states_of(data_dir, [0], [3]), "sizes": [64]} | given
        points = wanted.get("points", points_of(model, wanted["ranges"]))
        layers, place = chosen(model, wanted["layers"]), (wanted["states"], wanted["ranges"], tmp_path)
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


def test_what_was_measured_is_not_measured_again_and_needs_no_model(
    ask: Callable[..., Sensitivities], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ask()
    assert trials(capsys) == 2 * 6 + 3
    content, time = cached(tmp_path).read_bytes(), cached(tmp_path).stat().st_mtime_ns
    check_same(ask(never), first)
    assert capsys.readouterr().err == ""
    assert (cached(tmp_path).read_bytes(), cached(tmp_path).stat().st_mtime_ns) == (content, time)


def test_only_what_is_missing_is_measured(
    ask: Callable[..., Sensitivities], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ask()
    capsys.readouterr()
    more = ask(layers=(*FEW, "mm_block_1.text.attn.q_proj"))
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


def test_an_input_that_other_layers_read_too_is_another_measurement(ask: Callable[..., Sensitivities]) -> None:
    """All that read it are tried at once: what one alone does is less."""
    q, *others = (f"mm_block_3.image.attn.{which}_proj" for which in "qkv")
    ranges = {q: (-2.0, 2.0)}
    alone, together = (TapPoint(q, "modulated", aliases) for aliases in ((), tuple(others)))
    first = ask(points=[alone], ranges=ranges)
    second = ask(points=[together], ranges=ranges)
    assert set(second.activations) == {q, *others}
    assert np.all(first.activations[q][4] < second.activations[q][4])
    check_same(ask(never, points=[alone], ranges=ranges), first)


def test_other_states_are_another_measurement(
    ask: Callable[..., Sensitivities], data_dir: Path, tmp_path: Path
) -> None:
    first = ask()
    for states in (states_of(data_dir, [1], [3]), states_of(data_dir, [0], [4]), states_of(data_dir, [0, 1], [3])):
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


def test_older_datasets_of_other_states_or_another_model_are_another_measurement(
    ask: Callable[..., Sensitivities], model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    """They have no checksums, and do not say which model drew them."""
    shutil.copytree(data_dir, tmp_path / "copy")
    set_states(tmp_path / "copy" / "samples/0000.h5", lambda x: x.__setitem__(3, x[3] * 2))
    one, other = (
        StoredStates(folder, older(load_manifest(folder)), [0], [3]) for folder in (data_dir, tmp_path / "copy")
    )
    own = {"drawn_by": (model.fingerprint, model.text_encoders)}
    first, second = ask(states=one, **own), ask(states=other, **own)
    assert first.weights["final_layer.linear"][2, 64] != second.weights["final_layer.linear"][2, 64]
    another = replace(model, transformer=MMDiT(model.transformer.config))
    third = ask(lambda: another, states=one, drawn_by=(another.fingerprint, another.text_encoders))
    assert first.weights["final_layer.linear"][2, 64] != third.weights["final_layer.linear"][2, 64]
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
def test_a_damaged_cache_is_told_and_measured_again(
    ask: Callable[..., Sensitivities], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
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


def test_a_state_that_is_lost_is_named_before_the_model_is_loaded(
    ask: Callable[..., Sensitivities], data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_dir, tmp_path / "copy")
    (tmp_path / "copy" / "samples/0001.h5").unlink()
    with pytest.raises(CalibError, match=r"samples/0001\.h5 is missing"):
        ask(never, states=states_of(tmp_path / "copy", [0, 1], [3]))
    assert not list((tmp_path / "sensitivity").glob("*.json"))


def test_an_output_that_is_not_finite_ends_in_one_clear_line(
    ask: Callable[..., Sensitivities], data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_dir, tmp_path / "copy")
    set_states(tmp_path / "copy" / "samples/0000.h5", lambda x: x.__setitem__((3, 2, 2, 2), np.nan))
    restated(tmp_path / "copy")
    with pytest.raises(CalibError, match="step 3") as error:
        ask(states=states_of(tmp_path / "copy", [0], [3]))
    assert "\n" not in str(error.value)
    assert temporaries(tmp_path) == set()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("where", "left"), [("weights", 6 + 3), ("input", 3)])
def test_the_model_is_the_loaded_one_again_however_it_ends_and_finished_layers_are_kept(
    ask: Callable[..., Sensitivities],
    model: DiffusionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
    where: str,
    left: int,
) -> None:
    """It ends while the last layer is tried."""
    before, fingerprint = [id(module) for module in model.transformer.modules()], weights_fingerprint(model.transformer)
    layer, forward = model.transformer.final_layer.linear, MMDiT.__call__
    own = layer.weight

    def failing(transformer: MMDiT, *arguments: Any) -> Any:
        if (layer.weight is not own) if where == "weights" else (transformer.final_layer.linear is not layer):
            raise error
        return forward(transformer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(MMDiT, "__call__", failing)
        ask()
    assert [id(module) for module in model.transformer.modules()] == before
    assert weights_fingerprint(model.transformer) == fingerprint
    assert not any("_modulation_params" in module for _, module in model.transformer.named_modules())
    capsys.readouterr()
    ask()
    assert trials(capsys) == left
    assert temporaries(tmp_path) == set()


# Processes

SENSITIVITY = ("analysis=sensitivity", "sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[64]")


@pytest.fixture(scope="module")
def collected(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of a quarter of the layers."""
    folder = tmp_path_factory.mktemp("collected")
    taps = "taps.include=['mm_block_[23].image.*','final_layer.*']"
    given = ["collect", f"data_dir={data_dir}", "sampler.num_steps=8", "timestep_schedule=quarters", taps]
    process = start_process(folder, *given, "hydra.run.dir=run")
    status, err = end(process)
    assert status == 0, err
    return folder / "run"


def measured(folder: Path) -> dict[str, Any]:
    """What the cache below ``folder`` holds so far."""
    paths = list(folder.glob("calibration_cache/sensitivity/*.json"))
    return json.loads(paths[0].read_text()) if paths else {"weights": {}, "inputs": {}}


def test_killed_in_the_middle_another_that_waits_goes_on_from_there(
    collected: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_interrupted_by_the_keyboard_it_says_so_and_keeps_what_is_done(collected: Path, folder: Path) -> None:
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
