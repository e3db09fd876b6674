"""Rules for ranges as options: what they must return, and how files name them.

A file is data. Of the rules that it may name, calib's own are looked up in a fixed list; any other is the configured
one, or none: nothing that a file names is imported.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calib.analysis import ranges
from calib.analysis.ranges import GROUP, RangeRule, StepRanges
from calib.base.errors import ConfigError
from calib.base.option import Option, Unfit, kind_of, several
from calib.base.targets import bound, described

import numpy as np

#: calib's own rules by the names that files give them, which are those of the options.
RULES: Mapping[str, RangeRule] = {
    "static": ranges.static,
    "per_step": ranges.per_step,
    "grouped": ranges.grouped,
    "polynomial": ranges.polynomial,
}
#: Where they were, and are, for files of calib 0.2.0 and before, which name them by import path.
PLACE = f"{ranges.__name__}."


def checked_rule(rule: Callable[..., Any], named: str = "the rule for ranges") -> Option[StepRanges]:
    """``rule``, with checks of what it returns; ``named`` names it, for errors."""
    if isinstance(rule, Option):
        return rule
    return Option(named, rule, ("observed",), "StepRanges, from step 0 on", _read)


def _read(found: Any, observed: ranges.Observed) -> StepRanges:
    return step_ranges(found, observed.num_steps)


def step_ranges(found: Any, num_steps: int = sys.maxsize) -> StepRanges:
    """Ranges that a function returned, with NumPy's values as Python's; raises Unfit where they are none."""
    if not isinstance(found, StepRanges):
        raise Unfit(f"returned {kind_of(found)}")
    lists = {key: several(getattr(found, key)) for key in ("from_step", "low", "high")}
    values = {key: [v.item() if isinstance(v, np.generic) else v for v in own] for key, own in lists.items()}
    try:
        return ranges.ranges_of(values, num_steps)
    except ValueError as error:
        raise Unfit(f"in what it returned, {error}") from None


def recorded_rule(document: Mapping[str, Any]) -> dict[str, Any]:
    """The rule that a file records, by name and parameters; empty where it records none.

    Raises:
        ValueError: it is recorded in no known form.
    """
    if not document:
        return {}
    if "_target_" in document:
        name, parameters = document["_target_"], {k: v for k, v in document.items() if k != "_target_"}
    else:
        name, parameters = document["name"], document["parameters"]
    if not isinstance(name, str) or not isinstance(parameters, Mapping):
        raise ValueError("the rule of its ranges")
    short = name.removeprefix(PLACE)
    return {"name": short if short in RULES else name, "parameters": dict(parameters)}


def rule_of(record: Mapping[str, Any], configured: RangeRule, source: Path) -> RangeRule:
    """The rule that the file ``source`` records, or ``configured`` where it records that or none.

    Of a rule that is neither calib's own nor configured the ranges are there, so that the error comes only where it
    would have to make others.
    """
    if not record:
        return configured
    name = record["name"]
    if name in RULES:
        where = f"{source}: {GROUP}"
        return checked_rule(bound(where, name, RULES[name], record["parameters"], ("observed",)), where)
    if name == described(configured)["name"]:
        return configured

    def absent(observed: ranges.Observed) -> StepRanges:
        how = f"if it is yours, name it: {GROUP}._target_={name}"
        raise ConfigError(f"{source}: its ranges are those of {name}, and no function is taken from a file; {how}")

    return absent
