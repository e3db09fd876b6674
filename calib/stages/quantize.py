"""Applies a plan: weights packed as MLX runs them, activation ranges that follow the step, as a
folder quantized/ in the run directory.

Main keys: plan (a run directory or a quantization_config.json), quantizer, calibration, stats
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.analysis.observed import average_activation_bits, observed_ranges, plan_steps
from calib.analysis.plan import UNQUANTIZED, LayerPlan, Plan, plan_hash
from calib.analysis.plan_file import read_plan
from calib.analysis.rules import rule_of
from calib.analysis.steps import StepPlan, applied_hash, read_steps
from calib.base.device import device_kind
from calib.base.errors import CalibError, ConfigError, suggest
from calib.base.files import content_of, read_json, short_hash, write_json
from calib.base.layout import ACTIVATIONS, MODEL, PLAN, STEPS
from calib.base.progress import note, readable_bytes
from calib.base.targets import described
from calib.base.versions import numerics
from calib.dataset.check_model import check_model
from calib.models.architecture import Architecture
from calib.models.model import DiffusionModel
from calib.quantization.build import Calibration, check_names, quantize_layers
from calib.quantization.checkpoint import save
from calib.quantization.finished import forget
from calib.quantization.model import QuantizedModel
from calib.quantization.quantizer import QuantizerInput
from calib.quantization.texts import prompts_of
from calib.quantization.unfinished import done
from calib.runs.directory import RunDirectory
from calib.stages import Stage
from calib.stages.origin import activations_of, collected, plan_of, statistics_checksum, statistics_of
from calib.stages.settings import Settings

import mlx.core as mx

#: Of how many prompts one is left for evaluations, beside those of this configuration's.
SPARED = 8
logger = logging.getLogger("calib")


def check(settings: Settings) -> None:
    """Raise where there is no plan, or the plan is another model's; no weights are loaded."""
    path, model = plan_of(settings), settings.job.model
    plan, steps = read_plan(path), read_steps(path.parent / STEPS)
    if model.skeleton is not None:
        check_names(plan, _known(model.skeleton()), str(path))
    check_quantizer(settings)
    _check_layers_of(steps, plan, path)
    made_for = steps.origin.get("model", model.name)
    # Datasets of older scripts name a repository, or nothing; weights are compared once they are loaded.
    if made_for not in ("unknown", "None", model.name) and "/" not in made_for:
        raise ConfigError(f"plan={path}: made for model={made_for}, not {model.name}; set model={made_for}")
    stats = settings.analyze.stats
    if stats is not None and activations_of(stats) is None:
        allowed = f"no {ACTIVATIONS} there; calib collect makes a run directory with one"
        raise ConfigError.bad_value("stats", stats, allowed)
    if stats is None:
        statistics_of(path, steps, settings.generate.given_data_dir)


def check_quantizer(settings: Settings) -> None:
    """Raise where the model is known to be streamed, and the quantizer needs all of its weights at once."""
    model = settings.job.model
    if model.skeleton is not None and model.is_streamed():
        settings.quantize.quantizer(QuantizerInput.without_layers(model.skeleton(), mx.float16, streamed=True))


def _check_layers_of(steps: StepPlan, plan: Mapping[str, LayerPlan], path: Path) -> None:
    """Raise where the steps of ``plan`` name layers that it lacks, whose ranges or bits would have no effect."""
    by_phase = [*steps.activation_bits.values(), *steps.weight_bits.values()]
    named = [*steps.ranges, *steps.step_bits, *(name for bits in by_phase for name in bits)]
    if steps.plan == plan_hash(plan) and (unknown := [name for name in named if name not in plan]):
        hint = suggest(unknown[0], plan, list_all=False)
        raise CalibError(f"{path.parent / STEPS}: has layer {unknown[0]!r}, which {path.name} has not.{hint}")


def sources(settings: Settings) -> list[str]:
    """Checksums of the plan and of the statistics for quantizers."""
    plan = plan_of(settings)
    beside = (plan, plan.parent / STEPS, (settings.analyze.stats or plan.parent) / ACTIVATIONS)
    return [content_of(path) for path in beside if path.is_file()]


def _known(architecture: Architecture) -> list[str]:
    """Names that a plan may contain: layers, and blocks, which may have been tapped."""
    return [*architecture.layers(), *architecture.blocks()]


def run(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]) -> None:
    """Quantize the model by the plan with the chosen quantizer, into the run directory's folder ``quantized``."""
    start, quantizer = time.monotonic(), settings.quantize.quantizer
    path = run.path / PLAN if settings.stage is Stage.RUN else plan_of(settings)
    plan, steps = read_plan(path), read_steps(path.parent / STEPS)
    check_names(plan, _known(model().architecture), str(path))
    fingerprint, own = steps.origin.get("fingerprint"), model().fingerprint
    if fingerprint not in (None, own):
        raise CalibError(f"{path}: its statistics are of other weights ({fingerprint}, not {own})")
    source = _source(settings, run, path, steps, model)
    steps = _own_steps(path, plan, steps, source)
    made_from: dict[str, Any] = {
        "plan": applied_hash(plan, steps),
        "statistics": source.statistics and statistics_checksum(source.statistics),
    }
    if source.states is not None:
        made_from["calibration"] = asdict(settings.quantize.calibration)
    scratch = _scratch(settings, [made_from, own, model().text_encoders, steps.rule, numerics(model().transformer)])
    source = replace(source, scratch=scratch, home=run.home)
    about: dict[str, Any] = {"quantizer": described(quantizer), "ranges": steps.rule, "made_from": made_from}
    about |= steps.predictions(plan)
    mx.reset_peak_memory()
    quantized, notes = quantize_layers(model(), plan, steps, quantizer, source, about)
    peak = mx.get_peak_memory()
    if source.statistics is not None:
        bits = {n: quantized.inputs[n].bits if n in quantized.inputs else (UNQUANTIZED,) for n in plan}
        quantized.about["average_activation_bits"] = average_activation_bits(source.statistics, bits)
    save(quantized, run.path / MODEL)
    done(run.home)
    forget(scratch)
    if settings.stage is not Stage.RUN:
        _copy_plan(run, path, steps)
    for line in notes:
        note(line)
    seconds = time.monotonic() - start
    run.add_metrics(Stage.QUANTIZE, {**quantized.metrics(), "quantize_seconds": seconds, "quantize_peak_bytes": peak})
    logger.info("quantized %d layers in %.1f s", len(quantized.layers), seconds)
    on_disk = sum(path.stat().st_size for path in (run.path / MODEL).iterdir())
    print(f"{size_text(quantized, run.home / MODEL, on_disk)}; peak memory {readable_bytes(peak)}")


def _own_steps(path: Path, plan: dict[str, LayerPlan], steps: StepPlan, source: Calibration) -> StepPlan:
    """``steps`` where they belong to ``plan``; a new step plan from statistics where the plan was changed or copied."""
    if steps.plan == plan_hash(plan):
        return steps
    why = f"{path}: {STEPS} beside it is another plan's" if steps.timesteps else f"{path} stands alone"
    why += ", so inputs have the bits of this one at all steps" if steps.step_bits else ""
    if source.statistics is None:
        note(f"{why}, and there are no statistics (stats=DIR): inputs stay as they are, weights alone are quantized")
        return replace(steps, activation_bits={}, step_bits={}, weight_bits={}, ranges={})
    note(f"{why}: activation ranges are made from {source.statistics}")
    whole = Plan(plan)
    return plan_steps(whole, observed_ranges(whole, source.statistics), source.statistics, source.rule)


def _copy_plan(run: RunDirectory, plan: Path, steps: StepPlan) -> None:
    """Copy the plan to the run directory of the model, so that it is complete."""
    write_json(run.path / PLAN, read_json(plan))
    write_json(run.path / STEPS, steps.to_json())


def _source(
    settings: Settings, run: RunDirectory, plan: Path, steps: StepPlan, model: Callable[[], DiffusionModel]
) -> Calibration:
    """Calibration data for the quantizer: of this run, else given by ``stats=``, else named by the plan."""
    stats = run.path if settings.stage is Stage.RUN else settings.analyze.stats
    stats = stats or statistics_of(plan, steps, settings.generate.given_data_dir)
    # The rule of the plan's ranges also applies to those that a quantizer requests.
    rule = rule_of(steps.rule, settings.analyze.ranges, plan.parent / STEPS)
    if stats is None:
        return Calibration(None, rule, None)
    wanted = settings.quantize.calibration

    def states() -> StoredStates:
        found = collected(settings, stats, "this quantizer")
        check_model(found.data_dir, found.manifest, model())
        return found.states(wanted.images, wanted.steps)

    return Calibration(activations_of(stats), rule, states, prompts=lambda: spare_prompts(settings, states()))


def spare_prompts(settings: Settings, states: StoredStates) -> Sequence[str]:
    """Prompts of the list that a quantizer may draw: not the last ones, with which an evaluation begins.

    None, and a note, where the dataset is of another list.
    """
    prompts, evaluated = settings.generate.prompts, settings.evaluate.evaluation.num_images
    images = list(states.manifest.images)
    of_list = [prompts[image % len(prompts)] for image in images]
    if prompts_of(states, images) != of_list:
        note(
            f"{states.data_dir}: its prompts are not those of this configuration: no others are drawn; set prompts as "
            "they were when it was drawn"
        )
        return ()
    return prompts[: max(0, len(prompts) - max(evaluated, len(prompts) // SPARED))]


def _scratch(settings: Settings, given: Sequence[Any]) -> Path:
    """The folder for what a quantizer has done so far, by all that it is ``given`` but its own parameters."""
    key = short_hash([*given, device_kind()], digits=16)
    return settings.job.cache_dir / "reconstruction" / key


def size_text(quantized: QuantizedModel, folder: Path, on_disk: int) -> str:
    """The size of the quantized model in ``folder``, ``on_disk`` bytes there, for people."""
    size = quantized.size()
    copies = sum(map(len, quantized.copies.values()))
    more = f", {copies} further copies for phases" if copies else ""
    return (
        f"Quantized model: {folder}\n"
        f"  {len(quantized.layers)} layers at {size.average_bits:.2f} bits a weight, scales and biases counted{more}\n"
        f"  {size.bits_per_weight:.2f} bits a weight over all: {readable_bytes(size.nbytes)} of "
        f"{readable_bytes(size.nbytes_before)} at 16 bits ({readable_bytes(on_disk)} on disk)\n"
        f"  {len(quantized.inputs)} layers with quantized inputs{activations_text(quantized)}"
    )


def activations_text(quantized: QuantizedModel) -> str:
    """The average bits of inputs, for people; '' where they are not known, or none is quantized."""
    average = quantized.about.get("average_activation_bits")
    known = average is not None and quantized.inputs
    return f", {average:.2f} bits a number that layers read" if known else ""
