"""One job in its run directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.base.errors import in_a_line
from calib.base.layout import CONFIG, PAGE
from calib.base.progress import say
from calib.cli.blocked import check_targets
from calib.runs.directory import RunDirectory
from calib.runs.record import CARRIED
from calib.runs.standing import RunState, results_of
from calib.stages.build import build
from calib.stages.carried import carried
from calib.stages.origin import check_directory
from calib.stages.settings import ReportForm
from calib.stages.stages import check_stage, content_fingerprint, run_stage

from omegaconf import OmegaConf


def short(path: Path) -> Path:
    """``path`` relative to the working directory, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_job(values: Mapping[str, Any], path: Path, multirun: bool, records: Mapping[str, str]) -> None:
    """Run the job of ``values``, a composed configuration, in ``path``, unless it is complete there.

    ``records`` has the text of further files, by name, that describe the job.
    """
    check_targets(values)
    settings = build(values, multirun)
    run = RunDirectory(path, settings.stage.value, content_fingerprint(settings))
    wanted = settings.job.report is ReportForm.HTML
    if run.is_complete():
        if wanted and not (path / PAGE).exists():
            _page(path)
        print(f"Already complete: {short(path)}")
        return
    if multirun:  # there, what is wrong with files is the failure of one job
        check_stage(settings)
    check_directory(settings, path)
    try:
        earlier, options = carried(settings)
        config = OmegaConf.to_yaml(OmegaConf.create({**values, **earlier}))
        with run.job({CONFIG: config, **records}, {CARRIED: options} if options else {}):
            run_stage(settings, run, values)
    except Exception:
        if wanted and results_of(path).state is RunState.FAILED:
            _page(path, quiet=True)  # the first error is the one to report
        raise
    print(f"Run directory: {short(path)}{_page(path) if wanted else ''}")


def _page(path: Path, quiet: bool = False) -> str:
    """Write the page of a run; returns where to open it. A run does not fail for a page that cannot be written."""
    from calib.runs.pages.run import write_page  # slow to import, and not every job has a page

    try:
        return f"; open {short(write_page(path))}"
    except Exception as error:  # a full disk, for one
        if not quiet:
            say(f"calib: note: {path / PAGE}: could not be written ({in_a_line(error, path)})")
        return ""
