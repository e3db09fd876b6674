"""Ways to damage a small dataset, checksums made to hold where they are not what is tested."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calib.base.files import checksum
from calib.dataset.settings import SamplerSettings
from calib.dataset.verify import DatasetReport, verify

import h5py
import numpy as np
from helpers import contents
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SETTINGS = SamplerSettings(num_steps=2, cfg_weight=3.0, batch_size=2)
IMAGES = 4
PICTURE, LATENT, STATES, STATE = "images/0001.png", "latents/0001.npy", "samples/0001.h5", "samples/0001_001.npz"


def restated(folder: Path, change: Callable[[dict[str, Any]], object] = lambda document: None) -> None:
    """Make all checksums hold for what lies there, and ``change`` the manifest."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for entry in document["images"]:
        for name in entry["checksums"]:
            if (folder / name).exists():
                entry["checksums"][name] = checksum(folder / name)
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def redrawn(path: Path, pixels: Any, facts: Mapping[str, str]) -> None:
    """A picture with other pixels or another text."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    Image.fromarray(pixels).save(path, pnginfo=info)


def picture_of(path: Path) -> tuple[Any, dict[str, str]]:
    with Image.open(path) as picture:
        return np.array(picture), dict(picture.text)


def set_states(path: Path, change: Callable[[Any], None]) -> None:
    with h5py.File(path, "r+") as file:
        x = file["x"][:]
        change(x)
        file["x"][:] = x


def set_attribute(path: Path, key: str, value: Any) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs[key] = value


def set_npz(path: Path, **changes: Any) -> None:
    with np.load(path) as archive:
        content = {**archive, **changes}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})


def swap(folder: Path, first: str, second: str) -> None:
    (folder / first).rename(folder / "x")
    (folder / second).rename(folder / first)
    (folder / "x").rename(folder / second)


def assign(x: Any, place: Any, value: Any) -> None:
    x[place] = value


def found(report: DatasetReport, image: int | None = 1) -> dict[str, set[str]]:
    """Files by kind; all of one image or of none."""
    assert {finding.image_id for finding in report.findings} == {image}, report.findings
    kinds: dict[str, set[str]] = {}
    for finding in report.findings:
        kinds.setdefault(finding.kind.value, set()).add(finding.file)
    return kinds


def is_sound(folder: Path) -> bool:
    report = verify(folder)
    assert report.notes == []
    return report.sound


def without_aside(folder: Path) -> dict[str, str]:
    return {name: value for name, value in contents(folder).items() if not name.startswith("aside/")}
