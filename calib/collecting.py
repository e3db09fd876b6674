"""The stage that collects: from settings and a dataset to the files of a run directory."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from calib.activations.collect import Collection, checked_model
from calib.activations.drift import choose_steps
from calib.activations.join import merge_shards
from calib.activations.samples import SampleSettings
from calib.activations.store import FILE as ACTIVATIONS
from calib.activations.store import METADATA, write_activations
from calib.activations.taps import Halves, TapPoint, linear_layers, tap_points
from calib.activations.weights import cached_weight_sqnr
from calib.analysis.layers import STATISTICS, read_summaries
from calib.dataset.latents import features
from calib.dataset.load import load_manifest
from calib.dataset.manifest import Manifest
from calib.dataset.shards import Shard
from calib.errors import CalibError, ConfigError
from calib.files import read_json, write_json
from calib.models.model import DiffusionModel
from calib.progress import counted, note, say
from calib.runs.directory import RunDirectory, device_name, git_commit
from calib.settings import Settings
from calib.timesteps import Drift
from calib.versions import versions

from diffusionkit.mlx.mmdit import MMDiT

#: Values left out of the statistics: by layer, by step, how many were NaN and how many infinite.
_NonFinite: TypeAlias = dict[str, dict[str, dict[str, int]]]

logger = logging.getLogger("calib")


def run_collect(
    settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]
) -> None:
    """Statistics of the chosen images and steps, into the run directory; the model is loaded only if one is missing."""
    start = time.monotonic()
    manifest = load_manifest(settings.data_dir)
    image_ids = chosen_images(settings, manifest)
    model = checked_model(settings.data_dir, manifest, model)
    transformer = settings.skeleton() if settings.skeleton is not None else model().transformer
    points = tap_points(transformer, settings.taps)
    steps = chosen_steps(settings, manifest, transformer, model, image_ids)
    collection = _collection(settings, manifest, transformer, model, image_ids, points)
    collection.collect(steps, into=run.path)
    fingerprint = manifest.fingerprint or model().fingerprint
    names = [name for point in points for name in point.names]
    sqnr = cached_weight_sqnr(settings.cache_dir, fingerprint, names, lambda: linear_layers(model().transformer))
    attributes: dict[str, str | int | float] = {
        "producer": f"calib {versions()['calib']}",
        "git_commit": git_commit(),
        "config": json.dumps(config),
        "model": manifest.model,
        "fingerprint": fingerprint,
        "mlx_version": versions()["mlx"],
        "device": device_name(),
        "cfg_weight": manifest.cfg_weight,
        "shard_index": settings.shard.index,
        "shard_count": settings.shard.count,
        "collection": json.dumps(_identity(settings, manifest, transformer, model, image_ids, points, steps)),
    }
    sharded = settings.shard.count > 1
    source = collection.source(steps)
    write_activations(run.path / ACTIVATIONS, source, points, manifest, steps, sqnr, attributes, exact=sharded)
    write_json(run.path / METADATA, _metadata(settings, manifest, collection, points, steps))
    write_statistics(run.path)
    seconds = time.monotonic() - start
    run.add_metrics({"images": len(collection.images), "steps": len(steps), "collect_seconds": seconds})
    size = (len(names), len(collection.images), len(steps))
    logger.info("collected %d layers of %d images at %d steps in %.1f s", *size, seconds)
    if sharded:
        print(f"Shard {settings.shard.index} of {settings.shard.count}: calib merge joins the shards' run directories")


def write_statistics(run: Path) -> None:
    """``layer_statistics.json`` of a run directory, from its ``activations.h5``.

    Layers without one finite value have no statistics, and are left out.
    """
    summaries, _ = read_summaries(run)
    found = {name: layer.to_json() for name, layer in summaries.items() if layer.num_samples}
    if lost := [name for name in summaries if name not in found]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        note(f"{STATISTICS}: without {lost[0]}{more}, which saw no finite value")
    write_json(run / STATISTICS, found)


def merge(runs: Sequence[Path], into: Path) -> int:
    """Join the run directories of all shards of a collection into the folder ``into``; returns the number of images.

    ``calib analyze stats=INTO`` and all else that reads a run directory reads it.
    """
    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run}: no such run directory; calib collect with shard.index and shard.count makes one")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(f"{into}: is not an empty folder; name a new one")
    documents = sorted((_shard_metadata(run) for run in runs), key=lambda document: document["shard"]["index"])
    into.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent, ignore_cleanup_errors=True) as folder:
        made = Path(folder) / "made"
        blocks = merge_shards(runs, made)
        write_statistics(made)
        joined = {**documents[0], "image_ids": [i for block in blocks for i in block.images]}
        joined |= {"shard": {"index": 0, "count": 1}, "merged_from": [str(run) for run in runs]}
        joined["non_finite"] = _joined_non_finite([document["non_finite"] for document in documents])
        joined["non_finite_output"] = sorted({step for document in documents for step in document["non_finite_output"]})
        write_json(made / METADATA, joined)
        made.replace(into)  # whole or not at all
    return len(joined["image_ids"])


def _shard_metadata(run: Path) -> dict[str, Any]:
    """What a shard's run directory says of its collection."""
    if not (run / ACTIVATIONS).exists():
        raise CalibError(f"{run / ACTIVATIONS}: no such file; calib collect writes it")
    document = read_json(run / METADATA)
    try:
        int(document["shard"]["index"]), dict(document["non_finite"]), list(document["non_finite_output"])
    except (KeyError, TypeError, ValueError) as error:
        raise CalibError(f"{run / METADATA}: lacks or garbles {error}; run the shard's calib collect again") from None
    found: dict[str, Any] = document
    return found


def _joined_non_finite(parts: Sequence[_NonFinite]) -> _NonFinite:
    """Counts of NaN and infinity by layer and step, added up."""
    total: _NonFinite = {}
    for part in parts:
        for layer, steps in part.items():
            for step, counts in steps.items():
                own = total.setdefault(layer, {}).setdefault(step, {"nan": 0, "inf": 0})
                total[layer][step] = {kind: own[kind] + counts[kind] for kind in own}
    return total


def chosen_images(settings: Settings, manifest: Manifest) -> list[int]:
    """The images that are collected, of those that the dataset has."""
    limit = settings.num_images if settings.generate_missing else len(manifest.images)
    available = sorted(manifest.images)[:limit]
    return settings.choose_images(available, lambda ids: features(settings.data_dir, manifest, ids))


def check_subset(settings: Settings, manifest: Manifest) -> None:
    """Raise where the dataset has too few images for the subset, or the subset for as many shards."""
    images = len(settings.choose_images(sorted(manifest.images), None))
    size, shard = settings.collect.batch_size or manifest.batch_size or 1, settings.shard
    blocks = -(-images // size)
    if shard.count > blocks:
        made = f"{counted(images, 'image')} make {counted(blocks, 'block')} of {size}"
        allowed = f"{made}; so many shards at most"
        raise ConfigError.bad_value("shard.count", shard.count, allowed)


def chosen_steps(
    settings: Settings,
    manifest: Manifest,
    transformer: MMDiT,
    model: Callable[[], DiffusionModel],
    image_ids: Sequence[int],
) -> tuple[int, ...]:
    """The steps that are collected; a schedule that statistics decide first looks at some images at every state."""
    if not isinstance(settings.steps, Drift):
        return settings.steps
    candidates = check_drift(settings.steps, settings.data_dir, manifest)
    first = image_ids[: settings.steps.images]
    say(f"drift: a first look at {len(first)} images at all {len(candidates)} states")
    settings_of_look = replace(settings.collect, samples=SampleSettings(), cfg_halves=Halves.POOLED)
    plain = replace(settings, shard=Shard(), collect=settings_of_look)
    points = tap_points(transformer, replace(settings.taps, cfg_halves=Halves.POOLED))
    collection = _collection(plain, manifest, transformer, model, first, points)
    collection.collect(candidates)
    steps = choose_steps(collection.lazy(candidates), settings.steps.count)
    say(f"drift: steps {', '.join(map(str, steps))}")
    return steps


def check_drift(drift: Drift, data_dir: Path, manifest: Manifest) -> list[int]:
    """The states that a drift schedule chooses among; raises where they are too few."""
    candidates = [step for step in manifest.steps if step < manifest.num_steps]
    if drift.count > len(candidates):
        allowed = f"{data_dir} keeps {len(candidates)} states to choose from"
        raise ConfigError.bad_value("timestep_schedule.count", drift.count, allowed)
    return candidates


def _collection(
    settings: Settings,
    manifest: Manifest,
    transformer: MMDiT,
    model: Callable[[], DiffusionModel],
    image_ids: Sequence[int],
    points: Sequence[TapPoint],
) -> Collection:
    place = (settings.collect, settings.cache_dir, settings.shard)
    return Collection(transformer, model, settings.data_dir, manifest, image_ids, points, *place)


def _identity(
    settings: Settings,
    manifest: Manifest,
    transformer: MMDiT,
    model: Callable[[], DiffusionModel],
    image_ids: Sequence[int],
    points: Sequence[TapPoint],
    steps: Sequence[int],
) -> dict[str, Any]:
    """What all shards of one collection have in common: the content they collect, by its key, and how."""
    whole = replace(settings, shard=Shard())
    collection = _collection(whole, manifest, transformer, model, image_ids, points)
    return {"key": collection.cache.folder.name, "steps": list(steps), "settings": asdict(collection.settings)}


def _metadata(
    settings: Settings,
    manifest: Manifest,
    collection: Collection,
    points: Sequence[TapPoint],
    steps: Sequence[int],
) -> dict[str, object]:
    bad: _NonFinite = {}
    headers = {step: collection.cache.header(step) for step in steps}
    for step, header in headers.items():
        for tap in header["taps"]:
            if tap["nan"] or tap["inf"]:
                bad.setdefault(tap["name"], {})[str(step)] = {"nan": tap["nan"], "inf": tap["inf"]}
    bad_output = [step for step, header in headers.items() if not header["finite_output"]]
    if bad_output:
        note(f"the model's output holds NaN or infinity at steps {', '.join(map(str, bad_output))}")
    return {
        "data_dir": str(settings.data_dir),
        "model": manifest.model,
        "fingerprint": manifest.fingerprint,
        "image_ids": collection.images,
        "shard": {"index": settings.shard.index, "count": settings.shard.count},
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
        "histogram_rows": settings.collect.histogram_rows,
        "cache": str(collection.cache.folder),
        "taps": {point.name: {"kind": point.kind, "same_input": list(point.aliases)} for point in points},
        "non_finite": bad,
        "non_finite_output": bad_output,
    }
