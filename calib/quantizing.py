"""The stage that applies a plan: a quantized model in the run directory."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.activations.taps import linear_layers
from calib.analysis.plan import LayerPlan, Plan, read_plan
from calib.analysis.steps import StepPlan, observed_ranges, plan_hash, plan_steps, read_steps, rule_document
from calib.analyzing import PLAN, TIMESTEP_CONFIG
from calib.errors import CalibError, ConfigError
from calib.files import read_json, write_json
from calib.models.model import DiffusionModel
from calib.progress import note, readable_bytes
from calib.quantization.build import Source, build, check_names
from calib.quantization.checkpoint import save
from calib.quantization.model import QuantizedModel
from calib.runs.directory import RunDirectory
from calib.settings import Settings, Stage
from calib.sources import activations_of, collected
from calib.typed import bind

import mlx.core as mx

FOLDER = "quantized"

logger = logging.getLogger("calib")


def plan_path(settings: Settings) -> Path:
    """The plan that ``plan=`` names."""
    given = settings.plan
    if given is None:
        raise ConfigError("plan is not set: name a run directory or a quantization_config.json, plan=DIR")
    path = given / PLAN if given.is_dir() else given
    if not path.exists():
        raise ConfigError(f"plan={given}: no {PLAN} there; calib analyze makes one")
    return path


def check_plan(settings: Settings, path: Path) -> None:
    """Raise where a plan cannot be this model's; costs no weights."""
    plan = read_plan(path)
    if settings.skeleton is not None:
        check_names(plan, list(_known(linear_layers(settings.skeleton()))), str(path))
    made_for = read_steps(path.parent / TIMESTEP_CONFIG).origin.get("model", settings.model_name)
    # Datasets of older scripts name a repository, or nothing; weights are compared once they are loaded.
    if made_for not in ("unknown", "None", settings.model_name) and "/" not in made_for:
        raise ConfigError(f"plan={path}: made for model={made_for}, not {settings.model_name}; set model={made_for}")


def _known(layers: Any) -> list[str]:
    """Names that a plan may have: layers, and blocks where they were tapped."""
    return [*layers, *{name.partition(".")[0] for name in layers if "block_" in name}]


def run_quantize(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel]) -> None:
    """The planned model into the run directory's folder ``quantized``, by the chosen quantizer."""
    start = time.monotonic()
    path = run.path / PLAN if settings.stage is Stage.RUN else plan_path(settings)
    plan, steps = read_plan(path), read_steps(path.parent / TIMESTEP_CONFIG)
    check_names(plan, _known(linear_layers(model().transformer)), str(path))
    fingerprint, own = steps.origin.get("fingerprint"), model().fingerprint
    if fingerprint not in (None, own):
        raise CalibError(f"{path}: its statistics are of other weights ({fingerprint}, not {own})")
    source = _source(settings, run, path, steps)
    steps = _own_steps(path, plan, steps, source)
    about = {"quantizer": rule_document(settings.quantizer), "ranges": steps.rule}
    mx.reset_peak_memory()
    quantized, notes = build(model(), plan, steps, settings.quantizer, source, about)
    peak = mx.get_peak_memory()
    save(quantized, run.path / FOLDER)
    if settings.stage is not Stage.RUN:
        _copy_plan(run, path, steps)
    for line in notes:
        note(line)
    seconds = time.monotonic() - start
    run.add_metrics({**quantized.size().metrics(), "quantize_seconds": seconds, "quantize_peak_bytes": peak})
    logger.info("quantized %d layers in %.1f s", len(quantized.layers), seconds)
    print(f"{size_text(quantized, run.path / FOLDER)}; peak memory {readable_bytes(peak)}")


def _own_steps(path: Path, plan: dict[str, LayerPlan], steps: StepPlan, source: Source) -> StepPlan:
    """``steps`` where they belong to ``plan``; else, as the plan was changed or copied, made anew from statistics."""
    if steps.plan == plan_hash(plan):
        return steps
    why = f"{path}: {TIMESTEP_CONFIG} beside it is another plan's" if steps.timesteps else f"{path} stands alone"
    if source.statistics is None:
        note(f"{why}, and there are no statistics (stats=DIR): inputs stay as they are, weights alone are quantized")
        return replace(steps, activation_bits={}, weight_bits={}, ranges={})
    note(f"{why}: activation ranges are made from {source.statistics}")
    whole = Plan(plan)
    return plan_steps(whole, observed_ranges(whole, source.statistics), source.statistics, source.rule)


def _copy_plan(run: RunDirectory, plan: Path, steps: StepPlan) -> None:
    """The plan itself beside the model, so that the run directory says all of it."""
    write_json(run.path / PLAN, read_json(plan))
    write_json(run.path / TIMESTEP_CONFIG, steps.to_json())


def _source(settings: Settings, run: RunDirectory, plan: Path, steps: StepPlan) -> Source:
    """Statistics and states for the quantizer: of this run, else as asked, else those that the plan names."""
    stats = run.path if settings.stage is Stage.RUN else settings.stats
    if stats is None:
        beside = plan.parent if activations_of(plan.parent) else None
        named = Path(steps.origin["statistics"]) if "statistics" in steps.origin else None
        stats = beside or (named.parent if named is not None and named.exists() else None)
    # As the plan's own ranges were made, so those that a quantizer asks for.
    rule = bind("ranges", steps.rule, given=("observed",)) if steps.rule else settings.ranges
    if stats is None:
        return Source(None, rule, None)
    wanted = settings.calibration

    def states() -> Any:
        return collected(settings, stats, "this quantizer").states(wanted.images, wanted.steps)

    return Source(activations_of(stats), rule, states)


def size_text(quantized: QuantizedModel, folder: Path) -> str:
    """For people: how large the model is now."""
    size = quantized.size()
    copies = sum(map(len, quantized.copies.values()))
    more = f", {copies} further copies for phases" if copies else ""
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    return (
        f"Quantized model: {folder}\n"
        f"  {len(quantized.layers)} layers at {size.average_bits:.2f} bits a weight, scales and biases counted{more}\n"
        f"  {size.bits_per_weight:.2f} bits a weight over all: {readable_bytes(size.nbytes)} of "
        f"{readable_bytes(size.nbytes_before)} at 16 bits ({readable_bytes(on_disk)} on disk)\n"
        f"  {len(quantized.inputs)} layers with quantized inputs"
    )
