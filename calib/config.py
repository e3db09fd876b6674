"""From a composed configuration to typed settings; every bad value is caught here, before any model is loaded.

Options of a group are functions named by ``_target_``; their parameters are checked against the function's own
signature, so an option of the user's own gets the same care as one of calib's.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from calib import subsets, timesteps
from calib.activations.samples import SampleSettings
from calib.activations.step import CollectSettings
from calib.activations.taps import TapSelection, tap_points
from calib.analysis.heuristic import Heuristic
from calib.analysis.layers import PROBE
from calib.analysis.plan import GROUP_SIZES, LayerPlan
from calib.analysis.ranges import Observed, RangeRule, StepRanges
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype
from calib.errors import ConfigError, suggest
from calib.files import short_hash
from calib.prompts import report_duplicates
from calib.quantization.quantizer import Quantizer, Work
from calib.settings import (
    CalibrationSettings,
    DatasetSettings,
    EvaluationSettings,
    ImageChooser,
    SensitivitySettings,
    Settings,
    Stage,
    StorageSettings,
    StoredStates,
)
from calib.typed import at_least, bind, fill, typed

import mlx.core as mx
import numpy as np
from diffusionkit.mlx.mmdit import MMDiT

T = TypeVar("T")

#: Key of a ``model`` option that names a function building its transformer without weights, so that layer patterns
#: (and the sampler's settings) are checked before anything is loaded. An option may leave it out.
SKELETON = "skeleton"

#: Top-level keys of a configuration.
GROUPS = (
    *("collect", "shard", "model", "prompts", "sampler", "dataset", "timestep_schedule", "subset", "taps", "storage"),
    *("analysis", "ranges", "sensitivity", "quantizer", "calibration", "evaluation"),
)
KEYS = (
    *(
        "stage",
        "swept",
        "num_images",
        "seed",
        "data_dir",
        "cache_dir",
        "generate_missing",
        "keep_awake",
        "stats",
        "export_config",
        "phase_bits",
        "plan",
    ),
    *GROUPS,
)
#: Of these results do not depend.
BESIDES = ("swept", "cache_dir", "keep_awake")


def build(config: Mapping[str, Any], multirun: bool = False) -> Settings:
    """Check a composed configuration (plain containers, resolved) and turn it into :class:`Settings`."""
    for name in config:
        if name not in KEYS:
            raise ConfigError(f"{name}: no such key.{suggest(name, KEYS)}")
    for name in KEYS:
        if name not in config:
            raise ConfigError(f"{name}: missing; leave out what removes it")
        if name in GROUPS and not isinstance(config[name], Mapping):
            raise ConfigError.bad_value(name, config[name], f"must be a group of keys, e.g. {name}.key=value")
    stage = typed("stage", config["stage"], Stage)
    num_images, seed = typed("num_images", config["num_images"], int), typed("seed", config["seed"], int)
    at_least("num_images", num_images, 1)
    at_least("seed", seed, 0)
    sampler = _sampler(config["sampler"])
    dataset = fill("dataset", config["dataset"], DatasetSettings)
    model = config["model"]
    image_size = sampler.image_size
    parameters = {name: value for name, value in model.items() if name != SKELETON}
    load = bind("model", parameters, given=("shift", "image_size"))
    prompts = _prompts(config["prompts"])
    taps = fill("taps", config["taps"], TapSelection)
    skeleton = None
    if SKELETON in model:
        build_skeleton = bind("model", {**parameters, "_target_": model[SKELETON]}, given=("image_size", "cfg_weight"))
        skeleton = cache(partial(build_skeleton, image_size=image_size, cfg_weight=sampler.cfg_weight))
        tap_points(skeleton(), taps)
    generate_missing = typed("generate_missing", config["generate_missing"], bool | None)
    subset = dict(config["subset"])
    requested = typed("subset.num_images", subset.pop("num_images", None), int | None)
    shard = _shard(config["shard"], stage)
    parts = stage is Stage.COLLECT and shard.count > 1
    if generate_missing is None:
        generate_missing = (multirun and not parts) or stage is Stage.RUN
    if parts and generate_missing:
        raise ConfigError("generate_missing=true: a shard does not draw what it collects; calib generate first")
    choose_images = _chooser(subset, requested)
    if stage in (Stage.RUN, Stage.COLLECT) and generate_missing:
        choose_images(range(num_images), None)
    elif requested is not None:
        at_least("subset.num_images", requested, 1)
    steps = _steps(config["timestep_schedule"], sampler.num_steps)
    data_dir = _data_dir(config, prompts, sampler, dataset, steps)
    evaluation = _evaluation(config, sampler)
    return Settings(
        stage=stage,
        model_name=typed("model.name", model.get("name"), str),
        load_model=partial(load, shift=sampler.shift, image_size=image_size),
        skeleton=skeleton,
        prompts=prompts,
        num_images=num_images,
        seed=seed,
        data_dir=data_dir,
        cache_dir=_path("cache_dir", config["cache_dir"]) or Path("calibration_cache"),
        sampler=sampler,
        dataset=dataset,
        steps=steps,
        choose_images=choose_images,
        taps=taps,
        collect=_collect(config, seed),
        heuristic=_heuristic(config["analysis"]),
        ranges=_ranges(config["ranges"]),
        phase_bits=typed("phase_bits", config["phase_bits"], bool),
        sensitivity=_sensitivity(config["sensitivity"]),
        quantizer=_quantizer(config["quantizer"], skeleton),
        calibration=_calibration(config["calibration"]),
        evaluation=evaluation,
        evaluation_dir=data_dir.parent / _evaluation_name(config, prompts, sampler, evaluation),
        generate_missing=generate_missing,
        shard=shard,
        keep_awake=typed("keep_awake", config["keep_awake"], bool),
        stats=_path("stats", config["stats"]),
        plan=_path("plan", config["plan"]),
        export_config=_path("export_config", config["export_config"]),
        given_data_dir=_path("data_dir", config["data_dir"]),
        fingerprint=short_hash([{k: v for k, v in config.items() if k not in BESIDES}, prompts], digits=16),
    )


def _sampler(node: Mapping[str, Any]) -> SamplerSettings:
    sampler = fill("sampler", node, SamplerSettings)
    at_least("sampler.num_steps", sampler.num_steps, 1)
    if sampler.batch_size is not None:
        at_least("sampler.batch_size", sampler.batch_size, 1)
    at_least("sampler.cfg_weight", sampler.cfg_weight, 0)
    if sampler.shift <= 0:
        raise ConfigError.bad_value("sampler.shift", sampler.shift, "must be more than 0")
    if len(sampler.image_size) != 2 or any(size < 16 or size % 16 for size in sampler.image_size):
        allowed = "must be [height, width], each a multiple of 16"
        raise ConfigError.bad_value("sampler.image_size", list(sampler.image_size), allowed)
    return sampler


def _prompts(node: Mapping[str, Any]) -> tuple[str, ...]:
    prompts = tuple(bind("prompts", node)())
    if not prompts:
        raise ConfigError("prompts: the list of prompts is empty; give at least one")
    report_duplicates(prompts)
    return prompts


def _shard(node: Mapping[str, Any], stage: Stage) -> Shard:
    shard = fill("shard", node, Shard)
    at_least("shard.count", shard.count, 1)
    if not 0 <= shard.index < shard.count:
        raise ConfigError.bad_value("shard.index", shard.index, f"must be 0 to {shard.count - 1} (shard.count - 1)")
    if shard.count > 1 and stage not in (Stage.GENERATE, Stage.COLLECT):
        allowed = "only calib generate and calib collect are done in shards"
        raise ConfigError.bad_value("shard.count", shard.count, allowed)
    return shard


def _data_dir(
    config: Mapping[str, Any],
    prompts: Sequence[str],
    sampler: SamplerSettings,
    dataset: DatasetSettings,
    steps: Sequence[int] | timesteps.Drift,
) -> Path:
    """The configured folder, or one named by what makes the images: model, prompts, sampler, seed and storage."""
    given = _path("data_dir", config["data_dir"])
    if given is not None:
        return given
    by_schedule = dataset.steps is StoredStates.SCHEDULE
    if isinstance(steps, timesteps.Drift):
        if by_schedule:
            allowed = "timestep_schedule=drift chooses among stored states: it needs all of them"
            raise ConfigError.bad_value("dataset.steps", dataset.steps, allowed)
        steps = ()
    drawn_by = {name: value for name, value in asdict(sampler).items() if name != "batch_size"}
    stored = asdict(dataset) | ({"steps": list(steps)} if by_schedule else {})
    made_by = [dict(config["model"]), list(prompts), drawn_by, config["seed"], stored]
    model, source = config["model"]["name"], str(config["prompts"]["_target_"]).rpartition(".")[2].removeprefix("from_")
    return Path("calibration_data") / f"{model}-{source}-{sampler.num_steps}steps-{short_hash(made_by)}"


def _steps(node: Mapping[str, Any], num_steps: int) -> tuple[int, ...] | timesteps.Drift:
    schedule = bind("timestep_schedule", node, given=("num_steps",))
    steps = schedule(num_steps=num_steps)
    return steps if isinstance(steps, timesteps.Drift) else timesteps.checked(steps, num_steps)


def _chooser(node: Mapping[str, Any], requested: int | None) -> ImageChooser:
    """The images of a dataset that are collected; those whose latents decide only where ``latents`` are given."""
    choose = bind("subset", node, given=("image_ids", "num_images", subsets.LATENTS))
    by_latents = subsets.LATENTS in inspect.signature(choose).parameters

    def chosen(image_ids: Sequence[int], latents: subsets.Latents | None) -> list[int]:
        count = subsets.resolve_count(requested, len(image_ids))
        if by_latents and latents is None:
            return list(image_ids[:count])  # which ones can be told once they are drawn
        more = {subsets.LATENTS: latents} if by_latents else {}
        found: list[int] = choose(image_ids=image_ids, num_images=count, **more)
        return found

    return chosen


def _collect(config: Mapping[str, Any], seed: int) -> CollectSettings:
    batch_size = typed("collect.batch_size", config["collect"].get("batch_size"), int | None)
    if batch_size is not None:
        at_least("collect.batch_size", batch_size, 1)
    storage = fill("storage", config["storage"], StorageSettings)
    if storage.histogram_rows is not None:
        at_least("storage.histogram_rows", storage.histogram_rows, 1)
    at_least("storage.rows_per_image", storage.rows_per_image, 1)
    if storage.dtype is StateDtype.FLOAT32:
        raise ConfigError.bad_value("storage.dtype", storage.dtype, "must be float16 or bfloat16, or null")
    samples = SampleSettings(storage.samples, storage.rows_per_image, storage.dtype)
    halves = fill("taps", config["taps"], TapSelection).cfg_halves
    return CollectSettings(batch_size, storage.histogram_rows, seed, halves, samples)


def _heuristic(node: Mapping[str, Any]) -> Heuristic:
    heuristic = bind("analysis", node, given=("layer", "layers", "sensitivities"))
    if "layers" in inspect.signature(heuristic).parameters:
        return Heuristic(whole=heuristic)
    result = heuristic(PROBE)
    if not isinstance(result, LayerPlan):
        raise ConfigError.bad_value("analysis._target_", node["_target_"], "must return a LayerPlan")
    return Heuristic(by_layer=heuristic)


def _ranges(node: Mapping[str, Any]) -> RangeRule:
    rule = bind("ranges", node, given=("observed",))
    levels = np.linspace(1, 0.1, 5)
    ranges = rule(Observed(np.arange(5), -levels, levels, levels, levels))
    if not isinstance(ranges, StepRanges):
        raise ConfigError.bad_value("ranges._target_", node["_target_"], "must return StepRanges")
    return rule


def _quantizer(node: Mapping[str, Any], skeleton: Callable[[], MMDiT] | None) -> Quantizer:
    """The quantizer, tried on no layers at all: what it says of its parameters it says now."""
    quantizer = bind("quantizer", node, given=("work",))
    if skeleton is not None:
        quantizer(Work(skeleton(), {}, {}, mx.float16, lambda *_: None, lambda _: None, lambda *_: None))
    return quantizer


def _sensitivity(node: Mapping[str, Any]) -> SensitivitySettings:
    settings = fill("sensitivity", node, SensitivitySettings)
    at_least("sensitivity.images", settings.images, 1)
    at_least("sensitivity.steps", settings.steps, 1)
    if not settings.group_sizes or not set(settings.group_sizes) <= set(GROUP_SIZES):
        allowed = f"MLX has groups of {', '.join(map(str, GROUP_SIZES))}"
        raise ConfigError.bad_value("sensitivity.group_sizes", list(settings.group_sizes), allowed)
    return settings


def _calibration(node: Mapping[str, Any]) -> CalibrationSettings:
    settings = fill("calibration", node, CalibrationSettings)
    at_least("calibration.images", settings.images, 1)
    at_least("calibration.steps", settings.steps, 1)
    return settings


def _evaluation(config: Mapping[str, Any], sampler: SamplerSettings) -> EvaluationSettings:
    settings = fill("evaluation", config["evaluation"], EvaluationSettings)
    at_least("evaluation.num_images", settings.num_images, 0)
    at_least("evaluation.seed", settings.seed, 0)
    at_least("evaluation.steps", settings.steps, 1)
    return replace(settings, steps=min(settings.steps, sampler.num_steps))


def _evaluation_name(
    config: Mapping[str, Any], prompts: Sequence[str], sampler: SamplerSettings, evaluation: EvaluationSettings
) -> str:
    """The folder of the full-precision pictures, named by what makes them."""
    drawn_by = {name: value for name, value in asdict(sampler).items() if name != "batch_size"}
    made_by = [dict(config["model"]), list(prompts), drawn_by, evaluation.seed]
    return f"{config['model']['name']}-evaluation-{sampler.num_steps}steps-{short_hash(made_by)}"


def _path(key: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not typed(key, value, str):
        raise ConfigError(f"{key}: is empty; name a path, or leave it out")
    return Path(value).expanduser()


def check_writable(key: str, folder: Path) -> None:
    """Raise unless ``folder`` is, or could be made, a folder that this process can write to; leaves nothing."""
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        probe = existing / f".calib-probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        allowed = f"cannot be written ({error.strerror}); choose another folder"
        raise ConfigError.bad_value(key, folder, allowed) from None
