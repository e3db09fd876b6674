"""Fidelity metrics against their formulas, intervals against known populations, and what is made of them."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import write_json
from calib.evaluation.metrics import (
    MOST_PSNR,
    NO_ERROR,
    Fidelity,
    bootstrap,
    bootstrap_columns,
    bootstrap_difference,
    growth,
    psnr,
    relative_error,
    ssim,
)
from calib.evaluation.report import fidelity_text, picture_grid, plot_error

import numpy as np
import pytest
from helpers import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

#: Pictures of every kind: alike and not, flat, black, out of step.
pictures = st.builds(
    lambda seed, height, width, noise, scale: noisy_pair(seed, (height, width), noise, scale),
    st.integers(0, 10_000),
    st.integers(11, 16),
    st.integers(11, 16),
    st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    st.sampled_from([0.0, 0.01, 1.0]),
)


def noisy_pair(seed: int, size: tuple[int, int], noise: float, scale: float = 1.0) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    reference = scale * rng.random((*size, 3))
    return reference, np.clip(reference + noise * rng.normal(size=reference.shape), 0, 1)


def slow_ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Wang et al. 2004, equations 13 to 17, window by window."""
    window = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    w = np.array(window) / np.sum(window)
    c1, c2 = (0.01 * 1) ** 2, (0.03 * 1) ** 2
    found = []
    height, width, channels = x.shape
    for channel in range(channels):
        for top in range(height - 10):
            for left in range(width - 10):
                a = x[top : top + 11, left : left + 11, channel]
                b = y[top : top + 11, left : left + 11, channel]
                mu_a, mu_b = (w * a).sum(), (w * b).sum()
                var_a, var_b = (w * (a - mu_a) ** 2).sum(), (w * (b - mu_b) ** 2).sum()
                cov = (w * (a - mu_a) * (b - mu_b)).sum()
                above = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
                found.append(above / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("size", [(11, 11), (11, 17), (23, 14)])
@pytest.mark.parametrize("noise", [1e-4, 0.05, 0.5])
def test_ssim_window_by_window(size: tuple[int, int], noise: float) -> None:
    x, y = noisy_pair(7, size, noise)
    assert ssim(x, y) == pytest.approx(slow_ssim(x, y), abs=1e-12)
    assert ssim(x.astype(np.float32), y) == pytest.approx(slow_ssim(x, y), abs=1e-6)


@given(pictures)
def test_ssim_is_symmetric(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    x, y = pair
    found = ssim(x, y)
    assert -1 <= found <= 1 + 1e-12
    assert found == pytest.approx(ssim(y, x), abs=1e-12)
    assert ssim(x, x) == pytest.approx(1, abs=1e-12)
    assert found == pytest.approx(ssim(x[::-1], y[::-1]), abs=1e-9), "no place is favoured"


def test_ssim_of_a_negative_is_negative() -> None:
    x = np.random.default_rng(0).random((20, 20, 3))
    assert ssim(x, 1 - x) < -0.8


@given(pictures)
def test_psnr(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    x, y = pair
    assert psnr(x, x) == math.inf
    mse = float(np.mean((x - y) ** 2))
    expected = 20 * np.log10(1 / np.sqrt(mse)) if mse else math.inf
    assert psnr(x, y) == psnr(y, x) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("difference", "expected"), [(1.0, 0.0), (0.1, 20.0), (1 / 255, 48.1308), (1e-5, 100.0)])
def test_psnr_of_a_known_difference(difference: float, expected: float) -> None:
    x = np.zeros((8, 8, 3))
    assert psnr(x, x + difference) == pytest.approx(expected, abs=1e-4)
    assert psnr(x.astype(np.float16), np.full((8, 8, 3), difference)) == pytest.approx(expected, abs=1e-4)


def test_pictures_that_do_not_fit() -> None:
    x = np.zeros((12, 12, 3))
    for measure in (psnr, ssim):
        for other in (x[:11], x[:, :, :1], x[0]):
            with pytest.raises(ValueError, match="cannot be compared"):
                measure(x, other)
    with pytest.raises(ValueError, match="12×10 are smaller"):
        ssim(x[:10], x[:10])


def test_relative_error() -> None:
    rng = np.random.default_rng(1)
    v = rng.normal(size=(5, 4, 4, 16)).astype(np.float32)
    v_q = v + rng.normal(0, 0.01, v.shape).astype(np.float32)
    v[3] = 0
    v[4] = v_q[4] = 0
    found = relative_error(v, v_q)
    assert found.dtype == np.float64
    for row in range(3):
        a, b = v[row].astype(np.float64).ravel(), v_q[row].astype(np.float64).ravel()
        assert found[row] == pytest.approx(np.linalg.norm(a - b) ** 2 / np.linalg.norm(a) ** 2, rel=1e-12)
    assert found[3:].tolist() == [math.inf, 0.0]
    assert math.isnan(relative_error(np.ones((1, 2)), np.array([[1, np.nan]]))[0])
    large = np.full((1, 3), 60_000, np.float16)  # its square is beyond float16
    assert relative_error(large, large / 2)[0] == 0.25


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(0, 2))
def test_relative_error_knows_no_scale(seed: int, scale: float, factor: float) -> None:
    v = np.random.default_rng(seed).normal(size=(3, 7))
    np.testing.assert_allclose(relative_error(scale * v, factor * scale * v), (1 - factor) ** 2, rtol=1e-9, atol=1e-28)


def test_coverage() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(300):
        interval = bootstrap(rng.normal(5, 2, 30), resamples=2000, seed=seed)
        inside += interval.low <= 5 <= interval.high
    # Of 30 values 93.6% is what a percentile interval can do; three standard errors of 300 trials about that.
    assert 0.893 < inside / 300 < 0.979


@pytest.mark.parametrize("prompts", [50, 1000])
def test_width_of_intervals(prompts: int) -> None:
    """1000 prompts take several blocks."""
    values = np.random.default_rng(2).normal(3, 1, prompts)
    interval = bootstrap(values)
    error = values.std() / math.sqrt(prompts)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(1.96 * error, rel=0.08)
    assert interval.mean - interval.low == pytest.approx(1.96 * error, rel=0.08)
    half = bootstrap(values, level=0.5)
    assert half.high - half.low == pytest.approx(2 * 0.6745 * error, rel=0.08)


def test_intervals_repeat() -> None:
    values = np.random.default_rng(3).random(12)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)
    alone, beside = bootstrap(values), bootstrap_columns(np.stack([values, 2 * values], axis=1))
    for factor, interval in enumerate(beside, start=1):
        assert (interval.low, interval.high) == pytest.approx((factor * alone.low, factor * alone.high), rel=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
@settings(deadline=None)
def test_intervals_stay_within_the_values(values: list[float]) -> None:
    interval = bootstrap(np.array(values), resamples=200)
    assert interval.low <= interval.mean <= interval.high
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= interval.low and interval.high <= max(values) + slack


def test_rounding_of_intervals() -> None:
    for prompts in range(1, 60):
        interval = bootstrap(np.full(prompts, 0.1), resamples=10)
        assert interval.low <= interval.mean <= interval.high
        assert interval.high - interval.low < 1e-15


def test_intervals_of_one_and_none() -> None:
    interval = bootstrap(np.array([0.3]))
    assert (interval.mean, interval.low, interval.high) == (0.3, 0.3, 0.3)
    for bad in ([], [1.0, math.inf], [math.nan]):
        with pytest.raises(ValueError, match="all of them finite"):
            bootstrap(np.array(bad))


def test_pairing() -> None:
    rng = np.random.default_rng(4)
    prompts = rng.normal(30, 5, 40)
    a, b = prompts + rng.normal(0.5, 0.3, 40), prompts + rng.normal(0, 0.3, 40)
    paired = bootstrap_difference(a, b)
    unpaired = bootstrap_difference(a, rng.permutation(b))
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.high - paired.low < 0.15 * (unpaired.high - unpaired.low)
    assert paired.low > 0 > unpaired.low
    assert bootstrap_difference(b, a).high < 0
    same = bootstrap_difference(a, a)
    assert (same.low, same.high) == (0, 0)
    with pytest.raises(ValueError, match="40 and 39 prompts cannot be paired"):
        bootstrap_difference(a, b[1:])


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([1.0, 9, 9, 9, 3], 3.0),
        ([4.0, 2, 2, 2, 2, 2, 2, 2, 1, 2], 0.5),  # two of ten at each end
        ([1.0, 9, 9, 9, 9, 9, 9, 1, 5], 5.0),
        ([2.0], 1.0),
        ([2.0, 1.0], 0.5),
        ([0.0, 0.0, 0.0], 1.0),
        ([0.0, 1.0], 1 / NO_ERROR),
        ([1.0, 0.0], NO_ERROR),
    ],
)
def test_growth(errors: list[float], expected: float) -> None:
    steps = np.arange(len(errors)) * 3
    assert growth(np.array(errors), steps) == pytest.approx(expected)
    order = np.random.default_rng(5).permutation(len(errors))
    assert growth(np.array(errors)[order], steps[order]) == pytest.approx(expected), "in any order"


def fidelity(prompts: int = 10, level: float = 1e-3, growing: float = 2.0, seed: int = 0, steps: int = 10) -> Fidelity:
    """Errors that grow exponentially by ``growing`` over the steps 0, 5, …, alike for every prompt but for noise."""
    rng = np.random.default_rng(seed)
    curve = level * np.exp(np.linspace(0, np.log(growing), steps))
    error = curve * np.exp(rng.normal(0, 0.2, (prompts, 1)) + rng.normal(0, 0.01, (prompts, steps)))
    return Fidelity(rng.normal(35, 1, prompts), 1 - rng.random(prompts) / 10, error, 5 * np.arange(steps))


def same(prompts: int, steps: int = 4) -> Fidelity:
    """Of a model that changes nothing."""
    return Fidelity(np.full(prompts, np.inf), np.ones(prompts), np.zeros((prompts, steps)), np.arange(steps))


def test_the_summary_is_strict_json(tmp_path: Path) -> None:
    found = fidelity(3)
    found.psnr[1] = np.inf
    metrics = {**found.summary(), **same(2).summary("control_")}
    write_json(tmp_path / "metrics.json", metrics)
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document == metrics
    names = ["psnr", "ssim", "output_error"]
    names = [name + end for name in names for end in ("", "_low", "_high")] + ["output_error_growth"]
    assert list(document) == [*names, *(f"control_{name}" for name in names)]
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert document["psnr"] == pytest.approx((found.psnr[0] + MOST_PSNR + found.psnr[2]) / 3)
    assert document["psnr_low"] < document["psnr"] < document["psnr_high"]
    assert document["ssim"] == pytest.approx(found.ssim.mean())
    assert document["output_error"] == pytest.approx(found.error.mean())
    assert document["output_error_growth"] == pytest.approx(2 ** (8 / 9), rel=0.05), "8 of 9 spaces from end to end"
    assert (document["control_psnr"], document["control_output_error_growth"]) == (MOST_PSNR, 1.0)
    assert pytest.approx(107.12, abs=0.01) == MOST_PSNR


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("error", np.nan, "prompt 1, step 5: the relative output error is nan"),
        ("error", np.inf, "prompt 1, step 5: the relative output error is inf"),
        ("psnr", np.nan, "prompt 1: the picture is not finite"),
        ("ssim", np.nan, "prompt 1: the picture is not finite"),
    ],
)
def test_not_finite(name: str, value: float, words: str) -> None:
    found = fidelity(3)
    arrays = {"psnr": found.psnr, "ssim": found.ssim, "error": found.error, "steps": found.steps}
    arrays[name][(1, 1) if name == "error" else 1] = value
    with pytest.raises(CalibError) as error:
        Fidelity(**arrays)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


def test_arrays_that_do_not_fit() -> None:
    found = fidelity(3)
    for error, steps in ((found.error[:2], found.steps), (found.error, found.steps[1:]), (found.error[0], found.steps)):
        with pytest.raises(ValueError, match="shapes"):
            Fidelity(found.psnr, found.ssim, error, steps)
    with pytest.raises(ValueError, match="shapes"):
        Fidelity(found.psnr[:0], found.ssim[:0], found.error[:0], found.steps)


def test_the_table_to_the_letter() -> None:
    """Of two values every quarter of the resamples is one of them alone: the interval is known."""
    error = np.array([[1e-3, 2e-3, 8e-3], [3e-3, 2e-3, 4e-3]])
    quantized = Fidelity(np.array([30.0, 32.0]), np.array([0.9, 0.95]), error, np.array([0, 25, 49]))
    control = Fidelity(np.array([np.inf, 60.0]), np.array([1.0, 0.9999]), error / 1000, np.array([0, 25, 49]))
    assert fidelity_text(quantized, control, 50).splitlines() == [
        "2 prompts; output error at 3 of 50 steps",
        "                                   quantized [95% interval]       control, noise floor [95% interval]",
        "PSNR (dB, higher is closer)        31.00 [30.00, 32.00]           83.56 [60.00, 107.12]",
        "SSIM (1: equal)                    0.9250 [0.9000, 0.9500]        1.0000 [0.9999, 1.0000]",
        "output error (relative, 0: equal)  3.33e-03 [3.00e-03, 3.67e-03]  3.33e-06 [3.00e-06, 3.67e-06]",
        "error against step: grows 3-fold (first fifth 2.00e-03, last 6.00e-03, in 2 of 2 prompts); "
        "largest 6.00e-03 at step 49",
        "note: control: 1 of 2 pictures equal full precision's and count as 107.1 dB",
        "note: only 2 prompts: with fewer than 8 the intervals are too narrow to be trusted",
    ]


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (
            (2.0, 5.0),
            "grows 2.5-fold (first fifth 2.00e+00, last 5.00e+00, in 3 of 3 prompts); largest 5.00e+00 at step 4",
        ),
        (
            (5.0, 2.0),
            "falls 2.5-fold (first fifth 5.00e+00, last 2.00e+00, in 3 of 3 prompts); largest 5.00e+00 at step 0",
        ),
        ((5.0, 5.2), "is level (first fifth 5.00e+00, last 5.20e+00); largest 5.20e+00 at step 4"),
        ((0.0, 2.0), "grows from none (first fifth 0.00e+00, last 2.00e+00, in 3 of 3 prompts); "),
        ((2.0, 0.0), "falls to none (first fifth 2.00e+00, last 0.00e+00, in 3 of 3 prompts); "),
    ],
)
def test_how_the_error_goes_with_the_step(ends: tuple[float, float], words: str) -> None:
    error = np.tile(np.linspace(*ends, 5), (3, 1))
    found = Fidelity(np.full(3, 30.0), np.ones(3), error, np.arange(5))
    assert f"error against step: {words}" in fidelity_text(found, same(3), 5)


def test_growth_of_one_prompt() -> None:
    error = np.array([[1.0, 1, 1, 1, 10], [1, 1, 1, 1, 0.9], [1, 1, 1, 1, 0.9]])
    found = Fidelity(np.full(3, 30.0), np.ones(3), error, np.arange(5))
    assert "in 1 of 3 prompts" in fidelity_text(found, same(3), 5)


def test_few_prompts_and_the_noise_floor() -> None:
    control = fidelity(8, level=1e-5)
    assert "only 7 prompts" in fidelity_text(fidelity(7), control, 50)
    clear = Fidelity(control.psnr - 5, control.ssim - 0.1, control.error * 10, control.steps)
    assert "note" not in fidelity_text(clear, control, 50)
    # Prompts differ by far more than this, but each is worse.
    paired = Fidelity(control.psnr - 0.01, control.ssim - 1e-6, control.error * 1.001, control.steps)
    assert "note" not in fidelity_text(paired, control, 50)
    floor = "note: not beyond the noise floor (paired by prompt, 95%): "
    better = Fidelity(control.psnr + 1, control.ssim - 0.1, control.error / 2, control.steps)
    assert fidelity_text(better, control, 50).endswith(f"{floor}PSNR; output error\n")
    assert fidelity_text(control, control, 50).endswith(f"{floor}PSNR; SSIM; output error\n")
    few = Fidelity(control.psnr[:4], control.ssim[:4], control.error[:4], control.steps)
    assert fidelity_text(clear, few, 50).endswith(
        "note: control: of the first 4 prompts alone, as quantized is far from it\n"
    )


def pixels_of(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def ink(path: Path, color: tuple[int, int, int]) -> int:
    """Pixels very near to a colour."""
    return int((np.abs(pixels_of(path) - color).max(axis=-1) < 20).sum())


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
PALE_BLUE = (210, 228, 240)


def test_the_plots_curves(tmp_path: Path) -> None:
    both, one = tmp_path / "new" / "both.png", tmp_path / "one.png"
    plot_error(both, {"quantized": fidelity(), "control": fidelity(level=1e-5, growing=1)})
    plot_error(one, {"quantized": fidelity()})
    height, width, _ = pixels_of(both).shape
    assert 400 < height < width < 1500
    assert ink(both, BLUE) > 1000 and ink(both, ORANGE) > 1000
    assert ink(one, BLUE) > 1000 and ink(one, ORANGE) == 0


def test_the_plots_axis_is_logarithmic(tmp_path: Path) -> None:
    """An exponential growth is a straight line: its middle lies midway between its ends."""
    plot_error(tmp_path / "line.png", {"quantized": fidelity(1, growing=1e6, steps=3)})
    near = np.abs(pixels_of(tmp_path / "line.png") - BLUE).max(axis=-1) < 20
    rows, columns = np.nonzero(near[:440])  # above the legend
    places = [
        rows[np.abs(columns - column) < 3].mean() for column in np.linspace(columns.min() + 4, columns.max() - 4, 3)
    ]
    assert places[0] - places[2] > 200
    assert places[1] == pytest.approx((places[0] + places[2]) / 2, abs=8)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.filterwarnings("error")
def test_plots_of_zeros_and_single_prompts(tmp_path: Path, steps: int) -> None:
    some = Fidelity(np.full(2, 30.0), np.ones(2), np.array([[0.0, 0, 1e-4, 1], [0, 1e-3, 0, 1]]), np.arange(4))
    plot_error(tmp_path / "zero.png", {"control": same(3, steps)})
    plot_error(tmp_path / "some.png", {"quantized": some, "control": same(1, steps)})
    assert ink(tmp_path / "zero.png", BLUE) < 200, "in the legend alone"
    assert ink(tmp_path / "some.png", BLUE) > 500
    # Where no error is near zero the band is narrow, also beside a step whose interval begins at zero.
    band = np.abs(pixels_of(tmp_path / "some.png") - PALE_BLUE).max(axis=-1) < 8
    right = np.nonzero(band.any(axis=0))[0].max()
    assert 0 < band[:, right - 5].sum() < 100 < band.sum(axis=0).max()


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    x = np.zeros((1, 16, 16, 3))
    for write in (lambda path: plot_error(path, {"a": fidelity()}), lambda path: picture_grid(path, x, x, ["a"])):
        with pytest.raises(CalibError) as error:
            write(tmp_path / "folder.png")
        assert str(error.value).startswith(f"{tmp_path / 'folder.png'}: the picture cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_pyplot_is_never_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from calib.evaluation.report import *\n"
        "assert 'matplotlib' not in sys.modules\n"
        "x = np.zeros((1, 16, 16, 3)); picture_grid(Path('grid.png'), x, x, ['a'])\n"
        "plot_error(Path('plot.png'), {'a': Fidelity(np.ones(1), np.ones(1), np.ones((1, 1)), np.arange(1))})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "plot.png"]


def flat(color: tuple[int, int, int], count: int, size: tuple[int, int]) -> NDArray[np.float64]:
    return np.tile(np.array(color) / 255, (count, *size, 1))


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 64), (128, 128)), ((50, 100), (100, 200)), ((200, 300), (200, 300)), ((1024, 512), (384, 192))],
)
def test_the_grid(tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]) -> None:
    full, quantized, difference = (200, 30, 90), (160, 40, 90), (200, 50, 0)
    picture_grid(tmp_path / "grid.png", flat(full, 3, size), flat(quantized, 3, size), ["a", "b", "c"], most=2)
    pixels = pixels_of(tmp_path / "grid.png")
    tops = []
    for color in (full, quantized, difference):
        rows, columns = np.nonzero((pixels == color).all(axis=-1))
        assert len(rows) == 2 * shown[0] * shown[1], "two prompts of three"
        assert np.ptp(rows) + 1 == shown[0]
        tops.append((rows.min(), columns.min()))
    assert tops[0] < tops[1] < tops[2] and len({left for _, left in tops}) == 1
    assert pixels.shape[0] < 3 * shown[0] + 120 and pixels.shape[1] < 2 * shown[1] + 250


def test_small_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    levels = rng.integers(60, 200, (1, 32, 32, 3))
    picture_grid(tmp_path / "grid.png", levels / 255, np.clip(levels / 255 + 0.5, 0, 1), ["x"])
    pixels = pixels_of(tmp_path / "grid.png")
    colors = Counter(map(tuple, pixels.reshape(-1, 3).tolist()))
    for color, times in Counter(map(tuple, levels.reshape(-1, 3).tolist())).items():
        assert colors[color] >= 16 * times, "four by four pixels for each"
    left = np.argmax((pixels == levels[0, 0, 0]).all(axis=-1).any(axis=0))
    assert (pixels[-130:-20, left + 10 : left + 110].max(axis=-1) == 255).all(), "5 · 0.5 is white, not wrapped around"


def test_captions_stay_in_their_columns(tmp_path: Path) -> None:
    white = np.ones((2, 64, 64, 3))

    def captions(first: str) -> NDArray[np.int64]:
        picture_grid(tmp_path / "grid.png", white, 1 - white, [first, ""])
        return pixels_of(tmp_path / "grid.png")

    texts = ["", "å", "é", "é å", "two words", "two words " * 20, "unbreakable" * 20]
    drawn = [captions(text) for text in texts]
    assert len({pixels.tobytes() for pixels in drawn}) == len(texts)
    for pixels in drawn[1:]:
        rows, columns = np.nonzero((pixels != drawn[0]).any(axis=-1))
        assert rows.max() < 45
        second = pixels.shape[1] - 140  # from here on
        assert second - 140 < columns.min() <= columns.max() < second


def test_a_grid_of_too_few(tmp_path: Path) -> None:
    x = np.zeros((2, 16, 16, 3))
    for references, images, prompts in ((x[:0], x[:0], []), (x, x[:1], ["a", "b"]), (x, x, ["a"])):
        with pytest.raises(ValueError, match="make no grid"):
            picture_grid(tmp_path / "grid.png", references, images, prompts)
    assert not list(tmp_path.iterdir())
