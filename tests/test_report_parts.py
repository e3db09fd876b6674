"""What pages show of runs: short names, tables of bits, layers worth a histogram, axes, which runs are shown."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.analysis.plan import LayerPlan
from calib.analysis.steps import StepPlan
from calib.base.layout import FULL_PICTURES, QUANTIZED_PICTURES
from calib.runs.compare.comparison import compare
from calib.runs.pages.comparison import MOST_RUNS, _chosen, _spread
from calib.runs.pages.heat import heat_map
from calib.runs.pages.layers import (
    CHOSEN,
    BitTable,
    Ranges,
    bit_tables,
    chosen_layers,
    own_name,
    ranges_of,
    short_names,
)
from calib.runs.pages.parts import labels
from calib.runs.pages.pictures import pictures_of
from calib.runs.pages.run import page_parts, run_page
from calib.runs.pages.scales import limits, ticks
from calib.runs.record import RunRecord
from calib.runs.standing import RunState

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["analysis=range,seed=1-0123abcd", "analysis=sqnr,seed=1-4567cdef"], ["range", "sqnr"]),
        (["a.x=1,b=two", "a.x=1,b=true", "a.x=2,b=true"], ["x 1 · two", "x 1 · b true", "x 2 · b true"]),
        (["s/a=1-00000000", "t/b=1-00000000"], ["s/a=1", "t/b=1"]),
        (["a=1-00000000", "a=1-11111111"], ["a=1-00000000", "a=1-11111111"]),
        (["one-00000000", "one-11111111", "two-22222222"], ["one-00000000", "one-11111111", "two"]),
        (["a=1-00000000"], ["a=1"]),
        ([], []),
    ],
)
def test_short_names_of_jobs(names: list[str], short: list[str]) -> None:
    assert labels(names) == short


def test_pictures_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for folder in (tmp_path / FULL_PICTURES, tmp_path / QUANTIZED_PICTURES):
        folder.mkdir(parents=True)
        for number in (10000, 9999, 1000, 7):
            (folder / f"{number:04d}.png").touch()
    assert [int(one.stem) for one, _ in pictures_of(tmp_path)] == [7, 1000, 9999, 10000]


NAMES = st.lists(st.text("ab=,-01", min_size=1, max_size=14), unique=True, max_size=6)


@given(names=NAMES)
def test_short_names_stay_apart(names: list[str]) -> None:
    found = labels(names)
    assert len(found) == len(names) == len(set(found)) and all(found)


@given(count=st.integers(0, 40), most=st.integers(0, 10))
def test_spread(count: int, most: int) -> None:
    names = [f"{i:02}" for i in range(count)]
    found = _spread(names, most)
    assert len(found) == min(count, most) == len(set(found)) and found == sorted(found)
    if most > 1 and count:
        assert found[0] == names[0] and found[-1] == names[-1]


def test_best_runs_are_shown() -> None:
    runs = [
        RunRecord(
            Path(str(i)),
            str(i),
            RunState.COMPLETE,
            metrics={"quantized_bytes": 1e6 * i, "output_error": 1 / i if i % 2 else 2.0},
        )
        for i in range(1, 30)
    ]
    chosen = _chosen(compare(runs), runs)
    assert len(chosen) == MOST_RUNS and {"1", "29"} <= chosen and all(int(name) % 2 for name in chosen)


def ranges(count: int) -> Ranges:
    widths = np.random.default_rng(0).uniform(1, 9, (count, 3))
    return Ranges([f"layer{i}" for i in range(count)], [0, 1, 2], widths)


def test_chosen_layers() -> None:
    seen = ranges(20)
    plain = {f"layer{i}": LayerPlan(4, 8) for i in range(20)}
    assert "sensitive" not in [why for _, why in chosen_layers(seen, plain)]
    chosen = chosen_layers(seen, plain | {"layer7": LayerPlan(4, 8, sensitive=True)})
    assert [layer for layer, why in chosen if why == "sensitive"] == ["layer7"]
    assert len(chosen) == len({layer for layer, _ in chosen}) == CHOSEN
    measured = plain | {f"layer{i}": LayerPlan(4, 8, sensitivity=i / 10) for i in range(20)}
    assert [layer for layer, why in chosen_layers(seen, measured) if why == "sensitive"] == ["layer19", "layer18"]


def tables(*names: str) -> dict[str, BitTable]:
    return {table.title: table for table in bit_tables({name: LayerPlan(4, 8) for name in names})}


def layers_of(table: BitTable) -> list[str]:
    return [cell["tip"].partition(":")[0] for _, cells in table.rows for cell in cells if cell]


def test_tables_of_one_block() -> None:
    found = tables("mm_block_1.image.mlp.fc1", "mm_block_1.image.mlp.fc2", "mm_block_1")
    assert list(found) == ["Multimodal blocks", "Outside the blocks"] and found["Multimodal blocks"].blocks == ["1"]


def test_mmdit_tables() -> None:
    blocks = [f"mm_block_{i}.{stream}.mlp.fc{n}" for i in range(12) for stream in ("image", "text") for n in (1, 2)]
    blocks.remove("mm_block_11.text.mlp.fc2")
    unified = [f"unified_block_{i}.linear" for i in range(2)]
    found = tables("x_embedder", "t_embedder.0", "t_embedder.2", *blocks, *unified, "final_layer.linear")
    assert list(found) == ["Multimodal blocks", "Unified blocks", "Outside the blocks"]
    table = found["Multimodal blocks"]
    assert table.blocks == [str(i) for i in range(12)]
    assert [kind for kind, _ in table.rows] == ["image.mlp.fc1", "image.mlp.fc2", "text.mlp.fc1", "text.mlp.fc2"]
    assert table.rows[-1][1][-1] is None, "the last text stream has no second layer"
    assert layers_of(found["Outside the blocks"]) == [
        "x_embedder",
        "t_embedder.0",
        "t_embedder.2",
        "final_layer.linear",
    ]


@pytest.mark.parametrize(
    ("template", "title", "kinds"),
    [
        ("blocks.{}.attn.qkv", "Blocks", ["attn.qkv"]),
        ("layer_{}.mlp.fc2", "Layers", ["mlp.fc2"]),
        ("transformer.h{}.mlp.0.proj", "Transformer h", ["mlp.0.proj"]),
        ("stage2.blocks.{}.experts.1.w", "Stage2 blocks", ["experts.1.w"]),
    ],
)
def test_tables_of_any_network(template: str, title: str, kinds: list[str]) -> None:
    found = tables("embed.0", *(template.format(i) for i in range(11)), "head.fc1", "head.fc2")
    assert list(found) == [title, "Outside the blocks"]
    assert found[title].blocks == [str(i) for i in range(11)]
    assert [kind for kind, _ in found[title].rows] == kinds
    assert layers_of(found["Outside the blocks"]) == ["embed.0", "head.fc1", "head.fc2"]


LAYERS = st.lists(st.from_regex(r"([ab](_[01]?[0-3])?\.){0,3}[ab][12]", fullmatch=True), unique=True, max_size=12)


@given(names=LAYERS)
def test_tables_hold_every_layer_once(names: list[str]) -> None:
    plan = {name: LayerPlan(4, 8) for name in names}
    assert sorted(layer for table in bit_tables(plan) for layer in layers_of(table)) == sorted(names)


def test_short_names_of_layers() -> None:
    names = ["mm_block_3.image.mlp.fc1 (+2)", "unified_block_0.linear", "layer_12.mlp.fc2", "final_layer.linear"]
    assert short_names(names) == ["mm 3.image.mlp.fc1 (+2)", "unified 0.linear", "12.mlp.fc2", "final_layer.linear"]
    assert short_names(["blocks.0.w", "layers.0.w"]) == ["blocks.0.w", "layers.0.w"], "else both would be '0.w'"


POSITIVE = st.floats(1e-12, 1e12)


@given(one=POSITIVE, other=POSITIVE, logarithmic=st.booleans(), most=st.integers(3, 10))
def test_axes(one: float, other: float, logarithmic: bool, most: int) -> None:
    low, high = limits([np.array([one, np.nan]), np.array([other])], logarithmic, 0.05)
    assert low < min(one, other) and high > max(one, other) and (low > 0 or not logarithmic)
    marked = ticks(low, high, logarithmic, most)
    assert 1 <= len(marked) <= most and all(low * 0.999 <= value <= high * 1.001 for value in marked)
    assert all(first < second for first, second in pairwise(marked))


@pytest.mark.parametrize(
    ("ends", "logarithmic", "marked"),
    [
        ((0, 1), False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((18, 58), True, [20, 30, 40, 50]),
        ((0.9, 90), True, [1, 2, 5, 10, 20, 50]),
        ((1, 110), True, [1, 3, 10, 30, 100]),
        ((1e-6, 20), True, [1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_ticks_are_round(ends: tuple[float, float], logarithmic: bool, marked: list[float]) -> None:
    assert ticks(*ends, logarithmic, 6) == pytest.approx(marked)


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("value", [0.0, 2.0, float("nan")])
def test_flat_heat_map(value: float, logarithmic: bool) -> None:
    page = heat_map(["a", "b"], [0, 5], np.full((2, 2), value), "width", logarithmic)
    assert "nan" not in page and page.count("<span") >= 4


def test_many_rows_and_steps() -> None:
    page = heat_map([f"row{i}" for i in range(150)], list(range(100)), np.ones((150, 100)), "width")
    named = [i for i in range(150) if f">row{i}<" in page]
    assert named == list(range(0, 150, 3))
    steps = page.partition('class="steps">')[2]
    assert steps.count("<span") == 20 and steps.count('class="more"') == 15


OLD_RUN = Path(__file__).parent / "data" / "calib-0.1.0" / "run"
ENTRY = {
    "suggested_weight_bits": 4,
    "suggested_activation_bits": 8,
    "use_percentile_clipping": False,
    "clip_percentile": [0, 100],
}


def test_a_damaged_layer_spoils_no_other(tmp_path: Path) -> None:
    plan = {f"blocks.{i}.w": ENTRY for i in range(3)} | {"blocks.1.w": ENTRY | {"suggested_weight_bits": "four"}}
    (tmp_path / "quantization_config.json").write_text(json.dumps(plan))
    parts = page_parts(tmp_path)
    assert [layer for table in parts.tables for layer in layers_of(table)] == ["blocks.0.w", "blocks.2.w"]
    assert len(parts.problems) == 1 and "blocks.1.w" in parts.problems[0]
    assert "Not shown" in run_page(tmp_path)
    (tmp_path / "quantization_config.json").write_text(json.dumps({name: {} for name in plan}))
    assert [problem.endswith("(3 layers are damaged)") for problem in page_parts(tmp_path).problems] == [True]


def test_ranges_are_those_of_the_statistics() -> None:
    with ActivationFile(OLD_RUN / "activations.h5") as file:
        found = ranges_of(file)
        for row, widths in zip(found.layers, found.widths, strict=True):
            whole = file.by_step(own_name(row))
            spans = [float(whole[s].maximum.max()) - float(whole[s].minimum.min()) for s in found.steps]
            assert widths.tolist() == spans
        assert sum(1 + int((re.search(r"[+](\d+)", row) or [0, 0])[1]) for row in found.layers) == len(file.layers)


def test_damaged_clips_leave_histograms(tmp_path: Path) -> None:
    run = Path(shutil.copytree(OLD_RUN, tmp_path / "run"))
    whole = page_parts(run)
    assert whole.problems == [] and [part.name for part in whole.figures] == ["range", "drift", "histograms"]
    assert 'class="dashed"' in whole.figures[-1].figure and len(whole.tables) == 2
    (run / "timestep_config.json").write_text('{"num_steps": 2')
    damaged = page_parts(run)
    assert [part.name for part in damaged.figures] == ["range", "drift", "histograms"]
    figures = [parts.figures[-1].figure for parts in (whole, damaged)]
    assert 'class="dashed"' not in figures[1] and figures[0].count("<svg") == figures[1].count("<svg") > 3
    assert [problem.partition(":")[0] for problem in damaged.problems] == ["the plan's clips"]


@pytest.mark.parametrize(
    ("predicted", "title", "problem"),
    [
        ({}, None, None),
        ({"psnr": 30.0, "plan": ""}, None, None),  # of calib 0.3.0
        ({"of": "picture", "reach": {"latent": [0.01, 0.1, 1], "output": [0.0, 0.2]}}, "the picture", None),
        ({"of": "latent", "reach": {"latent": [0.01, 0.1, 1], "output": [1e-4, 0.2]}}, "the finished latent", None),
        ({"of": "picture", "reach": {"latent": [0, 0, 0], "output": [0, 0]}}, None, None),
        ({"of": "picture", "reach": {"latent": ["much"], "output": []}}, None, "how errors reach the picture: "),
        ({"of": "picture", "reach": {"latent": [1]}}, None, "how errors reach the picture: "),
        ({"of": "everything"}, None, "sensitivities: "),
    ],
)
def test_reach(predicted: dict[str, Any], title: str | None, problem: str | None, tmp_path: Path) -> None:
    """The figure of how steps reach the picture, where it is recorded, and a line where that is damaged."""
    (tmp_path / "quantization_config.json").write_text(json.dumps({"a": ENTRY | {"sensitivity": 1e-4, "bytes": 9}}))
    steps = StepPlan(timesteps=(1000.0, 500.0), predicted=predicted)
    (tmp_path / "timestep_config.json").write_text(json.dumps(steps.to_json()))
    parts = page_parts(tmp_path)
    figures = {part.name: part for part in parts.figures}
    assert [line.startswith(str(problem)) for line in parts.problems] == [True] * (problem is not None)
    assert ("reach" in figures) == (title is not None)
    if title is not None:
        assert figures["reach"].title == f"How errors reach {title}" and title in figures["reach"].note
        assert figures["reach"].figure.count("<li>") == 2


def test_import_is_light() -> None:
    heavy = ("mlx", "diffusionkit", "transformers", "matplotlib", "scipy")
    code = "import sys, calib.runs.pages.run, calib.runs.pages.comparison; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "calib.runs.pages.run" in modules and not set(heavy) & set(modules)
