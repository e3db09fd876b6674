"""The stage that applies a plan: a quantized model in the run directory."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.activations.taps import linear_layers
from calib.analysis.plan import LayerPlan, read_plan
from calib.analysis.steps import StepPlan, read_steps
from calib.analyzing import PLAN, TIMESTEP_CONFIG
from calib.errors import CalibError, ConfigError
from calib.files import write_json
from calib.models.model import DiffusionModel
from calib.progress import note, readable_bytes
from calib.quantization.build import Source, build, check_names
from calib.quantization.checkpoint import mmdit_fields, save
from calib.quantization.model import QuantizedModel
from calib.runs.directory import RunDirectory
from calib.settings import Settings, Stage
from calib.sources import activations_of, collected

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
    if made_for != settings.model_name:
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
    about = _about(settings, model())
    mx.reset_peak_memory()
    quantized, notes = build(model(), plan, steps, settings.quantizer, source, about)
    peak = mx.get_peak_memory()
    save(quantized, run.path / FOLDER)
    if settings.stage is not Stage.RUN:
        _copy_plan(run, plan, steps)
    for line in notes:
        note(line)
    seconds = time.monotonic() - start
    run.add_metrics({**quantized.size().metrics(), "quantize_seconds": seconds, "quantize_peak_bytes": peak})
    logger.info("quantized %d layers in %.1f s", len(quantized.layers), seconds)
    print(f"{size_text(quantized, run.path / FOLDER)}; peak memory {readable_bytes(peak)}")


def _copy_plan(run: RunDirectory, plan: dict[str, LayerPlan], steps: StepPlan) -> None:
    """The plan itself beside the model, so that the run directory says all of it."""
    write_json(run.path / PLAN, {name: layer.to_json() for name, layer in plan.items()})
    write_json(run.path / TIMESTEP_CONFIG, steps.to_json())


def _source(settings: Settings, run: RunDirectory, plan: Path, steps: StepPlan) -> Source:
    """Statistics and states for the quantizer: of this run, else as asked, else those that the plan names."""
    stats = run.path if settings.stage is Stage.RUN else settings.stats
    if stats is None:
        beside = plan.parent if activations_of(plan.parent) else None
        named = Path(steps.origin["statistics"]) if "statistics" in steps.origin else None
        stats = beside or (named.parent if named is not None and named.exists() else None)
    if stats is None:
        return Source(None, settings.ranges, None)
    wanted = settings.calibration

    def states() -> Any:
        return collected(settings, stats, "this quantizer").states(wanted.images, wanted.steps)

    return Source(activations_of(stats), settings.ranges, states)


def _about(settings: Settings, model: DiffusionModel) -> dict[str, Any]:
    config = model.transformer.config
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "quantizer": _named(settings.quantizer),
        "ranges": _named(settings.ranges),
        "dtype": str(config.dtype).rpartition(".")[2],
        "mmdit": mmdit_fields(config),
    }


def _named(bound: Any) -> dict[str, Any]:
    """A bound option: its function, and its parameters."""
    return {"function": f"{bound.func.__module__}.{bound.func.__qualname__}", **bound.keywords}


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
