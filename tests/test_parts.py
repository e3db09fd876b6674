"""Drawing parts of a batch side by side on a CPU: a dataset keeps the number of parts that it was begun with."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from calib.base.errors import CalibError
from calib.dataset.generate import generate, trajectory
from calib.dataset.load import load_manifest
from calib.dataset.rebuild import rebuild_manifest
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype, read_state
from calib.evaluation.paired import Paired, Reference
from calib.models import parallel
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from helpers import PROMPTS, contents
from tiny_models import tiny_model

#: With a batch of two and guidance there are four rows.
SETTINGS = SamplerSettings(num_steps=3, cfg_weight=3.0, batch_size=2)
IMAGES = 4

#: Draws so many images, or a shard of them, in a folder, on so many processors.
Draw: TypeAlias = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(model: DiffusionModel) -> DiffusionModel:
    """A transformer whose bits depend on how many rows are computed at once."""
    return tiny_model(model, "sd3")


@contextmanager
def processors(count: int, gpu: bool = False) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "cores", lambda: count)
        patch.setattr(parallel, "on_gpu", lambda: gpu)
        yield


@pytest.fixture(scope="module")
def drawn(tiny: DiffusionModel) -> Draw:
    def draw(folder: Path, images: int, count: int, shard: Shard | None = None, gpu: bool = False) -> Path:
        with processors(count, gpu):
            generate(tiny, PROMPTS, images, folder, SETTINGS, dtype=StateDtype.FLOAT32, shard=shard)
        return folder

    return draw


@pytest.mark.parametrize(("count", "gpu", "parts"), [(1, False, 1), (3, False, 3), (64, False, 4), (8, True, 1)])
def test_as_many_parts_as_processors_or_rows(drawn: Draw, tmp_path: Path, count: int, gpu: bool, parts: int) -> None:
    folder = drawn(tmp_path, 2, count, gpu=gpu)
    assert load_manifest(folder).parts == parts
    assert ("parts" in json.loads((folder / "manifest.json").read_text())) == (parts > 1), "as it was before parts"


@pytest.mark.parametrize("begun", [1, 3, 4])
def test_a_dataset_goes_on_in_the_parts_that_it_was_begun_with(drawn: Draw, tmp_path: Path, begun: int) -> None:
    """Later images, a lost one and those of shards on machines with other numbers of processors."""
    wanted = contents(drawn(tmp_path / "whole", IMAGES, begun))
    grown = drawn(drawn(tmp_path / "grown", 2, begun), IMAGES, 2)
    assert contents(grown) == wanted
    (grown / "images/0001.png").unlink()
    assert contents(drawn(grown, IMAGES, 1)) == wanted
    shared = drawn(tmp_path / "shared", IMAGES, begun, Shard(1, 2))
    assert contents(drawn(shared, IMAGES, 2, Shard(0, 2))) == wanted
    (shared / "manifest.json").unlink()
    rebuild_manifest(shared)
    assert contents(shared) == wanted


def test_states_are_those_of_all_rows_at_once(tiny: DiffusionModel, drawn: Draw, tmp_path: Path) -> None:
    """But for the rounding of other shapes; and the same to the bit as a trajectory in as many parts."""
    folder = drawn(tmp_path, 2, 3)
    manifest = load_manifest(folder)
    seeds = [int(manifest.images[i].seed or 0) for i in (0, 1)]
    for parts, tolerance in ((3, 0.0), (1, 1e-4)):
        for state in trajectory(tiny, PROMPTS[:2], seeds, SETTINGS, parts):
            found = np.stack([read_state(folder, manifest, image, state.step_index) for image in (0, 1)])
            np.testing.assert_allclose(found, np.array(state.x), rtol=0, atol=tolerance * float(mx.std(state.x)))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_unchanged_model_draws_the_references_pictures(
    tiny: DiffusionModel, drawn: Draw, tmp_path: Path, parts: int
) -> None:
    """A comparison draws in the parts of its reference, whatever the machine: nothing is lost by them."""
    folder = drawn(tmp_path, 3, parts)
    with processors(3):
        paired = Paired(tiny, Reference(folder, load_manifest(folder), (0, 2)))
        found = paired.compare(lambda: parallel.shared_cores(1), "unchanged")
    assert np.isinf(found.psnr).all() and not found.error.any()


@pytest.mark.parametrize("parts", [0, -1, 70_000, 1.5, "2", None])
def test_an_impossible_number_of_parts(drawn: Draw, tmp_path: Path, parts: object) -> None:
    path = drawn(tmp_path, 2, 3) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "parts": parts}))
    with pytest.raises(CalibError, match=r"damaged manifest.*parts.*rebuild-manifest") as error:
        load_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_images_are_decoded_one_by_one_however_many_at_once(model: DiffusionModel) -> None:
    latents = mx.random.normal((3, *model.latent_shape), key=mx.random.key(0))
    alone = np.concatenate([np.array(model.decode(latent[None])) for latent in latents])
    assert alone.shape == (3, 64, 64, 3)
    for at_once in (1, 2, 5):
        assert np.array_equal(model.decode_each(latents, at_once), alone)


def test_memory_decides_how_many_are_decoded_at_once(model: DiffusionModel) -> None:
    with processors(4):
        plans = {size: plan_memory(model, True, 2, size << 20, parts=4) for size in (200, 600, 10_000)}
        unknown = plan_memory(replace(model, decoding_bytes=0), True, 2, parts=4)
    assert [plan.decoders for plan in plans.values()] == [1, 2, 4]
    assert [plan.peak >> 20 for plan in plans.values()] == sorted(plan.peak >> 20 for plan in plans.values())
    assert unknown.decoders == 1
