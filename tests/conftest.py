"""What tests share: the loaded emoji model, one small dataset, and statistics collected from it."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors; a BLAS reads this when it is loaded
    for _name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

import calib  # isort: skip  (its BLAS must be loaded before mlx)

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calib.activations.collect import Collection
from calib.activations.record import StepRecord
from calib.activations.taps import TapKind, TapSelection
from calib.cli.help import CONF
from calib.dataset.generate import generate
from calib.dataset.load import load_manifest
from calib.dataset.manifest import Manifest
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StorageFormat
from calib.models import emoji
from calib.models.model import DiffusionModel

import pytest
from damage import IMAGES, SETTINGS
from helpers import PROMPTS, SAMPLER, STEPS, TINY, run_in
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobRuntime
from hypothesis import settings
from omegaconf import DictConfig
from watching import Whole, collected, collection_of, recording

assert calib.__version__

# The same examples in every run: a failure that comes and goes helps nobody.
settings.register_profile("calib", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("calib")


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra's composing, which a command does four times over and which takes 70 ms, done once for the same overrides.

    Not where folders of a user's own are searched, as their files may change.
    """
    compose = ConfigLoaderImpl.load_configuration
    known: dict[tuple[str | None, ...], DictConfig] = {}

    def load_configuration(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *more: Any, **options: Any
    ) -> DictConfig:
        paths = [source.path.removeprefix("file://") for source in self.get_search_path().get_path()]
        if paths != ["pkg://hydra.conf", str(CONF), "structured://"] or "searchpath" in "".join(overrides):
            return compose(self, config_name, overrides, *more, **options)
        key = (config_name, *overrides)
        if key not in known:
            known[key] = compose(self, config_name, overrides, *more, **options)
        config = copy.deepcopy(known[key])
        config.hydra.runtime.cwd = os.getcwd()
        config.hydra.job.name = JobRuntime().get("name")
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", load_configuration)
        yield


@pytest.fixture(scope="session")
def model() -> DiffusionModel:
    """The shipped model; tests leave it as they found it."""
    return emoji.load()


@pytest.fixture(scope="session")
def data_dir(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of eight steps with guidance, drawn two at a time; tests only read it."""
    folder = tmp_path_factory.mktemp("shared") / "dataset"
    generate(model, PROMPTS, 4, folder, SAMPLER, seed=0)
    return folder


@pytest.fixture(scope="session")
def manifest(data_dir: Path) -> Manifest:
    return load_manifest(data_dir)


@pytest.fixture(scope="session")
def whole(model: DiffusionModel, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Every tap over all four images at steps 0, 3 and 8, every row in the histogram."""
    cache = tmp_path_factory.mktemp("shared") / "cache"
    every_tap = TapSelection(kind=TapKind.ALL)
    with recording() as observers:
        collection = collection_of(model, data_dir, cache, [0, 1, 2, 3], every_tap, histogram_rows=None)
        records = collected(collection, STEPS)
    return Whole(collection, records, {s: o.values() for s, o in zip(STEPS, observers, strict=True)})


@pytest.fixture(scope="session")
def collection(whole: Whole) -> Collection:
    return whole.collection


@pytest.fixture(scope="session")
def records(whole: Whole) -> dict[int, StepRecord]:
    return whole.records


@pytest.fixture(scope="session")
def single_settings() -> SamplerSettings:
    """One image at a time, as DiffusionKit draws."""
    return SamplerSettings(num_steps=8, cfg_weight=3.0, batch_size=1)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the whole job; beside it what was printed."""
    folder = tmp_path_factory.mktemp("tiny")
    outcome = run_in(folder, *TINY, "data_dir=dataset", "hydra.run.dir=run")
    assert outcome.status == 0, outcome.err
    (folder / "stdout.txt").write_text(outcome.out)
    (folder / "stderr.txt").write_text(outcome.err)
    return folder / "run"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own, below the working folder."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def drawn(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[StorageFormat, Path]:
    """Four images of two steps in either storage; tests copy them."""
    folders = {storage: tmp_path_factory.mktemp("drawn") / storage for storage in StorageFormat}
    for storage, folder in folders.items():
        generate(model, PROMPTS, IMAGES, folder, SETTINGS, storage=storage)
    return folders


@pytest.fixture
def dataset(drawn: dict[StorageFormat, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn[StorageFormat.HDF5], tmp_path / "dataset"))


@pytest.fixture
def npz_dataset(drawn: dict[StorageFormat, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn[StorageFormat.NPZ], tmp_path / "dataset"))
