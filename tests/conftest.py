"""What tests share: the loaded emoji model, one small dataset, and statistics collected from it."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors; a BLAS reads this when it is loaded
    for _name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(_name, "1")
if sys.dont_write_bytecode:  # as containers have it; else every process compiles a thousand modules for itself
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parents[1] / ".pytest_cache/bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import calib  # isort: skip  (its BLAS must be loaded before mlx)

import copy
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from calib.activations.collect import Collection
from calib.activations.record import StepRecord
from calib.activations.taps import TapKind, TapSelection
from calib.base.device import cores
from calib.cli.conf import CONF
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
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hypothesis import settings
from omegaconf import DictConfig
from tiny_models import tiny_model
from watching import Whole, collected, collection_of, recording

assert calib.__version__

# The same examples in every run: a failure that comes and goes helps nobody.
settings.register_profile("calib", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("calib")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept the options of xdist that pyproject.toml sets where xdist is switched off (-p no:xdist)."""
    if not pluginmanager.hasplugin("xdist"):
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): of xdist; tests of a group share a process")
    # Ignored in what a script starts in the background or under nohup, and by the processes that tests start then.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for a folder of tests; none beside this one for single files, or where output is watched (-s)."""
    folder = any(Path(argument).is_dir() for argument in config.args)
    return 2 if folder and cores() > 1 and config.option.capture != "no" else 0


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra reads its files once, and merges those of the same options once; of 70 ms for each of three compositions.

    Not where folders of a user's own are searched, as their files may change.
    """
    load, create = ConfigRepository.load_config, config_loader_impl.create_defaults_list
    compose = ConfigLoaderImpl._compose_config_from_defaults_list
    files: dict[str, ConfigResult | None] = {}
    lists: dict[tuple[Any, ...], DefaultsList] = {}
    configs: dict[int, DictConfig] = {}

    def are_calibs_alone(repo: IConfigRepository) -> bool:
        return [source.path.removeprefix("file://") for source in repo.get_sources()] == ["hydra.conf", str(CONF), ""]

    def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        if not are_calibs_alone(self):
            return load(self, config_path)
        if config_path not in files:
            files[config_path] = load(self, config_path)
        return copy.deepcopy(files[config_path])

    def create_defaults_list(
        repo: IConfigRepository, config_name: str, overrides_list: list[Override], *more: Any, **options: Any
    ) -> DefaultsList:
        if not are_calibs_alone(repo):
            return create(repo, config_name, overrides_list, *more, **options)
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        chosen = [o.input_line for o in overrides_list if o not in values]
        key = (config_name, *chosen, *options.items())
        # Where none is missing, none is skipped.
        known = lists.get(key) or lists.get((config_name, *chosen, *(options | {"skip_missing": False}).items()))
        lists[key] = known or create(repo, config_name, overrides_list, *more, **options)
        return replace(lists[key], config_overrides=values)

    def composed(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        if not any(defaults is known.defaults for known in lists.values()):
            return compose(self, defaults, repo)
        if id(defaults) not in configs:
            configs[id(defaults)] = compose(self, defaults, repo)
        return copy.deepcopy(configs[id(defaults)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        patch.setattr(config_loader_impl, "create_defaults_list", create_defaults_list)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", composed)
        yield


@pytest.fixture(scope="session")
def model() -> DiffusionModel:
    """The shipped model; tests leave it as they found it."""
    return emoji.load()


@pytest.fixture(scope="session")
def quick(model: DiffusionModel) -> DiffusionModel:
    """One that draws in milliseconds, noise; for what is the same whatever is drawn."""
    return tiny_model(model, "sd3")


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
