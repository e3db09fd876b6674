"""Runs generate, collect, analyze, quantize and evaluate into one run directory under outputs/."""

from collections.abc import Callable, Mapping
from typing import Any

from calib.activations.taps import tap_points
from calib.base.errors import ConfigError
from calib.base.files import read_json
from calib.base.layout import METRICS
from calib.base.progress import counted
from calib.models.model import DiffusionModel
from calib.models.streamed import BY_GRADIENTS, refusal
from calib.runs.directory import RunDirectory
from calib.stages import analyze, collect, evaluate, quantize
from calib.stages.settings import Method, Settings


def check(settings: Settings) -> None:
    """Raise where one of the stages would fail, as far as known in advance."""
    skeleton = settings.job.model.skeleton
    if skeleton is not None:
        points = tap_points(skeleton(), settings.collect.taps)
        analyze.try_heuristic(settings, [name for point in points for name in point.names])
    _check_kept(settings)
    quantize.check_quantizer(settings)
    collect.check(settings)
    evaluate.check_reference(settings)


def _check_kept(settings: Settings) -> None:
    """Raise where the heuristic measures sensitivities that need all weights, or states that the dataset will lack."""
    own = settings.analyze
    if own.analysis.measures and own.sensitivity.method is Method.TRIALS and settings.job.model.is_streamed():
        raise refusal("sensitivities by trials (sensitivity.method=trials)", BY_GRADIENTS)
    if own.analysis.measures and own.sensitivity.of != "output":
        kept, num_steps = settings.generate.kept_steps, settings.generate.sampler.num_steps
        if lacking := sorted(set(range(num_steps + 1)) - set(kept)):
            allowed = f"sensitivity.of={own.sensitivity.of} needs all states, of which it leaves out {lacking[0]}"
            instead = "set dataset.steps=all, or sensitivity.of=output"
            raise ConfigError.bad_value("dataset.steps", settings.generate.dataset.steps, f"{allowed}; {instead}")


def sources(settings: Settings) -> list[str]:
    """Checksums of files that the result depends on: of a reference alone, as the job makes all others itself."""
    return evaluate.reference_sources(settings)


def run(settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]) -> None:
    """Run all stages, one after the other."""
    collect.run(settings, run, model, config)
    analyze.run(settings, run, model, config)
    quantize.run(settings, run, model, config)
    if settings.evaluate.evaluation.num_images:
        evaluate.run(settings, run, model, config)
    print(_in_short(read_json(run.path / METRICS), settings.evaluate.evaluation.num_images))


def _in_short(metrics: Mapping[str, float], pictures: int) -> str:
    """What was saved and, where ``pictures`` were drawn with it, how they came out, in a line."""
    before, after = (metrics[f"{which}_bytes"] / 1e6 for which in ("unquantized", "quantized"))
    bits = metrics["average_weight_bits"]
    saved = f"{bits:.2f} bits a weight, {after:.1f} MB for {before:.1f} ({after / before:.0%})"
    predicted = f", {metrics['predicted_psnr']:.2f} predicted" if "predicted_psnr" in metrics else ""
    drawn = f"; {counted(pictures, 'held-out picture')} at PSNR {metrics['psnr']:.2f} dB{predicted}" if pictures else ""
    return f"In short: {saved}{drawn}"
