"""mflux's transformers, with its own layers, sampler, text encoder and decoder.

What is common to its families is here: ``family`` (their options, and how they are loaded), ``parts`` (their forward
passes), ``precision``, ``flow`` (the sampler), ``files`` (folders and repositories), ``text``, ``decoder``. What a
family differs in has a folder: ``zimage``, ``flux2``, ``qwen``.

mflux is not among calib's dependencies, as it asks for torch. It is used as installed, but that static methods of its
attention, which take one picture, are replaced at import by ones that take a batch too and do the same for one.
"""

import importlib.metadata
from importlib.util import find_spec

from calib.base.errors import ConfigError
from calib.base.progress import note

#: The version that is tested.
TESTED = "0.24.0"

if find_spec("mflux") is None:
    raise ConfigError(
        "mflux is not installed, whose model this is; uv run --group mflux calib …, or "
        f"pip install --no-deps mflux=={TESTED} && pip install piexif platformdirs toml"
    )


def note_version() -> None:
    """Note where another version of mflux is installed than was tested: its layers may be others."""
    if (found := importlib.metadata.version("mflux")) != TESTED:
        note(f"mflux is {found}, tested is {TESTED}: pip install --no-deps mflux=={TESTED}")
