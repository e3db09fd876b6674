"""The stage that turns statistics into a plan, and its files."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from calib.activations.store import METADATA
from calib.activations.taps import TapPoint, TapSelection, linear_layers, tap_points
from calib.analysis.drift import drift_text
from calib.analysis.layers import PROBE, LayerSummary, read_summaries
from calib.analysis.measure import measure, quantizable
from calib.analysis.plan import WEIGHT_BITS, Plan
from calib.analysis.ranges import Observed
from calib.analysis.sensitivity import Sensitivities
from calib.analysis.steps import StepPlan, observed_ranges, plan_steps
from calib.analysis.summary import summary_text
from calib.errors import CalibError
from calib.files import write_json, write_text
from calib.models.model import DiffusionModel
from calib.runs.directory import RunDirectory
from calib.settings import Settings
from calib.sources import activations_of, collected
from calib.timesteps import phase_bounds

import numpy as np
from diffusionkit.mlx.mmdit import MMDiT

PLAN, TIMESTEP_CONFIG, SUMMARY = "quantization_config.json", "timestep_config.json", "analysis.txt"


def run_analyze(settings: Settings, run: RunDirectory, stats: Path, model: Callable[[], DiffusionModel]) -> None:
    """Turn statistics into a plan: from files alone, unless the heuristic measures."""
    start = time.monotonic()
    layers, _ = read_summaries(stats)
    _check_finite(stats, layers)
    plan = settings.heuristic.plan(layers, lambda: sensitivities_of(settings, stats, layers, model))
    steps, observed = _steps(settings, plan, layers, stats)
    write_json(run.path / PLAN, plan.to_json())
    write_json(run.path / TIMESTEP_CONFIG, steps.to_json())
    if settings.export_config is not None:
        write_json(settings.export_config, plan.to_json())
    text = summary_text(plan) + (drift_text(_distinct(observed)) if observed else "")
    write_text(run.path / SUMMARY, text)
    run.add_metrics({**plan.metrics(), "analyze_seconds": time.monotonic() - start})
    print(f"\n{text}")


def _check_finite(stats: Path, layers: Mapping[str, LayerSummary]) -> None:
    for name, layer in layers.items():
        if not (layer.std >= 0 and layer.range >= 0):
            raise CalibError(f"{stats}: layer {name!r} has no finite activations; look at {METADATA}")


def sensitivities_of(
    settings: Settings, stats: Path, layers: Mapping[str, LayerSummary], model: Callable[[], DiffusionModel]
) -> Sensitivities:
    """Measured on the states behind ``stats``, or from the cache."""
    source = collected(settings, stats, "this heuristic")
    load = source.model(model)
    transformer = settings.skeleton() if settings.skeleton is not None else load().transformer
    wanted, manifest = settings.sensitivity, source.manifest
    points = _points(transformer, layers)
    drawn_by = None if manifest.fingerprint else (load().fingerprint, load().text_encoders)
    return measure(
        load,
        {name: layer for name, layer in linear_layers(transformer).items() if name in layers},
        points,
        source.states(wanted.images, wanted.steps),
        {point.name: (layers[point.name].minimum, layers[point.name].maximum) for point in points},
        settings.cache_dir,
        wanted.group_sizes,
        drawn_by,
    )


def _points(transformer: MMDiT, layers: Collection[str]) -> list[TapPoint]:
    """The taps on ``layers``, of each its first one's name."""
    found = []
    for point in tap_points(transformer, TapSelection()):
        if names := [name for name in point.names if name in layers]:
            found.append(TapPoint(names[0], point.kind, tuple(names[1:])))
    return found


def check_heuristic(settings: Settings, names: Collection[str]) -> None:
    """Raise where a heuristic that measures could not plan the layers ``names``, whatever is measured."""
    if settings.heuristic.whole is None or settings.skeleton is None:
        return
    every = linear_layers(settings.skeleton())
    layers = {name: layer for name, layer in every.items() if name in names and quantizable(layer)}
    sizes = settings.sensitivity.group_sizes
    steps = tuple(first for first, _ in phase_bounds(settings.sampler.num_steps).values())
    pretended = Sensitivities(
        steps,
        settings.sampler.num_steps,
        {
            name: {(b, g): np.full(len(steps), 4.0**-b) for b in WEIGHT_BITS for g in quantizable(layer) if g in sizes}
            for name, layer in layers.items()
        },
        {},
        {name: (layer.weight.shape[0], layer.weight.shape[-1]) for name, layer in layers.items()},
    )
    settings.heuristic.whole(dict.fromkeys(layers, PROBE), pretended)


def _distinct(observed: Mapping[str, Observed]) -> dict[str, Observed]:
    """Layers that read one array under the first one's name, with the number of the others."""
    groups: dict[tuple[bytes, bytes], list[str]] = {}
    for name, seen in observed.items():
        groups.setdefault((seen.low.tobytes(), seen.high.tobytes()), []).append(name)
    return {
        names[0] + (f" and {len(names) - 1} that read the same" if len(names) > 1 else ""): observed[names[0]]
        for names in groups.values()
    }


def _steps(
    settings: Settings, plan: Plan, layers: Mapping[str, LayerSummary], stats: Path
) -> tuple[StepPlan, dict[str, Observed]]:
    """What varies with the step, and the ranges that were seen; a layer_statistics.json says nothing of either."""
    path = activations_of(stats)
    if path is None:
        return StepPlan(), {}
    observed = observed_ranges(plan, path)
    bits = settings.heuristic.phase_bits(layers, plan) if settings.phase_bits else None
    return plan_steps(plan, observed, path, settings.ranges, bits), observed
