"""Columns of a comparison, and the titles, units and better sides of metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from calib.runs.record import Scalar


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: title, unit, better side ('higher', 'lower' or None), format, factor to its unit.

    Attributes:
        overlaps: of sets of pictures; one value is better than another only where their intervals are apart.
    """

    title: str
    unit: str = ""
    better: str | None = None
    form: str = "{:.4g}"
    scale: float = 1.0
    overlaps: bool = False


#: The metrics of a table, in this order.
METRICS: Mapping[str, Metric] = {
    "psnr": Metric("PSNR", "dB", "higher", "{:.2f}"),
    "ssim": Metric("SSIM", "", "higher", "{:.4f}"),
    "lpips_effnet": Metric("perceptual distance", "", "lower", "{:.4f}"),
    "kid_effnet": Metric("KID (EffNet)", "", "lower", "{:.3g}", overlaps=True),
    "fd_effnet": Metric("FD (EffNet)", "", "lower", "{:.4g}", overlaps=True),
    "fid": Metric("FID", "", "lower", "{:.4g}", overlaps=True),
    "kid": Metric("KID", "", "lower", "{:.3g}", overlaps=True),
    "precision": Metric("precision", "", "higher", "{:.4f}", overlaps=True),
    "recall": Metric("recall", "", "higher", "{:.4f}", overlaps=True),
    "clip_similarity": Metric("CLIP similarity", "", "higher", "{:.4f}"),
    "clip_score": Metric("CLIP score", "", "higher", "{:.2f}"),
    "cmmd": Metric("CMMD (U)", "", "lower", "{:.4g}", overlaps=True),
    "output_error": Metric("output error", "", "lower", "{:.2e}"),
    "average_weight_bits": Metric("bits a weight", "bits", "lower", "{:.2f}"),
    "average_activation_bits": Metric("activation bits", "bits", "lower", "{:.2f}"),
    "quantized_bytes": Metric("size", "MB", "lower", "{:.2f}", 1e-6),
    "images": Metric("images collected", "", None, "{:.0f}"),
    "steps": Metric("steps collected", "", None, "{:.0f}"),
}
#: Other metrics with a unit or a better side.
FURTHER: Mapping[str, Metric] = {
    "predicted_psnr": Metric("predicted PSNR", "dB", None, "{:.2f}"),
    "predicted_weights_psnr": Metric("predicted PSNR, weights alone", "dB", None, "{:.2f}"),
    "clip_score_change": Metric("change of the CLIP score", "", "higher", "{:.2f}"),
    "control_psnr": Metric("control's PSNR", "dB", None, "{:.2f}"),
    "control_ssim": Metric("control's SSIM", "", None, "{:.4f}"),
    "control_lpips_effnet": Metric("control's perceptual distance", "", None, "{:.4f}"),
    "control_output_error": Metric("control's output error", "", None, "{:.2e}"),
    "mean_activation_bits": Metric("mean activation bits", "bits", "lower", "{:.2f}"),
    "mean_weight_bits": Metric("mean weight bits", "bits", "lower", "{:.2f}"),
    "bits_per_weight": Metric("bits a weight over all", "bits", "lower", "{:.2f}"),
    "unquantized_bytes": Metric("size at 16 bits", "MB", None, "{:.2f}", 1e-6),
}


def metric_of(key: str) -> Metric:
    """How the metric ``key`` is shown, ``psnr/Animals`` as ``psnr``; an unknown one by its key and as it is stored."""
    of_all, _, category = key.partition("/")
    known = METRICS.get(of_all) or FURTHER.get(of_all)
    if known is not None:
        return replace(known, title=f"{known.title}, {category}") if category else known
    if key.endswith("_seconds"):
        return Metric(key.removesuffix("_seconds").replace("_", " "), "s", "lower", "{:.1f}")
    if key.endswith("_bytes"):
        return Metric(key.removesuffix("_bytes").replace("_", " "), "MB", "lower", "{:.1f}", 1e-6)
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
        form = metric.form.replace("{:", "{:+") if signed else metric.form
        return form.format(value * metric.scale)
