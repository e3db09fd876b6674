"""Runs generate, collect, analyze, quantize and evaluate into one run directory under outputs/."""

from collections.abc import Callable, Mapping
from typing import Any

from calib.activations.taps import tap_points
from calib.models.model import DiffusionModel
from calib.runs.directory import RunDirectory
from calib.stages import analyze, collect, evaluate, quantize
from calib.stages.settings import Settings


def check(settings: Settings) -> None:
    """Raise where one of the stages would fail, as far as known in advance."""
    skeleton = settings.job.model.skeleton
    if skeleton is not None:
        points = tap_points(skeleton(), settings.collect.taps)
        analyze.try_heuristic(settings, [name for point in points for name in point.names])
    collect.check(settings)
    evaluate.check_reference(settings)


def sources(settings: Settings) -> list[str]:
    """Checksums of files that the result depends on: none, as the job makes all of them itself."""
    return []


def run(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]) -> None:
    """Run all stages, one after the other."""
    collect.run(settings, run, model, config)
    analyze.run(settings, run, model, config)
    quantize.run(settings, run, model, config)
    if settings.evaluate.evaluation.num_images:
        evaluate.run(settings, run, model, config)
