"""Statistics of layers for heuristics, read from a run directory or from a ``layer_statistics.json`` alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calib.activations.histogram import BINS, Histogram
from calib.activations.reader import ActivationFile
from calib.activations.statistics import PERCENTILES, Statistics, merge_all
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import CalibError, ConfigError, lacks_or_garbles
from calib.base.files import read_json, write_json
from calib.base.layout import ACTIVATIONS, STATISTICS
from calib.dataset.timesteps import phase_bounds

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerSummary:
    """A layer's activations pooled over steps and images; the optional fields need ``activations.h5``.

    Attributes:
        percentiles: p001 (the 0.1th) … p999 (the 99.9th).
        num_samples: number of activation values.
        channel_range: max - min of each channel, (channels,).
        kurtosis: kurtosis of the pooled histogram; 3 for a normal distribution.
        phases: the same layer over the steps of each phase alone.
        steps: min, max, p01 and p99 at each collected step that the sampler feeds to the model.
        histogram: histogram of the pooled values.
        weight_sqnr: SQNR of the layer's weights, dB, by bits in groups of 64; empty where they cannot be quantized so.
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    percentiles: dict[str, float]
    num_samples: int
    channel_range: NDArray[np.float64] | None = None
    kurtosis: float | None = None
    phases: dict[str, "LayerSummary"] = field(default_factory=dict)
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    histogram: Histogram | None = field(default=None, repr=False)
    weight_sqnr: dict[int, float] = field(default_factory=dict)

    @property
    def range(self) -> float:
        """p99 - p01."""
        return self.percentiles["p99"] - self.percentiles["p01"]

    @classmethod
    def of(cls, statistics: Statistics) -> "LayerSummary":
        low, high, mean, std, total = statistics.over_channels()
        spread = (statistics.maximum - statistics.minimum).astype(np.float64)
        histogram = statistics.histogram
        pooled = (statistics.percentiles(), total, spread, histogram.kurtosis())
        return cls(low, high, mean, std, *pooled, histogram=histogram)

    def to_json(self) -> dict[str, Any]:
        return {
            "min": self.minimum,
            "max": self.maximum,
            "mean": self.mean,
            "std": self.std,
            "percentiles": self.percentiles,
            "num_samples": self.num_samples,
        }


def _made_up() -> LayerSummary:
    values = np.linspace(-1, 1, 257)
    bits = values.astype(np.float16).view(np.uint16).astype(np.int64)
    histogram = Histogram.from_counts(np.bincount(bits, minlength=BINS), "float16")
    percentiles = dict(zip(PERCENTILES, histogram.percentiles(list(PERCENTILES.values())).tolist(), strict=True))
    shape = (-1.0, 1.0, 0.0, float(values.std()), percentiles, len(values), np.full(8, 2.0), histogram.kurtosis())
    step = {"min": -1.0, "max": 1.0, "p01": percentiles["p01"], "p99": percentiles["p99"]}
    phases = {phase: LayerSummary(*shape, histogram=histogram) for phase in phase_bounds(3)}
    sqnr = {b: 6.0 * b for b in WEIGHT_BITS}
    return LayerSummary(*shape, phases, dict.fromkeys(range(3), step), histogram, sqnr)


#: A made-up layer with all statistics of an ``activations.h5``, for trying heuristics before anything is loaded.
PROBE = _made_up()

NOTHING: Mapping[str, LayerSummary] = MappingProxyType({})


def read_summaries(
    stats: Path, known: Mapping[str, LayerSummary] = NOTHING
) -> tuple[dict[str, LayerSummary], int | None]:
    """Read layers by name, and the trajectory's number of steps where known.

    ``stats`` is a run directory (its ``activations.h5`` is used), that file, or a ``layer_statistics.json``. Taps that
    are ``known`` already are not read again.

    Raises:
        ConfigError: there is no such file.
        CalibError: the file is damaged.
    """
    if stats.suffix == ".h5":
        return _from_activations(stats, known)
    if stats.is_dir():
        if (stats / ACTIVATIONS).exists():
            return _from_activations(stats / ACTIVATIONS, known)
        stats = stats / STATISTICS
    if not stats.exists():
        raise ConfigError(f"stats={stats}: no such file; calib collect makes a run directory with {STATISTICS}")
    return {name: _from_json(stats, name, entry) for name, entry in _entries(stats)}, None


def write_summaries(run: Path, known: Mapping[str, LayerSummary] = NOTHING) -> list[str]:
    """Write ``layer_statistics.json`` of a run directory from its ``activations.h5``, and what is ``known`` of it.

    Returns the layers without any finite value, which are left out.
    """
    summaries, _ = read_summaries(run, known)
    write_json(run / STATISTICS, {name: layer.to_json() for name, layer in summaries.items() if layer.num_samples})
    return [name for name, layer in summaries.items() if not layer.num_samples]


def _entries(path: Path) -> list[tuple[str, Any]]:
    document = read_json(path)
    if not isinstance(document, dict) or not document:
        raise CalibError(f"{path}: holds no layers; it must be a JSON object of layer names")
    return list(document.items())


def _from_json(path: Path, name: str, entry: Mapping[str, Any]) -> LayerSummary:
    try:
        found = entry["percentiles"]
        percentiles = {key: float(found[key]) for key in PERCENTILES if key in found or key in ("p01", "p99")}
        low, high, mean, std, count = (float(entry[key]) for key in ("min", "max", "mean", "std", "num_samples"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise lacks_or_garbles(path, error, "calib collect writes it", part=f"layer {name!r}") from None
    if not np.isfinite([low, high, mean, std, count, *percentiles.values()]).all():
        raise CalibError(f"{path}: layer {name!r} holds NaN or infinite numbers")
    return LayerSummary(low, high, mean, std, percentiles, int(count))


def _from_activations(path: Path, known: Mapping[str, LayerSummary]) -> tuple[dict[str, LayerSummary], int]:
    with ActivationFile(path) as file:
        num_steps = int(file.attributes["num_steps"])
        shared = {name: file.same_data(name) for name in reported_layers(file)}
        evaluated = file.evaluated_steps()
        distinct = {
            name: known[name] if name in known else summarised(file.by_step(name), evaluated, num_steps)
            for name in dict.fromkeys(shared.values())
        }
        summaries = {name: replace(distinct[own], weight_sqnr=file.weight_sqnr(name)) for name, own in shared.items()}
        return summaries, num_steps


def reported_layers(file: ActivationFile) -> list[str]:
    """Names of the layers to summarise, in network order: linear layers, and blocks without their streams."""
    blocks = {name for name in file.layers if file.kind(name) == "block"}
    return [name for name in file.layers if name not in blocks or name.rpartition(".")[0] not in blocks]


def summarised(by_step: Mapping[int, Statistics], evaluated: Sequence[int], num_steps: int) -> LayerSummary:
    """Summarise one layer over all collected steps, over each phase, and at each of the ``evaluated`` steps."""
    pooled = LayerSummary.of(merge_all(list(by_step.values())))
    for phase, (first, last) in phase_bounds(num_steps).items():
        chosen = [by_step[step] for step in evaluated if first <= step <= last]
        if chosen:
            pooled.phases[phase] = LayerSummary.of(merge_all(chosen))
    for step in evaluated:
        statistics = by_step[step]
        (low, high), percentiles = statistics.extremes(), statistics.percentiles()
        pooled.steps[step] = {"min": low, "max": high, "p01": percentiles["p01"], "p99": percentiles["p99"]}
    return pooled
