"""Configuration: every option works by name alone, and every bad value is caught before anything is loaded."""

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from calib.analysis.ranges import per_step
from calib.base.errors import ConfigError
from calib.base.files import check_writable
from calib.base.seeds import image_seed
from calib.base.values import check
from calib.cli.conf import CONF
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype, StorageFormat
from calib.models import emoji
from calib.models.model import ModelDtype
from calib.quantization import gptq
from calib.stages import Stage
from calib.stages.build import KEYS, build
from calib.stages.settings import (
    DERIVED,
    Analyze,
    CalibrationSettings,
    Collect,
    Evaluate,
    EvaluationSettings,
    Generate,
    Job,
    Quantize,
    SensitivitySettings,
    Settings,
)

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from omegaconf import OmegaConf

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]

#: What an option cannot do without.
NEEDS = {
    ("timestep_schedule", "list"): ["timestep_schedule.steps=[0,10]"],
    ("subset", "list"): ["subset.ids=[0,3]"],
    ("prompts", "file"): ["prompts.path=prompts.txt"],
}

#: Options that have nothing to set.
PARAMETERLESS = ("all", "quarters", "taqdit", "key", "rtn", "static", "per_step")


@cache
def _composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)


def composed(*overrides: str) -> dict[str, Any]:
    """The configuration as plain containers; Hydra composes each but once."""
    plain = copy.deepcopy(_composed(*overrides))
    assert isinstance(plain, dict)
    return plain


def built(*overrides: str, multirun: bool = False) -> Settings:
    return build(composed(*overrides), multirun)


def no_latents(image_ids: Sequence[int]) -> NDArray[np.float32]:
    """Final latents of images that are all alike."""
    return np.zeros((len(image_ids), 3), np.float32)


@pytest.fixture(scope="module", autouse=True)
def skeletons() -> Iterator[None]:
    """The emoji model's shape is made once, and not for each of two thousand configurations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "skeleton", cache(emoji.skeleton))
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a list of prompts."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red fox\n\n  an owl \n", encoding="utf-8")
    return tmp_path


def test_the_groups_are_those_of_the_issue() -> None:
    wanted = {"model", "prompts", "sampler", "dataset", "timestep_schedule", "subset", "taps", "storage", "analysis"}
    wanted |= {"ranges", "quantizer", "evaluation"}
    assert wanted <= set(GROUPS) <= wanted | {"experiment", "hparams_search"}
    options: dict[str, set[str]] = {group: {name for g, name in OPTIONS if g == group} for group in GROUPS}
    schedules = {"key", "all", "uniform", "stride", "quarters", "taqdit", "ndtc", "phases", "drift", "list"}
    assert schedules <= options["timestep_schedule"]
    assert {"first", "stride", "random", "diverse", "list"} <= options["subset"]
    assert {"emoji", "sd3_medium", "sd35_large", "flux_schnell", "flux_dev"} <= options["model"]
    assert options["sampler"] == options["model"]
    assert {"emoji", "builtin", "file"} <= options["prompts"]
    assert {"hdf5", "npz"} <= options["dataset"]
    assert {"linear", "block", "all"} <= options["taps"]
    assert {"stats", "sampled", "full"} <= options["storage"]
    assert {"range", "uniform", "cv", "sqnr", "mse", "sensitivity", "allocate"} <= options["analysis"]
    assert {"static", "grouped", "polynomial", "per_step"} <= options["ranges"]
    assert {"rtn", "percentile", "smooth", "gptq"} <= options["quantizer"]
    assert {"none", "paired"} <= options["evaluation"]


#: Models that need mflux, which may be absent.
OF_MFLUX = ("zimage_turbo", "flux2_klein_4b", "qwen_image", "flux1_dev", "flux1_schnell")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_builds(folder: Path, group: str, option: str) -> None:
    choice = f"model={option}" if group == "sampler" else f"{group}={option}"
    if option in OF_MFLUX:
        pytest.importorskip("mflux", reason="mflux is not installed")
    config = composed(choice, *NEEDS.get((group, option), []))
    settings = build(config)
    assert settings.generate.prompts
    assert settings.collect.timestep_schedule
    assert settings.collect.subset(range(settings.generate.num_images), no_latents)
    if group == "sampler":
        chosen = OmegaConf.load(CONF / "sampler" / f"{option}.yaml")
        assert settings.generate.sampler.num_steps == chosen.num_steps
        assert list(settings.generate.sampler.image_size) == list(chosen.image_size)
    assert list(folder.iterdir()) == [folder / "prompts.txt"]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_has_its_usage_on_top(group: str, option: str) -> None:
    first, *rest = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    usage = rest[0] if "@package" in first else first
    assert usage.startswith("# ")
    assert f"{group}={option}" in usage or (group == "sampler" and f"model={option}" in usage)


def test_every_key_of_the_configuration_is_a_field_of_one_dataclass() -> None:
    found = [
        name
        for kind in (Job, Generate, Collect, Analyze, Quantize, Evaluate)
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if DERIVED not in get_args(hint)
    ]
    assert sorted(found) == sorted(composed()) == sorted(KEYS)


def test_the_defaults_are_those_of_the_design() -> None:
    settings = built()
    assert settings.stage is Stage.RUN
    assert settings.generate.num_images == 10
    assert (settings.generate.sampler.num_steps, settings.generate.sampler.cfg_weight) == (50, 3.0)
    assert len(settings.collect.timestep_schedule) == 17
    assert settings.generate.dataset.format is StorageFormat.HDF5
    assert settings.generate.dataset.dtype is StateDtype.FLOAT16
    assert settings.generate.kept_steps == tuple(range(51))
    assert settings.generate.sampler.batch_size is None, "as memory allows"
    assert settings.job.shard == Shard(0, 1)
    assert settings.collect.generate_missing
    assert str(settings.generate.data_dir).startswith("calibration_data/emoji-emoji-50steps-")
    assert not built("stage=collect").collect.generate_missing
    assert built("stage=collect", multirun=True).collect.generate_missing
    assert settings.collect.subset(range(settings.generate.num_images), no_latents) == list(range(10))
    assert settings.analyze.analysis.measures and settings.analyze.phase_bits
    assert settings.analyze.ranges.function.func is per_step
    assert settings.quantize.quantizer.function.func is gptq.quantize
    assert settings.quantize.plan is None
    assert settings.analyze.sensitivity == SensitivitySettings(images=4, steps=8, group_sizes=(32, 64, 128))
    assert settings.quantize.calibration == CalibrationSettings(images=128, steps=8)
    assert settings.evaluate.evaluation == EvaluationSettings(num_images=10, seed=0, steps=10)
    assert settings.evaluate.data_dir.parent == settings.generate.data_dir.parent
    assert settings.evaluate.data_dir.name.startswith("emoji-evaluation-50steps-")


@pytest.mark.parametrize(
    ("given", "alike"),
    [
        (("num_images=10",), True),
        (("num_images=33",), False),
        (("num_images=10", "generate_missing=false"), False),
        (("num_images=33", "quantizer=rtn"), True),
        (("stage=quantize", "plan=p"), False),
        (("stage=quantize", "plan=p", "quantizer=fit"), True),
        (("stage=analyze",), True),
    ],
)
def test_calibration_images_count_where_they_matter(given: tuple[str, ...], alike: bool) -> None:
    """More than there are is no other job, nor is the number where nothing is calibrated; what was done stays done."""
    former, now = (built(*given, *more).fingerprint for more in (("calibration.images=32",), ()))
    assert (former == now) == alike
    assert built(*given, "calibration.images=5").fingerprint not in (former, now)


def test_evaluation_can_be_left_out_and_never_compares_more_steps_than_there_are() -> None:
    assert built("evaluation=none").evaluate.evaluation.num_images == 0
    assert built("sampler.num_steps=4").evaluate.evaluation.steps == 4


def test_keys_that_calib_0_3_0_did_not_have_change_no_fingerprint_unless_they_are_set() -> None:
    before = composed()
    for key in ("metrics", "reference", "clip", "inception", "by"):
        del before["evaluation"][key]
    assert build(before).fingerprint == built().fingerprint == built("evaluation.metrics=[psnr,ssim]").fingerprint
    set_otherwise = built("evaluation.metrics=[psnr,ssim,kid_effnet]"), built("evaluation=effnet")
    assert len({built().fingerprint, *(own.fingerprint for own in set_otherwise)}) == 3


def test_seeds_of_evaluation_are_none_of_calibration() -> None:
    settings = built("evaluation.seed=7")
    of_evaluation = {image_seed(settings.evaluate.evaluation.base_seed, i) for i in range(500)}
    assert not of_evaluation & {image_seed(seed, i) for seed in range(20) for i in range(500)}


def test_experiment_quick_is_quick() -> None:
    settings = built("experiment=quick")
    assert settings.collect.timestep_schedule == (0, 2, 5, 7, 10)
    assert settings.generate.num_images == 4
    assert built("experiment=quick", "num_images=2").generate.num_images == 2


def test_an_option_of_the_users_own_package_is_an_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "mine.py").write_text(
        "def ends(num_steps: int, more: int = 0) -> list[int]:\n    return [0, num_steps, more]"
    )
    monkeypatch.syspath_prepend(folder)
    config = composed("sampler.num_steps=9")
    config["timestep_schedule"] = {"_target_": "mine.ends", "more": 4}
    assert build(config).collect.timestep_schedule == (0, 4, 9)
    config["timestep_schedule"]["more"] = "x"
    with pytest.raises(ConfigError, match=r"timestep_schedule\.more=x: must be an integer"):
        build(config)


# The dataset's folder


@pytest.mark.parametrize(
    "overrides",
    [
        (
            *("num_images=99", "sampler.batch_size=3", "subset=random", "taps=block", "analysis=uniform"),
            *("timestep_schedule=quarters", "collect.batch_size=2", "stage=generate", "export_config=plan.json"),
            *("sampler.cfg_weight=3", "sampler.shift=1", "keep_awake=true", "cache_dir=elsewhere", "report=none"),
        ),
        (
            *("subset=diverse", "timestep_schedule=drift", "taps.cfg_halves=apart", "storage=full"),
            *(
                "analysis=allocate",
                "ranges=per_step",
                "quantizer=gptq",
                "calibration.images=3",
                "sensitivity.steps=1",
                "phase_bits=false",
            ),
            *("plan=run", "evaluation.num_images=3"),
        ),
    ],
)
def test_what_does_not_change_the_images_does_not_change_their_folder(overrides: Sequence[str]) -> None:
    """All at once: one that did would change it still."""
    assert built(*overrides).generate.data_dir == built().generate.data_dir
    assert built(*overrides).evaluate.data_dir == built().evaluate.data_dir


@pytest.mark.parametrize(
    "override",
    [
        "sampler.num_steps=49",
        "sampler.cfg_weight=2.5",
        "sampler.shift=2.0",
        "seed=1",
        "prompts.seed=1",
        "dataset=npz",
        "prompts=builtin",
        "model.dtype=float16",
        "dataset.dtype=float32",
        "dataset.dtype=bfloat16",
        "dataset.steps=schedule",
    ],
)
def test_what_changes_the_images_changes_their_folder(override: str) -> None:
    assert built(override).generate.data_dir != built().generate.data_dir


@pytest.mark.parametrize("override", ["sampler.num_steps=49", "sampler.cfg_weight=2.5", "sampler.shift=2.0"])
def test_what_changes_the_pictures_of_evaluation_changes_their_folder(override: str) -> None:
    assert built(override).evaluate.data_dir != built().evaluate.data_dir


def test_another_evaluation_has_another_folder_and_the_same_dataset() -> None:
    for override in ("evaluation.seed=1", "prompts=builtin", "model.dtype=float16"):
        assert built(override).evaluate.data_dir != built().evaluate.data_dir
    assert built("evaluation.seed=1").generate.data_dir == built().generate.data_dir
    for override in ("seed=1", "dataset=npz", "dataset.dtype=float32"):
        assert built(override).evaluate.data_dir == built().evaluate.data_dir, "what calibration has is not seen here"


def test_another_cache_and_no_page_are_no_other_job() -> None:
    assert built("cache_dir=elsewhere", "report=none").fingerprint == built().fingerprint
    assert built("storage=sampled").fingerprint != built().fingerprint
    assert built("taps.cfg_halves=apart").fingerprint != built().fingerprint


def test_shards_of_a_dataset_have_its_folder() -> None:
    sharded = built("stage=generate", "shard.index=2", "shard.count=3")
    assert sharded.generate.data_dir == built().generate.data_dir
    assert sharded.job.shard == Shard(2, 3)
    collected = built("stage=collect", "shard.index=2", "shard.count=3", multirun=True)
    assert collected.job.shard == Shard(2, 3)
    assert not collected.collect.generate_missing, "the shards of a sweep share what is there"


def test_a_folder_of_chosen_states_is_that_of_its_schedule_and_keeps_those_states() -> None:
    key, same, other = (
        built("dataset.steps=schedule", f"timestep_schedule={name}") for name in ("key", "key", "quarters")
    )
    assert key.generate.data_dir == same.generate.data_dir != other.generate.data_dir
    assert key.generate.kept_steps == key.collect.timestep_schedule == built().collect.timestep_schedule
    assert built("timestep_schedule=quarters").generate.kept_steps == tuple(range(51))


def test_other_prompts_in_the_same_file_change_the_folder(folder: Path) -> None:
    before = built("prompts=file", "prompts.path=prompts.txt").generate.data_dir
    Path("prompts.txt").write_text("a lion\n")
    assert built("prompts=file", "prompts.path=prompts.txt").generate.data_dir != before


def test_prompts_of_a_file_are_its_lines_without_empty_ones(folder: Path) -> None:
    assert built("prompts=file", "prompts.path=prompts.txt").generate.prompts == ("a red fox", "an owl")
    Path("prompts.txt").write_bytes("\ufeffSüße Äpfel\r\n日本\n".encode())
    assert built("prompts=file", "prompts.path=prompts.txt").generate.prompts == ("Süße Äpfel", "日本")


# Bad values


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values of a configuration that are not containers of others."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        elif name not in ("_target_", "skeleton"):
            yield (*path, name)


ODD: list[Any] = [None, True, -1, 0, 1.5, float("nan"), float("inf"), "abc", "", [], [1, "a"], [-1], {}, {"a": 1}]


def one_line_or_settings(config: dict[str, Any], key: str) -> None:
    """A configuration either becomes settings, or an error of one line that names the key."""
    try:
        settings = build(config)
        settings.collect.subset(range(settings.generate.num_images), no_latents)
    except ConfigError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert key.split(".")[0] in message, f"{key}: {message}"


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g, o in OPTIONS if g not in ("model", "sampler", "experiment", "hparams_search")]
)
def test_no_odd_value_of_an_option_ends_in_a_traceback(folder: Path, group: str, option: str) -> None:
    config = composed(f"{group}={option}", *NEEDS.get((group, option), []))
    paths = list(leaves(config[group], (group,)))
    assert paths or option in PARAMETERLESS
    for path in paths:
        for value in [*ODD, 2**64]:
            changed = copy.deepcopy(config)
            changed[path[0]][path[1]] = value
            one_line_or_settings(changed, ".".join(path))


def test_no_odd_value_of_any_other_key_ends_in_a_traceback(folder: Path) -> None:
    config = composed()
    names = ["stage", "num_images", "seed", "data_dir", "generate_missing", "stats", "export_config", "plan"]
    groups = ("model", "sampler", "sensitivity", "calibration")
    paths = [(name,) for name in names] + list(leaves({group: config[group] for group in groups}))
    assert {("sampler", "image_size"), ("sensitivity", "group_sizes"), ("calibration", "images")} <= set(paths)
    more = [("keep_awake",), ("phase_bits",), ("collect", "batch_size"), ("shard", "index"), ("shard", "count")]
    for path in [*paths, *more]:
        for value in ODD:
            changed = copy.deepcopy(config)
            node = changed if len(path) == 1 else changed[path[0]]
            node[path[-1]] = value
            one_line_or_settings(changed, ".".join(path))


@pytest.mark.parametrize("name", ["collect", "sensitivity", "calibration", *(g for g in GROUPS if g != "experiment")])
def test_a_group_that_is_no_group_is_an_error_of_one_line(name: str) -> None:
    config = composed()
    for value in (None, 3, "abc", [], {}):
        one_line_or_settings({**config, name: value}, name)
    one_line_or_settings({key: value for key, value in config.items() if key != name}, name)


@pytest.mark.parametrize("seed", [2**32, 2**40])
@pytest.mark.parametrize("key", ["seed", "prompts.seed", "subset.seed", "timestep_schedule.seed"])
def test_a_seed_of_any_size_is_used_or_refused(key: str, seed: int) -> None:
    config = composed("subset=random", "timestep_schedule=ndtc")
    node = config if key == "seed" else config[key.split(".")[0]]
    node["seed"] = seed
    one_line_or_settings(config, key)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_images=abc"], ("num_images=abc", "integer")),
        (["num_images=1.5"], ("num_images=1.5", "integer")),
        (["num_images=true"], ("num_images=True", "integer")),
        (["num_images=0"], ("num_images=0", "1 or more")),
        (["seed=-1"], ("seed=-1", "0 or more")),
        (["sampler.num_steps=0"], ("sampler.num_steps=0", "1 or more")),
        (["sampler.num_steps=4.5"], ("sampler.num_steps=4.5", "integer")),
        (["sampler.batch_size=0"], ("sampler.batch_size=0", "1 or more")),
        (["sampler.batch_size=-2"], ("sampler.batch_size=-2", "1 or more")),
        (["sampler.cfg_weight=-1"], ("sampler.cfg_weight=-1", "0 or more")),
        (["sampler.cfg_weight=high"], ("sampler.cfg_weight=high", "number")),
        (["sampler.shift=0"], ("sampler.shift=0", "0.01 or more")),
        (["sampler.shift=1e-9"], ("sampler.shift=1e-09", "0.01 or more")),
        (["sampler.shift=1e300"], ("sampler.shift=1e+300", "100 or less")),
        (["sampler.cfg_weight=1e30"], ("sampler.cfg_weight=1e+30", "1000 or less")),
        (["sampler.num_steps=1000000000"], ("sampler.num_steps=1000000000", "10000 or less")),
        (["num_images=1000000000000"], ("num_images=1000000000000", "10000000 or less")),
        (["evaluation.num_images=1000000000"], ("evaluation.num_images=1000000000", "1000000 or less")),
        (["sampler.image_size=64"], ("sampler.image_size=64", "list")),
        (["sampler.image_size=[64,0]"], ("sampler.image_size=[64, 0]", "in pixels")),
        (["sampler.image_size=[64,60]", "model=sd3_medium"], ("sampler.image_size=[64, 60]", "multiple of 16")),
        (["sampler.image_size=[64,60]", "model=flux_dev"], ("sampler.image_size=[64, 60]", "multiple of 16")),
        (["sampler.image_size=[128,128]"], ("sampler.image_size=[128, 128]", "[64, 64]")),
        (["subset.num_images=0"], ("subset.num_images=0", "1 to 10")),
        (["subset.num_images=-3"], ("subset.num_images=-3", "1 to 10")),
        (["subset.num_images=11"], ("subset.num_images=11", "1 to 10")),
        (["num_images=2", "subset=list", "subset.ids=[0,2]"], ("subset.ids=2", "no such image")),
        (["timestep_schedule=list", "timestep_schedule.steps=[0,51]"], ("timestep_schedule.steps=51", "0 … 50")),
        (["timestep_schedule=list", "timestep_schedule.steps=[-1]"], ("timestep_schedule.steps=-1", "0 … 50")),
        (["timestep_schedule=list"], ("timestep_schedule.steps=[]",)),
        (["timestep_schedule=list", "timestep_schedule.steps=[a]"], ("timestep_schedule.steps=a", "integer")),
        (["timestep_schedule=list", "timestep_schedule.steps=3"], ("timestep_schedule.steps=3", "list")),
        (["timestep_schedule=uniform", "timestep_schedule.count=52"], ("timestep_schedule.count=52", "2 to 51")),
        (["timestep_schedule=uniform", "sampler.num_steps=4"], ("timestep_schedule.count=17", "2 to 5")),
        (["taps.kind=linar"], ("taps.kind=linar", "'linear'")),
        (["taps.include=['*.fc9']"], ("taps.include=*.fc9", "matches no layer", "fc")),
        (["taps.exclude=[mm_block_7]", "taps=block"], ("taps.exclude=mm_block_7", "'mm_block_")),
        (["taps.include=[mm_block_0.image.mlp.fc3]"], ("taps.include=mm_block_0.image.mlp.fc3", "fc2'")),
        (["analysis=uniform", "analysis.weight_bits=7"], ("analysis.weight_bits=7",)),
        (["analysis=range", "analysis.large=wide"], ("analysis.large=wide", "number")),
        (["storage.histogram_rows=0"], ("storage.histogram_rows=0", "1 or more")),
        (["storage=sampled", "storage.rows_per_image=0"], ("storage.rows_per_image=0", "1 or more")),
        (["storage=full", "storage.dtype=float32"], ("storage.dtype=float32", "float16 or bfloat16")),
        (["storage.samples=some"], ("storage.samples=some", "none, rows, all")),
        (["taps.cfg_halves=both"], ("taps.cfg_halves=both", "pooled, apart")),
        (["cache_dir=''"], ("cache_dir", "empty")),
        (["plan=''"], ("plan", "empty")),
        (["phase_bits=3"], ("phase_bits=3", "true or false")),
        (["sensitivity.images=0"], ("sensitivity.images=0", "1 or more")),
        (["sensitivity.steps=0"], ("sensitivity.steps=0", "1 or more")),
        (["sensitivity.group_sizes=[16]"], ("sensitivity.group_sizes=[16]", "32, 64, 128")),
        (["sensitivity.method=trials"], ("sensitivity.method=trials", "set sensitivity.of=output")),
        (["sensitivity.of=noise"], ("sensitivity.of=noise", "picture, latent, output")),
        (["sensitivity.probes=0"], ("sensitivity.probes=0", "1 or more")),
        (["sensitivity.group_sizes=[]"], ("sensitivity.group_sizes=[]", "32, 64, 128")),
        (["calibration.images=0"], ("calibration.images=0", "1 or more")),
        (["calibration.steps=-1"], ("calibration.steps=-1", "1 or more")),
        (["evaluation.num_images=-1"], ("evaluation.num_images=-1", "0 or more")),
        (["evaluation.steps=0"], ("evaluation.steps=0", "1 or more")),
        (["evaluation.seed=-1"], ("evaluation.seed=-1", "0 or more")),
        (["ranges=grouped", "ranges.groups=0"], ("ranges.groups=0", "1 or more")),
        (["ranges=polynomial", "ranges.degree=9"], ("ranges.degree=9", "1 to 8")),
        (["ranges._target_=calib.dataset.timesteps.key"], ("ranges.",)),
        (["quantizer=gptq", "+quantizer.dampening=1"], ("quantizer.dampening", "'damping'")),
        (["timestep_schedule=drift", "timestep_schedule.count=51"], ("timestep_schedule.count=51", "1 to 50")),
        (["timestep_schedule=drift", "timestep_schedule.images=0"], ("timestep_schedule.images=0", "1 or more")),
        (["timestep_schedule=drift", "dataset.steps=schedule"], ("dataset.steps=schedule", "drift")),
        (["stage=collect", "shard.count=2", "generate_missing=true"], ("generate_missing=true", "shard")),
        (["collect.batch_size=0"], ("collect.batch_size=0", "1 or more")),
        (["dataset.dtype=float8"], ("dataset.dtype=float8", "float16, bfloat16, float32")),
        (["dataset.steps=schedul"], ("dataset.steps=schedul", "all, schedule", "'schedule'")),
        (["dataset.format=zarr"], ("dataset.format=zarr", "hdf5, npz")),
        (["sampler.batch_size=two"], ("sampler.batch_size=two", "integer")),
        (["stage=generate", "shard.count=0"], ("shard.count=0", "1 or more")),
        (["stage=generate", "shard.index=1"], ("shard.index=1", "0 to 0")),
        (["stage=generate", "shard.index=-1", "shard.count=2"], ("shard.index=-1", "0 to 1")),
        (["stage=generate", "shard.index=a"], ("shard.index=a", "integer")),
        (["stage=collect", "shard.index=2", "shard.count=2"], ("shard.index=2", "0 to 1")),
        (["stage=generate", "shard.index=2", "shard.count=2"], ("shard.index=2", "0 to 1")),
        (["shard.count=2"], ("shard.count=2", "calib generate")),
        (["keep_awake=please"], ("keep_awake=please", "true or false")),
        (["report=pdf"], ("report=pdf", "html, none")),
        (["model.dtype=floot16"], ("model.dtype=floot16", "'float16'")),
        (["prompts.seed=-1"], ("prompts.seed=-1",)),
        (["subset=random", "subset.seed=-1"], ("subset.seed=-1",)),
        (["prompts=file"], ("prompts.path", "text file")),
        (["prompts=file", "prompts.path=none.txt"], ("prompts.path=none.txt", "cannot be read")),
        (["prompts=file", "prompts.path=empty.txt"], ("prompts.path=empty.txt", "no prompts")),
        (["prompts=file", "prompts.path=binary.txt"], ("prompts.path=binary.txt", "UTF-8")),
        (["prompts=file", "prompts.path=."], ("prompts.path=.", "cannot be read")),
        (["+numimages=3"], ("numimages", "'num_images'")),
        (["+timestep_schedule.steps=[0]"], ("timestep_schedule.steps", "no parameter")),
        (["+sampler.steps=9"], ("sampler.steps", "'num_steps'")),
        (["generate_missing=maybe"], ("generate_missing=maybe", "true or false")),
        (["stage=colect"], ("stage=colect", "'collect'")),
        (["analysis._target_=calib.analysis.rang.plan_layer"], ("analysis._target_", "names no function")),
        (["analysis._target_=calib.dataset.timesteps.key"], ("analysis.",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_is_named_with_what_is_allowed(folder: Path, overrides: list[str], words: Sequence[str]) -> None:
    Path("empty.txt").write_text("\n  \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as error:
        built(*overrides).collect.subset(range(2), no_latents)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (2.5, float, 2.5),
        ("a", str, "a"),
        (True, bool, True),
        (None, int | None, None),
        (4, int | None, 4),
        ("float16", StateDtype, StateDtype.FLOAT16),
        ("bfloat16", ModelDtype, ModelDtype.BFLOAT16),
        ([1, 2], Sequence[int], (1, 2)),
        ([], tuple[str, ...], ()),
        ([1, 2.5], list[float], (1.0, 2.5)),
    ],
)
def test_values_of_the_right_type_pass_and_have_that_type(value: Any, annotation: Any, expected: Any) -> None:
    found = check("key", value, annotation)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3.0, int),
        (True, int),
        (True, float),
        ("3", int),
        ("x", float),
        (float("nan"), float),
        (float("inf"), float),
        (3, str),
        (None, int),
        (None, str),
        (0, bool),
        ("yes", bool),
        ("float8", StateDtype),
        (None, StateDtype),
        (3, Sequence[int]),
        ("12", Sequence[int]),
        ([1, "a"], Sequence[int]),
        ([None], Sequence[str]),
        ({"a": 1}, Sequence[str]),
        ("x", int | None),
    ],
)
def test_values_of_another_type_are_refused(value: Any, annotation: Any) -> None:
    with pytest.raises(ConfigError, match=r"some\.key"):
        check("some.key", value, annotation)


def test_a_folder_that_cannot_be_made_is_refused_and_one_that_can_is_left_unmade(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for bad in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ConfigError, match=r"data_dir=.*cannot be written"):
            check_writable("data_dir", bad)
    check_writable("data_dir", tmp_path / "new" / "deep")
    check_writable("data_dir", tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
