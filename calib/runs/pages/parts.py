"""What the page of a run and that of a comparison share: sections, short names, curves."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calib.evaluation.metrics import bootstrap_columns
from calib.runs.pages.charts import Curve

import numpy as np


@dataclass(frozen=True)
class Part:
    """A section with a figure: its markup, and the numbers that the page reads out."""

    name: str
    title: str
    note: str
    figure: Any
    data: Any = ""


#: The end of a job's folder: it keeps those apart whose names are otherwise equal.
_HASH = re.compile(r"-[0-9a-f]{8}$")


def _word(key: str, value: str) -> str:
    """Return the value of a setting, with its key if the value alone does not say what it is: a number, or true."""
    return (
        value if value[:1].isalpha() and value not in ("true", "false", "null") else f"{key.rpartition('.')[2]} {value}"
    )


def labels(names: Sequence[str]) -> list[str]:
    """Return short names of jobs, for figures: the values that differ, without the hash; in full where two would clash.

    ``analysis=range,seed=1-0123abcd`` and ``analysis=sqnr,seed=2-4567cdef`` are 'range · seed 1' and 'sqnr · seed 2'.
    """
    bare = [_HASH.sub("", name) for name in names]
    pairs = [[word.partition("=") for word in name.split(",")] for name in bare]
    short = bare
    if len(names) > 1 and len({tuple(key for key, _, _ in own) for own in pairs}) == 1 and all(p[0][1] for p in pairs):
        values = [[_word(key, value) for key, _, value in own] for own in pairs]
        differing = [i for i in range(len(values[0])) if len({own[i] for own in values}) > 1]
        short = [" · ".join(own[i] for i in differing) for own in values]
    alone = [own if bare.count(own) == 1 else name for own, name in zip(bare, names, strict=True)]
    for candidates in (short, alone):
        if len(set(candidates)) == len(candidates) and all(candidates):
            return candidates
    return list(names)


def curve_of(fidelity: Mapping[str, Any], label: str, intervals: bool = True) -> Curve:
    """Return the output error against step of an entry of ``evaluation.json``."""
    steps, error = np.array(fidelity["steps"], np.int64), np.array(fidelity["error"], np.float64)
    if not intervals:
        return Curve(label, steps, error.mean(axis=0))
    mean, low, high = (
        np.array([getattr(i, name) for i in bootstrap_columns(error)]) for name in ("mean", "low", "high")
    )
    return Curve(label, steps, mean, low, high)
