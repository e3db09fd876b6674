"""Names of a sweep's folders, and what is known of its jobs before one is run."""

import os
import tempfile
from pathlib import Path

from calib.base.errors import ConfigError
from calib.cli.compose import planned
from calib.cli.conf import CONF
from calib.cli.launchers import sensible_jobs
from calib.cli.names import job_name, sweep_name
from calib.cli.overrides import take_apart
from calib.stages.build import build

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

WORDS = st.text(st.characters(codec="utf-8", exclude_characters=",\n\r\0"), min_size=1, max_size=120)
VALUES = (
    WORDS | st.lists(WORDS, max_size=3).map(lambda words: f"[{','.join(words)}]") | WORDS.map(lambda w: f"'{w},{w}'")
)
KEYS = st.sampled_from(["analysis", "taps.include", "seed", "prompts.path", "data_dir", "sampler.cfg_weight"])
OVERRIDES = st.dictionaries(KEYS, VALUES, min_size=0, max_size=4).map(
    lambda chosen: [f"{k}={v}" for k, v in chosen.items()]
)


@given(overrides=OVERRIDES, data=st.data())
@example(overrides=["prompts.path=" + "𝒜" * 200], data=None)
@example(overrides=["prompts.path=../../etc/passwd"], data=None)
@example(overrides=["taps.include=['*.fc2','x_embedder']", "seed=" + "9" * 300], data=None)
def test_job_name(overrides: list[str], data: st.DataObject | None) -> None:
    swept = [] if data is None else data.draw(st.lists(KEYS, unique=True, max_size=3))
    name = job_name(overrides, swept)
    assert name
    assert name not in (".", "..")
    assert not set(name) & set("/\\\0\n\t '\"*?[]{}()<>|&;$`!~:")
    assert len(os.fsencode(name)) <= 255
    reordered = list(reversed(overrides)) if data is None else data.draw(st.permutations(overrides))
    assert job_name(reordered, swept) == name
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).mkdir()


@given(one=OVERRIDES, other=OVERRIDES, data=st.data())
@example(one=["a=1/2"], other=["a=1_2"], data=None)
@example(one=["a=[1,2]"], other=["a=_1,2_"], data=None)
@example(one=["prompts.path=A.txt"], other=["prompts.path=a.txt"], data=None)
@example(one=["a=" + "x" * 100], other=["a=" + "x" * 101], data=None)
def test_job_names_differ(one: list[str], other: list[str], data: st.DataObject | None) -> None:
    swept = [] if data is None else data.draw(st.lists(KEYS, unique=True, max_size=3))
    if sorted(one) != sorted(other):
        # Some file systems, most Macs' among them, do not tell A from a.
        assert job_name(one, swept).lower() != job_name(other, swept).lower()


def test_readable_name() -> None:
    name = job_name(["stage=run", "timestep_schedule=key", "analysis=range"], [])
    assert name == "analysis=range,timestep_schedule=key"
    assert job_name([], []) == job_name(["stage=run"], [])


def test_repeated_key() -> None:
    assert job_name(["seed=1", "seed=2"]) != job_name(["seed=2", "seed=1"])


def test_stage_in_name() -> None:
    names = [job_name([f"stage={stage}", "seed=1"], ["seed"]) for stage in ("run", "generate", "collect")]
    assert names == ["seed=1", "generate,seed=1", "collect,seed=1"]


def test_keys_without_effect() -> None:
    plain = ["seed=1", "num_images=3"]
    besides = [*plain, "cache_dir=elsewhere", "keep_awake=true", "swept=[seed]"]
    assert job_name(besides, ["seed"]) == job_name(plain, ["seed"])
    assert sweep_name(besides, ["seed"]) == sweep_name(plain, ["seed"])


def test_keys_without_effect_that_vary() -> None:
    names = [job_name(["seed=1", f"keep_awake={awake}"], ["keep_awake"]) for awake in ("false", "true")]
    assert len(set(names)) == 2 and names[1].startswith("keep_awake=true-")


def test_sweep_name() -> None:
    assert sweep_name(["seed=1,2", "analysis=range,cv"], ["seed", "analysis"]) == "analysis,seed"
    fixed = sweep_name(["seed=1,2", "num_images=3"], ["seed"])
    assert fixed == sweep_name(["num_images=3", "seed=7"], ["seed"]), "the same for the sweep and in each of its jobs"
    assert fixed.startswith("seed-") and fixed != sweep_name(["seed=1,2", "num_images=4"], ["seed"])
    assert sweep_name(["stage=collect", "seed=1,2"], ["seed"]) == "collect,seed"
    assert sweep_name(["seed=1,2"], ["seed"]) != sweep_name(["seed=1,2", "num_images=3"], ["seed"])


# What is planned


@pytest.fixture
def resolvers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and the resolvers that the command line registers."""
    monkeypatch.chdir(tmp_path)
    OmegaConf.register_new_resolver("calib_job", job_name, replace=True)
    OmegaConf.register_new_resolver("calib_sweep", sweep_name, replace=True)
    return tmp_path


@pytest.mark.parametrize(
    ("search", "jobs"), [("timesteps", 5), ("heuristics", 7), ("budgets", 7), ("timesteps_and_heuristics", 12)]
)
def test_ready_sweep(resolvers: Path, search: str, jobs: int) -> None:
    """As many jobs as it has, each with a folder of its own."""
    what = planned(take_apart([f"hparams_search={search}"]))
    assert what.multirun, "a ready sweep needs no -m"
    assert len({folder.name.lower() for folder in what.folders}) == len(what.folders) == jobs
    assert len({folder.parent for folder in what.folders}) == 1
    assert not list(resolvers.iterdir())


def test_ready_sweeps_are_all_tried() -> None:
    found = {path.stem for path in (CONF / "hparams_search").glob("*.yaml")}
    assert found == {"timesteps", "heuristics", "budgets", "timesteps_and_heuristics"}


def test_ready_sweep_overridden(resolvers: Path) -> None:
    what = planned(take_apart(["hparams_search=timesteps_and_heuristics", "analysis=cv", "timestep_schedule=key,all"]))
    names = [folder.name.rpartition("-")[0] for folder in what.folders]
    assert names == ["timestep_schedule=key", "timestep_schedule=all"]


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("seed=range(0,3)", [f"seed={i}" for i in range(3)]),
        ("analysis=glob(s*)", ["analysis=sensitivity", "analysis=sqnr"]),
        ("seed=sort(3,1,2)", ["seed=1", "seed=2", "seed=3"]),
        ("+experiment=quick,origin", ["+experiment=quick", "+experiment=origin"]),
    ],
)
def test_kinds_of_sweeps(resolvers: Path, sweep: str, values: list[str]) -> None:
    if sweep.startswith("+"):
        sweep, values = sweep[1:], [value[1:] for value in values]
    what = planned(take_apart(["-m", sweep]))
    assert [folder.name for folder in what.folders] == values


def test_folders_of_the_users_choice(resolvers: Path) -> None:
    given = ["-m", "seed=1,2", "hydra.sweep.dir=sweeps/${now:%f}", "hydra.sweep.subdir=job${hydra.job.num}"]
    what = planned(take_apart(given))
    assert [folder.name for folder in what.folders] == ["job0", "job1"]
    (sweep_dir,) = [o for o in what.overrides if o.startswith("hydra.sweep.dir=")]
    assert sweep_dir == f"hydra.sweep.dir='{what.folders[0].parent}'", "named once, for all that composes it again"


def test_shared_folder(resolvers: Path) -> None:
    with pytest.raises(ConfigError, match="gives two jobs the folder same"):
        planned(take_apart(["-m", "seed=1,2", "hydra.sweep.subdir=same"]))


def test_lists_of_one_key(resolvers: Path) -> None:
    with pytest.raises(ConfigError, match=r"^seed: two lists of values; name them all in one$"):
        planned(take_apart(["-m", "seed=1,2", "seed=3,4"]))
    assert len(planned(take_apart(["-m", "seed=5", "seed=1,2"])).folders) == 2


def test_value_named_twice(resolvers: Path) -> None:
    with pytest.raises(ConfigError, match=r"^seed=1: this job twice; name it once$"):
        planned(take_apart(["-m", "seed=1,2,1"]))


@pytest.mark.parametrize(
    ("experiment", "images", "steps", "collected", "guidance"),
    [("quick", 4, 10, 5, 3.0), ("origin", 1000, 50, 17, 3.0), ("taqdit", 256, 100, 25, 1.5)],
)
def test_ready_experiment(experiment: str, images: int, steps: int, collected: int, guidance: float) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=[f"experiment={experiment}"]), resolve=True)
    assert isinstance(config, dict)
    settings = build({str(name): value for name, value in config.items()})
    sampler, schedule = settings.generate.sampler, settings.collect.timestep_schedule
    assert settings.generate.num_images == images and sampler.num_steps == steps
    assert isinstance(schedule, tuple) and len(schedule) == collected
    assert sampler.cfg_weight == guidance
    chosen = settings.collect.subset(range(images), None)
    assert len(chosen) == {"origin": 100}.get(experiment, images)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "seed=1,2", "analysis=range,nope"], ["analysis=nope", "no such option", "of 4; none was started"]),
        (["-m", "num_images=3,-1"], ["num_images=-1", "must be 1 or more", "job num_images=-1", "of 2"]),
        (["-m", "seed=interval(0,1)"], ["seed=interval(0,1)", "range("]),
        (["-m", "seed=1,2", "hydra/launcher=ray"], ["hydra/launcher=ray", "pip install hydra-ray-launcher"]),
        (["-m", "seed=1,2", "hydra/launcher=nobodys"], ["hydra/launcher=nobodys", "no such launcher"]),
        (["hparams_search=nope"], ["hparams_search=nope", "budgets"]),
        (["seed=1,2"], ["seed=1,2", "-m"]),
        (["-m", "seed=1,(2"], ["seed=1,(2", "not a valid override"]),
    ],
)
def test_impossible_sweep(resolvers: Path, arguments: list[str], words: list[str]) -> None:
    """One clear line before any folder is made."""
    with pytest.raises(ConfigError) as error:
        planned(take_apart(arguments))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not list(resolvers.iterdir())


@given(
    jobs=st.integers(1, 500),
    processors=st.integers(1, 256),
    memory=st.integers(0, 2**40),
    transformer=st.integers(0, 2**36),
)
def test_sensible_jobs(jobs: int, processors: int, memory: int, transformer: int) -> None:
    count = sensible_jobs(jobs, processors, memory, transformer)
    assert 1 <= count <= min(jobs, processors)
    assert count == 1 or count * 4 * transformer <= memory
    assert sensible_jobs(jobs, processors, 2 * memory, transformer) >= count
