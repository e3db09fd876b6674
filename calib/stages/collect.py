"""Replays stored states of chosen images and steps; draws no image unless generate_missing=true.

What is in cache_dir is not collected again; the model is loaded only for what is missing.

Main keys: data_dir, timestep_schedule, subset, taps, taps.cfg_halves, storage, collect.batch_size, shard.index,
shard.count, cache_dir
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calib.activations.choose_steps import choose_steps
from calib.activations.collect import Collection
from calib.activations.samples import SampleSettings
from calib.activations.states import image_hashes
from calib.activations.statistics import Statistics
from calib.activations.store import write_activations
from calib.activations.taps import Halves, TapPoint, tap_points
from calib.activations.weights import cached_weight_sqnr
from calib.analysis.layers import NOTHING, LayerSummary, summarised, write_summaries
from calib.base.device import device_name
from calib.base.errors import ConfigError
from calib.base.files import check_writable, checksum, write_json
from calib.base.layout import ACTIVATIONS, METADATA, STATISTICS
from calib.base.progress import counted, note, say
from calib.base.versions import git_commit, versions
from calib.dataset.check_model import checked_model
from calib.dataset.latents import features
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, Manifest
from calib.dataset.shards import Shard
from calib.dataset.timesteps import DriftSchedule
from calib.models.architecture import Architecture, names_in_order
from calib.models.model import DiffusionModel
from calib.runs.directory import RunDirectory
from calib.stages import Stage, generate
from calib.stages.settings import Settings

logger = logging.getLogger("calib")


def check(settings: Settings) -> None:
    """Raise where the dataset is missing or too small, was drawn with other settings, or lacks states."""
    check_writable("cache_dir", settings.job.cache_dir)
    data_dir = settings.generate.data_dir
    if settings.collect.generate_missing:
        generate.check(settings)
        manifest = load_manifest(data_dir) if (data_dir / MANIFEST).exists() else None
    else:
        manifest = load_manifest(data_dir)
        check_subset(settings, manifest)
        names = ("num_steps",) if manifest.is_older else ("model", "num_steps")
        generate.check_matches(settings, manifest, names)
    if manifest is not None and manifest.images:
        _check_kept(settings, manifest)


def _check_kept(settings: Settings, manifest: Manifest) -> None:
    """Raise where the dataset lacks a requested state."""
    data_dir, schedule = settings.generate.data_dir, settings.collect.timestep_schedule
    if isinstance(schedule, DriftSchedule):
        check_drift(schedule, data_dir, manifest)
    elif lacking := sorted(set(schedule) - set(manifest.steps)):
        raise ConfigError(
            f"timestep_schedule: {data_dir} does not keep state {lacking[0]} (it keeps "
            f"{len(manifest.steps)} of {manifest.num_steps + 1}); choose other steps, or draw "
            "another data_dir with dataset.steps=all"
        )


def sources(settings: Settings) -> list[str]:
    """Checksum of the dataset's manifest, unless this job draws missing images."""
    return [] if settings.collect.generate_missing else [checksum(settings.generate.data_dir / MANIFEST)]


def run(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]) -> None:
    """Collect statistics of the chosen images and steps; missing images are drawn first where that is configured."""
    if settings.collect.generate_missing:
        generate.run(settings, run, model, config)
    _collect(settings, run, model, config)


def _collect(
    settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]
) -> None:
    """Collect statistics into the run directory; the model is loaded only for those that are not cached."""
    start = time.monotonic()
    data_dir, cache_dir, shard = settings.generate.data_dir, settings.job.cache_dir, settings.job.shard
    manifest = load_manifest(data_dir)
    image_ids = chosen_images(settings, manifest)
    model = checked_model(data_dir, manifest, model)
    architecture = settings.job.model.architecture(model)
    points = tap_points(architecture, settings.collect.taps)
    steps = chosen_steps(settings, manifest, architecture, model, image_ids)
    collection = _collection(settings, manifest, architecture, model, image_ids, points)
    collection.collect(steps, into=run.path)
    unsharded = _collection(whole(settings), manifest, architecture, model, image_ids, points)
    fingerprint = manifest.fingerprint or model().fingerprint
    names = [name for point in points for name in point.names]
    sqnr = cached_weight_sqnr(cache_dir, fingerprint, names, lambda: model().layers())
    attributes: dict[str, str | int | float] = {
        "producer": f"calib {versions()['calib']}",
        "git_commit": git_commit(),
        "config": json.dumps(config),
        "model": manifest.model,
        "fingerprint": fingerprint,
        "mlx_version": versions()["mlx"],
        "device": device_name(),
        "cfg_weight": manifest.cfg_weight,
        "shard_index": shard.index,
        "shard_count": shard.count,
        "collection": json.dumps(_identity(unsharded, steps)),
    }
    sharded, order = shard.count > 1, {name: i for i, name in enumerate(names_in_order(architecture))}
    where = (run.path / ACTIVATIONS, collection.source(steps), points, manifest, steps)
    known: dict[str, LayerSummary] = {}
    write_activations(*where, sqnr, attributes, order, sharded, summarising(known, steps, manifest.num_steps))
    write_json(run.path / METADATA, _metadata(settings, manifest, collection, points, steps))
    summarise(run.path, known)
    seconds = time.monotonic() - start
    size = {"images": len(collection.images), "steps": len(steps)}
    run.add_metrics(Stage.COLLECT, {**size, "collect_seconds": seconds})
    shape = (len(names), len(collection.images), len(steps))
    logger.info("collected %d layers of %d images at %d steps in %.1f s", *shape, seconds)
    if sharded:
        print(f"Shard {shard.index} of {shard.count}: calib merge joins the shards' run directories")


def summarising(
    known: dict[str, LayerSummary], steps: Sequence[int], num_steps: int
) -> Callable[[str, Mapping[int, Statistics]], None]:
    """Return a function that adds to ``known`` the summary of each tap that is written, so that none is read back."""
    evaluated = [step for step in steps if step < num_steps]

    def watch(name: str, by_step: Mapping[int, Statistics]) -> None:
        if "/" not in name:
            known[name] = summarised(by_step, evaluated, num_steps)

    return watch


def summarise(run: Path, known: Mapping[str, LayerSummary] = NOTHING) -> None:
    """Write ``layer_statistics.json`` of a run directory, and report layers that are left out."""
    if lost := write_summaries(run, known):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        note(f"{STATISTICS}: without {lost[0]}{more}, which saw no finite value")


def chosen_images(settings: Settings, manifest: Manifest) -> list[int]:
    """Ids of the images to collect, among those of the dataset."""
    limit = settings.generate.num_images if settings.collect.generate_missing else len(manifest.images)
    available = sorted(manifest.images)[:limit]
    return settings.collect.subset(available, lambda ids: features(settings.generate.data_dir, manifest, ids))


def check_subset(settings: Settings, manifest: Manifest) -> None:
    """Raise where the dataset has too few images for the subset, or the subset too few blocks for the shards."""
    images = len(settings.collect.subset(sorted(manifest.images), None))
    size, shard = settings.collect.collect.batch_size or manifest.batch_size or 1, settings.job.shard
    blocks = -(-images // size)
    if shard.count > blocks:
        made = f"{counted(images, 'image')} make {counted(blocks, 'block')} of {size}"
        allowed = f"{made}; so many shards at most"
        raise ConfigError.bad_value("shard.count", shard.count, allowed)


def chosen_steps(
    settings: Settings,
    manifest: Manifest,
    architecture: Architecture,
    model: Callable[[], DiffusionModel],
    image_ids: Sequence[int],
) -> tuple[int, ...]:
    """The steps to collect; for a drift schedule, some images are collected at every state first."""
    schedule = settings.collect.timestep_schedule
    if not isinstance(schedule, DriftSchedule):
        return schedule
    candidates = check_drift(schedule, settings.generate.data_dir, manifest)
    first = image_ids[: schedule.images]
    say(f"drift: a first look at {len(first)} images at all {len(candidates)} states")
    how = replace(settings.collect.collect, samples=SampleSettings(), cfg_halves=Halves.POOLED)
    plain = replace(whole(settings), collect=replace(settings.collect, collect=how))
    points = tap_points(architecture, replace(settings.collect.taps, cfg_halves=Halves.POOLED))
    collection = _collection(plain, manifest, architecture, model, first, points)
    collection.collect(candidates)
    steps = choose_steps(collection.lazy(candidates), schedule.count)
    say(f"drift: steps {', '.join(map(str, steps))}")
    return steps


def check_drift(schedule: DriftSchedule, data_dir: Path, manifest: Manifest) -> list[int]:
    """The states that a drift schedule chooses from; raises where there are too few."""
    candidates = [step for step in manifest.steps if step < manifest.num_steps]
    if schedule.count > len(candidates):
        allowed = f"{data_dir} keeps {len(candidates)} states to choose from"
        raise ConfigError.bad_value("timestep_schedule.count", schedule.count, allowed)
    return candidates


def _collection(
    settings: Settings,
    manifest: Manifest,
    architecture: Architecture,
    model: Callable[[], DiffusionModel],
    image_ids: Sequence[int],
    points: Sequence[TapPoint],
) -> Collection:
    place = (settings.collect.collect, settings.job.cache_dir, settings.job.shard)
    return Collection(architecture, model, settings.generate.data_dir, manifest, image_ids, points, *place)


def whole(settings: Settings) -> Settings:
    """The settings of the same job without shards."""
    return replace(settings, job=replace(settings.job, shard=Shard()))


def _identity(unsharded: Collection, steps: Sequence[int]) -> dict[str, Any]:
    """What all shards of an ``unsharded`` collection share: the key of its content in the cache, steps and settings."""
    return {"key": unsharded.cache.folder.name, "steps": list(steps), "settings": asdict(unsharded.settings)}


def _metadata(
    settings: Settings,
    manifest: Manifest,
    collection: Collection,
    points: Sequence[TapPoint],
    steps: Sequence[int],
) -> dict[str, object]:
    bad: dict[str, dict[str, dict[str, int]]] = {}
    headers = {step: collection.cache.header(step) for step in steps}
    for step, header in headers.items():
        for tap in header["taps"]:
            if tap["nan"] or tap["inf"]:
                bad.setdefault(tap["name"], {})[str(step)] = {"nan": tap["nan"], "inf": tap["inf"]}
    bad_output = [step for step, header in headers.items() if not header["finite_output"]]
    if bad_output:
        note(f"the model's output holds NaN or infinity at steps {', '.join(map(str, bad_output))}")
    return {
        "data_dir": str(settings.generate.data_dir),
        "model": manifest.model,
        "fingerprint": manifest.fingerprint,
        "image_ids": collection.images,
        "image_hashes": image_hashes(settings.generate.data_dir, manifest, collection.images),
        "shard": asdict(settings.job.shard),
        "cfg_weight": manifest.cfg_weight,
        "cfg_halves": collection.settings.cfg_halves.value,
        "num_steps": manifest.num_steps,
        **({"timesteps": manifest.timesteps} if all(map(math.isfinite, manifest.timesteps)) else {}),
        "steps": [
            {
                "step_index": step,
                "sigma": manifest.sigmas[step],
                "timestep": manifest.timesteps[step],
                "evaluated_by_sampler": step < manifest.num_steps,
            }
            for step in steps
        ],
        "batch_size": collection.batch_size,
        "histogram_rows": settings.collect.collect.histogram_rows,
        "cache": str(collection.cache.folder),
        "taps": {point.name: {"kind": point.kind, "same_input": list(point.aliases)} for point in points},
        "non_finite": bad,
        "non_finite_output": bad_output,
    }
