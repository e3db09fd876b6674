"""Build typed settings from a composed configuration; every bad value is reported here, before a model is loaded."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from calib.activations.samples import SampleSettings
from calib.activations.step import CollectSettings
from calib.activations.taps import TapSelection, tap_points
from calib.analysis.sensitivities import Of
from calib.base.affine import GROUP_SIZES
from calib.base.errors import ConfigError, suggest
from calib.base.files import checksum, short_hash
from calib.base.targets import former_place, target_of
from calib.base.values import at_least, build_dataclass, check, group
from calib.dataset import timesteps
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype
from calib.evaluation.measures import DEFAULT, MEASURES, Sources, check_names, check_sources
from calib.runs.record import WITHOUT_EFFECT
from calib.stages import Stage
from calib.stages.options import (
    categories_of,
    chooser_of,
    heuristic_of,
    model_choice,
    model_of,
    prompts_of,
    quantizer_of,
    ranges_of,
    schedule_of,
)
from calib.stages.settings import (
    DERIVED,
    Analyze,
    CalibrationSettings,
    Collect,
    DatasetSettings,
    Evaluate,
    EvaluationSettings,
    Generate,
    Job,
    KeptStates,
    Method,
    Quantize,
    SensitivitySettings,
    Settings,
    StorageSettings,
)

T = TypeVar("T")

#: Images that calib 0.2.0 calibrated on at most where nothing was said.
FEWER = 32
#: Quantizers that take no stored states.
REPLAY_NOTHING = ("rtn.quantize", "fit.quantize", "smooth.quantize", "percentile.quantize")


def _marked(kind: type, name: str, mark: str) -> bool:
    return mark in get_args(get_type_hints(kind, include_extras=True)[name])


#: All top-level keys of a configuration.
KEYS = tuple(
    f.name
    for kind in (Job, Generate, Collect, Analyze, Quantize, Evaluate)
    for f in fields(kind)
    if not _marked(kind, f.name, DERIVED)
)


def build(config: Mapping[str, Any], multirun: bool = False) -> Settings:
    """Check a composed configuration (plain containers, resolved) and build :class:`Settings` from it.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not allowed.
    """
    for name in config:
        if name not in KEYS:
            raise ConfigError(f"{name}: no such key.{suggest(name, KEYS)}")
    for name in KEYS:
        if name not in config:
            raise ConfigError(f"{name}: missing; leave out what removes it")
    stage = check("stage", config["stage"], Stage)
    sampler, prompts = _sampler(config["sampler"]), prompts_of(config["prompts"])
    model = model_choice(config["model"], sampler)
    job = _filled(
        Job,
        config,
        model=model,
        shard=_shard(config["shard"], stage),
        cache_dir=check("cache_dir", config["cache_dir"], Path | None) or Path("calibration_cache"),
    )
    steps = schedule_of(config["timestep_schedule"], sampler.num_steps)
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
    evaluation = _evaluation(config["evaluation"], job.cache_dir)
    beside = generate.data_dir.parent / _evaluation_folder(config, prompts, sampler, evaluation)
    evaluation = replace(evaluation, steps=min(evaluation.steps, sampler.num_steps))
    ranges = ranges_of(config["ranges"], steps, sampler.num_steps, stage is Stage.RUN)
    analyze = _filled(Analyze, config, analysis=heuristic_of(config["analysis"]), ranges=ranges)
    _check_sensitivity(analyze.sensitivity)
    quantize = _filled(Quantize, config, quantizer=quantizer_of(config["quantizer"], model))
    return Settings(
        job,
        generate,
        collect,
        analyze,
        quantize,
        Evaluate(evaluation, beside, categories_of(config["prompts"], evaluation.by)),
        fingerprint(config, prompts, analyze.analysis.measures, quantize.calibration.images),
    )


def _filled(kind: type[T], config: Mapping[str, Any], **made: Any) -> T:
    """Build settings of type ``kind``: the fields in ``made``, and every other field from the key of its name."""
    hints = get_type_hints(kind, include_extras=True)
    return kind(**made, **{name: check(name, config[name], hints[name]) for name in hints if name not in made})


def fingerprint(config: Mapping[str, Any], prompts: Sequence[str], measures: bool, calibrated: int) -> str:
    """Hash of everything in the configuration that results depend on (16 hex digits).

    Options of calib's own count under their import paths of calib 0.1.0, so that what was finished stays finished;
    of a function of the user's own its code counts, too: the file in which it is. ``measures``: whether sensitivities
    are measured; ``calibrated``: images calibrated on at most.
    """

    def stable(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        found = {key: former_place(str(value)) if key == "_target_" else stable(value) for key, value in node.items()}
        file = _file_of_user(node.get("_target_"))
        return found if file is None else found | {"code": checksum(file)}

    counted = {key: stable(value) for key, value in config.items() if key not in WITHOUT_EFFECT}
    counted["model"] = stable(model_of(config["model"]))
    if not measures:  # keys that calib 0.2.0 did not have
        counted["sensitivity"] = {
            k: v for k, v in counted["sensitivity"].items() if k not in ("method", "of", "probes")
        }
    if calibrated == CalibrationSettings.images and _calibrates_alike(config):
        counted["calibration"] = {**counted["calibration"], "images": FEWER}
    # Keys that calib 0.3.0 did not have, at what it did.
    asked = {"metrics": list(DEFAULT), "reference": None, "clip": None, "inception": None, "by": None}
    counted["evaluation"] = {k: v for k, v in counted["evaluation"].items() if k not in asked or v != asked[k]}
    if not counted["quantizer"].get("search", True):  # grids as calib 0.2.0 had them
        counted["quantizer"] = {k: v for k, v in counted["quantizer"].items() if k != "search"}
    return short_hash([counted, prompts], digits=16)


def _calibrates_alike(config: Mapping[str, Any]) -> bool:
    """Whether a quantizer calibrates on the same images as with :data:`FEWER` at most: on none, or on no more."""
    stage, target = config["stage"], str(config["quantizer"].get("_target_"))
    if stage not in (Stage.RUN, Stage.QUANTIZE) or target.removeprefix("calib.quantization.") in REPLAY_NOTHING:
        return True
    drawn = config["generate_missing"] is not False  # else a run takes what its dataset has
    return stage == Stage.RUN and drawn and bool(config["num_images"] <= FEWER)


def _file_of_user(target: object) -> Path | None:
    """The source file of a function that is not calib's; None where there is none."""
    if target is None or str(target).startswith("calib."):
        return None
    with suppress(TypeError):  # built in
        file = inspect.getsourcefile(inspect.unwrap(target_of("option", {"_target_": target})))
        return Path(file) if file is not None and Path(file).is_file() else None
    return None


def _sampler(node: Any) -> SamplerSettings:
    sampler = build_dataclass("sampler", node, SamplerSettings)
    if len(sampler.image_size) != 2 or any(size < 1 for size in sampler.image_size):
        allowed = "must be [height, width], in pixels"
        raise ConfigError.bad_value("sampler.image_size", list(sampler.image_size), allowed)
    return sampler


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
    taps = build_dataclass("taps", config["taps"], TapSelection)
    storage = build_dataclass("storage", config["storage"], StorageSettings)
    return Collect(
        timestep_schedule=steps,
        subset=chooser_of(config["subset"], later),
        taps=taps,
        storage=storage,
        collect=_collect_settings(config, storage, taps),
        generate_missing=generate_missing,
    )


def _evaluation(node: Any, cache_dir: Path) -> EvaluationSettings:
    found = build_dataclass("evaluation", node, EvaluationSettings)
    check_names("evaluation.metrics", found.metrics, found.num_images or None)
    check_sources(found.metrics, Sources(cache_dir, found.clip, found.inception))
    if found.reference is not None and not any(MEASURES[name].sets for name in found.metrics):
        sets = ", ".join(name for name, measure in MEASURES.items() if measure.sets)
        allowed = f"it is what {sets} compare with; name one in evaluation.metrics, or leave it out"
        raise ConfigError.bad_value("evaluation.reference", found.reference, allowed)
    return found


def _dataset_folder(
    config: Mapping[str, Any],
    prompts: Sequence[str],
    sampler: SamplerSettings,
    dataset: DatasetSettings,
    steps: Sequence[int] | timesteps.DriftSchedule,
) -> Path:
    """The default folder of a dataset, named by what determines it: model, prompts, sampler, seed and storage."""
    by_schedule = dataset.steps is KeptStates.SCHEDULE
    if isinstance(steps, timesteps.DriftSchedule):
        if by_schedule:
            allowed = "timestep_schedule=drift chooses among stored states: it needs all of them"
            raise ConfigError.bad_value("dataset.steps", dataset.steps, allowed)
        steps = ()
    stored = asdict(dataset) | ({"steps": list(steps)} if by_schedule else {})
    made_by = [model_of(config["model"]), list(prompts), _drawn_by(sampler), config["seed"], stored]
    model, source = config["model"]["name"], str(config["prompts"]["_target_"]).rpartition(".")[2].removeprefix("from_")
    return Path("calibration_data") / f"{model}-{source}-{sampler.num_steps}steps-{short_hash(made_by)}"


def _evaluation_folder(
    config: Mapping[str, Any], prompts: Sequence[str], sampler: SamplerSettings, evaluation: EvaluationSettings
) -> str:
    """The name of the folder of the full-precision pictures, by what determines them."""
    made_by = [model_of(config["model"]), list(prompts), _drawn_by(sampler), evaluation.seed]
    return f"{config['model']['name']}-evaluation-{sampler.num_steps}steps-{short_hash(made_by)}"


def _drawn_by(sampler: SamplerSettings) -> dict[str, Any]:
    """The sampler's settings that affect an image."""
    return {name: value for name, value in asdict(sampler).items() if name != "batch_size"}


def _kept_steps(
    dataset: DatasetSettings, steps: tuple[int, ...] | timesteps.DriftSchedule, num_steps: int
) -> tuple[int, ...]:
    if dataset.steps is KeptStates.SCHEDULE and not isinstance(steps, timesteps.DriftSchedule):
        return steps
    return tuple(range(num_steps + 1))


def _collect_settings(config: Mapping[str, Any], storage: StorageSettings, taps: TapSelection) -> CollectSettings:
    batch_size = check("collect.batch_size", group("collect", config["collect"]).get("batch_size"), int | None)
    if batch_size is not None:
        at_least("collect.batch_size", batch_size, 1)
    if storage.dtype is StateDtype.FLOAT32:
        raise ConfigError.bad_value("storage.dtype", storage.dtype, "must be float16 or bfloat16, or null")
    samples = SampleSettings(storage.samples, storage.rows_per_image, storage.dtype)
    return CollectSettings(batch_size, storage.histogram_rows, config["seed"], taps.cfg_halves, samples)


def _check_sensitivity(wanted: SensitivitySettings) -> None:
    sizes = wanted.group_sizes
    if wanted.method is Method.TRIALS and wanted.of is not Of.OUTPUT:
        allowed = "trials measure the model's output alone; set sensitivity.of=output too"
        raise ConfigError.bad_value("sensitivity.method", wanted.method, allowed)
    if not sizes or not set(sizes) <= set(GROUP_SIZES):
        allowed = f"MLX has groups of {', '.join(map(str, GROUP_SIZES))}"
        raise ConfigError.bad_value("sensitivity.group_sizes", list(sizes), allowed)
