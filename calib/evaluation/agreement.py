"""Pictures and their prompts: whose prompts they are in a folder, and what is said of CLIP scores."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.layout import DETAILS
from calib.base.progress import counted
from calib.evaluation.metrics import FEW_PROMPTS, LEVEL, bootstrap
from calib.evaluation.pictures import READABLE

from numpy.typing import NDArray

FORM = f'a JSON object of prompts by picture\'s name, {{"0000": "red apple"}}, or the {DETAILS} of a run directory'


def read_prompts(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The prompt of each of ``names``, pictures' names without endings, from a file of :data:`FORM`.

    Raises:
        CalibError: the file is another, or lacks a name.
    """
    document = read_json(path)
    if isinstance(document, dict) and isinstance(document.get("prompts"), list):
        document = {f"{number:04d}": prompt for number, prompt in enumerate(document["prompts"])}
    if not isinstance(document, dict) or not all(isinstance(prompt, str) for prompt in document.values()):
        raise CalibError(f"{path}: must be {FORM}")
    found = {name[: -len(own)] if (own := _ending(name)) else name: prompt for name, prompt in document.items()}
    if missing := [name for name in names if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CalibError(f"{path}: has no prompt for the picture {missing[0]}{more}; it must be {FORM}")
    return {name: found[name] for name in names}


def _ending(name: str) -> str:
    return next((ending for ending in READABLE if name.lower().endswith(ending)), "")


def cut_lines(count: int, of: int) -> list[str]:
    """A line on ``count`` prompts that a CLIP reads the beginning of alone; none where it reads all."""
    return [f"{count} of {counted(of, 'prompt')} longer than the CLIP reads, and cut off"] if count else []


def score_lines(values: Mapping[str, NDArray[Any]], reference: str) -> list[str]:
    """A line that says whether CLIP scores are worse than the ``reference``'s; none without scores."""
    if "clip_score_change" not in values:
        return []
    change = bootstrap(values["clip_score_change"])
    if len(values["clip_score_change"]) < FEW_PROMPTS:
        said = "of too few prompts to be told from"
    elif change.low <= 0 <= change.high:
        said = "not to be told from"
    else:
        said = "worse than" if change.high < 0 else "better than"
    return [f"CLIP score: {said} {reference}'s (paired by prompt, {LEVEL:.0%})"]
