"""How measures are shown, everywhere: titles, units, formats, better sides. Read without NumPy, as comparisons are."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Title:
    """How a measure is shown: its title, how to read it, the format of its numbers, whether higher ones are better.

    Attributes:
        of_sets: one value of two sets of pictures; else one of each pair, averaged over prompts.
    """

    title: str
    how: str
    form: str
    higher: bool
    unit: str = ""
    of_sets: bool = False

    @property
    def label(self) -> str:
        """The title, with the unit and how to read it."""
        read = f"{self.unit}, {self.how}" if self.unit else self.how
        return f"{self.title}, {read}" if self.of_sets else f"{self.title} ({read})"

    @property
    def better(self) -> str:
        """The better side, 'higher' or 'lower'."""
        return "higher" if self.higher else "lower"


#: What :mod:`calib.evaluation.measures` computes, and the error of the model's output.
TITLES: Mapping[str, Title] = {
    "psnr": Title("PSNR", "higher is closer", "{:.2f}", True, "dB"),
    "ssim": Title("SSIM", "1: equal", "{:.4f}", True),
    "lpips_effnet": Title("perceptual distance", "EfficientNet, 0: equal", "{:.4f}", False),
    "kid_effnet": Title("KID (EffNet)", "lower is closer", "{:.3g}", False, of_sets=True),
    "fd_effnet": Title("FD (EffNet)", "Fréchet distance, lower is closer", "{:.4g}", False, of_sets=True),
    "fid": Title("FID", "lower is closer", "{:.4g}", False, of_sets=True),
    "kid": Title("KID", "lower is closer", "{:.3g}", False, of_sets=True),
    "precision": Title("precision", "1: all within the reference", "{:.4f}", True, of_sets=True),
    "recall": Title("recall", "1: all of the reference", "{:.4f}", True, of_sets=True),
    "clip_similarity": Title("CLIP similarity", "cosine, 1: equal", "{:.4f}", True),
    "clip_score": Title("CLIP score", "100·cosine with the prompt", "{:.2f}", True),
    "clip_score_change": Title("change of the CLIP score", "0: the reference's", "{:+.2f}", True),
    "cmmd": Title("CMMD (U)", "U-statistic, lower is closer", "{:.4g}", False, of_sets=True),
    "output_error": Title("output error", "relative, 0: equal", "{:.2e}", False),
}
