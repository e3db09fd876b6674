"""Check the files of a run directory, and that each was made from what lies beside it; ``calib verify RUN``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from calib.activations.reader import ActivationFile
from calib.analysis.plan_file import read_plan
from calib.analysis.steps import read_steps
from calib.base.errors import CalibError
from calib.base.files import content_of, read_json
from calib.base.layout import ACTIVATIONS, CHECKED, DETAILS, MODEL, MODEL_CONFIG, PLAN, STATISTICS, STATUS, STEPS
from calib.quantization.checkpoint import describe
from calib.runs.record import home_of, read_configuration
from calib.runs.standing import RunState, changed_files, standing
from calib.stages import Stage
from calib.stages.origin import check_quantized, check_statistics, statistics_of
from calib.stages.renew import renewing


def verify_run(run: Path) -> dict[str, list[str]]:
    """What is wrong in a run directory, by the part of it that was checked; only parts that are there are checked."""
    checks: dict[str, tuple[Path, Callable[[], object]]] = {
        "statistics": (run / STATISTICS, partial(check_statistics, run)),
        "activations": (run / ACTIVATIONS, partial(_read_activations, run / ACTIVATIONS)),
        "plan": (run / PLAN, partial(_check_plan, run / PLAN)),
        "quantized model": (run / MODEL, partial(_check_model, run / MODEL)),
        "evaluation": (run / DETAILS, partial(_check_evaluation, run)),
    }
    found: dict[str, list[str]] = {"job": _job(run)}
    for part, (path, check) in checks.items():
        if path.exists():
            found[part] = []
            with _noting(found[part]):
                check()
    return found


def _job(run: Path) -> list[str]:
    latest = standing(run)
    begun = (run / STATUS).exists()  # what calib merge joined has none
    failed = [] if latest.state is RunState.COMPLETE or not begun else [f"{run}: {latest.state}: {latest.why}"]
    changed = changed_files(run, CHECKED)
    return [*failed, *(f"{run / name}: was changed after the job was complete" for name in changed)]


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except CalibError as error:
        problems.append(str(error))


def _read_activations(path: Path) -> None:
    with ActivationFile(path) as file:
        for name in file.layers:
            file.by_step(name)


def _check_plan(path: Path) -> None:
    read_plan(path)
    statistics_of(path, read_steps(path.parent / STEPS))


def _check_model(folder: Path) -> None:
    describe(folder, thorough=True)
    check_quantized(folder)


def _check_evaluation(run: Path) -> None:
    document = read_json(run / DETAILS)
    made_from = document.get("made_from") if isinstance(document, dict) else None
    plan = run if (run / MODEL_CONFIG).exists() else home_of(Path(str(read_configuration(run, []).values.get("plan"))))
    model = plan / MODEL_CONFIG
    if isinstance(made_from, dict) and model.is_file() and made_from.get("quantized") != content_of(model):
        renew = f"{renewing(Stage.EVALUATE, run, f'plan={plan}')} renews it"
        raise CalibError(f"{run / DETAILS}: is of another quantized model than {plan / MODEL}; {renew}")
