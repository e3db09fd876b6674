"""Seeded random numbers that are the same in every version of NumPy, and each image's own seed."""

from calib.base.errors import ConfigError

import numpy as np


def generator(key: str, *entropy: int) -> np.random.RandomState:
    """A generator that depends on the integers ``entropy`` alone; raises an error that names ``key`` for negative ones.

    RandomState's streams are frozen by NumPy's compatibility policy; SeedSequence takes integers of any size.
    """
    for value in entropy:
        if value < 0:
            raise ConfigError.bad_value(key, value, "must be 0 or more")
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))


def image_seed(base_seed: int, image_id: int) -> int:
    """The seed of one image (32 bits), which depends on the run's seed and the image's number alone."""
    return int(np.random.SeedSequence([base_seed, image_id]).generate_state(1)[0])
