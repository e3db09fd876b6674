"""Trials of quantizing one layer or one tap's input, and the file that caches their results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, Unsettled
from calib.base.files import read_json, write_json
from calib.base.progress import note


@dataclass(frozen=True)
class Trial:
    """Quantization to try: of weights to ``bits`` in groups of ``group_size``, or of an input to ``bits``."""

    bits: int
    group_size: int | None = None

    @property
    def key(self) -> str:
        return f"{self.bits}" if self.group_size is None else f"{self.bits}x{self.group_size}"


@dataclass(frozen=True)
class Task:
    """Trials of one layer's weights, or of the input of one tap.

    Attributes:
        kind: 'weights' or 'inputs'.
        key: key of the results in the cache.
        names: the layer, or all layers of the tap.
        range: the range that an input is quantized over.
    """

    kind: str
    key: str
    names: tuple[str, ...]
    trials: list[Trial]
    range: tuple[float, float] = (0.0, 0.0)


@dataclass
class TrialCache:
    """Cached results: S at each step, by 'weights' or 'inputs', then by layer or tap, then by trial."""

    path: Path
    identity: Mapping[str, Any]
    found: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=lambda: {"weights": {}, "inputs": {}})

    def load(self) -> None:
        """Read the file; a damaged one is reported, and its results are measured again."""
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
        except Unsettled:
            raise
        except (CalibError, KeyError, TypeError, ValueError, AttributeError) as error:
            note(f"{self.path}: cannot be used ({error}); sensitivities are measured again")
            self.found = {"weights": {}, "inputs": {}}

    def missing(self, kind: str, name: str, trials: Sequence[Trial]) -> list[Trial]:
        have = self.found[kind].get(name, {})
        return [trial for trial in trials if trial.key not in have]

    def add(self, kind: str, name: str, results: Mapping[str, list[float]]) -> None:
        """Add results, and rewrite the file, whole or not at all."""
        self.found[kind].setdefault(name, {}).update(results)
        write_json(self.path, {"identity": self.identity, **self.found})
