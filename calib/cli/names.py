"""Names of the folders of sweeps and of their jobs."""

import re
from collections.abc import Sequence

from calib.base.files import short_hash
from calib.runs.record import WITHOUT_EFFECT

LONGEST_NAME = 80


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _own(overrides: Sequence[str], swept: Sequence[str]) -> list[str]:
    """Overrides that a name depends on, sorted by key; those of one key keep their order, as the last one wins.

    Keys that do not affect results are left out unless they vary, as two jobs never share a folder.
    """
    return sorted((o for o in overrides if _key(o) in swept or _key(o) not in WITHOUT_EFFECT), key=_key)


def _name(words: Sequence[str], everything: Sequence[str], leaves_out: bool) -> str:
    """``words`` as the name of a folder, with a hash of ``everything`` where they leave something out."""
    name = ",".join(words)
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", name)
    # Names that differ in case alone are one on most Macs.
    if not leaves_out and safe == name == name.lower() and len(name) <= LONGEST_NAME:
        return name
    return f"{safe[:LONGEST_NAME]}-{short_hash(list(everything))}"


def job_name(overrides: Sequence[str], swept: Sequence[str] = ()) -> str:
    """Folder name of one job of a sweep: readable, safe as a file name, unique and stable.

    It has the stage, the overrides that vary, and a hash of all overrides where that leaves any out.
    """
    own = _own(overrides, swept)
    stage = [o.partition("=")[2] for o in own if _key(o) == "stage" and o != "stage=run"]
    rest = [o for o in own if _key(o) != "stage"]
    varied = [o for o in rest if _key(o) in swept] or rest
    return _name([*stage, *varied] or ["default"], own, len(varied) < len(rest))


def sweep_name(overrides: Sequence[str], swept: Sequence[str] = ()) -> str:
    """Folder name of a sweep: the stage, the keys that vary, and a hash of the fixed overrides, if there are any.

    It leaves out the values that vary, so that the same sweep with more of them goes on in the same folder.
    """
    own = _own(overrides, swept)
    stage = [o.partition("=")[2] for o in own if _key(o) == "stage" and o != "stage=run" and "stage" not in swept]
    fixed = [o for o in own if _key(o) not in (*swept, "stage")]
    return _name([*stage, *sorted(swept)] or ["default"], [*stage, *sorted(swept), *fixed], bool(fixed))
