"""From a composed configuration to typed settings; every bad value is caught here, before any model is loaded.

Options of a group are functions named by ``_target_``; their parameters are checked against the function's own
signature, so an option of the user's own gets the same care as one of calib's.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from calib.activations.samples import SampleSettings
from calib.activations.step import CollectSettings
from calib.activations.taps import tap_points
from calib.analysis.heuristic import Heuristic
from calib.analysis.plan import GROUP_SIZES
from calib.analysis.ranges import Observed, RangeRule, StepRanges
from calib.base.errors import ConfigError, suggest
from calib.base.files import short_hash
from calib.base.values import at_least, bind_target, build_dataclass, check, group
from calib.dataset import subsets, timesteps
from calib.dataset.prompts import report_duplicates
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype
from calib.quantization.quantizer import Quantizer, QuantizerInput
from calib.stages import Stage
from calib.stages.settings import (
    DERIVED,
    Analyze,
    Collect,
    DatasetSettings,
    Evaluate,
    EvaluationSettings,
    Generate,
    ImageChooser,
    Job,
    KeptStates,
    ModelChoice,
    Quantize,
    Settings,
    StorageSettings,
)

import mlx.core as mx
import numpy as np

T = TypeVar("T")

#: Key of a ``model`` option that names a function building its transformer without weights, so that layer patterns
#: (and the sampler's settings) are checked before anything is loaded. An option may leave it out.
SKELETON = "skeleton"


def _marked(kind: type, name: str, mark: str) -> bool:
    return mark in get_args(get_type_hints(kind, include_extras=True)[name])


#: All top-level keys of a configuration.
KEYS = tuple(
    f.name
    for kind in (Job, Generate, Collect, Analyze, Quantize, Evaluate)
    for f in fields(kind)
    if not _marked(kind, f.name, DERIVED)
)
#: Keys that do not affect results: left out of fingerprints and of folder names.
WITHOUT_EFFECT = ("swept", "cache_dir", "keep_awake", "report")

#: Where options lay in calib 0.1.0. Fingerprints are of these names: what was finished before stays finished.
FORMER_PLACES = {
    "calib.dataset.prompts.": "calib.prompts.",
    "calib.dataset.timesteps.": "calib.timesteps.",
    "calib.dataset.subsets.": "calib.subsets.",
    "calib.analysis.heuristics.": "calib.analysis.",
}


def build(config: Mapping[str, Any], multirun: bool = False) -> Settings:
    """Check a composed configuration (plain containers, resolved) and turn it into :class:`Settings`."""
    for name in config:
        if name not in KEYS:
            raise ConfigError(f"{name}: no such key.{suggest(name, KEYS)}")
    for name in KEYS:
        if name not in config:
            raise ConfigError(f"{name}: missing; leave out what removes it")
    stage = check("stage", config["stage"], Stage)
    sampler, prompts = _sampler(config["sampler"]), _prompts(config["prompts"])
    model = _model(config["model"], sampler)
    job = _filled(
        Job,
        config,
        model=model,
        shard=_shard(config["shard"], stage),
        cache_dir=check("cache_dir", config["cache_dir"], Path | None) or Path("calibration_cache"),
    )
    steps = _steps(config["timestep_schedule"], sampler.num_steps)
    dataset = build_dataclass("dataset", config["dataset"], DatasetSettings)
    data_dir = check("data_dir", config["data_dir"], Path | None)
    collect = _collect(config, steps, job, multirun)
    generate = _filled(
        Generate,
        config,
        prompts=prompts,
        sampler=sampler,
        data_dir=data_dir or _dataset_folder(config, prompts, sampler, dataset, steps),
        given_data_dir=data_dir,
        kept_steps=_kept_steps(dataset, steps, sampler.num_steps),
    )
    if model.skeleton is not None:
        tap_points(model.skeleton(), collect.taps)
    if stage in (Stage.RUN, Stage.COLLECT) and collect.generate_missing:
        collect.subset(range(generate.num_images), None)
    evaluation = build_dataclass("evaluation", config["evaluation"], EvaluationSettings)
    beside = generate.data_dir.parent / _evaluation_folder(config, prompts, sampler, evaluation)
    evaluation = replace(evaluation, steps=min(evaluation.steps, sampler.num_steps))
    analyze = _filled(Analyze, config, analysis=_heuristic(config["analysis"]), ranges=_ranges(config["ranges"]))
    _check_group_sizes(analyze.sensitivity.group_sizes)
    return Settings(
        job,
        generate,
        collect,
        analyze,
        _filled(Quantize, config, quantizer=_quantizer(config["quantizer"], model)),
        Evaluate(evaluation, beside),
        fingerprint(config, prompts),
    )


def _filled(kind: type[T], config: Mapping[str, Any], **made: Any) -> T:
    """The stage's settings: what was ``made``, and every other field from the key of its name."""
    hints = get_type_hints(kind, include_extras=True)
    return kind(**made, **{name: check(name, config[name], hints[name]) for name in hints if name not in made})


def fingerprint(config: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """Hash of all that results depend on (16 hex digits)."""

    def stable(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        return {key: _former(str(value)) if key == "_target_" else stable(value) for key, value in node.items()}

    return short_hash([{k: stable(v) for k, v in config.items() if k not in WITHOUT_EFFECT}, prompts], digits=16)


def _former(target: str) -> str:
    for now, before in FORMER_PLACES.items():
        if target.startswith(now):
            return before + target.removeprefix(now)
    return target


def _model(node: Any, sampler: SamplerSettings) -> ModelChoice:
    node = group("model", node)
    parameters = {name: value for name, value in node.items() if name != SKELETON}
    load = bind_target("model", parameters, given=("shift", "image_size"))
    skeleton = None
    if SKELETON in node:
        named = {**parameters, "_target_": node[SKELETON]}
        build_skeleton = bind_target("model", named, given=("image_size", "cfg_weight"))
        skeleton = cache(partial(build_skeleton, image_size=sampler.image_size, cfg_weight=sampler.cfg_weight))
    return ModelChoice(
        check("model.name", node.get("name"), str),
        partial(load, shift=sampler.shift, image_size=sampler.image_size),
        skeleton,
    )


def _sampler(node: Any) -> SamplerSettings:
    sampler = build_dataclass("sampler", node, SamplerSettings)
    if sampler.shift <= 0:
        raise ConfigError.bad_value("sampler.shift", sampler.shift, "must be more than 0")
    if len(sampler.image_size) != 2 or any(size < 16 or size % 16 for size in sampler.image_size):
        allowed = "must be [height, width], each a multiple of 16"
        raise ConfigError.bad_value("sampler.image_size", list(sampler.image_size), allowed)
    return sampler


def _prompts(node: Any) -> tuple[str, ...]:
    prompts = tuple(bind_target("prompts", group("prompts", node))())
    if not prompts:
        raise ConfigError("prompts: the list of prompts is empty; give at least one")
    report_duplicates(prompts)
    return prompts


def _shard(node: Any, stage: Stage) -> Shard:
    shard = build_dataclass("shard", node, Shard)
    at_least("shard.count", shard.count, 1)
    if not 0 <= shard.index < shard.count:
        raise ConfigError.bad_value("shard.index", shard.index, f"must be 0 to {shard.count - 1} (shard.count - 1)")
    if shard.count > 1 and stage not in (Stage.GENERATE, Stage.COLLECT):
        allowed = "only calib generate and calib collect are done in shards"
        raise ConfigError.bad_value("shard.count", shard.count, allowed)
    return shard


def _collect(
    config: Mapping[str, Any], steps: tuple[int, ...] | timesteps.DriftSchedule, job: Job, multirun: bool
) -> Collect:
    generate_missing = check("generate_missing", config["generate_missing"], bool | None)
    parts = job.stage is Stage.COLLECT and job.shard.count > 1
    if generate_missing is None:
        generate_missing = (multirun and not parts) or job.stage is Stage.RUN
    if parts and generate_missing:
        raise ConfigError("generate_missing=true: a shard does not draw what it collects; calib generate first")
    later = job.stage in (Stage.RUN, Stage.COLLECT) and generate_missing  # the subset is tried on the images to be
    made = {"timestep_schedule": steps, "generate_missing": generate_missing}
    return _filled(Collect, config, collect=_gathering(config), subset=_chooser(config["subset"], later), **made)


def _dataset_folder(
    config: Mapping[str, Any],
    prompts: Sequence[str],
    sampler: SamplerSettings,
    dataset: DatasetSettings,
    steps: Sequence[int] | timesteps.DriftSchedule,
) -> Path:
    """The folder that is named by what makes the images: model, prompts, sampler, seed and storage."""
    by_schedule = dataset.steps is KeptStates.SCHEDULE
    if isinstance(steps, timesteps.DriftSchedule):
        if by_schedule:
            allowed = "timestep_schedule=drift chooses among stored states: it needs all of them"
            raise ConfigError.bad_value("dataset.steps", dataset.steps, allowed)
        steps = ()
    stored = asdict(dataset) | ({"steps": list(steps)} if by_schedule else {})
    made_by = [dict(config["model"]), list(prompts), _drawn_by(sampler), config["seed"], stored]
    model, source = config["model"]["name"], str(config["prompts"]["_target_"]).rpartition(".")[2].removeprefix("from_")
    return Path("calibration_data") / f"{model}-{source}-{sampler.num_steps}steps-{short_hash(made_by)}"


def _evaluation_folder(
    config: Mapping[str, Any], prompts: Sequence[str], sampler: SamplerSettings, evaluation: EvaluationSettings
) -> str:
    """The name of the folder of the full-precision pictures, by what makes them."""
    made_by = [dict(config["model"]), list(prompts), _drawn_by(sampler), evaluation.seed]
    return f"{config['model']['name']}-evaluation-{sampler.num_steps}steps-{short_hash(made_by)}"


def _drawn_by(sampler: SamplerSettings) -> dict[str, Any]:
    """Of the sampler's settings those that make an image what it is."""
    return {name: value for name, value in asdict(sampler).items() if name != "batch_size"}


def _steps(node: Any, num_steps: int) -> tuple[int, ...] | timesteps.DriftSchedule:
    schedule = bind_target("timestep_schedule", group("timestep_schedule", node), given=("num_steps",))
    steps = schedule(num_steps=num_steps)
    return steps if isinstance(steps, timesteps.DriftSchedule) else timesteps.checked(steps, num_steps)


def _kept_steps(
    dataset: DatasetSettings, steps: tuple[int, ...] | timesteps.DriftSchedule, num_steps: int
) -> tuple[int, ...]:
    if dataset.steps is KeptStates.SCHEDULE and not isinstance(steps, timesteps.DriftSchedule):
        return steps
    return tuple(range(num_steps + 1))


def _chooser(node: Any, checked_later: bool) -> ImageChooser:
    """The images of a dataset that are collected; those whose latents decide only where ``latents`` are given."""
    node = dict(group("subset", node))
    requested = check("subset.num_images", node.pop("num_images", None), int | None)
    if requested is not None and not checked_later:
        at_least("subset.num_images", requested, 1)
    choose = bind_target("subset", node, given=("image_ids", "num_images", subsets.LATENTS))
    by_latents = subsets.LATENTS in inspect.signature(choose).parameters

    def chosen(image_ids: Sequence[int], latents: subsets.Latents | None) -> list[int]:
        count = subsets.resolve_count(requested, len(image_ids))
        if by_latents and latents is None:
            return list(image_ids[:count])  # which ones can be told once they are drawn
        more = {subsets.LATENTS: latents} if by_latents else {}
        found: list[int] = choose(image_ids=image_ids, num_images=count, **more)
        return found

    return chosen


def _gathering(config: Mapping[str, Any]) -> CollectSettings:
    batch_size = check("collect.batch_size", group("collect", config["collect"]).get("batch_size"), int | None)
    if batch_size is not None:
        at_least("collect.batch_size", batch_size, 1)
    storage = build_dataclass("storage", config["storage"], StorageSettings)
    if storage.dtype is StateDtype.FLOAT32:
        raise ConfigError.bad_value("storage.dtype", storage.dtype, "must be float16 or bfloat16, or null")
    samples = SampleSettings(storage.samples, storage.rows_per_image, storage.dtype)
    halves = check("taps", config["taps"], get_type_hints(Collect)["taps"]).cfg_halves
    return CollectSettings(batch_size, storage.histogram_rows, config["seed"], halves, samples)


def _heuristic(node: Any) -> Heuristic:
    """The heuristic; one that looks at single layers is tried on a layer that no model has."""
    node = group("analysis", node)
    return Heuristic.of(bind_target("analysis", node, given=Heuristic.GIVEN), f"analysis._target_={node['_target_']}")


def _ranges(node: Any) -> RangeRule:
    node = group("ranges", node)
    rule = bind_target("ranges", node, given=("observed",))
    levels = np.linspace(1, 0.1, 5)
    ranges = rule(Observed(np.arange(5), -levels, levels, levels, levels))
    if not isinstance(ranges, StepRanges):
        raise ConfigError.bad_value("ranges._target_", node["_target_"], "must return StepRanges")
    return rule


def _quantizer(node: Any, model: ModelChoice) -> Quantizer:
    """The quantizer, tried on no layers at all: what it says of its parameters it says now."""
    quantizer = bind_target("quantizer", group("quantizer", node), given=("work",))
    if model.skeleton is not None:
        quantizer(QuantizerInput.without_layers(model.skeleton(), mx.float16))
    return quantizer


def _check_group_sizes(sizes: Sequence[int]) -> None:
    if not sizes or not set(sizes) <= set(GROUP_SIZES):
        allowed = f"MLX has groups of {', '.join(map(str, GROUP_SIZES))}"
        raise ConfigError.bad_value("sensitivity.group_sizes", list(sizes), allowed)
