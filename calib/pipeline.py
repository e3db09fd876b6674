"""What a job does, stage by stage, and what is checked before. Settings and folders are known here, Hydra is not."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from calib.activations.store import FILE as ACTIVATIONS
from calib.activations.store import METADATA
from calib.activations.taps import tap_points
from calib.analysis.layers import STATISTICS, read_summaries
from calib.analyzing import TIMESTEP_CONFIG, check_heuristic, run_analyze
from calib.awake import awake
from calib.collecting import check_drift, check_subset, run_collect
from calib.config import check_writable
from calib.dataset.generate import generate, missing_images
from calib.dataset.load import load_manifest
from calib.dataset.manifest import FILE as MANIFEST
from calib.dataset.manifest import Manifest
from calib.dataset.settings import check_manifest_is_there, check_prompts, only_read
from calib.errors import ConfigError
from calib.evaluating import forget_evaluation, quantized_folder, run_evaluate
from calib.files import checksum, short_hash
from calib.models.model import DiffusionModel
from calib.progress import counted
from calib.quantization.checkpoint import CONFIG
from calib.quantizing import check_plan, plan_path, run_quantize
from calib.runs.directory import RunDirectory
from calib.settings import Settings, Stage
from calib.sources import activations_of, collected
from calib.timesteps import Drift
from calib.typed import at_least

logger = logging.getLogger("calib")


def precheck(settings: Settings) -> None:
    """What can be known to be wrong before a run directory is made or a model is loaded."""
    if settings.stage is Stage.ANALYZE:
        layers, _ = read_summaries(_stats(settings))
        check_heuristic(settings, layers)
        if settings.heuristic.measures:
            collected(settings, _stats(settings), "this heuristic")
        return
    if settings.stage is Stage.QUANTIZE:
        check_plan(settings, plan_path(settings))
        if settings.stats is not None and activations_of(settings.stats) is None:
            allowed = "no activations.h5 there; calib collect makes a run directory with one"
            raise ConfigError.bad_value("stats", settings.stats, allowed)
        return
    if settings.stage is Stage.EVALUATE:
        at_least("evaluation.num_images", settings.evaluation.num_images, 1)
        quantized_folder(settings)
        _check_evaluation_folder(settings)
        return
    if settings.stage is Stage.RUN and settings.skeleton is not None:
        points = tap_points(settings.skeleton(), settings.taps)
        check_heuristic(settings, [name for point in points for name in point.names])
    if settings.stage is not Stage.GENERATE:
        check_writable("cache_dir", settings.cache_dir)
    draws = settings.stage is Stage.GENERATE or settings.generate_missing
    if not draws:
        manifest = _dataset(settings)
        check_subset(settings, manifest)
        check_matches(settings, manifest, ("num_steps",) if manifest.is_older else ("model", "num_steps"))
        _check_stored(settings, manifest)
    elif (settings.data_dir / MANIFEST).exists():
        manifest = _dataset(settings)
        if manifest.is_older:
            raise only_read(settings.data_dir)
        if manifest.images:  # a dataset without images is begun anew
            check_matches(settings, manifest, ("model", "num_steps", "cfg_weight", "shift", "seed", "format", "dtype"))
            _check_stored(settings, manifest)
            check_prompts(settings.data_dir, manifest, settings.prompts)
    if draws:
        check_manifest_is_there(settings.data_dir)
    if draws and missing_images(settings.data_dir, settings.num_images):
        check_writable("data_dir", settings.data_dir)
    if settings.stage is Stage.RUN:
        _check_evaluation_folder(settings)


def _check_evaluation_folder(settings: Settings) -> None:
    """Raise where full-precision pictures are to be drawn beside the dataset, and cannot be written there."""
    if missing_images(settings.evaluation_dir, settings.evaluation.num_images):
        check_writable("data_dir", settings.evaluation_dir)


def check_matches(settings: Settings, manifest: Manifest, names: Sequence[str]) -> None:
    """Raise where the dataset in ``data_dir`` was drawn otherwise than is asked now."""
    sampler = {f"sampler.{name}": getattr(settings.sampler, name) for name in ("num_steps", "cfg_weight", "shift")}
    stored = {"dataset.format": settings.dataset.format, "dataset.dtype": settings.dataset.dtype}
    wanted = {"model": settings.model_name, "seed": settings.seed, **sampler, **stored}
    for key, value in wanted.items():
        name = key.rpartition(".")[2]
        there = manifest.storage if name == "format" else getattr(manifest, name)
        if name in names and there != value:
            allowed = f"{settings.data_dir} was drawn with {name}={there}; ask for that, or name another data_dir"
            raise ConfigError.bad_value(key, value, allowed)


def _check_stored(settings: Settings, manifest: Manifest) -> None:
    """Raise where a state that is asked for is not kept in the dataset, or more would be drawn than it keeps."""
    drawn = settings.stored_steps
    if (settings.stage is Stage.GENERATE or settings.generate_missing) and list(drawn) != manifest.steps:
        raise ConfigError.bad_value(
            "dataset.steps",
            settings.dataset.steps,
            f"{settings.data_dir} keeps {len(manifest.steps)} states of an image, others than these {len(drawn)}; ask "
            "for the same, or name another data_dir",
        )
    wanted: Sequence[int] = ()
    if isinstance(settings.steps, Drift) and settings.stage is not Stage.GENERATE:
        check_drift(settings.steps, settings.data_dir, manifest)
    if settings.stage is not Stage.GENERATE and not isinstance(settings.steps, Drift):
        wanted = settings.steps
    if lacking := sorted(set(wanted) - set(manifest.steps)):
        raise ConfigError(
            f"timestep_schedule: {settings.data_dir} does not keep state {lacking[0]} (it keeps "
            f"{len(manifest.steps)} of {manifest.num_steps + 1}); choose other steps, or draw "
            "another data_dir with dataset.steps=all"
        )


def run_stage(settings: Settings, run: RunDirectory, config: Mapping[str, Any]) -> None:
    """Run the configured stage into ``run``, ``config`` being what it was configured by; prints what people read."""
    model = cache(lambda: _load_model(settings))
    stage = settings.stage
    if stage is Stage.GENERATE or (stage in (Stage.RUN, Stage.COLLECT) and settings.generate_missing):
        run_generate(settings, run, model)
    if stage in (Stage.RUN, Stage.COLLECT):
        run_collect(settings, run, model, config)
    if stage in (Stage.RUN, Stage.ANALYZE):
        run_analyze(settings, run, run.path if stage is Stage.RUN else _stats(settings), model)
    if stage in (Stage.RUN, Stage.QUANTIZE):
        forget_evaluation(run.path)
        run_quantize(settings, run, model)
    if stage is Stage.EVALUATE or (stage is Stage.RUN and settings.evaluation.num_images):
        run_evaluate(settings, run, model)


def _load_model(settings: Settings) -> DiffusionModel:
    start = time.monotonic()
    model = settings.load_model()
    logger.info("loaded %s (%s) in %.1f s", model.name, model.fingerprint, time.monotonic() - start)
    return model


def content_fingerprint(settings: Settings) -> str:
    """The job's fingerprint with the content of the files it starts from: those of the same name may have changed."""
    sources = [settings.fingerprint]
    if settings.stage is Stage.ANALYZE:
        stats = _stats(settings)
        files = (stats / ACTIVATIONS, stats / STATISTICS, stats / METADATA, stats)
        sources += [checksum(path) for path in files if path.is_file()]
    elif settings.stage is Stage.QUANTIZE:
        plan = plan_path(settings)
        beside = (plan, plan.parent / TIMESTEP_CONFIG, (settings.stats or plan.parent) / ACTIVATIONS)
        sources += [checksum(path) for path in beside if path.is_file()]
    elif settings.stage is Stage.EVALUATE:
        sources.append(checksum(quantized_folder(settings) / CONFIG))
    elif settings.stage is Stage.COLLECT and not settings.generate_missing:
        sources.append(checksum(settings.data_dir / MANIFEST))
    return short_hash(sources, digits=16)


def _dataset(settings: Settings) -> Manifest:
    return load_manifest(settings.data_dir)


def _stats(settings: Settings) -> Path:
    if settings.stats is None:
        raise ConfigError("stats is not set: name a run directory or a layer_statistics.json, calib analyze stats=DIR")
    return settings.stats


def run_generate(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel]) -> None:
    """Fill the dataset up to ``num_images``; a complete one costs nothing, not even the model."""
    shard = settings.shard
    drawn, start = 0, time.monotonic()
    if missing := missing_images(settings.data_dir, settings.num_images, shard, thorough=True):
        with awake() if settings.keep_awake else nullcontext():
            drawn = generate(
                model(),
                settings.prompts,
                settings.num_images,
                settings.data_dir,
                settings.sampler,
                settings.seed,
                settings.dataset.format,
                settings.dataset.dtype,
                settings.stored_steps,
                shard,
                wait=settings.generate_missing,
                known_missing=missing,
            )
    seconds = time.monotonic() - start
    logger.info("dataset %s: %d images made in %.1f s", settings.data_dir, drawn, seconds)
    run.add_metrics({"images_generated": drawn, "generate_seconds": seconds})
    part = f"shard {shard.index} of {shard.count}, " if shard.count > 1 else ""
    complete = len(load_manifest(settings.data_dir).images)
    print(f"Dataset: {settings.data_dir} ({part}{counted(complete, 'image')}, {drawn} new)")
