"""``calib merge``: shards joined are the whole, to the bit; what is not one collection is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import Outcome, everything, is_one_clear_line, run_here, run_in

FIVE = (
    *("num_images=5", "sampler.num_steps=2", "sampler.batch_size=2", "data_dir=dataset"),
    *("timestep_schedule=all", "report=none"),
)
KEPT = (
    "taps=all",
    "taps.cfg_halves=apart",
    "storage=sampled",
    "taps.include=[x_embedder,'mm_block_1.*.fc2',mm_block_1]",
)
SHARDS = 3


def datasets(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of a file; dimension scales' own lists of references are no content."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def shard(index: int) -> tuple[str, str]:
    return f"shard.index={index}", f"shard.count={SHARDS}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run directories of the whole and of three shards, each with a cache of its own."""
    folder = tmp_path_factory.mktemp("merge")
    for arguments in [
        ("generate", *FIVE, "hydra.run.dir=drawn"),
        ("collect", *FIVE, *KEPT, "hydra.run.dir=whole", "cache_dir=cache"),
        *(
            ("collect", *FIVE, *KEPT, *shard(i), f"hydra.run.dir=shards/{i}", f"cache_dir=cache{i}")
            for i in range(SHARDS)
        ),
        ("collect", *FIVE, "taps.include=x_embedder", "shard.index=0", "shard.count=3", "hydra.run.dir=other"),
    ]:
        outcome = run_in(folder, *arguments)
        assert outcome.status == 0, outcome.err
    return folder


def merge(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Outcome:
    return run_here(["merge", *map(str, arguments)], capsys)


def test_shards_in_any_order_merge_to_the_whole_bit_for_bit(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    into = tmp_path / "joined"
    outcome = merge(capsys, *(runs / "shards" / str(i) for i in (2, 0, 1)), "--into", into)
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"{into}: 5 images of 3 shards\n"
    joined, whole = datasets(into / "activations.h5"), datasets(runs / "whole" / "activations.h5")
    assert set(joined) == set(whole)
    for name, values in whole.items():
        assert joined[name].dtype == values.dtype, name
        np.testing.assert_array_equal(joined[name], values, err_msg=name)
    assert any(name.endswith("samples") for name in whole)
    assert any(name.startswith("unconditional/") for name in whole)
    statistics = "layer_statistics.json"
    assert (into / statistics).read_bytes() == (runs / "whole" / statistics).read_bytes()
    metadata = json.loads((into / "collection_metadata.json").read_text())
    assert metadata["image_ids"] == [0, 1, 2, 3, 4]
    assert metadata["shard"] == {"index": 0, "count": 1}


def test_the_folder_of_a_sweep_stands_for_its_run_directories(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = merge(capsys, runs / "shards", "--into", tmp_path / "joined")
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"{tmp_path / 'joined'}: 5 images of 3 shards\n"
    statistics = "layer_statistics.json"
    assert (tmp_path / "joined" / statistics).read_bytes() == (runs / "whole" / statistics).read_bytes()
    from_json = json.loads((tmp_path / "joined" / "collection_metadata.json").read_text())
    assert from_json["merged_from"] == [str(runs / "shards" / str(i)) for i in range(3)]


def test_what_was_merged_can_be_analysed(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "joined"
    assert merge(capsys, *(runs / "shards" / str(i) for i in range(3)), "--into", into).status == 0
    outcome = run_in(tmp_path, "analyze", f"stats={into}", "analysis=range", "hydra.run.dir=plan", "report=none")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "plan" / "quantization_config.json").exists()


def test_a_shard_collects_its_own_blocks_alone(runs: Path) -> None:
    images = [json.loads((runs / f"shards/{i}/collection_metadata.json").read_text())["image_ids"] for i in range(3)]
    assert images == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("shards/0", "shards/2"), ("1 shard of 3 missing: 1", "shard.index=1 shard.count=3")),
        (("shards/0", "shards/1", "shards/1", "shards/2"), ("shards/1/activations.h5: is shard 1", "name each once")),
        (("shards/1", "shards/2", "other"), ("other/activations.h5", "images, steps, taps or settings", "shards/1")),
        (("whole",), ("whole/activations.h5: is not of a shard", "calib collect")),
        (("shards/0", "nowhere"), ("nowhere: no such run directory", "calib collect")),
        (("drawn", "shards/0"), ("drawn/activations.h5: no such file", "calib collect")),
    ],
)
def test_what_is_not_one_collection_is_refused_and_nothing_made(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], words: tuple[str, ...]
) -> None:
    outcome = merge(capsys, *(runs / name for name in names), "--into", tmp_path / "joined")
    line = is_one_clear_line(outcome, outcome.status)
    assert outcome.status in (1, 2)
    for word in words:
        assert word in line
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard_count": 1 << 40}, f"{(1 << 40) - 2} shards of {1 << 40} missing: 2, 3, "),
        ({"shard_count": "many"}, "lacks or garbles"),
        ({"collection": "{", "shard_count": 2}, "lacks or garbles"),
    ],
    ids=str,
)
def test_shards_that_are_garbled_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], words: str
) -> None:
    for i in range(2):
        shutil.copytree(runs / f"shards/{i}", tmp_path / str(i))
        with h5py.File(tmp_path / str(i) / "activations.h5", "r+") as file:
            file.attrs.update(change)
    before = everything(tmp_path)
    outcome = merge(capsys, tmp_path / "0", tmp_path / "1", "--into", tmp_path / "joined")
    assert words in is_one_clear_line(outcome, outcome.status) and outcome.status in (1, 2)
    assert everything(tmp_path) == before


def test_a_folder_with_something_in_it_is_not_merged_into(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    outcome = merge(capsys, *(runs / f"shards/{i}" for i in range(3)), "--into", tmp_path)
    assert "is not an empty folder" in is_one_clear_line(outcome)
    assert everything(tmp_path) == ["mine.txt"]


def test_more_shards_than_blocks_is_said(runs: Path) -> None:
    outcome = run_in(runs, "collect", *FIVE, "shard.index=3", "shard.count=4", "hydra.run.dir=empty")
    assert outcome.status == 2
    line = is_one_clear_line(outcome)
    assert "shard.count=4: 5 images make 3 blocks of 2; so many shards at most" in line
    assert not (runs / "empty").exists()
