"""Rebuild a manifest in the older layout as far as the files allow, with a list of the facts that stay unknown."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.locks import refuse_unsettled
from calib.base.progress import counted
from calib.dataset.arrays import open_npz
from calib.dataset.images import IMAGES, LATENTS, open_picture
from calib.dataset.manifest import MANIFEST
from calib.dataset.older import sample_names

#: Names under which known scripts write a fact into a picture's text or a state's file.
ALIASES = {
    "prompt": ("prompt", "description"),
    "seed": ("seed",),
    "cfg_weight": ("cfg_weight", "cfg_scale", "cfg", "guidance_scale", "guidance"),
    "num_steps": ("num_steps", "steps", "num_inference_steps"),
    "model_version": ("model_version", "model"),
}
NAMES = {name for names in ALIASES.values() for name in names}
TYPES: Mapping[str, type] = {"prompt": str, "seed": int, "cfg_weight": float, "num_steps": int, "model_version": str}

#: For each fact: what to write into the manifest by hand, and what depends on it.
REMEDIES = {
    "num_steps": "write it into {path}; nothing reads the dataset till then",
    "cfg_scale": "write it into {path}; nothing reads the dataset till then",
    "model_version": "write it into {path}, to be told later what drew the images",
    "prompt": "write them into {path}; calib collect refuses these images till then",
    "seed": "write them into {path} where they are known; calib evaluate needs them, calib collect does not",
}


def older_document(data_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """The document of a ``manifest.json`` in the older layout, unknown facts null, and a line for each unknown fact.

    The images are those with states.

    Raises:
        CalibError: no state can be read.
    """
    states = sample_names(data_dir)
    facts, shapes, finals, damaged = {}, Counter[tuple[int, ...]](), Counter[int](), []
    for image_id, by_step in states.items():
        facts[image_id] = _known(_picture_facts(data_dir / IMAGES / f"{image_id:04d}.png"))
        try:
            with open_npz(data_dir / by_step[max(by_step)]) as archive:
                shapes[archive["x"].shape[-3:-1]] += 1
                finals.update([max(by_step)] if "is_final" in archive and archive["is_final"].any() else [])
                extra = {key: archive[key].item() for key in NAMES & {*archive}}
                facts[image_id] = {**_known(extra), **facts[image_id]}
        except Exception as error:  # for damaged files NumPy raises errors of any class
            refuse_unsettled(data_dir / by_step[max(by_step)], error)
            damaged.append(image_id)
    if not shapes:
        raise CalibError(f"{data_dir}: nothing there says how it was made, no picture or states of calib, no sound npz")
    shared = {key: _most_common(known.get(key) for known in facts.values()) for key in TYPES}
    document = {
        "num_steps": finals.most_common(1)[0][0] if finals else shared["num_steps"],
        "cfg_scale": shared["cfg_weight"],
        "latent_size": list(shapes.most_common(1)[0][0]),
        "model_version": shared["model_version"],
        "images": [_entry(image_id, facts[image_id], shared["cfg_weight"]) for image_id in sorted(states)],
    }
    return document, _unknown(data_dir, document, damaged)


def _entry(image_id: int, known: Mapping[str, Any], cfg_weight: float | None) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "prompt": known.get("prompt"),
        "seed": known.get("seed"),
        "cfg_weight": known.get("cfg_weight", cfg_weight),
        "filename": f"{IMAGES}/{image_id:04d}.png",
        "latent_filename": f"{LATENTS}/{image_id:04d}.npy",
    }


def _picture_facts(path: Path) -> dict[str, Any]:
    try:
        with open_picture(path) as picture:
            return {str(key).lower(): value for key, value in picture.info.items()}
    except Exception as error:  # no picture, or an unreadable one: no facts
        refuse_unsettled(path, error)
        return {}


def _known(found: Mapping[str, Any]) -> dict[str, Any]:
    """Facts in a file's metadata, by their names in a manifest."""
    known = {}
    for key, names in ALIASES.items():
        for name in names:
            if name in found and key not in known:
                try:
                    known[key] = TYPES[key](found[name])
                except (TypeError, ValueError):
                    continue
    return known


def _most_common(values: Iterable[Any]) -> Any:
    counts = Counter(value for value in values if value is not None)
    return counts.most_common(1)[0][0] if counts else None


def _unknown(data_dir: Path, document: Mapping[str, Any], damaged: list[int]) -> list[str]:
    path, lines = data_dir / MANIFEST, []
    for key, remedy in REMEDIES.items():
        ids = [entry["image_id"] for entry in document["images"] if entry.get(key, 0) is None]
        if ids:
            lines.append(f"{key} of {_images(ids)}: {remedy.format(path=path)}")
        elif key in document and document[key] is None:
            lines.append(f"{key}: {remedy.format(path=path)}")
    for folder, key in ((IMAGES, "filename"), (LATENTS, "latent_filename")):
        lacking = [entry["image_id"] for entry in document["images"] if not (data_dir / entry[key]).exists()]
        if lacking:
            lines.append(f"files in {folder}/ of {_images(lacking)}: calib verify {data_dir} --repair moves them aside")
    if damaged:
        lines.append(f"states of {_images(damaged)}, which cannot be read: calib verify {data_dir} says more")
    return lines


def _images(ids: list[int]) -> str:
    return f"{counted(len(ids), 'image')} ({', '.join(map(str, ids[:5]))}{', …' if len(ids) > 5 else ''})"
