"""Commands of the README and the guide: all are understood, and run in the order of the page, in smaller sizes."""

import glob
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from calib.cli.commands import command_of

import pytest
from helpers import CHECKOUT, run_here
from joblib.externals.loky import get_reusable_executor

PAGES = ("README.md", "docs/GUIDE.md")
#: Pages whose commands are run elsewhere, or are those of others.
POINTERS = ("docs/QUICKSTART_CALIBRATION.md", "docs/README_CALIBRATION.md", "docs/MFLUX.md")
#: What makes a job of minutes one of seconds; the same for all, as stages must find what earlier ones made.
SMALL = (
    *("sampler.num_steps=8", "sampler.batch_size=2", "evaluation.num_images=2", "evaluation.steps=2"),
    *("sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[64]"),
    *("calibration.images=2", "calibration.steps=2", "taps.include=['*.image.*']"),
)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Language and text of the page's fenced blocks, in their order."""
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(block: str) -> list[list[str]]:
    """The arguments of each ``calib`` in a block of shell commands; other programs are not run."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|;", re.split(r"(?:^|\s)#", line)[0]):
            words = shlex.split(command.strip().removeprefix("uv run "))
            if words and words[0] == "calib":
                found.append(words[1:])
    return found


def commands(page: str) -> list[list[str]]:
    return [words for language, block in blocks(page) if language in ("sh", "bash") for words in commands_of(block)]


def is_job(words: list[str]) -> bool:
    return command_of(words) is None


def smaller(words: list[str]) -> list[str]:
    """The command's arguments, of a job a smaller one, with patterns expanded as a shell does."""
    found: list[str] = []
    for word in words:
        if word.startswith("multirun/") and "=" not in word and not word.endswith("*") and not Path(word).exists():
            word += "*"  # a sweep's folder has a hash where something is fixed besides, as the sizes are here
        if re.fullmatch(r"num_images=\d\d+", word):
            word = "num_images=4"
        found += sorted(glob.glob(word)) if "*" in word and "=" not in word else [word]
    if not is_job(words):
        return found
    if not any(word.startswith(("num_images=", "experiment=")) for word in words):
        found.append("num_images=4")
    return [*found, *SMALL]


@pytest.fixture
def folder(folder: Path) -> Iterator[Path]:
    """An empty working folder, and none of joblib's idle workers afterwards: they keep the folder they started in."""
    yield folder
    get_reusable_executor().shutdown(wait=True)


def test_the_pages_have_commands() -> None:
    assert len(commands("README.md")) >= 2
    assert len(commands("docs/GUIDE.md")) > 15
    assert {words[0] for words in commands("docs/GUIDE.md")} >= {"generate", "collect", "analyze", "compare", "merge"}


@pytest.mark.parametrize("page", [*PAGES, *POINTERS])
def test_every_job_of_the_page_is_understood(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Composed and checked, all jobs of a sweep too, but not run."""
    for words in filter(is_job, commands(page)):
        outcome = run_here([*words, "--cfg", "job"], capsys)
        assert outcome.status == 0, f"{' '.join(words)}\n{outcome.err}"
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_the_first_job_of_the_guide_does_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = next(words for words in commands("docs/GUIDE.md") if is_job(words))
    outcome = run_here([*smaller(words), "report=none", "hydra.run.dir=run"], capsys)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "Run directory: run"
    outcome = run_here(["compare", "run"], capsys)
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_does_what_it_says(
    page: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, page, "exec"), {})
        for words in commands_of(block) if language in ("sh", "bash") else ():
            outcome = run_here(smaller(words), capsys)
            assert outcome.status == 0, f"{' '.join(words)}\n{outcome.err[-2000:]}"
    for made in folder.rglob("report.html"):
        assert made.stat().st_size > 10_000
    assert list(folder.glob("multirun/*/comparison.html"))


@pytest.mark.parametrize("page", [*PAGES, *POINTERS])
def test_every_file_that_the_page_names_is_there(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (CHECKOUT / page).read_text(encoding="utf-8")):
        assert link.startswith(("http:", "https:")) or ((CHECKOUT / page).parent / link).exists(), link
