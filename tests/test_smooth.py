"""Smoothing whole transformers: nothing changes but widths; one layer is in test_quantizers."""

from dataclasses import replace

from calib.models.architecture import Producer, Site
from calib.models.grids import searched
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import weights
from calib.quantization import smooth
from calib.quantization.quantizer import ChannelRange, Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx.mmdit import MMDiT
from helpers import check_config_error, float64
from mlx import nn
from quantizing import Asked, Case, States, same, tiny_states, work_on
from tiny_models import STRUCTURES


@pytest.fixture(scope="module")
def sd3() -> States:
    return tiny_states("sd3")


@pytest.fixture(scope="module", params=STRUCTURES)
def any_states(request: pytest.FixtureRequest) -> States:
    return tiny_states(request.param)


def smoothed_copy(states: States, made: Quantized) -> MMDiTArchitecture:
    """A transformer with the weights that ``made`` changed, nothing rounded."""
    copy = MMDiT(states.architecture.module.config)
    copy.load_weights(list((weights(states.architecture.module) | made.weights).items()), strict=False)
    return MMDiTArchitecture(copy)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_keeps_outputs(any_states: States, alpha: float) -> None:
    """And what the layers read is divided as is told."""
    states = any_states
    asked = Asked(states)
    # Planned, and none that MLX could quantize: all that changes is left at full precision.
    made = smooth.quantize(replace(work_on(states, asked=asked), layers={}), alpha)
    assert not made.layers
    copy, divisors = smoothed_copy(states, made), asked.divisors
    for plain, found in zip(states.outputs(), states.outputs(copy), strict=True):
        np.testing.assert_allclose(found, plain, rtol=0, atol=2e-5 * np.abs(plain).max())
    assert set(made.ranges) == set(divisors)
    for before, after in zip(states.inputs(), states.inputs(copy), strict=True):
        for name, x in before.items():
            expected = x / divisors.get(name, 1.0)
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=3e-5 * np.abs(expected).max(), err_msg=name)
    modulated = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "final_layer.linear")
    assert set(divisors) == {name for name in states.architecture.layers() if name.endswith(modulated)}
    assert all(s.std() > 0.01 * s.mean() for s in divisors.values())
    assert np.array_equal(divisors["mm_block_0.image.attn.o_proj"], divisors["mm_block_0.text.attn.o_proj"])
    for i in range(states.architecture.depth[1]):
        attention, mlp = divisors[f"unified_block_{i}.attn.q_proj"], divisors[f"unified_block_{i}.mlp.fc1"]
        parallel = states.architecture.shared_input(f"unified_block_{i}.mlp.fc1").endswith("q_proj")
        assert np.array_equal(attention, mlp) is parallel


def test_smoothing_after_a_layer_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 64, mx.float16)
    case.architecture.module.modulation = nn.Linear(32, 192, bias=False)
    monkeypatch.setattr(case.architecture, "sites", lambda: [Site(("linear",), (Producer("modulation"),))])
    made = smooth.quantize(case.work())
    weight = float64(case.architecture.module.modulation.weight)
    assert set(made.weights) == {"modulation.weight"}
    divided = float64(made.weights["modulation.weight"]) * case.divisors[0][:, None]
    np.testing.assert_allclose(divided, weight, rtol=1e-6, atol=1e-9)


def test_divisors_are_the_papers(sd3: States) -> None:
    """Over all layers that read the same channels."""
    asked, alpha = Asked(sd3), 0.3
    smooth.quantize(work_on(sd3, asked=asked), alpha)
    layers = sd3.architecture.layers()
    groups = [
        [f"mm_block_2.text.attn.{which}_proj" for which in "qkv"],
        ["mm_block_2.image.attn.o_proj"],
        [f"mm_block_0.{stream}.attn.o_proj" for stream in ("image", "text")],
        ["mm_block_1.text.mlp.fc1"],
        ["final_layer.linear"],
    ]
    for names in groups:
        spans = [sd3.extremes[name] for name in names]
        x = np.max([np.maximum(-span.low, span.high) for span in spans], axis=0)
        w = np.max([np.abs(np.array(layers[name].weight)).max(axis=0) for name in names], axis=0)
        for name in names:
            np.testing.assert_allclose(asked.divisors[name], x**alpha / w ** (1 - alpha), rtol=1e-6)


def test_smoothed_weights_are_rounded(sd3: States) -> None:
    """What else changes is given back at full precision."""
    work = work_on(sd3, bits=8)
    bare = smooth.quantize(replace(work, layers={}))
    made = smooth.quantize(work)
    assert list(made.layers) == list(work.layers)
    for name, packed in made.layers.items():
        weight = bare.weights.get(f"{sd3.architecture.path(name)}.weight", work.layers[name].weight)
        assert same(packed, searched(weight, 8, 64, mx.float16)), name
    assert set(made.weights) == {path for path in bare.weights if path.endswith(".bias")}
    assert all(path.endswith(("v_proj.bias", "adaLN_modulation.layers.1.bias")) for path in made.weights)
    copy = smoothed_copy(sd3, made)
    rounded = States(copy, sd3.arguments)
    with rounded.given({name: packed.dequantize() for name, packed in made.layers.items()}):
        for plain, found in zip(sd3.outputs(), rounded.outputs(), strict=True):
            assert np.sum((found - plain) ** 2) < 5e-3 * np.sum(plain**2)


def test_smoothing_some_layers(sd3: States) -> None:
    whole = work_on(sd3)
    name = "mm_block_1.text.mlp.fc1"
    made = smooth.quantize(replace(whole, plan={name: whole.plan[name]}, layers={name: whole.layers[name]}))
    adaln = sd3.architecture.path("mm_block_1.text.adaln")
    assert set(made.weights) == {f"{adaln}.weight", f"{adaln}.bias"}
    assert list(made.layers) == list(made.ranges) == [name]


def test_smoothing_layers_alone(sd3: States) -> None:
    """With the same plan, whichever others are asked for beside them: copies for phases fit the rest."""
    work = work_on(sd3)
    whole = smooth.quantize(work)
    for name in ("mm_block_0.image.adaln", "mm_block_2.text.attn.v_proj", "mm_block_1.image.attn.o_proj"):
        alone = smooth.quantize(replace(work, layers={name: work.layers[name]}))
        assert same(alone.layers[name], whole.layers[name])


def test_zero_channels_are_not_smoothed(sd3: States) -> None:
    asked, seen = Asked(sd3), sd3.extremes["final_layer.linear"]
    low, high = seen.low.copy(), seen.high.copy()
    low[:3], high[:3] = 0, 0
    low[3:5], high[3:5] = np.inf, -np.inf  # no finite value was seen
    low[5], high[5] = -1e-30, 1e-30
    work = replace(work_on(sd3, asked=asked), channel_range=lambda _: ChannelRange(low, high))
    plan = {"final_layer.linear": work.plan["final_layer.linear"]}
    made = smooth.quantize(replace(work, plan=plan, layers={}))
    s = asked.divisors["final_layer.linear"]
    assert np.all(s[:6] == 1)
    assert np.all(np.isfinite(s) & (s > 0))
    assert all(bool(mx.isfinite(weight).all()) for weight in made.weights.values())


def test_smooth_needs_places() -> None:
    """An architecture need not say where a factor can be moved."""

    class Bare:
        def layers(self) -> dict[str, nn.Module]:
            return {}

    nothing = QuantizerInput.without_layers(Bare(), mx.float16)
    check_config_error(lambda: smooth.quantize(nothing), ("quantizer=smooth", "choose another"))
