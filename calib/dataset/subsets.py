"""Subsets: the choice of a dataset's images for collection.

Every subset is a function of the dataset's image ids (ascending) and ``num_images`` that returns chosen ids.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from calib.base.errors import ConfigError
from calib.base.seeds import generator

import numpy as np
from numpy.typing import NDArray

GROUP = "subset"
#: Name of the parameter of a subset that depends on final latents.
LATENTS = "latents"
#: Image ids -> their final latents, (images, features) float32.
Latents: TypeAlias = Callable[[Sequence[int]], NDArray[np.float32]]
DEFAULT_NUM_IMAGES = 100


def made_up_latents(image_ids: Sequence[int]) -> NDArray[np.float32]:
    """Latents for trying a subset before images are drawn."""
    return generator(f"{GROUP}.seed", 0).randn(len(image_ids), 16).astype(np.float32)


def resolve_count(num_images: int | None, available: int) -> int:
    """Number of images to collect: ``num_images``, or 100, or all if fewer.

    Raises:
        ConfigError: ``num_images`` exceeds the number of images ``available``, or is less than 1.
    """
    if num_images is None:
        return min(DEFAULT_NUM_IMAGES, available)
    if not 1 <= num_images <= available:
        raise ConfigError.bad_value(
            f"{GROUP}.num_images",
            num_images,
            f"must be 1 to {available}, the images of the dataset; make more with calib generate num_images=…",
        )
    return num_images


def first(image_ids: Sequence[int], num_images: int) -> list[int]:
    """The first ``num_images`` images."""
    return list(image_ids[:num_images])


def stride(image_ids: Sequence[int], num_images: int) -> list[int]:
    """``num_images`` images evenly spaced over the ids."""
    positions = np.linspace(0, len(image_ids) - 1, num_images)
    return [image_ids[round(position)] for position in positions]


def random(image_ids: Sequence[int], num_images: int, seed: int = 0) -> list[int]:
    """``num_images`` images drawn at random without replacement."""
    order = generator(f"{GROUP}.seed", seed).permutation(len(image_ids))
    return sorted(image_ids[i] for i in order[:num_images])


def diverse(image_ids: Sequence[int], num_images: int, latents: Latents, seed: int = 0) -> list[int]:
    """``num_images`` images that differ most from one another in their final latents.

    k-center greedy (Gonzalez 1985; Sener and Savarese 2018, algorithm 1): a first image drawn by ``seed``, then
    repeatedly the image farthest from those chosen, in Euclidean distance.
    """
    points = latents(image_ids)
    chosen = [int(generator(f"{GROUP}.seed", seed).randint(len(image_ids)))]
    distance = np.full(len(image_ids), np.inf)
    while len(chosen) < num_images:
        difference = points - points[chosen[-1]]
        distance = np.minimum(distance, np.einsum("ij,ij->i", difference, difference))
        distance[chosen] = -1
        chosen.append(int(np.argmax(distance)))
    return sorted(image_ids[i] for i in chosen)


def from_list(image_ids: Sequence[int], num_images: int, ids: Sequence[int] = ()) -> list[int]:
    """The listed image ids; ``num_images`` is not used."""
    if not ids:
        raise ConfigError(f"{GROUP}.ids=[]: name at least one image id, e.g. {GROUP}.ids=[0,1]")
    known = set(image_ids)
    for image_id in ids:
        if image_id not in known:
            raise ConfigError.bad_value(f"{GROUP}.ids", image_id, f"no such image; the dataset has {len(known)} images")
    return sorted(set(ids))
