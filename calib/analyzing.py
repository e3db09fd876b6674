"""The stage that turns statistics into a plan, and its files."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.activations.store import METADATA
from calib.activations.taps import TapSelection, linear_layers, tap_points
from calib.analysis.drift import drift_text, observe
from calib.analysis.layers import LayerSummary, read_summaries
from calib.analysis.measure import measure
from calib.analysis.plan import Plan
from calib.analysis.range_files import to_json
from calib.analysis.ranges import Observed
from calib.analysis.sensitivity import Sensitivities
from calib.analysis.summary import summary_text
from calib.errors import CalibError
from calib.files import read_json, write_json, write_text
from calib.models.model import DiffusionModel
from calib.runs.directory import RunDirectory
from calib.settings import Settings
from calib.sources import activations_of, collected
from calib.timesteps import phase_bounds

import numpy as np

PLAN, TIMESTEP_CONFIG, SUMMARY = "quantization_config.json", "timestep_config.json", "analysis.txt"


def run_analyze(settings: Settings, run: RunDirectory, stats: Path, model: Callable[[], DiffusionModel]) -> None:
    """Turn statistics into a plan: from files alone, unless the heuristic measures."""
    start = time.monotonic()
    layers, _ = read_summaries(stats)
    _check_finite(stats, layers)
    plan = settings.heuristic.plan(layers, lambda: _sensitivities(settings, stats, layers, model))
    steps, observed = _timestep_config(settings, plan, layers, stats)
    write_json(run.path / PLAN, plan.to_json())
    write_json(run.path / TIMESTEP_CONFIG, steps)
    if settings.export_config is not None:
        write_json(settings.export_config, plan.to_json())
    text = summary_text(plan) + (drift_text(observed) if observed else "")
    write_text(run.path / SUMMARY, text)
    run.add_metrics({**plan.metrics(), "analyze_seconds": time.monotonic() - start})
    print(f"\n{text}")


def _check_finite(stats: Path, layers: Mapping[str, LayerSummary]) -> None:
    for name, layer in layers.items():
        if not (layer.std >= 0 and layer.range >= 0):
            raise CalibError(f"{stats}: layer {name!r} has no finite activations; look at {METADATA}")


def _sensitivities(
    settings: Settings, stats: Path, layers: Mapping[str, LayerSummary], model: Callable[[], DiffusionModel]
) -> Sensitivities:
    """Measured on the states behind ``stats``, or from the cache."""
    source = collected(settings, stats, "this heuristic")
    load = source.model(model)
    transformer = settings.skeleton() if settings.skeleton is not None else load().transformer
    wanted = settings.sensitivity
    points = [point for point in tap_points(transformer, TapSelection()) if point.name in layers]
    return measure(
        load,
        {name: layer for name, layer in linear_layers(transformer).items() if name in layers},
        points,
        source.states(wanted.images, wanted.steps),
        {point.name: (layers[point.name].minimum, layers[point.name].maximum) for point in points},
        settings.cache_dir,
        wanted.group_sizes,
    )


def _timestep_config(
    settings: Settings, plan: Plan, layers: Mapping[str, LayerSummary], stats: Path
) -> tuple[dict[str, Any], dict[str, Observed]]:
    """What varies with the step: phases with their bits, ranges. And the ranges that were seen at each step."""
    path = activations_of(stats)
    if path is None:  # a layer_statistics.json says nothing of steps
        return {"num_steps": None, "phases": {}, "activation_ranges": {}}, {}
    with ActivationFile(path) as file:
        levels, kept = file.levels(), dict(file.attributes)
        observed = {name: observe(file, name, layer.clip_percentile) for name, layer in plan.layers.items()}
    bounds = {
        phase: (first, min(last, levels.num_steps - 1))
        for phase, (first, last) in phase_bounds(levels.num_steps).items()
    }
    bits = settings.heuristic.phase_bits(layers, plan) if settings.phase_bits else {}
    phases: dict[str, dict[str, Any]] = {}
    for phase, (first, last) in bounds.items():
        phases[phase] = {"steps": [first, last], "activation_bits": bits.get(phase, {})}
        if phase in plan.phase_weight_bits:
            phases[phase]["weight_bits"] = plan.phase_weight_bits[phase]
    return {
        "num_steps": levels.num_steps,
        "timesteps": _timesteps(stats, levels.timesteps, levels.num_steps),
        "model": kept.get("model"),
        "fingerprint": kept.get("fingerprint"),
        "statistics": str(path),
        "phases": phases,
        "activation_ranges": to_json({name: settings.ranges(seen) for name, seen in observed.items()}),
    }, observed


def _timesteps(stats: Path, known: Mapping[int, float], num_steps: int) -> list[float]:
    """Timesteps of steps 0 … n - 1: as recorded, else between those that were collected, linear in the step."""
    metadata = (stats if stats.is_dir() else stats.parent) / METADATA
    recorded = read_json(metadata).get("timesteps") if metadata.exists() else None
    if isinstance(recorded, list) and len(recorded) > num_steps:
        return [float(t) for t in recorded[:num_steps]]
    steps = sorted(known)
    between: list[float] = np.interp(np.arange(num_steps), steps, [known[s] for s in steps]).tolist()
    return between
