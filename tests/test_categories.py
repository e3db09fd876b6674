"""Scores by a column of the file of prompts: in the report, in ``metrics.json``, on the page; bad columns."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from calib.base.files import read_json
from calib.base.layout import DETAILS, FIDELITY, METRICS, PAGE
from calib.dataset import prompt_files
from calib.evaluation.metrics import bootstrap
from calib.evaluation.titles import TITLES

import numpy as np
import pytest
from helpers import Outcome, check_config_error, is_one_clear_line, run_here, run_in, well

Calib: TypeAlias = Callable[..., Outcome]
#: As PartiPrompts has them: a name in quotes, an empty cell.
ROWS = [
    ("red apple", "Food", "Basic"),
    ("cat face", "Animals", "Basic"),
    ("dog face", "Animals", "Imagination"),
    ('"green heart" on white', "", "Writing & Symbols"),
    ("blue heart", "Symbols", "Basic"),
    ("pig face", "Animals", "Basic"),
]
TABLE = "Prompt\tCategory\tChallenge\n" + "".join("\t".join(row) + "\n" for row in ROWS)
OF_FILE = ("prompts=file", "prompts.path=parti.tsv", "prompts.column=Prompt")
SIZES = ("evaluation.num_images=5", "evaluation.steps=1", "sampler.num_steps=2", "sampler.batch_size=2")
METRICS_WANTED = "evaluation.metrics=[lpips_effnet,psnr,ssim]"


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file and the run directory ``run`` of an evaluation of five of its prompts by category."""
    folder = tmp_path_factory.mktemp("categories")
    (folder / "parti.tsv").write_text(TABLE)
    command = ("evaluate", f"plan={tiny_run}", *OF_FILE, *SIZES, METRICS_WANTED)
    outcome = well(run_in(folder, *command, "evaluation.by=Category", "hydra.run.dir=run"))
    assert (folder / "run" / FIDELITY).read_text() in outcome.out
    return folder


@pytest.fixture
def calib(evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Calib:
    monkeypatch.chdir(evaluated)
    return lambda *arguments: run_here(arguments, capsys)


def groups(run: Path) -> dict[str, list[int]]:
    """Places of the run's prompts by category, by the table itself."""
    by_prompt = {prompt: category or "(none)" for prompt, category, _ in ROWS}
    found: dict[str, list[int]] = {}
    for place, prompt in enumerate(read_json(run / DETAILS)["prompts"]):
        found.setdefault(by_prompt[prompt], []).append(place)
    return found


def values(run: Path) -> dict[str, list[float]]:
    own = read_json(run / DETAILS)["quantized"]
    return {"psnr": own["psnr"], "ssim": own["ssim"], **own["further"]}


def test_figures_are_those_of_the_prompts(evaluated: Path) -> None:
    run = evaluated / "run"
    metrics, by_prompt = read_json(run / METRICS), groups(run)
    assert sorted(map(len, by_prompt.values())) == [1, 1, 3], "the last five of the file"
    for name, own in values(run).items():
        for category, places in by_prompt.items():
            interval = bootstrap(np.array([own[place] for place in places]))
            found = [metrics[f"{name}{end}/{category}"] for end in ("", "_low", "_high")]
            assert found == pytest.approx([interval.mean, interval.low, interval.high])
            assert metrics[f"pictures/{category}"] == len(places)
    assert sum(key.startswith("pictures/") for key in metrics) == len(by_prompt)


def test_the_worst_are_first_by_the_first_measure_named(evaluated: Path) -> None:
    run = evaluated / "run"
    distances, prompts = values(run)["lpips_effnet"], read_json(run / DETAILS)["prompts"]
    means = {category: np.mean([distances[i] for i in places]) for category, places in groups(run).items()}
    lines = (run / FIDELITY).read_text().splitlines()
    start = lines.index("by Category, the worst perceptual distance first [95% interval]")
    rows = [re.split(r" {2,}", line) for line in lines[start + 1 : start + 5]]
    assert [row[0] for row in rows] == ["Category", *sorted(means, key=lambda category: -means[category])]
    assert [row[1] for row in rows[1:]] == [str(len(groups(run)[row[0]])) for row in rows[1:]]
    worst = sorted(range(5), key=lambda place: -distances[place])
    after = lines[lines.index("worst 5 prompts by perceptual distance") + 1 :]
    assert [line.rpartition("  ")[2] for line in after[:5]] == [prompts[place] for place in worst]
    assert any("fewer than 8 pictures" in line for line in lines)


def test_the_page_shows_them_with_the_worst_pictures_first(evaluated: Path) -> None:
    page, run = (evaluated / "run" / PAGE).read_text(), evaluated / "run"
    assert "<h2>By Category</h2>" in page and "Symbols" in page
    distances, prompts = values(run)["lpips_effnet"], read_json(run / DETAILS)["prompts"]
    shown = re.findall(r'alt="([^<>]*?), quantized"', page)
    worst = sorted(range(5), key=lambda place: -distances[place])
    assert [text.replace("&#34;", '"') for text in shown] == [prompts[place] for place in worst]
    form = TITLES["lpips_effnet"].form
    captions = re.findall(r'<span class="sub">(.*?)</span>', page)
    for place, caption in zip(worst, [c for c in captions if " dB, " in c], strict=True):
        assert f"perceptual distance {form.format(distances[place])}" in caption


@pytest.mark.slow
def test_several_pictures_of_a_prompt_are_noted(calib: Calib, evaluated: Path, tiny_run: Path) -> None:
    command = ("evaluate", f"plan={tiny_run}", *OF_FILE, *SIZES, "hydra.run.dir=more", "report=none")
    note = "8 pictures of 6 different prompts: intervals are over pictures"
    assert f"note: {note}" in well(calib(*command, "evaluation.num_images=8")).out
    assert any(line.startswith(note) for line in read_json(Path("more", DETAILS))["notes"])
    assert "different prompt" not in (evaluated / "run" / FIDELITY).read_text()


def test_a_changed_column_is_another_job(calib: Calib, evaluated: Path, tiny_run: Path) -> None:
    command = ("evaluate", f"plan={tiny_run}", *OF_FILE, *SIZES, METRICS_WANTED, "evaluation.by=Category")
    assert "Already complete" in well(calib(*command, "hydra.run.dir=run")).out
    Path("parti.tsv").write_text(TABLE.replace("Animals", "Beasts"))
    try:
        again = calib(*command, "hydra.run.dir=other", "report=none")
        assert "Beasts" in well(again).out and "Animals" not in again.out
    finally:
        Path("parti.tsv").write_text(TABLE)
    table = json.loads(well(calib("compare", "run", "other", "--all", "--json")).out)
    titles = {column["key"]: column["title"] for column in table["columns"]}
    assert titles["psnr/Symbols"] == "PSNR, Symbols"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((*OF_FILE, "evaluation.by=Categorie"), ("by=Categorie: ", "'Prompt', 'Category', 'Challenge'", "Did you")),
        ((*OF_FILE, "evaluation.by=x"), ("evaluation.by=x", "'Category'", "Name one, evaluation.by=COLUMN")),
        (("evaluation.by=Category",), ("evaluation.by=Category", "prompts=file prompts.path=FILE")),
        (("prompts=file", "prompts.path=p.txt", "evaluation.by=x"), ("evaluation.by=x: p.txt has no columns",)),
    ],
)  # fmt: skip
def test_a_wrong_column_is_one_line(calib: Calib, settings: tuple[str, ...], words: tuple[str, ...]) -> None:
    Path("p.txt").write_text("a cat\n")
    line = is_one_clear_line(calib(*settings, "hydra.run.dir=wrong"))
    assert all(word in line for word in words) and not Path("wrong").exists(), line


def as_json(rows: list[tuple[Any, Any]]) -> str:
    return json.dumps([{"Prompt": prompt, "Category": category} for prompt, category in rows])


#: The same prompts in each form; a row without a prompt is left out, with its category.
FORMS: Mapping[str, str] = {
    "p.tsv": 'Prompt\tCategory\na cat\tA\n\tB\n"x, y"\t2\nlast\t\n',
    "p.csv": 'Category,Prompt\nA,a cat\nB,\n2,"x, y"\n,last\n',
    "p.json": as_json([("a cat", "A"), ("", "B"), ("x, y", 2), ("last", None)]),
    "p.jsonl": "".join(
        json.dumps({"Prompt": p, "Category": c}) + "\n" for p, c in [("a cat", "A"), ("x, y", 2), ("last", "")]
    ),
    "keyed.json": '{"7": {"Prompt": "a cat", "Category": "A"}, "8": {"Prompt": "x, y", "Category": "2"}, '
    '"9": {"Prompt": "last", "Category": ""}}',
}


@pytest.mark.parametrize("name", FORMS)
def test_columns_of_every_form(folder: Path, name: str) -> None:
    Path(name).write_text(FORMS[name])
    assert prompt_files.read(name, "Prompt") == ["a cat", "x, y", "last"]
    assert prompt_files.categories(name, "Prompt", "Category") == ["A", "2", ""]


def test_captions_of_one_picture_share_its_category_and_several_values_are_refused(folder: Path) -> None:
    Path("a.json").write_text('[{"Prompt": ["a", "b"], "Category": "A"}, {"Prompt": "c", "Category": ["B", "C"]}]')
    words = ["evaluation.by=Category: a.json, item 2, has 2 there; each prompt needs one"]
    check_config_error(lambda: prompt_files.categories("a.json", "Prompt", "Category"), words)
    Path("a.json").write_text('[{"Prompt": ["a", "b"], "Category": "A"}, {"Prompt": "c", "Category": "B"}]')
    assert prompt_files.categories("a.json", "Prompt", "Category") == ["A", "A", "B"]
