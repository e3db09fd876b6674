"""Where the configuration lies, and its groups."""

from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
#: In a wheel the configuration lies inside the package, in a checkout beside it.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def groups(more: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Options by config group, those in ``more`` configuration folders of the user's own among them."""
    found: dict[str, set[str]] = {folder.name: set() for folder in sorted(CONF.iterdir()) if folder.is_dir()}
    for group, options in found.items():
        options |= {file.stem for place in (CONF, *more) for file in (place / group).glob("*.yaml")}
    return {group: sorted(options) for group, options in found.items()}
