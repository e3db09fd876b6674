"""``manifest.json``: what a dataset is and which images it has.

An image is complete when its entry is here; entries are written after the files they name. Top-level keys
``num_steps``, ``cfg_scale``, ``latent_size`` and ``model_version`` are those of older datasets.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calib.errors import CalibError
from calib.files import read_json, write_json

FORMAT, FORMAT_VERSION = "calib-dataset", 1
FILE = "manifest.json"


@dataclass(frozen=True)
class ImageEntry:
    """One image; file names are relative to the dataset's folder."""

    image_id: int
    prompt: str
    seed: int
    cfg_weight: float
    num_steps: int
    filename: str
    latent_filename: str
    samples: list[str]
    checksums: dict[str, str]


@dataclass
class Manifest:
    """A dataset's settings, and its images by id."""

    model: str
    fingerprint: str
    num_steps: int
    cfg_weight: float
    shift: float
    seed: int
    batch_size: int
    latent_shape: tuple[int, int, int]
    sigmas: list[float]
    timesteps: list[float]
    storage: str
    dtype: str
    versions: dict[str, str]
    images: dict[int, ImageEntry] = field(default_factory=dict)

    def save(self, data_dir: Path) -> None:
        settings = asdict(self)
        del settings["images"]
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model_version": self.model,
            "cfg_scale": self.cfg_weight,
            "latent_size": list(self.latent_shape[:2]),
            **settings,
            "images": [asdict(self.images[image_id]) for image_id in sorted(self.images)],
        }
        write_json(data_dir / FILE, document)

    @classmethod
    def load(cls, data_dir: Path) -> "Manifest":
        """Read the manifest of a dataset; a missing or foreign one ends in a line that says what to do."""
        path = data_dir / FILE
        if not path.exists():
            raise CalibError(f"{data_dir}: no dataset there (no {FILE}); make one with calib generate")
        document: Any = read_json(path)
        if (
            not isinstance(document, dict)
            or document.get("format") != FORMAT
            or document.get("format_version") != FORMAT_VERSION
        ):
            raise CalibError(f"{path}: not a {FORMAT} manifest of version {FORMAT_VERSION}")
        try:
            images = {entry["image_id"]: ImageEntry(**entry) for entry in document["images"]}
            settings = {name: document[name] for name in cls.__dataclass_fields__ if name != "images"}
            settings["latent_shape"] = tuple(settings["latent_shape"])
        except (KeyError, TypeError) as error:
            raise CalibError(f"{path}: damaged manifest ({error!r})") from None
        return cls(**settings, images=images)
