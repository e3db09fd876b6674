"""Every command of the two guides is run, in the order of the page; only sizes are smaller."""

import glob
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from calib.cli.main import main

import pytest
from helpers import CHECKOUT
from joblib.externals.loky import get_reusable_executor

GUIDES = ("QUICKSTART_CALIBRATION.md", "README_CALIBRATION.md")
#: What makes a job of minutes one of seconds; the same for all, as stages must find what earlier ones made.
SMALL = (
    *("sampler.num_steps=8", "sampler.batch_size=2", "evaluation.num_images=2", "evaluation.steps=2"),
    *("sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[64]"),
    *("calibration.images=2", "calibration.steps=2", "taps.include=['*.image.*']"),
)
SMALLER = {
    "num_images=100": "num_images=4",
    "num_images=30": "num_images=4",
    "num_images=20": "num_images=3",
    "num_images=10": "num_images=2",
    "timestep_schedule.count=20": "timestep_schedule.count=4",
    "hparams_search=budgets": "hparams_search=budgets analysis.average_bits=4,5",
}
WITHOUT_HYDRA = ("doctor", "compare", "convergence", "merge", "verify", "rebuild-manifest")


def commands(guide: str) -> list[str]:
    """The lines of the page's blocks of commands."""
    found, inside = [], False
    for line in (CHECKOUT / "docs" / guide).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```bash"
        elif inside and line.strip():
            found.append(line.partition("  #")[0].strip())
    return found


def smaller(line: str) -> list[str]:
    """The command's words, with patterns expanded as a shell does."""
    words: list[str] = []
    given = shlex.split(line)[1:]
    for word in given:
        if word.startswith("multirun/") and not word.endswith("*"):
            word += "*"  # a sweep's folder has a hash where something is fixed besides, as the sizes are here
        for part in [word] if "analysis.average_bits=4,5" in given else SMALLER.get(word, word).split(" "):
            words += sorted(glob.glob(part)) if "*" in part and "=" not in part else [part]
    return words if given and given[0] in WITHOUT_HYDRA else [*words, *SMALL]


@pytest.fixture
def folder(folder: Path) -> Iterator[Path]:
    """An empty working folder, and none of joblib's idle workers afterwards: they keep the folder they started in."""
    yield folder
    get_reusable_executor().shutdown(wait=True)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_of_the_guide_does_what_it_says(
    guide: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = commands(guide)
    assert len(lines) > 15 and all(line.startswith("calib") for line in lines)
    for line in lines:
        monkeypatch.setattr(sys, "argv", ["calib", *smaller(line)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert not end.value.code, f"{line}\n{said.err[-2000:]}"
    for page in folder.rglob("report.html"):
        assert page.stat().st_size > 10_000
    assert list(folder.glob("multirun/*/comparison.html"))
    if guide == GUIDES[0]:
        assert {"runs.csv", "runs.json", "runs.md", "comparison.html"} <= set(os.listdir(folder))


def test_every_file_that_the_guides_name_is_there() -> None:
    for guide in GUIDES:
        text = (CHECKOUT / "docs" / guide).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert (CHECKOUT / "docs" / link).exists(), link
