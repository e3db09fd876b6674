"""Stages of a job: one module per stage, with its help, its checks, its sources and its run."""

from enum import StrEnum


class Stage(StrEnum):
    """Stages of a job; ``calib STAGE --help`` prints the docstring of the module of that name."""

    RUN = "run"
    GENERATE = "generate"
    COLLECT = "collect"
    ANALYZE = "analyze"
    QUANTIZE = "quantize"
    EVALUATE = "evaluate"
