"""Check one image of a dataset by reading each of its files completely."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from calib.base import hdf5
from calib.base.errors import Unsettled, reason_of
from calib.base.files import checksum
from calib.base.locks import refuse_unsettled, settled
from calib.base.seeds import image_seed
from calib.dataset.arrays import check_dataset, contents, most_bytes, open_npz, read_npy
from calib.dataset.images import IMAGES, LATENTS, open_picture
from calib.dataset.manifest import MANIFEST, ImageEntry, Manifest
from calib.dataset.plausible import Fault, is_affine_of, is_first_state, latent_fault
from calib.dataset.store import TRAJECTORY_FORMAT, StateDtype, StorageFormat, sample_files

import numpy as np
from numpy.typing import NDArray

ASIDE = "aside"

#: Noise levels that differ by less may round to the same states.
DISTINCT_SIGMAS = 0.005


class Kind(StrEnum):
    """Kinds of findings."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    ALTERED = "altered"
    NOT_FINITE = Fault.NOT_FINITE.value
    IMPLAUSIBLE = Fault.IMPLAUSIBLE.value
    CONSTANT = "constant picture"
    DISAGREES = "disagrees"
    SEED = "wrong seed"
    SETTINGS = "mixed settings"
    DUPLICATE = "duplicate"
    ORPHAN = "orphan"
    TEMPORARY = "temporary"
    UNSETTLED = "not judged"


@dataclass(frozen=True)
class Finding:
    """One fault of a dataset.

    Attributes:
        image_id: None where the file belongs to no image.
        file: name relative to the dataset's folder.
    """

    kind: Kind
    image_id: int | None
    file: str
    detail: str


@dataclass(frozen=True)
class Checked:
    """Findings of one image, and the width and height of its picture where that could be read."""

    findings: list[Finding]
    picture_size: tuple[int, int] | None


def check_image(data_dir: Path, manifest: Manifest, entry: ImageEntry) -> Checked:
    """Check one image; a file that cannot be read is a finding, never an error."""
    check = _Check(data_dir, manifest, entry)
    if check.entry_is_usable():
        check.files()
        check.trajectory()
        check.latent()
        check.picture()
    return Checked(check.findings, check.picture_size)


def canonical_files(image_id: int, manifest: Manifest) -> list[str]:
    """Names of an image's files as calib writes them: picture, latent, states."""
    return [f"{IMAGES}/{image_id:04d}.png", f"{LATENTS}/{image_id:04d}.npy", *sample_files(image_id, manifest)]


def stays_inside(name: str) -> bool:
    """Whether a name in a manifest is that of a file of an image within the dataset's folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith(("/", ".")) and ".." not in parts and parts[0] not in (MANIFEST, ASIDE)


class _Check:
    """The checks of one image, one after the other; faults are collected in ``findings``.

    Readers of damaged files raise errors of any class, tokenizer and decompression errors among them, so every
    exception here counts as a fault of the file.
    """

    def __init__(self, data_dir: Path, manifest: Manifest, entry: ImageEntry):
        self.data_dir, self.manifest, self.entry = data_dir, manifest, entry
        self.findings: list[Finding] = []
        self.picture_size: tuple[int, int] | None = None
        self._seed = None if manifest.seed is None else image_seed(manifest.seed, entry.image_id)
        self._unusable: set[str] = set()
        self._digests: dict[int, tuple[int, float]] = {}
        self._final: NDArray[Any] | None = None

    def _add(self, kind: Kind, file: str, detail: str, error: Exception | None = None) -> None:
        """Record a finding, once, whose cause may be ``error``; what may pass is no fault of the file."""
        try:
            refuse_unsettled(self.data_dir / file, error)
        except Unsettled as cause:
            kind, detail = Kind.UNSETTLED, cause.advice
        finding = Finding(kind, self.entry.image_id, file, detail)
        if finding not in self.findings:
            self.findings.append(finding)

    # The entry against the manifest

    def entry_is_usable(self) -> bool:
        """Check the entry itself; False where it does not name this image's files."""
        entry, manifest = self.entry, self.manifest
        for key in ("num_steps", "cfg_weight"):
            ours, general = getattr(entry, key), getattr(manifest, key)
            if ours != general:
                self._add(Kind.SETTINGS, MANIFEST, f"{key}={ours} in the entry, {general} in the dataset")
        if self._seed is not None and entry.seed != self._seed:
            self._add(Kind.SEED, MANIFEST, f"seed {entry.seed} in the entry, the dataset's seed gives {self._seed}")
        if manifest.is_older:
            usable = all(stays_inside(name) for name in entry.files)
        else:
            usable = entry.files == canonical_files(entry.image_id, manifest)
        if not usable:
            self._add(Kind.DISAGREES, MANIFEST, "the entry names other files than this image's")
        return usable

    # Files as bytes

    def files(self) -> None:
        for name in self.entry.files:
            try:
                size = (self.data_dir / name).stat().st_size
                found = None if self.manifest.is_older else checksum(self.data_dir / name)
            except FileNotFoundError:
                self._useless(Kind.MISSING, name, "no such file")
            except (OSError, Unsettled) as error:
                self._useless(Kind.UNREADABLE, name, reason_of(error), error)
            else:
                if found != self.entry.checksums.get(name):
                    self._useless(Kind.ALTERED, name, f"checksum does not hold ({size} bytes)")

    def _useless(self, kind: Kind, name: str, detail: str, error: Exception | None = None) -> None:
        """Record a finding for a file and exclude it from further checks."""
        self._unusable.add(name)
        self._add(kind, name, detail, error)

    # States

    def trajectory(self) -> None:
        for row, name in enumerate(self.entry.samples):
            if name in self._unusable:
                continue
            try:
                if self.manifest.storage == StorageFormat.HDF5:
                    self._hdf5(name)
                else:
                    self._npz(name, self.manifest.steps[row])
            except Exception as error:
                self._useless(Kind.UNREADABLE, name, reason_of(error), error)

    def _hdf5(self, name: str) -> None:
        manifest, steps = self.manifest, self.manifest.steps
        most = most_bytes(self.data_dir / name)
        with settled(self.data_dir / name) as raw, hdf5.opened(raw) as file:
            if file.attrs.get("format") != TRAJECTORY_FORMAT:
                raise ValueError(f"not a {TRAJECTORY_FORMAT} file")
            self._facts(name, file.attrs)
            x = file["x"]
            check_dataset(x, most)
            if x.attrs.get("dtype") != manifest.dtype:
                self._add(Kind.DISAGREES, name, f"holds {x.attrs.get('dtype')}, the manifest says {manifest.dtype}")
            expected = {
                "step_index": steps,
                "sigma": [manifest.sigmas[step] for step in steps],
                "timestep": [manifest.timesteps[step] for step in steps],
            }
            for key, values in expected.items():
                if contents(file[key], most).tolist() != values:
                    self._add(Kind.DISAGREES, name, f"{key} is not the manifest's")
            if self._has_layout(name, x, (len(steps), *manifest.latent_shape)):
                for row, step in enumerate(steps):
                    self._state(name, step, x[row])

    def _npz(self, name: str, step: int) -> None:
        manifest = self.manifest
        with open_npz(self.data_dir / name) as archive:
            expected: dict[str, float] = {
                "step_index": step,
                "image_id": self.entry.image_id,
                "sigma": manifest.sigmas[step],
                "timestep": manifest.timesteps[step],
            }
            # An older dataset that keeps no finished latent may call its last state final.
            if not manifest.is_older or step != manifest.steps[-1] or step == manifest.num_steps:
                expected["is_final"] = step == manifest.num_steps
            for key, value in expected.items():
                found = archive[key].reshape(-1)[0].item()
                if found != value:
                    self._add(Kind.DISAGREES, name, f"{key} is {found}, not {value}")
            x = archive["x"]
            if self._has_layout(name, x, (1, *manifest.latent_shape)):
                self._state(name, step, x[0])

    def _has_layout(self, name: str, x: Any, shape: tuple[int, ...]) -> bool:
        dtype = "uint16" if self.manifest.dtype == StateDtype.BFLOAT16 else self.manifest.dtype
        if x.shape != shape or x.dtype != np.dtype(dtype):
            self._add(Kind.DISAGREES, name, f"holds {x.dtype} of shape {x.shape}, not {dtype} of shape {shape}")
            return False
        return True

    def _state(self, name: str, step: int, stored: NDArray[Any]) -> None:
        x = StateDtype(self.manifest.dtype).unpack(stored).astype(np.float32)
        sigma = self.manifest.sigmas[step]
        if not self._is_plausible(name, x, f"state {step}: ", sigma if step == 0 else None):
            return
        if step == 0 and self._seed is not None and not is_first_state(x, self._seed, sigma, self.manifest.noise):
            self._add(Kind.SEED, name, f"state 0 is not the noise of seed {self._seed}")
        twin, level = self._digests.setdefault(hash(stored.tobytes()), (step, sigma))
        if abs(level - sigma) > DISTINCT_SIGMAS:
            self._add(Kind.IMPLAUSIBLE, name, f"state {step} is a copy of state {twin}")
        if step == self.manifest.num_steps:
            self._final = x

    def _is_plausible(self, name: str, x: NDArray[Any], which: str = "", sigma: float | None = None) -> bool:
        fault = latent_fault(x, sigma)
        if fault is not None:
            self._add(Kind(fault[0].value), name, which + fault[1])
        return fault is None

    # Latent and picture

    def latent(self) -> None:
        name = self.entry.latent_filename
        if name in self._unusable:
            return
        try:
            x = read_npy(self.data_dir / name)
            shape = x.shape[1:] if self.manifest.is_older and x.shape[:1] == (1,) else x.shape
            if x.dtype.kind != "f" or shape != self.manifest.latent_shape:
                expected = f"floats of shape {self.manifest.latent_shape}"
                self._add(Kind.DISAGREES, name, f"holds {x.dtype} of shape {x.shape}, not {expected}")
            elif self._is_plausible(name, x) and self._final is not None and not is_affine_of(x, self._final):
                self._add(Kind.DISAGREES, name, f"is not the finished state (state {self.manifest.num_steps})")
        except Exception as error:
            self._useless(Kind.UNREADABLE, name, reason_of(error), error)

    def picture(self) -> None:
        name = self.entry.filename
        if name in self._unusable:
            return
        try:
            with open_picture(self.data_dir / name) as picture:
                picture.verify()  # checks the checksums of all chunks; loading reads the pixels alone
            with open_picture(self.data_dir / name) as picture:
                picture.load()
                self.picture_size = picture.size
                self._facts(name, getattr(picture, "text", {}))
                pixels = np.asarray(picture)
            if np.ptp(pixels, axis=(0, 1)).max() == 0:
                self._add(Kind.CONSTANT, name, f"every pixel is {pixels[0, 0].tolist()}")
        except Exception as error:
            self._useless(Kind.UNREADABLE, name, reason_of(error), error)

    def _facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Compare the metadata in a file of calib's with the entry and the manifest."""
        if self.manifest.is_older:
            return
        if "dataset" not in facts:
            self._add(Kind.DISAGREES, name, "does not say how it was made")
            return
        for key in ("image_id", "prompt", "seed", "cfg_weight", "num_steps"):
            found, expected = str(facts.get(key)), str(getattr(self.entry, key))
            if found != expected:
                detail = f"{key} is {_short(found)} in the file, {_short(expected)} in the entry"
                self._add(Kind.DISAGREES, name, detail)
        settings = {**self.manifest.settings(), "latent_shape": list(self.manifest.latent_shape)}
        found_settings = json.loads(str(facts["dataset"]))
        if found_settings != settings:
            keys = sorted(key for key in {*found_settings, *settings} if found_settings.get(key) != settings.get(key))
            self._add(Kind.SETTINGS, name, f"made with another {', '.join(keys)} than the manifest says")
        elif (str(facts.get("model")), str(facts.get("fingerprint"))) != (settings["model"], settings["fingerprint"]):
            self._add(Kind.SETTINGS, name, "made by another model than the manifest says")


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57] + "…")
