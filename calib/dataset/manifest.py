"""``manifest.json``: a dataset's settings and its list of images.

An image is complete when it has an entry and the checksums of its files hold; an entry is written after the files that
it names. The top-level keys ``num_steps``, ``cfg_scale``, ``latent_size`` and ``model_version`` are those of older
datasets, which :mod:`calib.dataset.older` reads.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from calib.base.errors import CalibError, check_format
from calib.base.files import write_text

FORMAT, FORMAT_VERSION = "calib-dataset", 2
MANIFEST = "manifest.json"
#: Limits of what a manifest may ask for: its own bytes (a million images), steps of a trajectory, images per batch.
MOST_BYTES, MOST_STEPS, MOST_BATCH = 1 << 30, 100_000, 1 << 16
#: How the noise of a seed is drawn (:mod:`calib.dataset.plausible`): by NumPy as in DiffusionKit, by MLX as in mflux,
#: there of some models with the channels last.
DEFAULT_NOISE, CHANNELS_LAST = "numpy", "mlx-channels-last"
NOISES = (DEFAULT_NOISE, "mlx", CHANNELS_LAST)
#: Fields that are left out where they have these values, which calib 0.3.0 and earlier knew alone.
LEFT_OUT = {"parts": 1, "noise": DEFAULT_NOISE}


@dataclass(frozen=True)
class ImageEntry:
    """One image; file names are relative to the dataset's folder.

    Attributes:
        prompt, seed: None where an older dataset does not record them.
        samples: the files of its states: one, or one for each of the manifest's ``steps``.
        checksums: 'sha256:<hex>' by file name; empty in older datasets.
    """

    image_id: int
    prompt: str | None
    seed: int | None
    cfg_weight: float
    num_steps: int
    filename: str
    latent_filename: str
    samples: list[str]
    checksums: dict[str, str]

    @property
    def files(self) -> list[str]:
        """Names of all files of the image."""
        return [self.filename, self.latent_filename, *self.samples]


@dataclass
class Manifest:
    """A dataset's settings, and its images by id.

    Attributes:
        fingerprint, text_encoders, shift, seed, batch_size: None in older datasets, which do not record them.
        parts: number of parts of a batch's rows that are computed side by side (:mod:`calib.models.parallel`).
        latent_shape: (height, width, channels).
        sigmas, timesteps: of all states 0 … num_steps; NaN where an older dataset does not record them.
        steps: indices of the stored states, ascending.
        storage, dtype: layout and type of the stored states.
        noise: how the noise of a seed is drawn, one of :data:`NOISES`.
    """

    model: str
    fingerprint: str | None
    text_encoders: str | None
    num_steps: int
    cfg_weight: float
    shift: float | None
    seed: int | None
    batch_size: int | None
    latent_shape: tuple[int, int, int]
    sigmas: list[float]
    timesteps: list[float]
    steps: list[int]
    storage: str
    dtype: str
    versions: dict[str, str]
    parts: int = 1
    noise: str = DEFAULT_NOISE
    images: dict[int, ImageEntry] = field(default_factory=dict)

    @property
    def is_older(self) -> bool:
        """Whether the dataset has the older layout, to which no images are added."""
        return self.fingerprint is None

    def settings(self) -> dict[str, Any]:
        """All fields but the images; stored in each file of an image, so that a lost manifest can be restored.

        A single part is left out, as by calib 0.3.0 and earlier, which drew all rows at once; and NumPy's noise.
        """
        left_out = {"images", *(name for name, value in LEFT_OUT.items() if getattr(self, name) == value)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """The inverse of :meth:`settings`, without images; malformed settings raise KeyError or TypeError."""
        whole = {**LEFT_OUT, **settings}
        known = {f.name: whole[f.name] for f in fields(cls) if f.name != "images"}
        height, width, channels = known["latent_shape"]
        return cls(**{**known, "latent_shape": (height, width, channels)})

    def row(self, step: int) -> int:
        """Position of state ``step`` among the stored states; raises a CalibError where it is not stored."""
        try:
            return self.steps.index(step)
        except ValueError:
            raise CalibError(f"state {step} is not stored; the dataset keeps {self.steps}") from None

    def save(self, data_dir: Path) -> None:
        """Write ``manifest.json``, whole or not at all, with one line per image."""
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model_version": self.model,
            "cfg_scale": self.cfg_weight,
            "latent_size": list(self.latent_shape[:2]),
            **self.settings(),
        }
        lines = [json.dumps(asdict(self.images[i]), ensure_ascii=False) for i in sorted(self.images)]
        values = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in head.items()]
        values.append('"images": [' + ",".join(f"\n  {line}" for line in lines) + "\n]")
        write_text(data_dir / MANIFEST, "{\n" + ",\n".join(values) + "\n}\n")


def parse_manifest(path: Path, document: Any) -> Manifest:
    """The manifest in ``document``, which was read from ``path``.

    Raises:
        CalibError: the document is damaged, or no manifest of this format.
    """
    repair = f"calib rebuild-manifest {path.parent} restores it from the files"
    check_format(path, document, FORMAT, (FORMAT_VERSION,), repair)
    try:
        manifest = Manifest.from_settings(document)
        manifest.images = {entry["image_id"]: ImageEntry(**entry) for entry in document["images"]}
        for name in ("num_steps", "seed", "batch_size", "parts"):
            if not isinstance(getattr(manifest, name), int):
                raise ValueError(f"{name} is {getattr(manifest, name)!r}")
        if manifest.noise not in NOISES:
            raise ValueError(f"noise is {manifest.noise!r}")
        if not isinstance(manifest.fingerprint, str):
            raise ValueError(f"fingerprint is {manifest.fingerprint!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise CalibError(f"{path}: damaged manifest ({error!r}); {repair}") from None
    return manifest
