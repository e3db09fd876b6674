"""Sensitivities that were measured: what was tried, and the file that keeps the results for later plans."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import read_json, write_json
from calib.base.progress import note


@dataclass(frozen=True)
class Trial:
    """One thing to try on one layer or tap: weights of (bits, group size), or its input at ``bits``."""

    bits: int
    group_size: int | None = None

    @property
    def key(self) -> str:
        return f"{self.bits}" if self.group_size is None else f"{self.bits}x{self.group_size}"


@dataclass
class TrialCache:
    """What has been measured: by 'weights' or 'inputs', layer and trial; a list of S by step."""

    path: Path
    identity: Mapping[str, Any]
    found: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=lambda: {"weights": {}, "inputs": {}})

    def load(self) -> None:
        """What the file holds; one that is damaged is measured again, and said so."""
        if not self.path.exists():
            return
        try:
            document = read_json(self.path)
            steps = len(self.identity["steps"])
            for kind, layers in self.found.items():
                for name, trials in document[kind].items():
                    layers[name] = {key: [float(s) for s in values] for key, values in trials.items()}
                    for values in layers[name].values():
                        if len(values) != steps or not all(0 <= s < math.inf for s in values):
                            raise ValueError(f"{name} has not {steps} errors, a step each")
        except (CalibError, KeyError, TypeError, ValueError, AttributeError) as error:
            note(f"{self.path}: cannot be used ({error}); sensitivities are measured again")
            self.found = {"weights": {}, "inputs": {}}

    def missing(self, kind: str, name: str, trials: Sequence[Trial]) -> list[Trial]:
        have = self.found[kind].get(name, {})
        return [trial for trial in trials if trial.key not in have]

    def add(self, kind: str, name: str, results: Mapping[str, list[float]]) -> None:
        """Keep, and write the file: whole, or as it was."""
        self.found[kind].setdefault(name, {}).update(results)
        write_json(self.path, {"identity": self.identity, **self.found})
