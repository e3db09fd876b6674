"""``calib convergence``: the bootstrap against closed forms and brute force, and what the command makes of a run."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from calib.analysis.convergence import (
    ImageRanges,
    Movement,
    Quantity,
    convergence,
    estimates,
    image_counts,
    image_prompts,
    layer_values,
    movements,
    read_image_ranges,
    resample,
)
from calib.analysis.convergence_report import convergence_json, convergence_text, write_plot
from calib.base.layout import METADATA

import h5py
import numpy as np
import pytest
from helpers import is_one_clear_line, run_here, run_in
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

TEXTS = ("red apple", "octopus", "rocket")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def own_prompts(count: int) -> NDArray[np.int64]:
    return np.arange(count)


def random_ranges(images: int, seed: int = 0) -> NDArray[np.float64]:
    """(images, 4): min, max, p01, p99 of images of a layer with heavy tails."""
    rng = np.random.default_rng(seed)
    p01, p99 = rng.normal(-1, 0.1, images), rng.normal(3, 0.3, images)
    return np.stack([p01 - rng.exponential(2, images), p99 + rng.exponential(5, images), p01, p99], axis=1)


def source_of(
    layers: Mapping[str, NDArray[np.float64]],
    prompts: NDArray[np.int64] | None = None,
    not_finite: Mapping[str, int] | None = None,
) -> ImageRanges:
    images = len(next(iter(layers.values())))
    numbers = own_prompts(images) if prompts is None else prompts
    apart = dict(not_finite or {})
    return ImageRanges(list(range(images)), numbers, "", [0, 1], [], dict(layers), {name: [] for name in layers}, apart)


def gathered(ranges: NDArray[np.float64], picked: list[int]) -> dict[Quantity, float]:
    """Every quantity of some images, by definition."""
    low, high, p01, p99 = (ranges[picked, column] for column in range(4))
    return {
        Quantity.RANGE: high.max() - low.min(),
        Quantity.CENTRAL: p99.mean() - p01.mean(),
        Quantity.P01: p01.mean(),
        Quantity.P99: p99.mean(),
    }


@pytest.mark.parametrize("count", [10, 25, 100])
def test_spread_of_a_mean(count: int) -> None:
    ranges = random_ranges(100)
    widths = ranges[:, 3] - ranges[:, 2]
    columns = {Quantity.CENTRAL: widths, Quantity.P01: ranges[:, 2], Quantity.P99: ranges[:, 3]}
    found = movements(ranges, resample(own_prompts(100), count, draws=20_000))
    for quantity, values in columns.items():
        sigma = values.std() / math.sqrt(count) / widths.mean()
        movement = found[quantity]
        assert movement.bias == pytest.approx(0, abs=4 * sigma / math.sqrt(20_000))
        assert movement.expected == pytest.approx(sigma * math.sqrt(2 / math.pi), rel=0.03)
        assert movement.most == pytest.approx(1.96 * sigma, rel=0.04)
        assert (movement.low, movement.high) == pytest.approx((-1.96 * sigma, 1.96 * sigma), rel=0.08)


@pytest.mark.parametrize("count", [2, 10, 40])
def test_the_full_range_falls_short(count: int) -> None:
    ranges = random_ranges(40)
    low, high = np.sort(ranges[:, 0])[::-1], np.sort(ranges[:, 1])
    # P(maximum of N drawn from n is the k-th smallest) = (k/n)^N - ((k - 1)/n)^N; the minimum likewise.
    places = np.arange(41) / 40
    chances = np.diff(places**count)
    whole = high[-1] - low[-1]
    expected = ((high * chances).sum() - (low * chances).sum() - whole) / whole
    movement = movements(ranges, resample(own_prompts(40), count, draws=20_000))[Quantity.RANGE]
    assert movement.bias == pytest.approx(expected, rel=0.03)
    assert movement.bias == pytest.approx(-movement.expected)
    assert movement.low < 0 and movement.high <= 0, "it never exceeds the range of all images"


def test_movements() -> None:
    ranges = random_ranges(4, seed=3)
    everything = [gathered(ranges, list(picked)) for picked in product(range(4), repeat=3)]
    whole = gathered(ranges, [0, 1, 2, 3])
    found = movements(ranges, resample(own_prompts(4), 3, draws=40_000))
    for quantity in Quantity:
        width = whole[Quantity.RANGE if quantity is Quantity.RANGE else Quantity.CENTRAL]
        exact = Movement.of(np.array([(values[quantity] - whole[quantity]) / width for values in everything]))
        assert found[quantity].bias == pytest.approx(exact.bias, abs=0.002)
        assert found[quantity].expected == pytest.approx(exact.expected, rel=0.02)
        # Of 64 sets a quantile may lie at a jump; within a hundredth of probability it must agree.
        deviations = np.array([(values[quantity] - whole[quantity]) / width for values in everything])
        near = np.quantile(np.abs(deviations), [0.935, 0.965], method="inverted_cdf")
        assert near[0] - 1e-12 <= found[quantity].most <= near[1] + 1e-12


def test_prompts_bring_their_images() -> None:
    prompts = np.array([0, 1, 0, 2, 0])  # three images of the first prompt
    members = {0: [0, 2, 4], 1: [1], 2: [3]}
    exact: dict[tuple[int, ...], float] = {}
    for picks in product(range(3), repeat=4):
        sets: list[tuple[list[int], float]] = [([], 1.0)]
        for pick in picks:
            if len(sets[0][0]) == 4:
                break
            left = 4 - len(sets[0][0])
            ways = [members[pick]] if len(members[pick]) <= left else subsets(members[pick], left)
            sets = [(chosen + way, chance / len(ways)) for chosen, chance in sets for way in ways]
        for chosen, chance in sets:
            counts = tuple(np.bincount(chosen, minlength=5).tolist())
            exact[counts] = exact.get(counts, 0) + chance / 3**4
    drawn = Counter(map(tuple, resample(prompts, 4, draws=50_000).tolist()))
    assert set(drawn) == set(exact)
    for counts, chance in exact.items():
        assert drawn[counts] / 50_000 == pytest.approx(chance, abs=5 * math.sqrt(chance / 50_000))


def subsets(members: list[int], size: int) -> list[list[int]]:
    found = [sorted(picked) for picked in product(members, repeat=size) if len(set(picked)) == size]
    return [list(chosen) for chosen in sorted(set(map(tuple, found)))]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 60), st.integers(0, 3))
def test_sizes_of_resamples(owners: list[int], count: int, seed: int) -> None:
    prompts = np.unique(owners, return_inverse=True)[1]
    chosen = resample(prompts, count, draws=20, seed=seed)
    assert chosen.shape == (20, len(owners))
    assert (chosen >= 0).all()
    assert (chosen.sum(axis=1) == count).all()
    for row in chosen:
        # One prompt at most is drawn in part: its images differ by one, all others' do not differ.
        spreads = [int(np.ptp(row[prompts == prompt])) for prompt in range(prompts.max() + 1)]
        assert sorted(spreads)[-1] <= 1 and sum(spreads) <= 1


def test_prompts_that_repeat_move_more() -> None:
    ranges = np.repeat(random_ranges(25), 4, axis=0)  # four images of each prompt, all alike
    apart = movements(ranges, resample(own_prompts(100), 100))
    together = movements(ranges, resample(np.repeat(np.arange(25), 4), 100))
    for quantity in (Quantity.CENTRAL, Quantity.P01, Quantity.P99):
        ratio = together[quantity].expected / apart[quantity].expected
        assert ratio == pytest.approx(2, rel=0.1), "only 25 of them are independent: √4"
    assert together[Quantity.RANGE].expected > apart[Quantity.RANGE].expected


def test_coverage() -> None:
    """The truth is inside the 95% interval about so often, for intervals from 60 images of a known population."""
    inside = 0
    for seed in range(300):
        ranges = random_ranges(60, seed=1000 + seed)
        movement = movements(ranges, resample(own_prompts(60), 60, draws=400, seed=seed))[Quantity.CENTRAL]
        value = layer_values(ranges)[Quantity.CENTRAL]
        inside += abs(4 - value) <= movement.most * value
    assert 0.90 < inside / 300 < 0.98


@given(st.integers(1, 12), st.integers(0, 10_000), st.integers(1, 15))
def test_estimates(images: int, seed: int, count: int) -> None:
    ranges = random_ranges(images, seed=seed)
    ranges[:, :2] = np.round(ranges[:, :2])  # ties too
    chosen = resample(own_prompts(images), count, draws=5, seed=seed)
    found = estimates(ranges, chosen)
    for row, counts in enumerate(chosen):
        expected = gathered(ranges, [i for i, times in enumerate(counts) for _ in range(times)])
        for quantity in Quantity:
            assert found[quantity][row] == pytest.approx(expected[quantity], rel=1e-12)


def test_the_same_seed() -> None:
    source = source_of({"a": random_ranges(30), "b": random_ranges(30, seed=1)})
    once = convergence(source)
    assert once.counts == [10, 25, 30]
    assert convergence(source).layers == once.layers
    alone = convergence(source, counts=[25])
    assert [layer.movements[25] for layer in alone.layers] == [layer.movements[25] for layer in once.layers]
    other = convergence(source, seed=1)
    assert other.layers[0].movements[25] != once.layers[0].movements[25]


def test_a_layer_alike_in_all_images() -> None:
    constant = np.tile([-1.0, 2.0, -0.9, 1.9], (12, 1))
    nothing = np.zeros((12, 4))
    found = convergence(source_of({"constant": constant, "nothing": nothing, "moving": random_ranges(12)}))
    for layer in found.layers[:2]:
        for moved in layer.movements.values():
            for movement in moved.values():
                assert movement.most == pytest.approx(0, abs=1e-12)
    assert found.worst(Quantity.RANGE)[0].name == "moving"


def test_percentiles_without_width() -> None:
    ranges = np.zeros((10, 4))
    ranges[:, 1] = 8.0
    ranges[:5, 2:] = 1.0  # most values of half of the images are 1, of the others 0
    found = movements(ranges, resample(own_prompts(10), 10))
    assert found[Quantity.CENTRAL].most == 0
    assert found[Quantity.P99].expected == pytest.approx(0.5 / math.sqrt(10) / 8 * math.sqrt(2 / math.pi), rel=0.1)


@pytest.mark.parametrize(
    ("images", "counts"),
    [
        (2, [2]),
        (3, [2, 3]),
        (10, [2, 5, 10]),
        (12, [2, 5, 10, 12]),
        (26, [10, 25, 26]),
        (100, [10, 25, 50, 100]),
        (1000, [10, 25, 50, 100, 1000]),
    ],
)
def test_image_counts(images: int, counts: list[int]) -> None:
    assert image_counts(images) == counts


def test_the_verdict() -> None:
    layers = {f"layer_{i}": random_ranges(20, seed=i) for i in range(40)}
    found = convergence(source_of(layers))
    for quantity in Quantity:
        most = found.most_of_layers(quantity)
        assert sum(layer.most(quantity) <= most for layer in found.layers) >= 38
        assert sum(layer.most(quantity) < most for layer in found.layers) < 39
        ordered = [layer.most(quantity) for layer in found.worst(quantity)]
        assert ordered == sorted(ordered, reverse=True)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven images of three prompts, at steps 0 to 4 of four; 16 layers with 10 inputs."""
    folder = tmp_path_factory.mktemp("repeated")
    (folder / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    dataset = ("data_dir=dataset", "sampler.num_steps=4")
    prompts = ("prompts=file", "prompts.path=prompts.txt", "num_images=7", "report=none")
    taps = "taps.include=['x_embedder','mm_block_0.image.*','mm_block_[12].*.mlp.fc2','*.text.adaln']"
    for job in (
        ("generate", *dataset, *prompts),
        ("collect", *dataset, "timestep_schedule=quarters", taps, "report=none", "hydra.run.dir=run"),
    ):
        outcome = run_in(folder, *job)
        assert outcome.status == 0, outcome.err
    return folder / "run"


@pytest.fixture
def copied(repeated: Path, tmp_path: Path) -> Path:
    """The run of :func:`repeated`, to be damaged; its dataset beside it."""
    shutil.copytree(repeated.parent / "dataset", tmp_path / "dataset")
    return Path(shutil.copytree(repeated, tmp_path / "run", ignore=shutil.ignore_patterns("*.png")))


def set_ranges(run: Path, layer: str, place: Any, value: float) -> None:
    with h5py.File(run / "activations.h5", "r+") as file:
        file[f"layers/{layer}/image_ranges"][place] = value


def test_ranges_of_a_run(repeated: Path) -> None:
    source = read_image_ranges(repeated)
    assert source.images == list(range(7))
    assert (source.steps, source.steps_left_out) == ([0, 1, 2, 3], [4])
    assert source.prompts_unknown == ""
    assert source.prompts.tolist() == [source.prompts[i % 3] for i in range(7)]
    assert len(set(source.prompts)) == 3
    with h5py.File(repeated / "activations.h5") as file:
        for name, ranges in source.layers.items():
            stored = file[f"layers/{name}/image_ranges"][:4].astype(np.float64)
            np.testing.assert_array_equal(ranges[:, 0], stored[:, :, 0].min(axis=0))
            np.testing.assert_array_equal(ranges[:, 1], stored[:, :, 1].max(axis=0))
            np.testing.assert_allclose(ranges[:, 2:], stored[:, :, 2:].mean(axis=0), rtol=1e-12)
    pooled = json.loads((repeated / "layer_statistics.json").read_text())
    assert source.same_input["mm_block_0.image.attn.q_proj"] == [
        "mm_block_0.image.attn.k_proj",
        "mm_block_0.image.attn.v_proj",
    ]
    assert {*source.layers, *(name for names in source.same_input.values() for name in names)} == set(pooled)


def test_the_command(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["convergence", str(repeated), "--layers", "3"], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == f"{repeated}: 7 images of 3 prompts; 4 steps; 16 layers with 10 different inputs"
    found = convergence(read_image_ranges(repeated))
    assert found.counts == [2, 5, 7]
    for quantity, title in ((Quantity.CENTRAL, "percentiles"), (Quantity.RANGE, "full range, max - min")):
        first = next(i for i, line in enumerate(lines) if line.startswith(title))
        assert lines[first + 1].split("  ")[-1].strip() == "all 7"
        for line, layer in zip(lines[first + 3 : first + 6], found.worst(quantity)[:3], strict=True):
            moved = [layer.movements[n][quantity] for n in (2, 5, 7)]
            expected = [f"{100 * part:.1f}" for m in moved for part in (m.expected, m.most)]
            assert line.split()[0] == layer.name
            assert line.split()[-7:] == [f"{layer.values[quantity]:.4g}", *expected]
        assert lines[first + 6].startswith("median of 10 layers ")
    worst = found.worst(Quantity.CENTRAL)[0]
    assert any(
        line.startswith("with 7 images the central range of 95% of layers moves by at most ")
        and line.endswith(f"{worst.most(Quantity.CENTRAL):.1%}")
        and f"worst: {worst.name} " in line
        for line in lines
    )
    assert any("step 4 is left out" in line for line in lines)
    assert any("3 prompts are few" in line for line in lines)
    assert not any("prompts are unknown" in line for line in lines)
    assert lines[-1] == f"plot: {repeated / 'convergence.png'}"
    check_picture(repeated / "convergence.png")


def check_picture(path: Path) -> None:
    """A PNG with something drawn on both halves."""
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert width > height > 400
    for half in (pixels[:, : width // 2], pixels[:, width // 2 :]):
        colourful = np.ptp(half, axis=-1) > 60
        assert 500 < colourful.sum() < half[..., 0].size / 4


def test_json(repeated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "elsewhere" / "movement.png"
    outcome = run_here(["convergence", str(repeated), "--json", "--plot", str(plot), "--layers", "1"], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    document = json.loads(outcome.out)
    found = convergence(read_image_ranges(repeated))
    assert document == json.loads(json.dumps(convergence_json(found, repeated, plot)))
    assert (document["images"], document["prompts"], document["counts"]) == (7, 3, [2, 5, 7])
    assert len(document["layers"]) == 10
    layer = document["layers"]["mm_block_2.text.mlp.fc2"]
    assert set(layer["values"]) == set(layer["movements"]["7"]) == {"range", "central_range", "p01", "p99"}
    assert set(layer["movements"]["7"]["range"]) == {"bias", "expected", "low", "high", "most"}
    verdict = document["verdict"]["range"]
    assert verdict["worst_most"] == max(one["movements"]["7"]["range"]["most"] for one in document["layers"].values())
    assert document["plot"] == str(plot)
    check_picture(plot)


def test_the_smallest_run(tiny_run: Path, tmp_path: Path) -> None:
    """Two images: one point in each curve."""
    found = convergence(read_image_ranges(tiny_run))
    assert found.counts == [2]
    write_plot(found, tmp_path / "small.png", 10)
    check_picture(tmp_path / "small.png")
    text = convergence_text(found, tiny_run, 10)
    assert "all 2" in text
    assert "2 prompts are few" in text


def test_prompts_from_any_folder(repeated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((repeated / METADATA).read_text())["data_dir"] == "dataset"
    monkeypatch.chdir(tmp_path)
    assert image_prompts(repeated, [0, 1, 3]) == ([TEXTS[0], TEXTS[1], TEXTS[0]], "")
    monkeypatch.chdir(repeated)
    assert image_prompts(Path("."), [2])[0] == [TEXTS[2]]


def change_manifest(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = run.parent / "dataset" / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def manifest_is_a_folder(run: Path) -> None:
    path = run.parent / "dataset" / "manifest.json"
    path.unlink()
    path.mkdir()


UNKNOWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no dataset": (lambda run: shutil.rmtree(run.parent / "dataset"), "the dataset dataset is not there"),
    "no manifest": (lambda run: (run.parent / "dataset" / "manifest.json").unlink(), "no dataset there"),
    "another model": (
        lambda run: change_manifest(run, lambda document: document.update(fingerprint="another")),
        "is not the one that was collected from",
    ),
    "fewer images": (
        lambda run: change_manifest(run, lambda document: document["images"].pop()),
        "is not the one that was collected from",
    ),
    "a folder in the manifest's place": (manifest_is_a_folder, "cannot be read"),
    "no metadata": (lambda run: (run / METADATA).unlink(), f"{METADATA}: no such file"),
    "damaged metadata": (lambda run: (run / METADATA).write_text("{"), "not valid JSON"),
    "metadata of another kind": (lambda run: (run / METADATA).write_text("[]"), "names no dataset"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_prompts(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = UNKNOWN[name]
    damage(copied)
    outcome = run_here(["convergence", str(copied)], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{copied}: 7 images, each a prompt of its own; ")
    (note,) = [line for line in outcome.out.splitlines() if line.startswith("note: prompts are unknown: ")]
    assert reason in note
    assert len(set(read_image_ranges(copied).prompts)) == 7


def test_layers_that_are_not_finite(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_ranges(copied, "x_embedder", (1, slice(2, 4), slice(2, 4)), np.nan)
    set_ranges(copied, "mm_block_1.image.mlp.fc2", (0, 5, 0), np.inf)
    set_ranges(copied, "mm_block_2.image.mlp.fc2", (4, 5), np.nan)  # the finished latent's, which is left out
    outcome = run_here(["convergence", str(copied)], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    (note,) = [line for line in lines if "without a finite value" in line]
    assert note.startswith("note: 2 layers left out")
    assert "most of all x_embedder, in 2 images" in note
    assert all("(2 layers left out) moves" in line for line in lines if line.startswith("with "))
    assert "nan" not in outcome.out.replace("finite", "")
    source = read_image_ranges(copied)
    assert source.not_finite == {"x_embedder": 2, "mm_block_1.image.mlp.fc2": 1}
    assert not set(source.not_finite) & set(source.layers)
    assert len(source.layers) == 8


def make_version_1(run: Path) -> None:
    with h5py.File(run / "activations.h5", "r+") as file:
        file.attrs["format_version"] = 1
        for group in file["layers"].values():
            del group["image_ranges"]
        del file["image_block"], file["image_id"]


def keep_images(run: Path, count: int) -> None:
    """The file of a collection of so many images."""
    with h5py.File(run / "activations.h5", "r+") as file:
        for group in file["layers"].values():
            ranges = group["image_ranges"][:, :count]
            del group["image_ranges"]
            group["image_ranges"] = ranges
        ids = file["image_id"][:count]
        del file["image_id"]
        file["image_id"] = ids


def make_all_nan(run: Path) -> None:
    with h5py.File(run / "activations.h5", "r+") as file:
        for group in file["layers"].values():
            group["image_ranges"][0, 0] = np.nan


def never_evaluated(run: Path) -> None:
    with h5py.File(run / "activations.h5", "r+") as file:
        file["evaluated_by_sampler"][:] = False


def one_prompt(run: Path) -> None:
    change_manifest(run, lambda document: [entry.update(prompt="the same") for entry in document["images"]])


BAD_RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such directory": (shutil.rmtree, "no such directory"),
    "no activations": (lambda run: (run / "activations.h5").unlink(), "no activations.h5 in it; calib collect makes"),
    "not HDF5": (lambda run: (run / "activations.h5").write_text("x"), "damaged or not an activations.h5"),
    "version 1": (make_version_1, "holds nothing image by image, it is of version 1; collect again"),
    "one image": (lambda run: keep_images(run, 1), "holds 1 image"),
    "nothing finite": (make_all_nan, "no layer has finite activations in every image"),
    "final states only": (never_evaluated, "which the sampler never evaluates"),
    "one prompt": (one_prompt, "its 7 images are all of one prompt"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_runs(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = BAD_RUNS[name]
    damage(copied)
    line = is_one_clear_line(run_here(["convergence", str(copied)], capsys), status=1)
    assert reason in line
    assert line.startswith(str(copied))
    assert not (copied / "convergence.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the following arguments are required: DIR"),
        (("run", "--layers", "0"), "'0' is not a number of layers, 1 or more"),
        (("run", "--layers", "many"), "'many' is not a number of layers"),
        (("run", "--plot", "movement.pdf"), "'movement.pdf' does not end in .png"),
        (("run", "--lay", "3"), "unrecognized arguments: --lay 3"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = is_one_clear_line(run_here(["convergence", *arguments], capsys))
    assert words in line
    assert line.endswith("see calib convergence --help")


def test_a_plot_that_cannot_be_written(repeated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder.png", tmp_path / "file" / "x.png"):
        outcome = run_here(["convergence", str(repeated), "--plot", str(path)], capsys)
        line = is_one_clear_line(outcome, status=1)
        assert line.startswith(f"{path}: the picture cannot be written (")
        assert line.endswith("--plot puts it elsewhere")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder.png"], "nothing half-written is left"


def test_the_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  convergence DIR  " in run_here(["--help"], capsys).out
    own = run_here(["convergence", "--help"], capsys)
    assert own.status == 0
    for word in ("--layers N", "--json", "--plot PATH", "bootstrap over prompts", "exit status"):
        assert word in own.out
