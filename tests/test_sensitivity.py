"""The fewest bits whose measured error is within a tolerance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from calib.analysis.heuristics import allocate, sensitivity
from calib.analysis.plan import Plan
from calib.analysis.sensitivities import Of, Sensitivities
from calib.base.errors import ConfigError

import numpy as np
import pytest
from helpers import check_config_error
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import GOOD, bytes_of, layers_of, measured, small_models, taken


@settings(max_examples=150)
@given(found=small_models(), tolerance=st.floats(1e-9, 1e-7))
def test_smallest_option_within_the_tolerance(found: Sensitivities, tolerance: float) -> None:
    plan = sensitivity.plan_layers(layers_of(found), found, tolerance)
    for name, layer in plan.layers.items():
        shape, own = found.shapes[name], found.weights[name]
        s = {option: float(np.mean(values)) for option, values in own.items() if shape[1] % option[1] == 0}
        chosen = (layer.weight_bits, layer.group_size)
        within = [option for option in s if s[option] <= tolerance]
        if within:
            assert bytes_of(shape, *chosen) == min(bytes_of(shape, *option) for option in within)
            assert s[chosen] <= tolerance
        else:
            assert s[chosen] == min(s.values())
            assert layer.reason == f"fragile: no option has S ≤ {tolerance:g}"
            assert layer.sensitive and not layer.aggressive
        assert layer.figure == f"S = {s[chosen]:.1e}"


def test_bits_before_groups() -> None:
    found = measured({"a": {(2, 32): 1e-4, (3, 128): 1e-6}, "b": {(4, 32): 1e-5, (4, 64): 1e-5, (4, 128): 1e-3}})
    plan = sensitivity.plan_layers(layers_of(found), found)
    assert (plan.layers["a"].weight_bits, plan.layers["a"].group_size) == (2, 32)
    assert (plan.layers["b"].weight_bits, plan.layers["b"].group_size) == (4, 64)
    assert plan.layers["a"].reason == "2 bits do"  # met is enough
    assert plan.layers["b"].reason == "4 bits do"
    assert plan.layers["a"].aggressive


@pytest.mark.parametrize(
    ("s", "bits"),
    [
        ({4: 1e-3, 6: 1e-5, 8: 1e-6}, 6),
        ({4: 1e-5, 6: 1e-4, 8: 1e-3}, 4),
        ({4: 1e-4, 6: 1e-5, 8: 1e-6}, 4),  # met is enough
        ({4: 1.0, 6: 5e-4, 8: 6e-4}, 6),  # none within 1e-4, the best near it
        ({4: 1.0, 6: 1e-2, 8: 1e-3}, 8),  # the best misses it tenfold
        ({4: 1.0, 6: 1e-2, 8: 1.01e-3}, 16),  # and by more
        ({}, 8),
    ],
)
def test_activation_bits(s: dict[int, float], bits: int) -> None:
    found = measured({"a": GOOD}, activations={"a": s, "conv": s})
    plan = sensitivity.plan_layers(layers_of(found, "conv", "unknown"), found, 1e-4)
    assert plan.layers["a"].activation_bits == plan.layers["conv"].activation_bits == bits
    assert plan.layers["unknown"].activation_bits == 8
    apart = sensitivity.plan_layers(layers_of(found, "conv"), found, 1e-9, activation_tolerance=1e-4)
    assert apart.layers["a"].activation_bits == bits


def test_notes() -> None:
    weights = {"a": {(8, 64): 1e-2}, "b": {(3, 64): 1e-5, (8, 64): 0.0}, "c": {(3, 64): 3e-5}}
    found = measured(weights, activations={"a": {8: 1.0}, "b": {8: 1e-6}})
    plan = sensitivity.plan_layers(layers_of(found, "conv"), found)
    nbytes = taken(plan, found)
    size = f"{(8 + 3 + 3) / 3 + 0.5:.3f} bits a weight, scales and biases counted, {nbytes / 1e6:.2f} MB"
    assert plan.notes == (
        f"predicted error ΣS = 0.01 at {size}",
        "with inputs quantized as planned, ΣS = 0.01",
        "weights are kept and not counted, as MLX cannot quantize them: 1 of 4 layers",
        "no option has S ≤ 0.0001, so they have their best: 1 of 3 layers",
        "activations are left as they are, with S > 0.001 at their best: 1 of 4 layers",
    )
    assert (plan.layers["conv"].weight_bits, plan.layers["conv"].reason) == (8, "kept, MLX cannot quantize it")
    assert len(sensitivity.plan_layers(layers_of(found), found, 1.0).notes) == 2


def test_fragile_layers() -> None:
    weights = {name: {(3, 64): 1e-6} for name in "bcdefgh"} | {"a": {(3, 64): 1e-2, (6, 64): 1e-6}}
    found = measured(weights)
    plan = sensitivity.plan_layers(layers_of(found), found)
    assert plan.layers["a"].sensitive
    assert plan.layers["a"].reason == "fragile: fewer bits have S > 0.0001"
    assert not any(plan.layers[name].sensitive for name in "bcdefgh")


@pytest.mark.parametrize("value", [0.0, -1e-4, math.nan, math.inf])
@pytest.mark.parametrize("key", ["tolerance", "activation_tolerance"])
def test_impossible_tolerances(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^analysis.{key}={value}: must be positive and finite"):
        sensitivity.plan_layers({}, measured({}), **{key: value})


@pytest.mark.parametrize("heuristic", [sensitivity.plan_layers, allocate.plan_layers])
@pytest.mark.parametrize(
    ("of", "s", "said"),
    [
        (Of.PICTURE, 1e-5, ["predicted PSNR = 50.00 ± 1.5 dB, weights alone, rounded to nearest, at "]),
        (Of.PICTURE, 2e-3, ["predicted PSNR = 26.99 ± 1.5 dB", "predicted well: below 30 dB expect 1 to 3 dB less"]),
        (Of.PICTURE, 2e-2, ["predicted PSNR = 16.99 ± 1.5 dB", "predicted well: below 24 dB expect 4 to 8 dB less"]),
        (Of.LATENT, 2e-3, ["predicted error ΣS = 0.002 of the finished latent at "]),
        (Of.OUTPUT, 2e-3, ["predicted error ΣS = 0.002 at "]),
    ],
)
def test_what_is_predicted(heuristic: Callable[..., Plan], of: Of, s: float, said: Sequence[str]) -> None:
    """A PSNR of pictures alone, and how far to trust it."""
    found = replace(measured({"a": {(4, 64): s}}), of=of, doubt=1.5)
    plan = heuristic(layers_of(found), found)
    assert (plan.predicted_psnr is not None) == (of is Of.PICTURE)
    for line, part in zip(plan.notes, said, strict=False):
        assert part in line
    assert any("too large" in line for line in plan.notes) == (len(said) > 1)


def test_phases_share_errors_of_all_steps() -> None:
    for of in (Of.PICTURE, Of.LATENT):
        found = replace(measured({"a": GOOD}), of=of)
        words = ["analysis.per_phase", f"errors of the {of}", "sensitivity.of=output"]
        check_config_error(lambda found=found: allocate.plan_layers(layers_of(found), found, per_phase=True), words)
