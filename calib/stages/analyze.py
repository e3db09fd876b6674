"""Turns statistics into a bit-width plan, from files alone; analysis=sensitivity and allocate
replay stored states once, and find what they measured in cache_dir ever after.

Main keys: stats (a run directory or a layer_statistics.json), analysis, ranges, phase_bits, sensitivity,
export_config
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.analysis.gradients import gradient_sensitivities
from calib.analysis.input_bits import over_ranges
from calib.analysis.layers import PROBE, LayerSummary, read_summaries
from calib.analysis.measure import placeholder_sensitivities, sensitivities
from calib.analysis.observed import average_activation_bits, drift_text, observed_ranges, plan_steps, ranges_by
from calib.analysis.passes import check_complete
from calib.analysis.plan import Plan
from calib.analysis.ranges import Observed, per_step, static
from calib.analysis.sensitivities import Of, Sensitivities
from calib.analysis.steps import StepPlan
from calib.analysis.summary import summary_text
from calib.base.errors import CalibError, ConfigError
from calib.base.files import content_of, write_json, write_text
from calib.base.layout import ACTIVATIONS, METADATA, PLAN, STATISTICS, STEPS, SUMMARY
from calib.base.option import on_trial
from calib.base.progress import note
from calib.models.model import DiffusionModel
from calib.runs.directory import RunDirectory
from calib.stages import Stage
from calib.stages.origin import activations_of, check_statistics, collected, statistics_checksum, stats_of
from calib.stages.settings import Method, Settings

import numpy as np
from numpy.typing import NDArray


def check(settings: Settings) -> None:
    """Raise where the statistics cannot be read, or the heuristic cannot plan their layers."""
    stats = stats_of(settings)
    layers, _ = read_summaries(stats)
    check_statistics(stats, settings.generate.given_data_dir)
    _check_steps_of(try_heuristic(settings, list(layers)), stats)
    if settings.analyze.analysis.measures:
        source = collected(settings, stats, "this heuristic")
        if (of := settings.analyze.sensitivity.of) is not Of.OUTPUT:
            check_complete(source.data_dir, source.manifest, of)


def sources(settings: Settings) -> list[str]:
    """Checksums of the statistics that the plan is made from."""
    stats = stats_of(settings)
    files = (stats / ACTIVATIONS, stats / STATISTICS, stats / METADATA, stats)
    return [content_of(path) for path in files if path.is_file()]


def run(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]) -> None:
    """Make a plan from statistics, without a model unless the heuristic measures sensitivities."""
    start, own = time.monotonic(), settings.analyze
    stats = run.path if settings.stage is Stage.RUN else stats_of(settings)
    layers, _ = read_summaries(stats)
    _check_finite(stats, layers)
    measured: list[Sensitivities] = []

    def measure() -> Sensitivities:
        measured.append(sensitivities_of(settings, stats, layers, model))
        return measured[-1]

    plan = own.analysis.plan(layers, measure)
    _check_steps_of(plan, stats)
    steps, observed = _steps(settings, plan, layers, stats)
    if steps.timesteps:
        steps = replace(steps, importance=importance_of(plan, measured))
    steps = steps.with_predictions(plan, _known(measured))
    if settings.stage is Stage.RUN and "statistics" in steps.origin:
        steps.origin["statistics"] = str(run.home / ACTIVATIONS)
    write_json(run.path / PLAN, plan.to_json())
    write_json(run.path / STEPS, steps.to_json())
    if own.export_config is not None:
        write_json(own.export_config, plan.to_json())
    text = summary_text(plan) + (drift_text(_distinct(observed)) if observed else "")
    write_text(run.path / SUMMARY, text)
    metrics = plan.metrics()
    if (activations := activations_of(stats)) is not None:
        bits = {name: steps.bits_by_step(name, layer.activation_bits) for name, layer in plan.layers.items()}
        metrics["average_activation_bits"] = average_activation_bits(activations, bits)
    run.add_metrics(Stage.ANALYZE, {**metrics, "analyze_seconds": time.monotonic() - start})
    print(f"\n{text}")


def _known(measured: Sequence[Sensitivities]) -> dict[str, Any]:
    """What errors are of, and how those at each step reach it; empty of outputs."""
    if not measured or measured[-1].of is Of.OUTPUT:
        return {}
    reach = measured[-1].reach
    return {"of": measured[-1].of.value, **({} if reach is None else {"reach": reach.to_json()})}


def importance_of(plan: Plan, measured: Sequence[Sensitivities]) -> dict[str, NDArray[np.float64]]:
    """By planned layer, to three digits, how much errors of its output at each step count, relative to the most."""
    found = {}
    for name, share in measured[-1].importance.items() if measured else ():
        if name in plan.layers and share.max() > 0:
            found[name] = np.array([float(f"{value:.3g}") for value in share / share.max()])
    return found


def _check_steps_of(plan: Plan | None, stats: Path) -> None:
    """Raise where the plan has bits by step, and the statistics know no steps."""
    if plan is not None and plan.step_activation_bits and activations_of(stats) is None:
        what = f"knows no steps, by which this plan's activation bits vary: name a run directory with its {ACTIVATIONS}"
        raise ConfigError.bad_value("stats", stats, what)


def _check_finite(stats: Path, layers: Mapping[str, LayerSummary]) -> None:
    for name, layer in layers.items():
        if not (layer.std >= 0 and layer.range >= 0):
            raise CalibError(f"{stats}: layer {name!r} has no finite activations; look at {METADATA}")


def sensitivities_of(
    settings: Settings, stats: Path, layers: Mapping[str, LayerSummary], model: Callable[[], DiffusionModel]
) -> Sensitivities:
    """Sensitivities measured on the states that ``stats`` was collected from, or cached."""
    source, wanted = collected(settings, stats, "this heuristic"), settings.analyze.sensitivity
    drawn, asked = source.manifest.cfg_weight, settings.generate.sampler.cfg_weight
    if drawn != asked:
        note(f"sampler.cfg_weight={asked}: sensitivities are of {source.data_dir} as it was drawn, with {drawn}")
    load = source.model(model)
    states = source.states(wanted.images, wanted.steps)
    where = (load, settings.job.model.architecture(load), layers, states, settings.job.cache_dir)
    activations, trials = activations_of(stats), wanted.method is Method.TRIALS
    # The same whatever the rule for ranges is, so that every rule finds it in the cache.
    measured = None if activations is None else ranges_by(static if trials else per_step, activations)
    if trials:
        found = sensitivities(*where, wanted.group_sizes)
    else:
        found = gradient_sensitivities(*where, wanted.of, wanted.group_sizes, wanted.probes, measured)
    if activations is None or measured is None:
        return found
    return over_ranges(found, measured, ranges_by(settings.analyze.ranges, activations))


def try_heuristic(settings: Settings, names: list[str]) -> Plan | None:
    """Raise where a heuristic over all layers could not plan the layers ``names``, whatever is measured.

    Returns the plan of made-up statistics, where there is one.
    """
    heuristic, skeleton = settings.analyze.analysis, settings.job.model.skeleton
    if heuristic.by_layer:
        return None
    with on_trial():
        if not heuristic.measures:
            return heuristic.whole(dict.fromkeys(names, PROBE))
        elif skeleton is not None:
            wanted, num_steps = settings.analyze.sensitivity, settings.generate.sampler.num_steps
            layers, found = placeholder_sensitivities(skeleton(), names, num_steps, wanted.group_sizes, wanted.of)
            return heuristic.whole(layers, lambda: found)
    return None


def _distinct(observed: Mapping[str, Observed]) -> dict[str, Observed]:
    """One entry for layers that read the same array, named by the first with the number of the others."""
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
    """The step plan, and the observed ranges; both are empty for a layer_statistics.json."""
    path, own = activations_of(stats), settings.analyze
    checksum = {"statistics_checksum": statistics_checksum(stats)}
    if path is None:
        return StepPlan(origin=checksum), {}
    observed = observed_ranges(plan, path)
    bits = own.analysis.phase_bits(layers, plan) if own.phase_bits else None
    steps = plan_steps(plan, observed, path, own.ranges, bits)
    return replace(steps, origin=steps.origin | checksum), observed
