"""From statistics to a plan: the heuristics, the summary people read, and the files others depend on."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.analysis.heuristic import Heuristic, make_plan, outlier_channels, outlier_layers
from calib.analysis.heuristics import range as range_heuristic
from calib.analysis.heuristics import uniform
from calib.analysis.layers import LayerSummary, read_summaries
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.sensitivities import Sensitivities
from calib.analysis.steps import read_steps
from calib.analysis.summary import summary_text
from calib.base.errors import CalibError, ConfigError
from calib.dataset.timesteps import phase_bounds

import numpy as np
import pytest
from helpers import run_here
from hypothesis import given, settings
from hypothesis import strategies as st

RANGE = Heuristic.of(range_heuristic.plan_layer, "analysis=range")
NUMBER = st.floats(-1e4, 1e4, allow_subnormal=False)


def summary(p01: float, p99: float, low: float, high: float, std: float) -> LayerSummary:
    """A layer with these figures; the rest in between."""
    middle = (p01 + p99) / 2
    percentiles = {"p001": low, "p01": p01, "p05": p01, "p50": middle, "p95": p99, "p99": p99, "p999": high}
    return LayerSummary(low, high, middle, std, percentiles, 1000)


@st.composite
def summaries(draw: st.DrawFn) -> LayerSummary:
    low, p01, p99, high = sorted(draw(st.lists(NUMBER, min_size=4, max_size=4)))
    if draw(st.booleans()):  # most real layers: a narrow middle and tails
        width = draw(st.floats(0, 20))
        p01, p99 = -width / 2, width / 2
        low, high = p01 * draw(st.floats(1, 3)), p99 * draw(st.floats(1, 3))
    spread = draw(st.floats(0, 2)) * (p99 - p01) if draw(st.booleans()) else draw(st.floats(0, 1e3))
    return summary(p01, p99, low, high, spread)


def origins_rule(s: LayerSummary) -> tuple[int, bool]:
    """METHODS section 4, ``range``: bits, and whether to clip to [1, 99]."""
    p01, p99 = s.percentiles["p01"], s.percentiles["p99"]
    r = p99 - p01
    bits = 4
    if r > 5:
        bits = 6
    if r > 10:
        bits = 8
    ratio = s.std / r if r else (math.inf if s.std else 0.0)
    if ratio > 0.5:
        bits = min(8, bits + 2)
    full = s.maximum - s.minimum
    return bits, full > 0 and r / full < 0.9


@settings(max_examples=500)
@given(layer=summaries())
def test_range_is_the_origins_rule(layer: LayerSummary) -> None:
    plan, (bits, clip) = range_heuristic.plan_layer(layer), origins_rule(layer)
    assert plan.weight_bits == plan.activation_bits == bits
    assert plan.clips == clip
    assert plan.clip_percentile == ((1.0, 99.0) if clip else (0.0, 100.0))
    assert plan.sensitive == (bits == 8)
    assert plan.aggressive == (bits <= 4)
    r = layer.percentiles["p99"] - layer.percentiles["p01"]
    if plan.sensitive:
        assert plan.reason == ("large range" if r > 10 else "high variation")
    if plan.aggressive:
        assert plan.reason == "narrow range"
    assert plan.figure.split(", ")[0] == f"r = {r:.3g}"
    varies = layer.std > 0 and layer.std > 0.5 * r
    assert ("std/r = " in plan.figure) == varies, "the figure that decided is told"


@pytest.mark.parametrize(
    ("p99", "std", "bits"),
    [
        (10.0, 1.0, 6),
        (math.nextafter(10.0, 11), 1.0, 8),
        (5.0, 1.0, 4),
        (math.nextafter(5.0, 6), 1.0, 6),
        (4.0, 2.0, 4),
        (4.0, math.nextafter(2.0, 3), 6),
        (8.0, math.nextafter(4.0, 5), 8),
        (20.0, 19.0, 8),
        (0.0, 0.0, 4),
        (0.0, 1.0, 6),
    ],
)
def test_range_thresholds(p99: float, std: float, bits: int) -> None:
    assert range_heuristic.plan_layer(summary(0.0, p99, 0.0, p99, std)).weight_bits == bits


@pytest.mark.parametrize(("high", "clips"), [(9.0, False), (10.0, False), (math.nextafter(10.0, 11), True)])
def test_range_clips_below_nine_tenths(high: float, clips: bool) -> None:
    assert range_heuristic.plan_layer(summary(0.0, 9.0, 0.0, high, 1.0)).clips == clips


def test_range_takes_thresholds() -> None:
    layer = summary(0.0, 3.0, 0.0, 4.0, 1.0)
    assert range_heuristic.plan_layer(layer, large=2.0).weight_bits == 8
    assert range_heuristic.plan_layer(layer, medium=2.0).weight_bits == 6
    assert range_heuristic.plan_layer(layer, variation=0.3).weight_bits == 6
    assert range_heuristic.plan_layer(layer).clips
    assert not range_heuristic.plan_layer(layer, clip_below=0.5).clips


@given(layer=summaries(), bits=st.sampled_from([2, 3, 4, 5, 6, 8]), activation_bits=st.integers(2, 16))
def test_uniform(layer: LayerSummary, bits: int, activation_bits: int) -> None:
    plan = uniform.plan_layer(layer, weight_bits=bits, activation_bits=activation_bits)
    assert (plan.weight_bits, plan.activation_bits, plan.clips) == (bits, activation_bits, False)


@pytest.mark.parametrize(
    ("given_bits", "words"),
    [
        ({"weight_bits": 7}, "analysis.weight_bits=7"),
        ({"weight_bits": 16}, "analysis.weight_bits=16"),
        ({"activation_bits": 1}, "analysis.activation_bits=1"),
        ({"activation_bits": 17}, "analysis.activation_bits=17"),
    ],
)
def test_uniform_refuses(given_bits: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        uniform.plan_layer(summary(0, 1, 0, 1, 0.2), **given_bits)


@given(ranges=st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_outlier_channels(ranges: list[float]) -> None:
    layer = replace(summary(0, 1, 0, 1, 0.2), channel_range=np.array(ranges))
    limit = 2.5 * float(np.median(ranges))
    found = outlier_channels(layer)
    assert list(found) == [i for i, value in enumerate(ranges) if value > limit]
    for channel, medians in found.items():
        assert medians == pytest.approx(ranges[channel] / float(np.median(ranges)))


def test_outlier_layers() -> None:
    layers = {name: replace(summary(0, 1, 0, 1, 0.2), kurtosis=k) for name, k in {"a": 3.0, "b": 51.0}.items()}
    layers["c"] = summary(0, 1, 0, 1, 0.2)
    assert outlier_layers(layers) == {"b": 51.0}
    assert outlier_channels(layers["c"]) == {}


def test_phases() -> None:
    wide, narrow = summary(-10, 10, -10, 10, 3.0), summary(-1, 1, -1, 1, 0.3)
    layers = {"a": replace(narrow, phases={"early": wide, "late": narrow})}
    plan = RANGE.plan(layers, never)
    assert (plan, RANGE.phase_bits(layers, plan)) == (
        make_plan(layers, range_heuristic.plan_layer),
        {"early": {"a": 8}, "late": {"a": 4}},
    )
    whole = Heuristic.of(lambda layers: Plan(dict.fromkeys(layers, LayerPlan(4, 6))), "analysis=own")
    plan = whole.plan(layers, never)
    assert whole.phase_bits(layers, plan) == {"early": {"a": 6}, "late": {"a": 6}}, "the plan's, which is one for all"


def never() -> Sensitivities:
    raise AssertionError("sensitivities were measured")


# What people read

EXPECTED = """\
Layer Statistics Summary:
  Total layers: 28
  Suggested bit-widths:
    8-bit: 12 layers (43%)
    6-bit: 9 layers (32%)
    4-bit: 7 layers (25%)
  Sensitive layers (need careful handling):
    - mm_block_0 (large range, r = 12.4, needs 8-bit)
{sensitive}
  Layers suitable for aggressive quantization (≤4-bit):
    - mm_block_21 (narrow range, r = 3.1)
{aggressive}
"""


def test_the_summary_to_the_letter() -> None:
    eight = LayerPlan(8, 8, reason="large range", sensitive=True, figure="r = 12.4")
    six = LayerPlan(6, 6, reason="medium range", figure="r = 7")
    four = LayerPlan(4, 4, reason="narrow range", aggressive=True, figure="r = 3.1")
    layers = {f"mm_block_{i}": eight if i < 12 else six if i < 21 else four for i in range(28)}
    layers["mm_block_5"] = replace(eight, reason="high variation", figure="")
    reasons = {i: "high variation" if i == 5 else "large range, r = 12.4" for i in range(12)}
    sensitive = "\n".join(f"    - mm_block_{i} ({reasons[i]}, needs 8-bit)" for i in range(1, 12))
    aggressive = "\n".join(f"    - mm_block_{i} (narrow range, r = 3.1)" for i in range(22, 28))
    assert summary_text(Plan(layers)) == EXPECTED.format(sensitive=sensitive, aggressive=aggressive)


def test_what_stands_out_is_added_below() -> None:
    plan = Plan({"a": LayerPlan(6, 6, reason="medium range")}, {"a": 120.4}, {"a": {1: 2.6, 2: 7.0}})
    text = summary_text(replace(plan, notes=("predicted error 3", "nothing else")))
    assert text.startswith(summary_text(Plan(plan.layers)))
    assert "    - a (kurtosis 120)\n" in text
    assert "2 in 1 layers\n    - a (2 channels, widest 2: 7.0 × median)\n" in text
    assert text.endswith("  predicted error 3\n  nothing else\n")


# A real run


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_users_scripts(tiny_run: Path) -> None:
    stats = json.load(open(tiny_run / "layer_statistics.json"))  # noqa: SIM115  (as users' scripts have it)
    plan = json.load(open(tiny_run / "quantization_config.json"))  # noqa: SIM115
    scales = {}
    for name, s in stats.items():
        bits = plan[name]["suggested_activation_bits"]
        p01 = s["percentiles"]["p01"]
        p99 = s["percentiles"]["p99"]
        scale = (p99 - p01) / (2**bits - 1)
        scales[name] = scale
    assert len(scales) == 61
    assert all(math.isfinite(scale) and scale > 0 for scale in scales.values())


def test_layer_statistics_json(tiny_run: Path) -> None:
    stats = load(tiny_run / "layer_statistics.json")
    with ActivationFile(tiny_run / "activations.h5") as file:
        assert set(stats) == set(file.layers)
        assert len(file.steps) == 5
        for name, s in stats.items():
            assert {"min", "max", "mean", "std", "percentiles", "num_samples"} <= set(s)
            assert list(s["percentiles"]) == ["p001", "p01", "p05", "p50", "p95", "p99", "p999"]
            pooled = file.statistics(name)
            low, high, mean, std, count = pooled.over_channels()
            assert (s["min"], s["max"], s["num_samples"]) == (low, high, count)
            assert s["mean"] == pytest.approx(mean, abs=1e-6 * std)
            assert s["std"] == pytest.approx(std, rel=1e-6)
            assert s["percentiles"] == pytest.approx(pooled.percentiles())
            ordered = [s["min"], *s["percentiles"].values(), s["max"]]
            assert ordered == sorted(ordered)
    # 5 steps, 2 images, two halves of guidance; 64 image tokens of 256 channels, 16 text tokens.
    assert stats["mm_block_0.image.mlp.fc1"]["num_samples"] == 5 * 2 * 2 * 64 * 256
    assert stats["mm_block_0.image.mlp.fc2"]["num_samples"] == 5 * 2 * 2 * 64 * 1024
    assert stats["mm_block_1.text.attn.q_proj"]["num_samples"] == 5 * 2 * 2 * 16 * 256
    assert stats["mm_block_0.text.adaln"]["num_samples"] == 5 * 2 * 2 * 256


def test_quantization_config_json(tiny_run: Path) -> None:
    plan, layers = load(tiny_run / "quantization_config.json"), load(tiny_run / "layer_statistics.json")
    assert list(plan) == list(layers)
    for name, entry in plan.items():
        assert entry["suggested_weight_bits"] in (2, 3, 4, 5, 6, 8)
        assert isinstance(entry["suggested_activation_bits"], int)
        assert isinstance(entry["use_percentile_clipping"], bool)
        assert entry["clip_percentile"] == ([1, 99] if entry["use_percentile_clipping"] else [0, 100])
        s = layers[name]
        given_layer = summary(s["percentiles"]["p01"], s["percentiles"]["p99"], s["min"], s["max"], s["std"])
        bits, clip = origins_rule(given_layer)
        assert (entry["suggested_weight_bits"], entry["use_percentile_clipping"]) == (bits, clip), name


def bounds_by_step(run: Path) -> dict[str, dict[int, tuple[float, float]]]:
    """What each planned layer spans at each step that the model sees, after the plan's clipping."""
    plan = load(run / "quantization_config.json")
    found: dict[str, dict[int, tuple[float, float]]] = {}
    with ActivationFile(run / "activations.h5") as file:
        for name, entry in plan.items():
            by_step = file.by_step(name)
            for step in (0, 1, 2, 3):  # the finished latent, 4, is never fed to the model
                percentiles = by_step[step].percentiles()
                low, high, *_ = by_step[step].over_channels()
                clipped = (percentiles["p01"], percentiles["p99"])
                found.setdefault(name, {})[step] = clipped if entry["use_percentile_clipping"] else (low, high)
    return found


def test_timestep_config_json(tiny_run: Path) -> None:
    config, plan = load(tiny_run / "timestep_config.json"), load(tiny_run / "quantization_config.json")
    manifest = load(tiny_run.parent / "dataset" / "manifest.json")
    assert config["num_steps"] == 4
    assert config["timesteps"] == manifest["timesteps"][:4]
    assert (config["model"], config["fingerprint"]) == ("emoji", manifest["fingerprint"])
    assert (tiny_run.parent / config["statistics"]).samefile(tiny_run / "activations.h5")
    bounds = {name: (first, min(last, 3)) for name, (first, last) in phase_bounds(4).items()}
    assert {name: tuple(phase["steps"]) for name, phase in config["phases"].items()} == bounds
    assert sorted(step for first, last in bounds.values() for step in range(first, last + 1)) == [0, 1, 2, 3]
    assert not any("weight_bits" in phase for phase in config["phases"].values()), "one copy serves all phases"
    layers, _ = read_summaries(tiny_run)
    by_phase = RANGE.phase_bits(layers, RANGE.plan(layers, never))
    steps, several = read_steps(tiny_run / "timestep_config.json"), 0
    for name, entry in plan.items():
        by_step = steps.bits_by_step(name, entry["suggested_activation_bits"])
        for phase, (first, last) in bounds.items():
            assert set(by_step[first : last + 1]) == {by_phase[phase][name]}, (name, phase)
        several += len(set(by_step)) > 1
    assert several > 3
    expected = bounds_by_step(tiny_run)
    assert set(config["activation_ranges"]) == set(expected) == set(plan)
    for name, ranges in config["activation_ranges"].items():
        assert ranges["from_step"] == [0], "static: one range for all steps"
        low, high = min(low for low, _ in expected[name].values()), max(high for _, high in expected[name].values())
        assert (ranges["low"], ranges["high"]) == (pytest.approx([low]), pytest.approx([high])), name


def test_ranges_that_vary_with_the_step(tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given_ranges = ["analysis=range", "ranges=per_step", "phase_bits=false", "hydra.run.dir=run", "report=none"]
    outcome = run_here(["analyze", f"stats={tiny_run}", *given_ranges], capsys)
    assert outcome.status == 0, outcome.err
    config = load(folder / "run" / "timestep_config.json")
    assert [phase["activation_bits"] for phase in config["phases"].values()] == [{}, {}, {}]
    ranges = read_steps(folder / "run" / "timestep_config.json").ranges
    several = 0
    for name, by_step in bounds_by_step(tiny_run).items():
        entry = config["activation_ranges"][name]
        assert entry["from_step"][0] == 0 and entry["from_step"] == sorted(set(entry["from_step"]))
        assert len(entry["from_step"]) == len(entry["low"]) == len(entry["high"])
        for step, bounds in by_step.items():
            assert ranges[name].at(step) == pytest.approx(bounds), (name, step)
        several += len(entry["from_step"]) == 4
    assert several > 40


def test_the_runs_summary(tiny_run: Path) -> None:
    text, plan = (tiny_run / "analysis.txt").read_text(encoding="utf-8"), load(tiny_run / "quantization_config.json")
    stats = load(tiny_run / "layer_statistics.json")
    assert text in (tiny_run.parent / "stdout.txt").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[:3] == ["Layer Statistics Summary:", f"  Total layers: {len(plan)}", "  Suggested bit-widths:"]
    counts = Counter(entry["suggested_weight_bits"] for entry in plan.values())
    for bits, count in counts.items():
        assert f"    {bits}-bit: {count} layers ({100 * count / len(plan):.0f}%)" in lines
    r = {name: s["percentiles"]["p99"] - s["percentiles"]["p01"] for name, s in stats.items()}
    listed = lines[lines.index("  Sensitive layers (need careful handling):") + 1 :]
    border = listed.index("  Layers suitable for aggressive quantization (≤4-bit):")
    sensitive = [
        re.fullmatch(r"    - (\S+) \((?:large range|high variation), r = ([^,]+)(?:, std/r = \S+)?, needs 8-bit\)", row)
        for row in listed[:border]
    ]
    assert [match and (match[1], match[2]) for match in sensitive] == [
        (n, f"{r[n]:.3g}") for n, e in plan.items() if e["suggested_weight_bits"] == 8
    ]
    narrow = [row for row in listed[border + 1 :] if " (narrow range" in row]
    expected = [n for n, e in plan.items() if e["suggested_weight_bits"] <= 4]
    assert narrow == [f"    - {name} (narrow range, r = {r[name]:.3g})" for name in expected]
    assert all(plan[name]["figure"] == f"r = {r[name]:.3g}" for name in expected)


def test_a_plan_names_outlier_channels(tiny_run: Path) -> None:
    plan = load(tiny_run / "quantization_config.json")
    lines = (tiny_run / "analysis.txt").read_text(encoding="utf-8").splitlines()
    total = 0
    with ActivationFile(tiny_run / "activations.h5") as file:
        for name, entry in plan.items():
            pooled = file.statistics(name)
            spread = (pooled.maximum - pooled.minimum).astype(np.float64)
            expected = np.flatnonzero(spread > 2.5 * np.median(spread)).tolist()
            assert entry.get("outlier_channels", []) == expected, name
            total += len(expected)
    named = [name for name, entry in plan.items() if "outlier_channels" in entry]
    place = lines.index(f"  Outlier channels (range > 2.5 × median): {total} in {len(named)} layers")
    assert re.fullmatch(r"    - \S+ \(\d+ channels, widest \d+: [\d.]+ × median\)", lines[place + 1])


def test_the_summary_ends_with_drift(tiny_run: Path) -> None:
    lines = (tiny_run / "analysis.txt").read_text(encoding="utf-8").splitlines()
    rows = lines[lines.index("  Drift over the steps (width at its widest : at its narrowest):") + 1 :]
    # Layers that read one array are told once, by the first one's name.
    alike: dict[tuple[tuple[float, float], ...], list[str]] = {}
    bounds = bounds_by_step(tiny_run)
    for name, by_step in bounds.items():
        alike.setdefault(tuple(by_step.values()), []).append(name)
    told = {names[0]: f" and {len(names) - 1} that read the same" * (len(names) > 1) for names in alike.values()}
    widths = {name: {step: high - low for step, (low, high) in bounds[name].items()} for name in told}
    times = {name: max(by_step.values()) / min(by_step.values()) for name, by_step in widths.items()}
    above = sorted((name for name in times if times[name] > 1.5), key=lambda name: -times[name])
    assert len(above) > 3
    assert rows[-1] == f"    {len(above)} of {len(times)} layers above ×1.5"
    for row, name in zip(rows[:-1], above[:10], strict=True):
        widest, narrowest = (pick(widths[name], key=widths[name].get) for pick in (max, min))
        figures = f"×{times[name]:.1f}, widest at step {widest}, narrowest at step {narrowest}"
        assert row == f"    - {name}{told[name]} ({figures})"


def test_the_json_alone(tiny_run: Path) -> None:
    whole, steps = read_summaries(tiny_run)
    alone, no_steps = read_summaries(tiny_run / "layer_statistics.json")
    assert (steps, no_steps) == (4, None)
    assert list(whole) == list(alone)
    assert {n: s.to_json() for n, s in whole.items()} == {n: s.to_json() for n, s in alone.items()}, "bit for bit"
    plans = [make_plan(layers, range_heuristic.plan_layer).layers for layers in (whole, alone)]
    assert plans[0] == plans[1]
    assert all(layer.phases and layer.steps for layer in whole.values())
    assert whole["x_embedder"].channel_range is not None


def test_a_phase_pools_evaluated_steps(tiny_run: Path) -> None:
    whole, _ = read_summaries(tiny_run)
    with ActivationFile(tiny_run / "activations.h5") as file:
        for phase, (first, last) in phase_bounds(4).items():
            steps = [step for step in file.steps if first <= step <= min(last, 3)]
            expected = LayerSummary.of(file.statistics("mm_block_1.image.mlp.fc2", steps))
            found = whole["mm_block_1.image.mlp.fc2"].phases[phase]
            assert (found.minimum, found.maximum, found.num_samples) == (
                expected.minimum,
                expected.maximum,
                expected.num_samples,
            )
            assert found.percentiles == pytest.approx(expected.percentiles)


def test_another_plan(tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given_plan = ["analysis=uniform", "analysis.weight_bits=3", "export_config=out/plan.json", "report=none"]
    outcome = run_here(["analyze", f"stats={tiny_run}", *given_plan], capsys)
    assert outcome.status == 0, outcome.err
    plan = load(folder / "out/plan.json")
    (own,) = folder.glob("outputs/*/*/quantization_config.json")
    assert plan == load(own)
    assert {entry["suggested_weight_bits"] for entry in plan.values()} == {3}
    assert {entry["suggested_activation_bits"] for entry in plan.values()} == {8}
    assert len(plan) == 61
    assert "3-bit: 61 layers (100%)" in outcome.out


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"a": 3}',
        '{"a": null}',
        '{"a": {"min": 0, "max": 1, "mean": 0, "std": 1, "num_samples": 3}}',
        '{"a": {"min": 0, "max": 1, "mean": 0, "std": 1, "num_samples": 3, "percentiles": {"p01": 0}}}',
        '{"a": {"min": "x", "max": 1, "mean": 0, "std": 1, "num_samples": 3, "percentiles": {"p01": 0, "p99": 1}}}',
        '{"a": {"min": 0, "max": 1, "mean": 0, "std": 1, "num_samples": 3, "percentiles": [1, 2]}}',
        '{"a": {"min": 0, "max": 1, "mean": 0, "std": NaN, "num_samples": 3, "percentiles": {"p01": 0, "p99": 1}}}',
        '{"a": {"min": 0, "max": 1, "mean": 0, "std": 1, "num_samples": 1e999, "percentiles": {"p01": 0, "p99": 1}}}',
    ],
)
def test_garbled_statistics(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("layer_statistics.json").write_text(content)
    outcome = run_here(["analyze", "stats=layer_statistics.json"], capsys)
    assert outcome.status in (1, 2)
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("calib: ")
    assert "layer_statistics.json" in outcome.err


def test_missing_statistics(tmp_path: Path) -> None:
    with pytest.raises(CalibError, match=r"nowhere.*calib collect"):
        read_summaries(tmp_path / "nowhere")
    with pytest.raises(CalibError, match="calib collect"):
        read_summaries(tmp_path)
