"""Backward passes, the states that they need, and what their tables say together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.analysis.sensitivities import Of, Reach
from calib.analysis.tables import KEYS, Table
from calib.base.errors import ConfigError
from calib.base.files import short_hash
from calib.dataset.manifest import Manifest

import numpy as np
from numpy.typing import NDArray

#: The option, its bits and group size, that stands for all when pictures are weighed against one another.
TYPICAL = (4, 64)


@dataclass(frozen=True)
class Pass:
    """One backward pass: images, the probe's number, and the step of an output."""

    images: tuple[int, ...]
    probe: int
    step: int | None

    @property
    def name(self) -> str:
        step = "" if self.step is None else f"_step{self.step}"
        return f"{short_hash(list(self.images))}_probe{self.probe}{step}.npz"


def check_complete(data_dir: Path, manifest: Manifest, of: Of = Of.PICTURE) -> None:
    """Raise where the dataset lacks a state or a noise level, as a gradient of the picture goes through all of them."""
    if not np.isfinite([*manifest.sigmas, *manifest.timesteps]).all():
        raise ConfigError(
            f"sensitivity.of={of}: {data_dir}, of the older layout, does not record all noise levels; "
            "draw another data_dir, or set sensitivity.of=output"
        )
    if lacking := sorted(set(range(manifest.num_steps + 1)) - set(manifest.steps)):
        raise ConfigError(
            f"sensitivity.of={of}: {data_dir} keeps {len(manifest.steps)} of {manifest.num_steps + 1} states, not "
            f"state {lacking[0]}; draw another data_dir with dataset.steps=all, or set sensitivity.of=output"
        )


def of_output(tables: Mapping[Pass, Table], steps: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Errors by option and step, and by tap, step and bit-width; means over images and probes."""
    columns = []
    for step in steps:
        own = [(len(each.images), table) for each, table in tables.items() if each.step == step]
        total = sum(count for count, _ in own)
        columns.append([sum(n * table[key] for n, table in own) / total for key in KEYS[:2]])
    return (
        np.stack([np.asarray(weights) for weights, _ in columns], axis=1),
        np.concatenate([np.asarray(inputs) for _, inputs in columns], axis=1),
    )


def of_typical(
    tables: Sequence[Table], options: Sequence[tuple[str, int, int]], steps: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float | None]:
    """As :func:`of_output`, of the typical picture, and the standard error of its PSNR in dB.

    Its PSNR is the mean of PSNRs, as of drawn pictures, not that of the mean error: whatever the plan, a few pictures
    have errors ten times as large as others. So each table is divided by its error at :data:`TYPICAL`, and the mean
    multiplied by the geometric mean of these. Errors are those of all steps together, so that their mean over steps is
    the picture's.
    """
    places = [i for i, (_, *option) in enumerate(options) if tuple(option) == TYPICAL] or list(range(len(options)))
    errors = np.array([table["weights"][places].sum() for table in tables])
    logs = np.log(errors) if errors.all() else np.zeros(len(errors))
    shares = np.exp(logs.mean() - logs)
    weights, inputs = (np.mean([s * t[key] for s, t in zip(shares, tables, strict=True)], 0) for key in KEYS[:2])
    doubt = 10 / math.log(10) * float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else None
    return np.repeat(weights[:, None], len(steps), axis=1), inputs * len(steps), doubt


def reach_of(found: Sequence[NDArray[np.float64]], sigmas: Sequence[float]) -> Reach | None:
    """Of the typical picture, from ‖λ‖² of each; None where nothing reaches it."""
    each = np.array([reach / reach[-1] for reach in found if reach[-1] > 0])
    if not len(each):
        return None
    with np.errstate(divide="ignore"):
        latent = np.exp(np.log(each).mean(axis=0))
    return Reach(latent, np.diff(np.array(sigmas)) ** 2 * latent[1:])
