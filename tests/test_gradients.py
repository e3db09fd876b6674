"""Gradients of the picture and of outputs: against the whole sampler differentiated at once, and against trials."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.adjoint import Adjoint
from calib.analysis.gradients import Of, gradient_sensitivities
from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.measure import measure, quantizable
from calib.analysis.watch import INPUT_BITS
from calib.base.errors import CalibError
from calib.dataset.load import load_manifest
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
import numpy as np
import pytest
from helpers import PROMPTS, check_config_error
from mlx import nn
from numpy.typing import NDArray
from tiny_models import STRUCTURES, draw, tiny_model

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

    def adjoint(self) -> Adjoint:
        return Adjoint(self.model, self.states, self.layers, self.points, lambda tap, step: (LOW, HIGH))

    def velocity(self, x: mx.array, step: int) -> mx.array:
        """v with guidance, as the sampler takes it."""
        manifest = self.states.manifest
        text = self.model.encode([PROMPTS[i] for i in self.images], manifest.cfg_weight)
        timestep = mx.array([manifest.timesteps[step]])
        if manifest.cfg_weight <= 0:
            return self.model.velocity(x, text, timestep)
        c, u = mx.split(self.model.velocity(mx.concatenate([x, x]), text, timestep), 2)
        return u + manifest.cfg_weight * (c - u)

    def picture(self, first: int = 0, changed: mx.array | None = None) -> mx.array:
        """The picture from the stored state ``first``, or from another state in its place."""
        manifest = self.states.manifest
        x = mx.array(read_states(self.states.data_dir, manifest, self.images, first)) if changed is None else changed
        for step in range(first, manifest.num_steps):
            x = x + self.velocity(x, step) * (manifest.sigmas[step + 1] - manifest.sigmas[step])
        return self.model.decode_latents(self.model.latent_format.process_out(x)) / 2


#: The smallest family is always tried.
TRIED = ("sd3", *(pytest.param(structure, marks=pytest.mark.slow) for structure in STRUCTURES if structure != "sd3"))


@pytest.fixture(scope="module", params=TRIED)
def case(request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny = tiny_model(model, request.param)
    folder = draw(tiny, tmp_path_factory.mktemp("gradients") / request.param)
    manifest = load_manifest(folder)
    states = StoredStates(folder, manifest, sorted(manifest.images), range(manifest.num_steps))
    layers = {name: layer for name, layer in tiny.architecture.layers().items() if quantizable(layer)}
    return Case(tiny, states, layers, tap_points(tiny.architecture, TapSelection()))


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
        assert distance(found.weights[name], gradient) < 2e-3, name


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
    # Layers that read an array together, but for adaLN, whose layers make an array each of what they share.
    points = [point for point in case.points if "adaln" not in point.name]
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
    for point in points:
        x, g = (np.array(a).astype(np.float64) for a in (inputs[point.name], gradients[point.name]))
        expected = [np.sum(g**2 * (rounded(x, bits) - x) ** 2) for bits in INPUT_BITS]
        assert found.inputs[point.name][step] == pytest.approx(expected, rel=2e-2), point.name


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
    tiny = tiny_model(model, "sd3")
    folder = draw(tiny, tmp_path_factory.mktemp("trials") / "sd3")
    manifest = load_manifest(folder)
    states = StoredStates(folder, manifest, sorted(manifest.images), [1, 3])
    layers = {name: layer for name, layer in tiny.architecture.layers().items() if quantizable(layer)}
    return Case(tiny, states, layers, tap_points(tiny.architecture, TapSelection()))


def summaries(case: Case) -> dict[str, LayerSummary]:
    return {name: replace(PROBE, minimum=LOW, maximum=HIGH) for point in case.points for name in point.names}


def test_trials(case_of_trials: Case, tmp_path: Path) -> None:
    """One backward pass for each batch and step tells of every layer and option what trials do."""
    case = case_of_trials
    ranges = {point.name: (LOW, HIGH) for point in case.points}
    trials = measure(lambda: case.model, case.layers, case.points, case.states, ranges, tmp_path, [32, 64])
    given = (lambda: case.model, case.model.architecture, summaries(case), case.states, tmp_path)
    found = gradient_sensitivities(*given, Of.OUTPUT, [32, 64], probes=4)
    assert found.weights.keys() == trials.weights.keys() and found.steps == trials.steps
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
    """What a pass found is not sought again; a damaged file is."""
    case = case_of_trials
    loads: list[int] = []

    def load() -> DiffusionModel:
        loads.append(1)
        return case.model

    given = (load, case.model.architecture, summaries(case), case.states, tmp_path)
    first = gradient_sensitivities(*given)
    files = sorted(tmp_path.glob("gradients/*/*.npz"))
    again = gradient_sensitivities(*given)
    assert len(files) == 1 and len(loads) == 1
    files[0].write_bytes(files[0].read_bytes()[:100])
    damaged = gradient_sensitivities(*given)
    assert len(loads) == 2
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


def test_gradients_that_are_not_finite(case_of_trials: Case) -> None:
    case = case_of_trials
    layer = case.layers["mm_block_0.image.attn.v_proj"]
    own = layer.weight
    layer.weight = own * float("nan")
    try:
        with pytest.raises(CalibError, match="not finite at step 3, in "):
            case.adjoint().of_picture(case.images, KEY)
    finally:
        layer.weight = own
