"""Activations that are kept: the very values that went by, at the tokens named, in 16 bits."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import calib.activations.step
from calib.activations.record import StepRecord
from calib.activations.samples import RowIdentity, Samples, SampleSettings, SampleWriter, read_rows
from calib.activations.taps import Halves, TapKind, TapSelection
from calib.base.errors import CalibError
from calib.base.progress import readable_bytes
from calib.dataset.store import StateDtype
from calib.models.model import DiffusionModel

import h5py
import mlx.core as mx
import numpy as np
import pytest
from helpers import MLX_DTYPES, contents, flip_byte, is_one_clear_line, lines_of, run_here, temporaries
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from watching import collected, collection_of, in_parts, recording, write_collected

STEPS = (1, 8)
ATTENTION = "mm_block_0.image.attn"
TAPS = TapSelection(
    TapKind.ALL, include=("x_embedder", "mm_block_0.text.mlp.fc2", f"{ATTENTION}.?_proj", "t_embedder.0", "mm_block_3")
)
NAMES = {"x_embedder", "mm_block_0.text.mlp.fc2", f"{ATTENTION}.q_proj", "t_embedder.0", "mm_block_3.image"}
NAMES |= {f"{ATTENTION}.o_proj"}


def rounded(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """In 16 bits, to nearest, ties to even."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float64)
    wide = values.astype(np.float32).view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def stored_values(samples: h5py.Dataset) -> NDArray[np.float64]:
    if samples.attrs["dtype"] == "float16":
        return samples[:].astype(np.float64)
    return (samples[:].astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def collect_and_write(
    model: DiffusionModel, data_dir: Path, folder: Path, settings: SampleSettings, **more: Any
) -> tuple[list[dict[str, NDArray[np.float64]]], dict[int, StepRecord]]:
    """Three images in blocks of two, into ``folder/activations.h5``; and what went by, (rows, tokens, channels)."""
    given = {"selection": TAPS} | more
    collection = collection_of(model, data_dir, folder / "cache", [0, 1, 3], samples=settings, seed=5, **given)
    with recording() as observers:
        records = collected(collection, STEPS)
    values = []
    for place in range(len(STEPS)):  # of a subset in parts, all steps of the first part come before those of the next
        own = [observer.values() for observer in observers[place :: len(STEPS)]]
        values.append({name: np.concatenate([part[name] for part in own]) for name in own[0]})
    write_collected(folder / "activations.h5", model, collection, STEPS)
    return values, records


def check_samples(
    folder: Path, values: list[dict[str, NDArray[np.float64]]], settings: SampleSettings, dtype: str
) -> None:
    """The file's rows are those that went by: of images 0 and 1 the conditional, then the unconditional; then of 3."""
    places = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3, (3, 0): 4, (3, 1): 5}
    with h5py.File(folder / "activations.h5", "r") as file:
        kept = {name for name, group in file["layers"].items() if "samples" in group}
        assert kept == NAMES | {f"{ATTENTION}.{layer}_proj" for layer in "kv"}
        for name in NAMES:
            group = file[f"layers/{name}"]
            samples = group["samples"]
            assert samples.attrs["dtype"] == dtype
            assert samples.fletcher32
            tokens, channels = values[0][name].shape[1:]
            each = settings.rows(tokens)
            assert samples.shape == (2, 6 * each, channels)
            scales = [file["step_index"], group["sample"], group["channel"]]
            assert [samples.dims[axis][0] for axis in range(3)] == scales
            images, halves, chosen = (group[f"sample_{field}"][:] for field in ("image", "half", "token"))
            assert chosen.shape == (2, 6 * each)
            assert images.tolist() == np.repeat([0, 1, 0, 1, 3, 3], each).tolist()
            assert halves.tolist() == np.repeat([0, 0, 1, 1, 0, 1], each).tolist()
            found = stored_values(samples)
            for step in range(2):
                for row, identity in enumerate(zip(images, halves, chosen[step], strict=True)):
                    image, half, token = map(int, identity)
                    expected = rounded(values[step][name][places[image, half], token], dtype)
                    assert np.array_equal(found[step, row], expected), (name, step, identity)
                by_owner = chosen[step].reshape(6, each)
                assert np.all(np.diff(by_owner, axis=1) > 0), "ascending, no token twice"
                assert np.array_equal(by_owner[0], by_owner[2]), "the same tokens of an image in both halves"
        linked = file[f"layers/{ATTENTION}.k_proj"]
        assert linked["samples"] == file[f"layers/{ATTENTION}.q_proj/samples"]


@pytest.mark.parametrize(
    ("kind", "dtype", "parts"),
    [
        *product((Samples.ROWS, Samples.ALL), (None, StateDtype.FLOAT16, StateDtype.BFLOAT16), [(2,)]),
        (Samples.ROWS, StateDtype.BFLOAT16, (1, 1)),
        (Samples.ALL, None, (1, 1)),
    ],
)
def test_what_is_kept_is_what_went_by(
    model: DiffusionModel,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Samples,
    dtype: StateDtype | None,
    parts: tuple[int, ...],
) -> None:
    in_parts(monkeypatch, *parts)
    settings = SampleSettings(kind, 3, dtype)
    values, _ = collect_and_write(model, data_dir, tmp_path, settings)
    check_samples(tmp_path, values, settings, "bfloat16" if dtype is StateDtype.BFLOAT16 else "float16")


def test_samples_are_kept_beside_halves_that_are_apart(model: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    settings = SampleSettings(Samples.ROWS, 2)
    apart = TapSelection(TAPS.kind, TAPS.include, cfg_halves=Halves.APART)
    collect_and_write(model, data_dir, tmp_path / "apart", settings, selection=apart)
    collect_and_write(model, data_dir, tmp_path / "pooled", settings)
    with h5py.File(tmp_path / "apart/activations.h5") as one, h5py.File(tmp_path / "pooled/activations.h5") as other:
        for name in NAMES:
            for field in ("samples", "sample_image", "sample_half", "sample_token"):
                assert np.array_equal(one[f"layers/{name}/{field}"][:], other[f"layers/{name}/{field}"][:])
            assert "samples" not in one[f"conditional/{name}"]


def test_statistics_are_those_of_a_collection_that_keeps_nothing(
    model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    settings = SampleSettings(Samples.ALL)
    _, kept = collect_and_write(model, data_dir, tmp_path / "kept", settings)
    plain = collected(collection_of(model, data_dir, tmp_path / "plain", [0, 1, 3], TAPS, seed=5), STEPS)
    for index in STEPS:
        for name, own in plain[index].seen.items():
            other = kept[index].seen[name]
            assert np.array_equal(own.statistics.moments.sums, other.statistics.moments.sums)
            assert np.array_equal(own.statistics.histogram.counts, other.statistics.histogram.counts)
            assert np.array_equal(own.ranges, other.ranges)


@given(
    seed=st.integers(0, 2**40),
    image=st.integers(0, 10**6),
    step=st.integers(0, 1000),
    tokens=st.integers(1, 300),
    count=st.integers(1, 400),
)
def test_tokens_are_drawn_by_seed_image_and_step(seed: int, image: int, step: int, tokens: int, count: int) -> None:
    settings = SampleSettings(Samples.ROWS, count)
    chosen = settings.tokens(seed, image, step, tokens)
    assert chosen.dtype == np.int32
    assert len(chosen) == settings.rows(tokens) == min(count, tokens)
    assert np.all(np.diff(chosen) > 0)
    assert chosen[0] >= 0 and chosen[-1] < tokens
    assert np.array_equal(chosen, settings.tokens(seed, image, step, tokens))


def test_every_token_is_drawn_as_often() -> None:
    settings = SampleSettings(Samples.ROWS, 4)
    times = sum(np.bincount(settings.tokens(0, i, s, 16), minlength=16) for i in range(50) for s in range(10))
    assert np.all(np.abs(times - 125) < 5 * np.sqrt(125))


def test_rows_are_named_in_the_order_of_blocks_halves_and_images() -> None:
    rows = RowIdentity.of([(5, 2), (7,)], halves=2, each=2)
    assert rows.image.tolist() == [5, 5, 2, 2, 5, 5, 2, 2, 7, 7, 7, 7]
    assert rows.half.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    assert RowIdentity.of([(1,)], halves=1, each=0).image.tolist() == []


# What can go wrong


def test_values_beyond_float16_are_one_clear_line_that_says_what_holds_them(
    model: DiffusionModel, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The x_embedder is given states beyond float16's range."""
    read = calib.activations.step.ahead

    def larger(*given: Any) -> Any:
        return (states * np.float32(1e5) for states in read(*given))

    monkeypatch.setattr(calib.activations.step, "ahead", larger)
    taps = TapSelection(include=("x_embedder", "t_embedder.0"))
    settings = SampleSettings(Samples.ROWS, 64)
    collection = collection_of(model, data_dir, tmp_path / "cache", [0, 1], taps, samples=settings)
    before = [id(module) for module in model.transformer.modules()]
    with pytest.raises(CalibError) as error:
        collection.collect(STEPS)
    assert str(error.value) == (
        "storage.dtype=float16: activations at x_embedder exceed its range at step 1; use storage.dtype=bfloat16"
    )
    assert [id(module) for module in model.transformer.modules()] == before
    assert temporaries(tmp_path) == set()
    assert [path.name for path in collection.cache.folder.iterdir() if path.suffix == ".samples"] == []
    wide = SampleSettings(Samples.ROWS, 64, StateDtype.BFLOAT16)
    record = collected(collection_of(model, data_dir, tmp_path / "cache", [0, 1], taps, samples=wide), [1])[1]
    assert record.seen["x_embedder"].statistics.maximum.max() > 1e5


def test_infinities_that_went_by_are_kept_and_are_no_overflow(tmp_path: Path) -> None:
    x = mx.array([[[1.0, float("inf")], [float("-inf"), float("nan")]]])
    for dtype in ("float16", "float32"):
        writer = SampleWriter(tmp_path / "x.samples", SampleSettings(Samples.ALL), 0, 0)
        tied = writer.take("x", x.astype(MLX_DTYPES[dtype]), [0])
        mx.eval(tied, writer.end_forward())
        writer.settle()
        (rows,) = read_rows(tmp_path / "x.samples", writer.finish()["x"], 2)
        np.testing.assert_array_equal(rows.view(np.float16), [[1, np.inf], [-np.inf, np.nan]])


BRIEF = ("sampler.num_steps=8", "report=none")


def test_how_much_will_be_kept_is_said_before(data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["collect", f"data_dir={data_dir}", *BRIEF, "timestep_schedule=quarters"]
    given += ["subset.num_images=3", "taps=all", "taps.include=[mm_block_1,x_embedder,t_embedder.0]", "storage=full"]
    outcome = run_here([*given, "hydra.run.dir=run"], capsys)
    assert outcome.status == 0, outcome.err
    sizes = [path.stat().st_size for path in folder.rglob("*.samples")]
    each, whole = readable_bytes(sizes[0]), readable_bytes(sum(sizes))
    assert len(sizes) == 5
    assert f"activations to keep: {each} a step, {whole} in cache_dir and {whole} in the run's file" in outcome.err
    assert (folder / "run" / "activations.h5").stat().st_size > sum(sizes)


def test_what_no_disk_can_hold_is_refused_before_anything_is_collected(
    data_dir: Path, small_disk: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["collect", f"data_dir={data_dir}", *BRIEF, "timestep_schedule=quarters", "storage=full"]
    for place in (["cache_dir=disk/cache", "hydra.run.dir=run"], ["hydra.run.dir=disk/run"]):
        outcome = run_here([*given, *place], capsys)
        assert outcome.status == 1
        (line,) = lines_of(outcome.err)
        assert re.search(r"disk/.*: activations to keep need .* MB, .* are free; choose fewer taps", line)
        assert "forwards" not in outcome.err
        assert list(folder.rglob("step_*")) == []
        assert temporaries(folder) == set()


def test_a_flipped_byte_in_what_was_kept_is_one_clear_line_and_mended_by_the_same_command(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["collect", f"data_dir={data_dir}", *BRIEF, "timestep_schedule=list", "subset.num_images=2"]
    given += ["timestep_schedule.steps=[1]", "taps.include=[x_embedder]", "storage=sampled"]
    assert run_here([*given, "hydra.run.dir=run"], capsys).status == 0
    before = contents(folder)
    (path,) = folder.rglob("*.samples")
    flip_byte(path, 77)
    outcome = run_here([*given, "hydra.run.dir=run2"], capsys)
    line = is_one_clear_line(outcome, status=1)
    name = path.relative_to(folder)
    assert line == f"{name}: is damaged; the same command collects step 1 again"
    assert temporaries(folder) == set()
    assert not (folder / "run2" / "activations.h5").exists()
    assert run_here([*given, "hydra.run.dir=run2"], capsys).status == 0
    assert contents(folder)["run2/activations.h5"] == before["run/activations.h5"]
    assert contents(folder)[str(name)] == before[str(name)]
