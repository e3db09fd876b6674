"""Sampling: equal to DiffusionKit's own loop, and without a trace in the model, the disk or any global state."""

import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from calib.dataset.generate import trajectory
from calib.dataset.sampling import initial_noise, initial_state, noise_levels
from calib.dataset.settings import SamplerSettings
from calib.models import emoji
from calib.models.clock import Clock
from calib.models.model import DiffusionModel, weights_fingerprint
from calib.models.noise import RectifiedFlow

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx import CFGDenoiser, DiffusionPipeline, sample_euler
from diffusionkit.mlx.sampler import FluxSampler, ModelSamplingDiscreteFlow
from helpers import PROMPTS, pipeline_of
from mlx.utils import tree_flatten
from tiny_models import tiny_model

SAMPLERS = [ModelSamplingDiscreteFlow(1.0), ModelSamplingDiscreteFlow(3.0), FluxSampler(1.0), FluxSampler(1.15)]
SAMPLER_NAMES = ["flow", "flow-shift3", "flux", "flux-shift1.15"]
LATENT = (16, 16, 16)


@pytest.fixture(scope="module")
def tiny(model: DiffusionModel) -> DiffusionModel:
    """SD3's structure, small: what is tested here is how it is called."""
    return tiny_model(model, "sd3")


@pytest.fixture(scope="module")
def copy(model: DiffusionModel) -> DiffusionModel:
    """The same once more, for DiffusionKit to draw with."""
    return tiny_model(model, "sd3")


@pytest.fixture(scope="module")
def bare_pipeline() -> DiffusionPipeline:
    return DiffusionPipeline.__new__(DiffusionPipeline)


def kits_final_state(
    copy: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], settings: SamplerSettings
) -> mx.array:
    """The finished latents that DiffusionKit draws, before ``process_out``."""
    pipeline = pipeline_of(copy)
    text = copy.encode(prompts, settings.cfg_weight)
    empty = pipeline.get_empty_latent(*copy.latent_shape[:2])
    noise = mx.concatenate([pipeline.get_noise(seed, empty) for seed in seeds])
    sigmas = pipeline.get_sigmas(copy.sampler, settings.num_steps)
    x = copy.sampler.noise_scaling(sigmas[0], noise, empty, pipeline.max_denoise(sigmas))
    given = {"conditioning": text.tokens, "cfg_weight": settings.cfg_weight, "pooled_conditioning": text.pooled}
    final, _ = sample_euler(CFGDenoiser(pipeline), x, sigmas, extra_args=given)
    return final


@pytest.mark.parametrize("sampler", [ModelSamplingDiscreteFlow, FluxSampler, RectifiedFlow])
@pytest.mark.parametrize("shift", [0.01, 100])
def test_levels_at_the_smallest_and_the_largest_shift(sampler: Any, shift: float) -> None:
    """They fall from 1 to 0, no two of them equal in float32."""
    levels = np.array(noise_levels(sampler(shift), 1000))
    assert levels[0] == pytest.approx(1, abs=1e-3) and levels[-1] == 0
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=SAMPLER_NAMES)
@pytest.mark.parametrize("cfg_weight", [3.0, 0.0])
@pytest.mark.parametrize("seeds", [(5,), (1, 2**32 - 1)], ids=["one", "two"])
def test_finished_latents(
    tiny: DiffusionModel, copy: DiffusionModel, sampler: Any, cfg_weight: float, seeds: tuple[int, ...]
) -> None:
    settings = SamplerSettings(num_steps=6, cfg_weight=cfg_weight)
    prompts = PROMPTS[: len(seeds)]
    expected = kits_final_state(replace(copy, sampler=sampler), prompts, seeds, settings)
    *_, final = trajectory(replace(tiny, sampler=sampler), prompts, seeds, settings)
    assert final.x.dtype == mx.float32
    assert mx.std(final.x).item() > 0.1, "a picture, not a blank"
    assert mx.max(mx.abs(final.x - expected)).item() <= 1e-5


def test_16_bit_timesteps(model: DiffusionModel) -> None:
    """Rounded as DiffusionKit rounds them."""
    settings = SamplerSettings(num_steps=3, cfg_weight=3.0)
    ours, copy = (tiny_model(model, "sd3", mx.bfloat16) for _ in range(2))
    expected = kits_final_state(copy, PROMPTS[:1], [5], settings)
    *_, final = trajectory(ours, PROMPTS[:1], [5], settings)
    assert mx.max(mx.abs(final.x - expected)).item() <= 1e-5


def test_denoise_latents_and_decoding(model: DiffusionModel) -> None:
    """The shipped model's picture, to the end."""
    copy = emoji.load()
    pipeline, text = pipeline_of(copy), copy.encode(["red apple"], 3.0)
    latent, _ = pipeline.denoise_latents(
        text.tokens, text.pooled, num_steps=6, cfg_weight=3.0, latent_size=(16, 16), seed=7
    )
    *_, final = trajectory(model, ["red apple"], [7], SamplerSettings(num_steps=6, cfg_weight=3.0))
    assert mx.max(mx.abs(model.latent_format.process_out(final.x) - latent)).item() <= 1e-5
    decoded = pipeline.decode_latents_to_image(latent)
    assert mx.max(mx.abs(model.decode(final.x) - decoded)).item() <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS, ids=SAMPLER_NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7, 50, 100])
def test_noise_levels(bare_pipeline: DiffusionPipeline, sampler: Any, num_steps: int) -> None:
    expected = bare_pipeline.get_sigmas(sampler, num_steps)
    sigmas = noise_levels(sampler, num_steps)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == mx.float32
    assert np.array_equal(np.array(sigmas), np.array(expected))
    assert np.all(np.diff(np.array(sigmas)) < 0)
    assert sigmas[-1].item() == 0


@pytest.mark.parametrize("shape", [LATENT, (6, 10, 16)])
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1])
def test_noise(bare_pipeline: DiffusionPipeline, seed: int, shape: tuple[int, int, int]) -> None:
    expected = bare_pipeline.get_noise(seed, mx.zeros((1, *shape)))
    assert np.array_equal(np.array(initial_noise(seed, shape)), np.array(expected[0]))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=SAMPLER_NAMES)
def test_state_0(bare_pipeline: DiffusionPipeline, sampler: Any) -> None:
    sigmas = noise_levels(sampler, 5)
    noise, empty = initial_noise(3, LATENT)[None], bare_pipeline.get_empty_latent(*LATENT[:2])
    for sigma in (sigmas, 0.6 * sigmas):  # with less than all of the noise, the empty latent shows
        expected = sampler.noise_scaling(sigma[0], noise, empty)
        assert np.array_equal(np.array(initial_state(noise, sampler, sigma)), np.array(expected))


def test_states(tiny: DiffusionModel) -> None:
    settings = SamplerSettings(num_steps=5, cfg_weight=0.0)
    states = list(trajectory(tiny, PROMPTS[:1], [3], settings))
    sigmas = np.array(noise_levels(tiny.sampler, 5))
    assert [state.step_index for state in states] == [0, 1, 2, 3, 4, 5]
    assert [state.sigma for state in states] == sigmas.tolist()
    assert [state.timestep for state in states] == (sigmas * np.float32(1000)).tolist()
    assert all(state.x.shape == (1, *LATENT) for state in states)
    assert np.array_equal(np.array(states[0].x[0]), np.array(initial_noise(3, LATENT)))


def test_euler_steps(tiny: DiffusionModel) -> None:
    settings = SamplerSettings(num_steps=4, cfg_weight=3.0)
    states = list(trajectory(tiny, PROMPTS[:2], [3, 4], settings))
    text = tiny.encode(PROMPTS[:2], 3.0)
    for state, after in pairwise(states):
        sigma = mx.array(state.sigma)
        denoised = np.array(tiny.denoise(state.x, mx.array(state.timestep), sigma, text, 3.0)).astype(np.float64)
        x = np.array(state.x).astype(np.float64)
        expected = x + (x - denoised) / state.sigma * (after.sigma - state.sigma)
        assert np.max(np.abs(np.array(after.x) - expected)) <= 1e-5


class Seen(Clock):
    """A clock that notes what it was set to."""

    def __init__(self, timesteps: Sequence[float]):
        super().__init__(timesteps)
        self.set: list[float | None] = []

    def set_timestep(self, timestep: float | None) -> None:
        self.set.append(timestep)
        super().set_timestep(timestep)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_graphs_built_ahead(
    tiny: DiffusionModel, num_steps: int, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the same bits, each forward at its own step, and every step once."""
    drawn = []
    for ahead in (False, True):
        monkeypatch.setattr("calib.dataset.sampling.on_gpu", lambda ahead=ahead: ahead)
        clock = Seen([1000 - i for i in range(1000)])
        model = replace(tiny, clock=clock, dtype=dtype)
        states = list(trajectory(model, PROMPTS[:2], [3, 4], SamplerSettings(num_steps=num_steps, cfg_weight=3.0)))
        assert clock.set == [state.timestep for state in states[:-1]]
        drawn.append(np.stack([np.array(state.x) for state in states]))
    assert np.array_equal(*drawn)


def test_a_timestep_is_a_number_or_an_array(tiny: DiffusionModel) -> None:
    x, text = mx.random.normal((2, *LATENT), key=mx.random.key(0)), tiny.encode(PROMPTS[:2], 0.0)
    model = replace(tiny, clock=Seen([1000, 500, 300.25]))
    given: list[float | mx.array] = [300.25, mx.array(300.25), mx.array([300.25]), mx.array([300.25, 300.25])]
    outputs = [np.array(model.velocity(x, text, timestep)) for timestep in given]
    assert all(np.array_equal(output, outputs[0]) for output in outputs)
    assert isinstance(model.clock, Seen) and model.clock.set == [300.25, 300.25, 300.25, None]


def test_images_are_independent(tiny: DiffusionModel) -> None:
    settings = SamplerSettings(num_steps=4, cfg_weight=3.0)
    *_, first = trajectory(tiny, ["red apple", "octopus"], [1, 2], settings)
    *_, other = trajectory(tiny, ["red apple", "rocket"], [1, 9], settings)
    *_, again = trajectory(tiny, ["red apple", "octopus"], [1, 2], settings)
    assert np.array_equal(np.array(first.x), np.array(again.x))
    assert np.max(np.abs(np.array(first.x[0] - other.x[0]))) <= 1e-5
    assert np.max(np.abs(np.array(first.x[1] - other.x[1]))) > 0.1


def global_random_states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [random.getstate(), kind, np.array(keys).tolist(), rest, [np.array(key).tolist() for key in mx.random.state]]


def test_global_randomness_is_left_alone(tiny: DiffusionModel) -> None:
    np.random.seed(11)
    mx.random.seed(11)
    before = global_random_states()
    *_, final = trajectory(tiny, PROMPTS[:2], [3, 4], SamplerSettings(num_steps=2, cfg_weight=3.0))
    mx.eval(tiny.decode(final.x))
    assert global_random_states() == before


def test_global_randomness_changes_nothing(tiny: DiffusionModel) -> None:
    drawn = []
    for seed in (1, 2):
        np.random.seed(seed)
        mx.random.seed(seed)
        *_, final = trajectory(tiny, PROMPTS[:1], [3], SamplerSettings(num_steps=2, cfg_weight=3.0))
        drawn.append(np.array(final.x))
    assert np.array_equal(*drawn)


def weights(model: DiffusionModel) -> dict[str, mx.array]:
    return dict(tree_flatten(model.transformer.parameters()))


def leftovers(model: DiffusionModel) -> list[str]:
    """Modules that hold on to modulations or to a list of layers to empty."""
    keys = ("_modulation_params", "to_offload")
    found = [(name, key) for name, module in model.transformer.named_modules() for key in keys if key in module]
    found += [("", key) for key in keys if hasattr(model.transformer, key)]
    return [f"{name}.{key}" for name, key in found]


def test_weights_stay_the_same_arrays(tiny: DiffusionModel) -> None:
    before, fingerprint = weights(tiny), weights_fingerprint(tiny.transformer)
    for seed in range(4):
        *_, final = trajectory(tiny, PROMPTS[:2], [seed, seed + 1], SamplerSettings(num_steps=3, cfg_weight=3.0))
        mx.eval(tiny.decode(final.x))
    after = weights(tiny)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert weights_fingerprint(tiny.transformer) == fingerprint == tiny.fingerprint
    assert leftovers(tiny) == []


def test_an_interrupted_draw(tiny: DiffusionModel) -> None:
    fingerprint = weights_fingerprint(tiny.transformer)
    states = trajectory(tiny, PROMPTS[:2], [1, 2], SamplerSettings(num_steps=3, cfg_weight=3.0))
    next(states)
    next(states)
    states.close()
    with pytest.raises(ValueError):
        tiny.denoise(mx.zeros((1, *LATENT)), mx.array(5.0), mx.array(0.5), tiny.encode(["x", "y"], 3.0), 3.0)
    assert leftovers(tiny) == []
    assert weights_fingerprint(tiny.transformer) == fingerprint


class Opened:
    """Collects the files that Python opens while it is switched on; an audit hook cannot be taken off again."""

    def __init__(self) -> None:
        self.on = False
        self.files: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open":
            self.files.append(str(arguments[0]))


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


@pytest.fixture
def model_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiffusionModel]:
    """The model, loaded from a copy of its folder that is gone."""
    folder = tmp_path / "emoji"
    shutil.copytree(emoji.FOLDER, folder)
    monkeypatch.setattr(emoji, "FOLDER", folder)
    loaded = emoji.load()
    shutil.rmtree(folder)
    yield loaded


def test_no_file_is_opened_between_images(model_without_files: DiffusionModel, opened: Opened) -> None:
    settings = SamplerSettings(num_steps=2, cfg_weight=3.0)
    drawn = []
    for _ in range(3):
        *_, final = trajectory(model_without_files, PROMPTS[:1], [3], settings)
        drawn.append(np.array(model_without_files.decode(final.x)))
        opened.on = True
    opened.on = False
    assert opened.files == []
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])
    with open(__file__) as file:
        opened.on = True
        open(file.name).close()
        opened.on = False
    assert opened.files == [__file__], "the hook does see what is opened"
