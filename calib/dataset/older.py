"""Read datasets in the layout of older scripts.

Their ``manifest.json`` holds ``num_steps``, ``cfg_scale``, ``latent_size``, ``model_version`` and ``images``; each
state is an ``.npz`` file, named ``<image>_<step>.npz``, in float16 or float32. There are no checksums, no fingerprint
of the weights and no list of sigmas, which are read from the states, those of the first image where possible.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from calib.base.errors import CalibError, reason_of
from calib.base.locks import refuse_unsettled
from calib.dataset.arrays import open_npz
from calib.dataset.manifest import MANIFEST, MOST_STEPS, ImageEntry, Manifest
from calib.dataset.store import SAMPLES, StorageFormat

SAMPLE = re.compile(r"(\d+)_(\d+)\.npz")


def parse_older_manifest(data_dir: Path, document: Mapping[str, Any]) -> Manifest:
    """The manifest of the dataset in ``data_dir``, from its parsed ``manifest.json``, ``document``.

    Prompts and seeds may be unknown (null).

    Raises:
        CalibError: the document is damaged, or lacks num_steps or cfg_scale, without which no state can be replayed.
    """
    path = data_dir / MANIFEST
    for key in ("num_steps", "cfg_scale"):
        if document.get(key) is None:
            raise CalibError(f"{path}: {key} is unknown; write the value that the images were drawn with into it")
    states = sample_names(data_dir)
    try:
        num_steps, cfg_weight = int(document["num_steps"]), float(document["cfg_scale"])
        listed = {int(entry["image_id"]): dict(entry) for entry in document["images"]}
        steps = _stored_steps(states, listed)
        images = {
            image_id: _entry(data_dir, image_id, entry, _sample_files(image_id, states, steps), num_steps, cfg_weight)
            for image_id, entry in sorted(listed.items())
        }
        if not 0 < num_steps <= MOST_STEPS:
            raise ValueError(f"num_steps={num_steps}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CalibError(f"{path}: damaged manifest of the older layout ({error!r})") from None
    if steps and steps[-1] > num_steps:
        raise CalibError(f"{path}: num_steps={num_steps}, but there are states of step {steps[-1]}")
    sigmas, timesteps, shape, dtype = _read_levels(data_dir, images, steps, num_steps)
    return Manifest(
        model=str(document.get("model_version") or "unknown"),
        fingerprint=None,
        text_encoders=None,
        num_steps=num_steps,
        cfg_weight=cfg_weight,
        shift=None,
        seed=None,
        batch_size=None,
        latent_shape=shape,
        sigmas=sigmas,
        timesteps=timesteps,
        steps=steps,
        storage=StorageFormat.NPZ.value,
        dtype=dtype,
        versions={},
        images=images,
    )


def sample_names(data_dir: Path) -> dict[int, dict[int, str]]:
    """Names of the states' files by image and step, from one listing of the folder."""
    found: dict[int, dict[int, str]] = {}
    folder = data_dir / SAMPLES
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := SAMPLE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = f"{SAMPLES}/{path.name}"
    return found


def _stored_steps(states: Mapping[int, Mapping[int, str]], listed: Mapping[int, Any]) -> list[int]:
    """Steps that at least half of the images keep, so that a lost or stray file of one image has no effect."""
    kept = [states[image_id] for image_id in listed if image_id in states]
    counts = Counter(step for steps in kept for step in steps)
    return sorted(step for step, count in counts.items() if 2 * count >= len(kept))


def _sample_files(image_id: int, states: Mapping[int, Mapping[int, str]], steps: Sequence[int]) -> list[str]:
    found = states.get(image_id, {})
    return [found.get(step, f"{SAMPLES}/{image_id:04d}_{step:03d}.npz") for step in steps]


def _entry(
    data_dir: Path, image_id: int, entry: Mapping[str, Any], samples: list[str], num_steps: int, cfg_weight: float
) -> ImageEntry:
    known = {key: value for key, value in entry.items() if value is not None}
    return ImageEntry(
        image_id=image_id,
        prompt=str(known["prompt"]) if "prompt" in known else None,
        seed=int(known["seed"]) if "seed" in known else None,
        cfg_weight=float(known.get("cfg_weight", cfg_weight)),
        num_steps=int(known.get("num_steps", num_steps)),
        filename=_placed(data_dir, "images", str(known.get("filename", f"{image_id:04d}.png"))),
        latent_filename=_placed(data_dir, "latents", str(known.get("latent_filename", f"{image_id:04d}.npy"))),
        samples=samples,
        checksums={},
    )


def _placed(data_dir: Path, folder: str, name: str) -> str:
    """The file's name with its folder, which older manifests may leave out."""
    return name if name.startswith(f"{folder}/") or (data_dir / name).exists() else f"{folder}/{name}"


def _read_levels(
    data_dir: Path, images: Mapping[int, ImageEntry], steps: Sequence[int], num_steps: int
) -> tuple[list[float], list[float], tuple[int, int, int], str]:
    """Sigmas and timesteps of the stored states, their shape and type, from the first image that can be read."""
    sigmas, timesteps = [math.nan] * (num_steps + 1), [math.nan] * (num_steps + 1)
    layouts: Counter[tuple[tuple[int, int, int], str]] = Counter()
    for row, step in enumerate(steps):
        names = [entry.samples[row] for entry in images.values()]
        sigmas[step], timesteps[step], layout = _first_readable(data_dir, names)
        layouts[layout] += 1
    shape, dtype = layouts.most_common(1)[0][0] if layouts else ((0, 0, 0), "float32")
    return sigmas, timesteps, shape, dtype


def _first_readable(data_dir: Path, names: Sequence[str]) -> tuple[float, float, tuple[tuple[int, int, int], str]]:
    failures = []
    for name in names:
        try:
            with open_npz(data_dir / name) as archive:
                sigma, timestep = (archive[key].reshape(-1)[0].item() for key in ("sigma", "timestep"))
                x = archive["x"]
            return float(sigma), float(timestep), (cast("tuple[int, int, int]", x.shape[-3:]), str(x.dtype))
        except Exception as error:  # for damaged headers NumPy raises errors of any class, e.g. TokenError
            refuse_unsettled(data_dir / name, error)
            failures.append(f"{data_dir / name}: not a state of an older dataset ({reason_of(error)})")
    raise CalibError(failures[0])
