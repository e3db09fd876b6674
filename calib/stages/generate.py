"""Draws images 0 … num_images - 1 into data_dir; those it has are kept.

Main keys: num_images, prompts, sampler.num_steps, sampler.cfg_weight, seed, data_dir, dataset
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from calib.base.errors import ConfigError
from calib.base.keep_awake import keep_awake
from calib.base.progress import counted
from calib.dataset.generate import generate, missing_images
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, Manifest
from calib.dataset.preflight import check_folders
from calib.dataset.settings import check_manifest_is_there, check_prompts, read_only_error
from calib.models.model import DiffusionModel
from calib.runs.directory import RunDirectory
from calib.stages import Stage
from calib.stages.settings import Settings

logger = logging.getLogger("calib")


def check(settings: Settings) -> None:
    """Raise where the dataset cannot be drawn, or was begun with other settings."""
    own = settings.generate
    if (own.data_dir / MANIFEST).exists():
        manifest = load_manifest(own.data_dir)
        if manifest.is_older:
            raise read_only_error(own.data_dir)
        if manifest.images:  # a dataset without images is replaced
            check_matches(settings, manifest, ("model", "num_steps", "cfg_weight", "shift", "seed", "format", "dtype"))
            _check_kept(settings, manifest)
            check_prompts(own.data_dir, manifest, own.prompts)
    check_manifest_is_there(own.data_dir)
    if missing_images(own.data_dir, own.num_images):
        check_folders(own.data_dir)


def sources(settings: Settings) -> list[str]:
    """Checksums of files that the result depends on besides the configuration: none."""
    return []


def run(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]) -> None:
    """Draw the missing images up to ``num_images``; the model is loaded only if there are any."""
    own, shard = settings.generate, settings.job.shard
    drawn, start = 0, time.monotonic()
    if missing := missing_images(own.data_dir, own.num_images, shard, thorough=True):
        with keep_awake() if settings.job.keep_awake else nullcontext():
            drawn = generate(
                model(),
                own.prompts,
                own.num_images,
                own.data_dir,
                own.sampler,
                own.seed,
                own.dataset.format,
                own.dataset.dtype,
                own.kept_steps,
                shard,
                wait=settings.collect.generate_missing,
                known_missing=missing,
            )
    seconds = time.monotonic() - start
    logger.info("dataset %s: %d images made in %.1f s", own.data_dir, drawn, seconds)
    run.add_metrics(Stage.GENERATE, {"images_generated": drawn, "generate_seconds": seconds})
    part = f"shard {shard.index} of {shard.count}, " if shard.count > 1 else ""
    complete = len(load_manifest(own.data_dir).images)
    print(f"Dataset: {own.data_dir} ({part}{counted(complete, 'image')}, {drawn} new)")


def check_matches(settings: Settings, manifest: Manifest, names: Sequence[str]) -> None:
    """Raise where the dataset in ``data_dir`` was drawn with other values of the settings ``names``."""
    own = settings.generate
    sampler = {f"sampler.{name}": getattr(own.sampler, name) for name in ("num_steps", "cfg_weight", "shift")}
    stored = {"dataset.format": own.dataset.format, "dataset.dtype": own.dataset.dtype}
    wanted = {"model": settings.job.model.name, "seed": own.seed, **sampler, **stored}
    for key, value in wanted.items():
        name = key.rpartition(".")[2]
        there = manifest.storage if name == "format" else getattr(manifest, name)
        if name in names and there != value:
            allowed = f"{own.data_dir} was drawn with {name}={there}; ask for that, or name another data_dir"
            raise ConfigError.bad_value(key, value, allowed)


def _check_kept(settings: Settings, manifest: Manifest) -> None:
    """Raise where the dataset keeps other states than requested."""
    own = settings.generate
    if list(own.kept_steps) != manifest.steps:
        raise ConfigError.bad_value(
            "dataset.steps",
            own.dataset.steps,
            f"{own.data_dir} keeps {len(manifest.steps)} states of an image, others than these "
            f"{len(own.kept_steps)}; ask for the same, or name another data_dir",
        )
