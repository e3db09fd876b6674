"""Columns of a comparison, and the titles, units and better sides of metrics; measures have :data:`TITLES`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from calib.evaluation.titles import TITLES
from calib.runs.record import Scalar


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: title, unit, better side ('higher', 'lower' or None), format, factor to its unit.

    Attributes:
        counted: it is what it is: of two values the better one is better. Others are measured, and vary.
    """

    title: str
    unit: str = ""
    better: str | None = None
    form: str = "{:.4g}"
    scale: float = 1.0
    counted: bool = False


#: Measures of pictures, and of the model's output.
MEASURED: Mapping[str, Metric] = {
    name: Metric(own.title, own.unit, own.better, own.form) for name, own in TITLES.items()
}
#: The metrics of a table, in this order.
METRICS: Mapping[str, Metric] = {
    **{name: metric for name, metric in MEASURED.items() if name != "clip_score_change"},  # its score is there
    "average_weight_bits": Metric("bits a weight", "bits", "lower", "{:.2f}", counted=True),
    "average_activation_bits": Metric("activation bits", "bits", "lower", "{:.2f}", counted=True),
    "quantized_bytes": Metric("size", "MB", "lower", "{:.2f}", 1e-6, counted=True),
    "images": Metric("images collected", "", None, "{:.0f}"),
    "steps": Metric("steps collected", "", None, "{:.0f}"),
}
#: Other metrics with a unit or a better side.
FURTHER: Mapping[str, Metric] = {
    "predicted_psnr": Metric("predicted PSNR", "dB", None, "{:.2f}"),
    "predicted_weights_psnr": Metric("predicted PSNR, weights alone", "dB", None, "{:.2f}"),
    "mean_activation_bits": Metric("mean activation bits", "bits", "lower", "{:.2f}", counted=True),
    "mean_weight_bits": Metric("mean weight bits", "bits", "lower", "{:.2f}", counted=True),
    "bits_per_weight": Metric("bits a weight over all", "bits", "lower", "{:.2f}", counted=True),
    "unquantized_bytes": Metric("size at 16 bits", "MB", None, "{:.2f}", 1e-6),
}


def metric_of(key: str) -> Metric:
    """How the metric ``key`` is shown, ``psnr/Animals`` as ``psnr``; an unknown one by its key and as it is stored."""
    of_all, _, category = key.partition("/")
    known = METRICS.get(of_all) or MEASURED.get(of_all) or FURTHER.get(of_all)
    if known is not None:
        return replace(known, title=f"{known.title}, {category}") if category else known
    if (measure := MEASURED.get(of_all.removeprefix("control_"))) is not None:
        return replace(measure, title=f"control's {measure.title}", better=None)
    if key.endswith("_seconds"):
        return Metric(key.removesuffix("_seconds").replace("_", " "), "s", "lower", "{:.1f}")
    if key.endswith("_bytes"):
        counted = not key.endswith("_peak_bytes")
        return Metric(key.removesuffix("_bytes").replace("_", " "), "MB", "lower", "{:.1f}", 1e-6, counted)
    return Metric(key.replace("_", " "))


@dataclass(frozen=True)
class Column:
    """One column: ``kind`` is 'config' or 'metric'."""

    key: str
    title: str
    unit: str
    kind: str
    better: str | None = None

    @property
    def raw_unit(self) -> str:
        """The unit of the stored value, before it is scaled for people."""
        return "bytes" if self.unit == "MB" else self.unit

    def text(self, value: Scalar, signed: bool = False) -> str:
        """A value for people, in the column's unit."""
        if value is None:
            return "–"
        if self.kind == "config" or isinstance(value, str | bool):
            return str(value)
        metric = metric_of(self.key)
        form = metric.form.replace("{:+", "{:").replace("{:", "{:+") if signed else metric.form
        return form.format(value * metric.scale)
