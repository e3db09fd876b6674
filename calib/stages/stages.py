"""The table of stages, and the steps that are the same for each."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

from calib.base.files import short_hash
from calib.models.model import DiffusionModel
from calib.runs.directory import RunDirectory
from calib.stages import Stage, analyze, collect, evaluate, generate, quantize, run
from calib.stages.settings import Settings

logger = logging.getLogger("calib")


class StageModule(Protocol):
    """The interface of a stage's module, whose docstring is the stage's help."""

    def check(self, settings: Settings) -> None:
        """Raise for faults that can be found before a run directory is made or a model is loaded."""

    def sources(self, settings: Settings) -> list[str]:
        """Checksums of the files that the job starts from, as files of the same name may have changed."""

    def run(
        self, settings: Settings, run: RunDirectory, model: Callable[[], DiffusionModel], config: Mapping[str, Any]
    ) -> None:
        """Run the stage into ``run`` and print results for people; ``config`` is the job's configuration."""


STAGES: Mapping[Stage, StageModule] = {
    Stage.RUN: run,
    Stage.GENERATE: generate,
    Stage.COLLECT: collect,
    Stage.ANALYZE: analyze,
    Stage.QUANTIZE: quantize,
    Stage.EVALUATE: evaluate,
}


def check_stage(settings: Settings) -> None:
    """Raise for faults that can be found before a run directory is made or a model is loaded."""
    STAGES[settings.stage].check(settings)


def content_fingerprint(settings: Settings) -> str:
    """Hash of the job's fingerprint and the contents of the files that it starts from."""
    return short_hash([settings.fingerprint, *STAGES[settings.stage].sources(settings)], digits=16)


def run_stage(settings: Settings, directory: RunDirectory, config: Mapping[str, Any]) -> None:
    """Run the configured stage into ``directory``; the model is loaded once, and only if it is needed."""

    @cache
    def model() -> DiffusionModel:
        start = time.monotonic()
        loaded = settings.job.model.load()
        logger.info("loaded %s (%s) in %.1f s", loaded.name, loaded.fingerprint, time.monotonic() - start)
        return loaded

    STAGES[settings.stage].run(settings, directory, model, config)
