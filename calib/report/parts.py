"""What the pages of a run and of a comparison have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calib.evaluation.metrics import bootstrap_columns
from calib.report.charts import Curve

import numpy as np


@dataclass(frozen=True)
class Part:
    """A section with a figure: its markup, and the numbers that the page reads out."""

    name: str
    title: str
    note: str
    svg: Any
    data: Any = ""


def curve_of(fidelity: Mapping[str, Any], label: str, intervals: bool = True) -> Curve:
    """Output error against step of an ``evaluation.json``'s entry."""
    steps, error = np.array(fidelity["steps"], np.int64), np.array(fidelity["error"], np.float64)
    if not intervals:
        return Curve(label, steps, error.mean(axis=0))
    mean, low, high = (
        np.array([getattr(i, name) for i in bootstrap_columns(error)]) for name in ("mean", "low", "high")
    )
    return Curve(label, steps, mean, low, high)
