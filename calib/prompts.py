"""Prompt sources: what the images of a dataset show.

A source is a function that returns a list of prompts; image i is drawn from prompt i, starting again at the end
of the list, with a seed of its own.
"""

from pathlib import Path

from calib.errors import ConfigError
from calib.models.emoji import training_names
from calib.seeds import generator

SUBJECTS = (
    "a red fox", "an old fisherman", "a steam locomotive", "a bowl of ripe cherries", "a lighthouse", "two dancers",
    "a glass chess set", "a sleeping cat", "a market stall", "a stone bridge", "a humpback whale", "a violin maker",
    "a vintage bicycle", "a field of sunflowers", "an astronaut", "a cup of coffee", "a snow-capped volcano",
    "a street musician", "a hot air balloon", "a wooden rowing boat", "a library staircase", "a peacock",
    "a cast-iron stove", "a robot gardener", "a desert caravan", "a child with a kite",
)  # fmt: skip
SETTINGS = (
    "at dawn", "in heavy rain", "under a starry sky", "in a crowded city", "beside a frozen lake", "in thick fog",
    "in a sunlit room", "on a windy cliff", "in deep snow", "at the edge of a forest",
)  # fmt: skip
STYLES = (
    "35 mm photograph", "watercolour painting", "charcoal drawing", "isometric illustration", "oil painting",
    "macro photograph", "woodblock print", "studio product shot",
)  # fmt: skip


def emoji(seed: int = 0) -> list[str]:
    """The names the shipped model was trained on, shuffled, so that the first few are varied."""
    names = training_names()
    return [names[i] for i in generator("prompts.seed", seed).permutation(len(names))]


def builtin(seed: int = 0) -> list[str]:
    """2,080 distinct prompts composed of subject, setting and style, shuffled."""
    composed = [f"{subject} {setting}, {style}" for subject in SUBJECTS for setting in SETTINGS for style in STYLES]
    return [composed[i] for i in generator("prompts.seed", seed).permutation(len(composed))]


def from_file(path: str = "") -> list[str]:
    """The lines of a UTF-8 text file, empty ones left out."""
    if not path:
        raise ConfigError("prompts.path is not set: name a text file with one prompt a line, prompts.path=FILE")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError.bad_value(
            "prompts.path", path, f"cannot be read ({reason}); name a UTF-8 text file"
        ) from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError.bad_value("prompts.path", path, "holds no prompts; it needs at least one non-empty line")
    return prompts
