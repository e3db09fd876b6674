"""The configuration that a run directory records: of what the job did not make, that of the job that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from calib.base.files import read_json
from calib.base.layout import CONFIG
from calib.quantization.checkpoint import CHECKPOINT
from calib.runs.record import read_configuration
from calib.runs.standing import mapping_in
from calib.stages import Stage
from calib.stages.origin import plan_of, quantized_of, stats_of
from calib.stages.settings import Analyze, Collect, Generate, Quantize, Settings

#: Keys of earlier stages, of which a stage uses none itself: an evaluation draws with its own sampler and prompts.
_EARLIER: Mapping[Stage, tuple[type, ...]] = {
    Stage.ANALYZE: (Generate, Collect),
    Stage.QUANTIZE: (Generate, Collect, Analyze),
    Stage.EVALUATE: (Collect, Analyze, Quantize),
}
#: Keys about the dataset, of which an evaluation uses none either.
_DATASET = ("num_images", "seed", "dataset", "data_dir")
#: Keys that name what a job starts from or where it writes; they are each job's own.
_OWN = ("stats", "plan", "export_config")


def carried(settings: Settings) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and options, by top-level key, of the earlier stages whose products the job starts from."""
    source = _source(settings)
    if source is None:
        return {}, {}
    kinds = _EARLIER[settings.stage]
    keys = [field.name for kind in kinds for field in fields(kind) if field.name not in _OWN]
    keys += _DATASET if settings.stage is Stage.EVALUATE else ()
    if settings.stage is Stage.EVALUATE and not (source / CONFIG).exists():
        return _of_model(quantized_of(settings), keys)
    found = read_configuration(source, [])
    values = {key: found.values[key] for key in keys if key in found.values}
    return values, {key: found.options[key] for key in values if key in found.options}


def _of_model(folder: Path, keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a quantized model that was copied from its run says of what it was made by; None where that is unknown."""
    document = mapping_in(folder / CHECKPOINT, [], read_json)  # what is wrong with it is the stage's to say
    made_by = {key: entry for key in ("quantizer", "ranges") if isinstance(entry := document.get(key), dict)}
    options = {key: name for key, entry in made_by.items() if isinstance(name := entry.get("name"), str)}
    found = {key: made_by[key].get("parameters") for key in options}
    return dict.fromkeys(keys) | {key: p if isinstance(p, dict) else {} for key, p in found.items()}, options


def _source(settings: Settings) -> Path | None:
    """The directory that the job starts from; None where it starts from nothing."""
    match settings.stage:
        case Stage.ANALYZE:
            stats = stats_of(settings)
            return stats if stats.is_dir() else stats.parent
        case Stage.QUANTIZE:
            return plan_of(settings).parent
        case Stage.EVALUATE:
            return quantized_of(settings).parent
    return None
