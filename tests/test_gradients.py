"""Gradients of the picture and of outputs: against the whole sampler differentiated at once, and against trials."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.adjoint import Adjoint, Probe
from calib.analysis.gradients import gradient_sensitivities
from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.measure import measure, quantizable
from calib.analysis.sensitivities import Of
from calib.analysis.tables import SAMPLED_ROWS, shares_of
from calib.analysis.watch import INPUT_BITS
from calib.base.device import on_gpu
from calib.base.errors import CalibError
from calib.base.progress import note
from calib.dataset.load import load_manifest
from calib.models.grids import left_by_search
from calib.models.model import DiffusionModel, weights
from calib.models.parallel import shared_cores

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx.mmdit import RoPE
from helpers import PROMPTS, check_config_error, float64
from mlx import nn
from mlx.utils import tree_map
from numpy.typing import NDArray
from tiny_models import MFLUX, STRUCTURES, draw, enlarged, tiny_model

KEY = mx.random.key(3)
LOW, HIGH = -3.0, 5.0


@dataclass
class Case:
    """A small model, and its images with all states in float32."""

    model: DiffusionModel
    states: StoredStates
    layers: dict[str, nn.Module]
    points: list[TapPoint]

    @property
    def images(self) -> list[int]:
        return list(self.states.images)

    def adjoint(self, by_parts: bool = False) -> Adjoint:
        return Adjoint(self.model, self.states, self.layers, self.points, lambda tap, step: (LOW, HIGH), by_parts)

    def velocity(self, x: mx.array, step: int) -> mx.array:
        """v with guidance, as the sampler takes it."""
        manifest = self.states.manifest
        text = self.model.encode([PROMPTS[i] for i in self.images], manifest.cfg_weight)
        timestep = mx.array([manifest.timesteps[step]])
        if manifest.cfg_weight <= 0:
            return self.model.velocity(x, text, timestep)
        halves = mx.split(self.model.velocity(mx.concatenate([x, x]), text, timestep), 2)
        return self.model.guidance(*halves, manifest.cfg_weight)

    def picture(self, first: int = 0, changed: mx.array | None = None) -> mx.array:
        """The picture from the stored state ``first``, or from another state in its place."""
        manifest = self.states.manifest
        x = mx.array(read_states(self.states.data_dir, manifest, self.images, first)) if changed is None else changed
        for step in range(first, manifest.num_steps):
            x = x + self.velocity(x, step) * (manifest.sigmas[step + 1] - manifest.sigmas[step])
        return self.model.decode_latents(self.model.latent_format.process_out(x)) / 2


#: The smallest first, then the one with texts of different lengths and guidance of its own.
FAMILIES = tuple(dict.fromkeys(("sd3", "qwen", *STRUCTURES, *MFLUX)))


def families(by_default: int) -> list[Any]:
    """All of them, of which those after the first ``by_default`` are slow."""
    return [pytest.param(s, marks=() if i < by_default else pytest.mark.slow) for i, s in enumerate(FAMILIES)]


ONE_BY_DEFAULT = pytest.mark.parametrize("case", families(1), indirect=True)


@pytest.fixture(scope="module", params=families(2))
def case(request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(tiny_model(model, request.param), tmp_path_factory.mktemp("gradients") / request.param)


def case_of(model: DiffusionModel, folder: Path, steps: Sequence[int] | None = None, **drawn: float) -> Case:
    """Drawn by ``model``; ``steps`` of the trajectory, None: all."""
    manifest = load_manifest(draw(model, folder, **drawn))
    states = StoredStates(folder, manifest, sorted(manifest.images), steps or range(manifest.num_steps))
    layers = {name: layer for name, layer in model.architecture.layers().items() if quantizable(layer)}
    return Case(model, states, layers, tap_points(model.architecture, TapSelection()))


def directions(shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape, key=KEY) / np.sqrt(np.prod(shape[1:]))


def distance(found: mx.array, expected: mx.array) -> float:
    """Relative; of two that are zero, as of the last text's queries, 0."""
    return float((mx.linalg.norm(found - expected) / mx.maximum(mx.linalg.norm(expected), 1e-30)).item())


def test_weights(case: Case) -> None:
    """Equal to the gradient of the sampler unrolled from the noise, for every layer; the model is as it was."""
    before = weights(case.model.transformer)
    found = case.adjoint().of_picture(case.images, KEY)
    after = weights(case.model.transformer)
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in before)
    own = {name: layer.weight for name, layer in case.layers.items()}
    bias = {name: layer.get("bias") for name, layer in case.layers.items()}

    def loss(given: dict[str, mx.array]) -> mx.array:
        for name, weight in given.items():
            case.layers[name].weight = weight
        picture = case.picture()
        return (picture * directions(picture.shape)).sum()

    expected = mx.grad(loss)(own)
    for name, layer in case.layers.items():
        layer.weight = own[name]
        if bias[name] is not None:
            layer.bias = bias[name]
    assert found.weights.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance(found.weights[name], gradient) < (2e-3 if on_gpu() else 1e-5), name


@contextmanager
def in_float64(*modules: nn.Module) -> Iterator[None]:
    own = [(module, module.parameters()) for module in modules]
    try:
        for module, parameters in own:
            module.update(tree_map(lambda w: w.astype(mx.float64), parameters))
        yield
    finally:
        for module, parameters in own:
            module.update(parameters)


def rotated(x: mx.array, rope: mx.array) -> mx.array:
    """DiffusionKit's ``RoPE.apply`` in the precision of ``x``; its own is in float32."""
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
    return (rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]).flatten(-2)


#: Structure, or the shipped model itself, and weight of guidance; FLUX's is distilled.
EXACT = [
    ("sd3", 3.0),
    pytest.param("sd3", 0.0, marks=pytest.mark.slow),
    ("flux", 0.0),
    pytest.param("zimage", 0.0, marks=pytest.mark.slow),
    ("qwen", 3.0),
    pytest.param("flux2", 0.0, marks=pytest.mark.slow),
    pytest.param("flux1_dev", 0.0, marks=pytest.mark.slow),
    pytest.param("serial", 0.0, marks=pytest.mark.slow),
    pytest.param("emoji", 3.0, marks=pytest.mark.slow),
]


@pytest.mark.skipif(on_gpu(), reason="MLX has float64 on CPUs")
@pytest.mark.parametrize(("structure", "guidance"), EXACT)
def test_finite_differences(
    structure: str, guidance: float, model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of the picture in float64, through the whole sampler, along random directions of all weights."""
    monkeypatch.setattr(RoPE, "apply", staticmethod(rotated))
    tiny = model if structure == "emoji" else tiny_model(model, structure)
    case = case_of(tiny, tmp_path / "dataset", cfg_weight=guidance)
    found = case.adjoint().of_picture(case.images, KEY).weights
    if structure != "emoji":
        case.model = replace(tiny, decode_latents=lambda z: mx.repeat(mx.repeat(z[..., :3], 4, axis=1), 4, axis=2))
    noise = mx.array(read_states(case.states.data_dir, case.states.manifest, case.images, 0)).astype(mx.float64)
    with in_float64(tiny.transformer, tiny.decoder):
        own = {name: layer.weight for name, layer in case.layers.items()}

        def along(moved: Mapping[str, mx.array]) -> float:
            for name, layer in case.layers.items():
                layer.weight = own[name] + moved[name]
            picture = case.picture(0, noise)
            value = (picture * directions(picture.shape)).sum()
            assert value.dtype == mx.float64
            return float(value.item())

        for number in range(3):
            keys = dict(zip(own, mx.random.split(mx.random.key(number), len(own)), strict=True))
            way, expected, scale = {}, 0.0, 0.0
            for name, gradient in found.items():
                size = mx.linalg.norm(own[name]) / math.sqrt(gradient.size)
                way[name] = size * mx.random.normal(gradient.shape, key=keys[name])
                expected += float((way[name] * gradient).sum().item())
                scale += float(((size * gradient) ** 2).sum().item())  # the variance of that term
            # Some of MLX's functions round to float32 whatever they are given: steps are not small.
            ahead, behind = (along({name: step * w for name, w in way.items()}) for step in (1e-3, -1e-3))
            assert (ahead - behind) / 2e-3 == pytest.approx(expected, abs=2e-3 * math.sqrt(scale))


@ONE_BY_DEFAULT
def test_reach(case: Case) -> None:
    """λ of each state is the gradient of the picture with respect to that state."""
    manifest = case.states.manifest
    found = case.adjoint().of_picture(case.images, KEY).reach
    for step in range(manifest.num_steps + 1):
        x = mx.array(read_states(case.states.data_dir, manifest, case.images, step))

        def loss(x: mx.array, step: int = step) -> mx.array:
            picture = case.picture(step, x)
            return (picture * directions(picture.shape)).sum()

        assert found[step] == pytest.approx(float((mx.grad(loss)(x) ** 2).sum().item()), rel=5e-3)


def rounded(x: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """On the grid of 2^bits values over [LOW, HIGH] that has zero on it."""
    scale = (HIGH - LOW) / (2**bits - 1)
    zero = np.round(-LOW / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


@ONE_BY_DEFAULT
def test_inputs(case: Case) -> None:
    """At one step, of every tap: from the input and the gradients by MLX with the input and the output as variables."""
    manifest, step = case.states.manifest, 2
    adjoint = case.adjoint()
    found = adjoint.of_picture(case.images, KEY)
    state = mx.array(read_states(case.states.data_dir, manifest, case.images, step))
    following = mx.array(read_states(case.states.data_dir, manifest, case.images, step + 1))

    def later(x: mx.array) -> mx.array:
        picture = case.picture(step + 1, x)
        return (picture * directions(picture.shape)).sum()

    carried = mx.grad(later)(following) * (manifest.sigmas[step + 1] - manifest.sigmas[step])
    points = case.points  # adaLN's layers make an array each of what they share: their gradients add up, too
    inputs: dict[str, mx.array] = {}

    def loss(more: dict[str, mx.array]) -> mx.array:
        seen: dict[str, mx.array] = {}

        def shifted(name: str, x: mx.array) -> mx.array:
            inputs[name] = x
            tap = next(point.name for point in points if name in point.names)
            if tap not in seen:
                seen[tap] = x + more[tap]
            return seen[tap]

        with tapped(case.model.architecture, [TapPoint(n, p.kind) for p in points for n in p.names], shifted):
            return (case.velocity(state, step) * carried).sum()

    loss({point.name: mx.array(0.0) for point in points})
    zeros = {point.name: mx.zeros_like(inputs[point.name]) for point in points}
    gradients = mx.grad(loss)(zeros)
    loss({point.name: mx.array(0.0) for point in points})
    checked = 0
    for point in points:
        x, g = (np.array(a).astype(np.float64) for a in (inputs[point.name], gradients[point.name]))
        expected = [np.sum(g**2 * (rounded(x, bits) - x) ** 2) for bits in INPUT_BITS]
        assert found.inputs[point.name][step] == pytest.approx(expected, rel=2e-2), point.name
        rows, columns = case.layers[point.name].weight.shape if point.name in case.layers else (0, 1)
        if rows == columns and len(point.names) == 1:  # of the output y: ∂/∂x = Wᵀ ∂/∂y
            squares = np.linalg.solve(float64(case.layers[point.name].weight).T, g.reshape(-1, rows).T) ** 2
            assert found.outputs[point.name][step] == pytest.approx(squares.mean(), rel=1e-2), point.name
            checked += 1
    assert checked > 3


@ONE_BY_DEFAULT
def test_probes_side_by_side(case: Case) -> None:
    """Each finds what it finds by itself, to the bit; on a GPU there is one at a time."""
    probes = [Probe([image], mx.random.key(image)) for image in case.images]
    with shared_cores(1, 1):
        alone = [case.adjoint().of_picture(probe.images, probe.key) for probe in probes]
        steps: list[int] = []
        together = case.adjoint().carried(Of.PICTURE, probes[: 1 if on_gpu() else None], lambda: steps.append(1))
    assert len(steps) == len(together) * case.states.manifest.num_steps
    for found, expected in zip(together, alone, strict=on_gpu() is False):
        assert all(mx.array_equal(found.weights[name], g).item() for name, g in expected.weights.items())
        assert all(np.array_equal(found.inputs[tap], errors) for tap, errors in expected.inputs.items())
        assert all(np.array_equal(found.outputs[name], squares) for name, squares in expected.outputs.items())
        assert np.array_equal(found.reach, expected.reach)


@ONE_BY_DEFAULT
def test_parts(case: Case) -> None:
    """A block at a time all is as in one piece, but for rounding; the model is as it was."""
    before = weights(case.model.transformer)
    whole, parts = (case.adjoint(by_parts).of_picture(case.images, KEY) for by_parts in (False, True))
    after = weights(case.model.transformer)
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in before)
    assert list(parts.weights) == list(whole.weights) and list(parts.inputs) == list(whole.inputs)
    for name, gradient in whole.weights.items():
        assert distance(parts.weights[name], gradient) < 1e-4, name
    for tap, errors in whole.inputs.items():
        np.testing.assert_allclose(parts.inputs[tap], errors, rtol=1e-3, err_msg=tap)
    assert parts.outputs.keys() == whole.outputs.keys()
    for name, squares in whole.outputs.items():
        np.testing.assert_allclose(parts.outputs[name], squares, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(parts.reach, whole.reach, rtol=1e-4)


@pytest.fixture(autouse=True)
def as_before(model: DiffusionModel) -> Iterator[None]:
    before = weights(model.transformer)
    yield
    assert all(weights(model.transformer)[path] is array for path, array in before.items())


def spearman(one: list[float], other: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.fixture(scope="module")
def case_of_trials(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(tiny_model(model, "sd3"), tmp_path_factory.mktemp("trials") / "sd3", [1, 3])


def summaries(case: Case) -> dict[str, LayerSummary]:
    return {name: replace(PROBE, minimum=LOW, maximum=HIGH) for point in case.points for name in point.names}


@pytest.mark.slow
def test_trials(case_of_trials: Case, tmp_path: Path) -> None:
    """One backward pass for each batch and step tells of layers and options what trials do."""
    case = case_of_trials
    ranges, some = {point.name: (LOW, HIGH) for point in case.points}, dict(list(case.layers.items())[::3])
    trials = measure(lambda: case.model, some, case.points, case.states, ranges, tmp_path, [64])
    given = (lambda: case.model, case.model.architecture, summaries(case), case.states, tmp_path)
    found = gradient_sensitivities(*given, Of.OUTPUT, [64], probes=4)
    assert found.weights.keys() == case.layers.keys() and found.steps == trials.steps
    pairs = [
        (found.weights[name][option].mean(), trials.weights[name][option].mean())
        for name, own in trials.weights.items()
        for option in own
        if 3 <= option[0] <= 6 and own[option].mean() > 1e-12
    ]
    ratios = np.log10([one / other for one, other in pairs])
    assert spearman(*map(list, zip(*pairs, strict=True))) > 0.97
    assert abs(np.median(ratios)) < 0.1 and ratios.std() < 0.25
    inputs = [(found.activations[n][8].mean(), trials.activations[n][8].mean()) for n in trials.activations]
    assert spearman(*map(list, zip(*[p for p in inputs if p[1] > 1e-12], strict=True))) > 0.9


def test_cache(case_of_trials: Case, tmp_path: Path) -> None:
    """What a pass found is not sought again; a damaged file is. Text encoders that do not fit are unloaded."""
    case = case_of_trials
    loads: list[int] = []
    unloaded: list[int] = []

    def load() -> DiffusionModel:
        loads.append(1)
        return replace(case.model, text_bytes=10**15, unload_text=lambda: unloaded.append(1))

    given = (load, case.model.architecture, summaries(case), case.states, tmp_path)
    first = gradient_sensitivities(*given)
    files = sorted(tmp_path.glob("gradients/*/picture/*.npz"))
    again = gradient_sensitivities(*given)
    assert len(files) == len(case.images) and len(loads) == len(unloaded) == 1
    files[0].write_bytes(files[0].read_bytes()[:100])
    damaged = gradient_sensitivities(*given)
    assert len(loads) == 2, "for one image"
    for other in (again, damaged):
        for name, own in first.weights.items():
            for option, errors in own.items():
                assert np.array_equal(errors, other.weights[name][option])


def test_too_few_states(case_of_trials: Case, tmp_path: Path) -> None:
    case = case_of_trials
    manifest = replace(case.states.manifest, steps=[0, 2, 4])
    states = replace(case.states, manifest=manifest)
    given = (lambda: case.model, case.model.architecture, summaries(case), states, tmp_path)
    check_config_error(
        lambda: gradient_sensitivities(*given), ["keeps 3 of 5 states, not state 1", "dataset.steps=all"]
    )


def test_unknown_noise_levels(case_of_trials: Case, tmp_path: Path) -> None:
    """As in datasets of the older layout."""
    case = case_of_trials
    manifest = replace(case.states.manifest, sigmas=[1.0, float("nan"), 0.5, 0.2, 0.0])
    states = replace(case.states, manifest=manifest)
    given = (lambda: case.model, case.model.architecture, summaries(case), states, tmp_path)
    check_config_error(lambda: gradient_sensitivities(*given), ["does not record all noise levels", "of=output"])


@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize("forward", [True, False])
def test_gradients_that_are_not_finite(case_of_trials: Case, forward: bool, by_parts: bool) -> None:
    """The step is named, and the first input that is not finite, or the layer where gradients cease to be."""
    case = case_of_trials
    block = case.model.transformer.multimodal_transformer_blocks[1].image_transformer_block
    layer, activation = block.attn.v_proj, block.mlp.act_fn
    own = layer.weight
    if forward:
        layer.weight = own * float("nan")
    else:
        block.mlp.act_fn = lambda x: activation(x) + mx.sqrt(0 * x)
    where = "first the input of mm_block_1.image.attn.o_proj" if forward else "first in mm_block_1.image.mlp.fc1"
    try:
        with pytest.raises(CalibError, match=f"^the gradient of the picture at step 3 is not finite, {where}$"):
            case.adjoint(by_parts).of_picture(case.images, KEY)
    finally:
        layer.weight, block.mlp.act_fn = own, activation


#: Decoders without a gradient, and why.
UNDECODABLE: dict[str, tuple[Callable[[mx.array], mx.array], str]] = {
    "leaves MLX": (lambda z: mx.array(np.array(enlarged(z))), "no gradient reaches the latent"),
    "pixels": (lambda z: mx.round(127 * enlarged(z)) / 127, "no gradient reaches the latent"),
    "factorises": (lambda z: enlarged(z) + mx.linalg.svd(z[0, :, :, 0], stream=mx.cpu)[1][0], "SVD"),
    "not finite": (lambda z: enlarged(z) + mx.sqrt(0 * enlarged(z)), "its gradient is not finite"),
}


@pytest.mark.parametrize(("decode", "why"), UNDECODABLE.values(), ids=UNDECODABLE.keys())
def test_decoder_without_gradient(
    case_of_trials: Case,
    decode: Callable[[mx.array], mx.array],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Errors are the finished latent's, which is said once in a process, and known the next time without the model."""
    case, loads = case_of_trials, list[int]()

    def load() -> DiffusionModel:
        loads.append(1)
        return replace(case.model, decode_latents=decode)

    given = (case.model.architecture, summaries(case), replace(case.states, images=case.images[:1]))
    note.cache_clear()
    found = gradient_sensitivities(load, *given, tmp_path)
    loaded = len(loads)
    again = gradient_sensitivities(load, *given, tmp_path)
    assert len(loads) == loaded
    said = [line for line in capsys.readouterr().err.splitlines() if "decoder" in line]
    assert len(said) == 1 and said[0].startswith("calib: note: sensitivity.of=picture: ") and why in said[0]
    asked = gradient_sensitivities(lambda: case.model, *given, tmp_path / "asked", Of.LATENT)
    for one in (found, again):
        assert one.of is Of.LATENT and one.reach is not None and one.reach.latent[-1] == 1
        for name, own in asked.weights.items():
            for option, errors in own.items():
                assert np.array_equal(one.weights[name][option], errors)


def test_shares_of_searched_grids(model: DiffusionModel) -> None:
    """Those that a search of each layer by itself finds, for layers of other widths and options in any order."""
    layers = {
        n: x for n, x in model.architecture.layers().items() if x.weight.ndim == 2 and x.weight.shape[1] % 64 == 0
    }
    names = [*layers][:3] + [*layers][-3:] + [n for n in layers if n.endswith("mlp.fc2")][:2]
    options = [(name, bits, size) for name in names for bits, size in ((4, 64), (2, 32))][::-1]
    found = shares_of(layers, options)
    for (name, bits, size), share in zip(options, found, strict=True):
        weight = layers[name].weight
        some = weight[:: max(1, len(weight) // SAMPLED_ROWS)]
        (alone,) = left_by_search([some], bits, size, mx.float16)
        assert share.item() == pytest.approx(alone.item(), rel=1e-4)
    assert len({round(share.item(), 3) for share in found}) > 4
