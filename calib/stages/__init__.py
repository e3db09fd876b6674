"""What a job does: one module a stage, with its help, its checks, what it starts from, and its run."""

from enum import StrEnum


class Stage(StrEnum):
    """What a job does; the docstring of the module of that name is what ``calib STAGE --help`` prints."""

    RUN = "run"
    GENERATE = "generate"
    COLLECT = "collect"
    ANALYZE = "analyze"
    QUANTIZE = "quantize"
    EVALUATE = "evaluate"
