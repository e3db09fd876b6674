"""What a reader of a comparison must know: runs that do not compare, or were evaluated on what they were made from."""

from collections.abc import Sequence

from calib.runs.record import RunRecord, Scalar
from calib.runs.standing import RunState

#: Settings that affect what is drawn and measured, and those among them that do not.
_MEASURED, _UNMEASURED = (
    ("evaluation.", "prompts", "sampler."),
    ("evaluation.by", "evaluation.dequantize", "evaluation.metrics", "sampler.batch_size"),
)
#: Runs that a note names at most.
_MOST_NOTED = 3


def plain(value: Scalar) -> str:
    """``value`` as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def models_of(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the runs' models."""
    return list(dict.fromkeys(str(run.config["model.name"]) for run in runs if "model.name" in run.config))


def notes_on(runs: Sequence[RunRecord], base: RunRecord | None) -> list[str]:
    """Notes on ``runs``, with ``base`` as the baseline."""
    notes = []
    models, done = models_of(runs), [run for run in runs if run.state is RunState.COMPLETE]
    if len(models) > 1:
        alone = "so none is marked as the best; --where model=… leaves those of one"
        notes.append(f"these are runs of different models ({', '.join(models)}): their figures do not compare, {alone}")
    elif differing := _measured_otherwise([run for run in runs if "psnr" in run.metrics and run.config]):
        notes.append(
            f"they were evaluated on different pictures or steps ({', '.join(differing)}): compare errors with care"
        )
    if base is not None and not base.metrics:
        notes.append(f"the baseline, {base.name}, has no figures")
    lacking = sum(bool(run.metrics) and "psnr" not in run.metrics for run in done)
    if 0 < lacking < len(done):
        notes.append(f"not evaluated, so without PSNR and errors: {lacking} of {len(runs)} runs")
    if seen := [f"{run.name} ({run.metrics['prompts_seen']:.0f})" for run in done if run.metrics.get("prompts_seen")]:
        more = f" and {len(seen) - _MOST_NOTED} more" if len(seen) > _MOST_NOTED else ""
        notes.append(
            f"evaluated on prompts that were calibrated or trained on, which say little of others: "
            f"{', '.join(seen[:_MOST_NOTED])}{more}"
        )
    # The table itself shows what is wrong with the others.
    damaged = [f"{run.name}: {run.why}" for run in done if run.why]
    notes += damaged[:_MOST_NOTED]
    if len(damaged) > _MOST_NOTED:
        notes.append(f"{len(damaged) - _MOST_NOTED} more runs have files that cannot be read")
    return notes


def _measured_otherwise(runs: Sequence[RunRecord]) -> list[str]:
    """Settings that affect what is drawn and measured, and differ."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key.startswith(_MEASURED))
    differing = [k for k in keys if k not in _UNMEASURED and len({plain(run.config.get(k)) for run in runs}) > 1]
    return differing
