"""Measures that an evaluation is asked for: in its files, its page, comparisons; the same as of folders of pictures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from calib.base.files import read_json, write_json
from calib.base.layout import DETAILS, FIDELITY, FULL_PICTURES, METRICS, PAGE, QUANTIZED_PICTURES
from calib.evaluation.measures import MEASURES, check_names
from calib.evaluation.titles import TITLES
from calib.runs.compare.columns import metric_of
from calib.runs.pages.run import run_page
from calib.stages.build import build
from calib.stages.evaluate import reference_sources

import pytest
from helpers import Outcome, check_config_error, is_one_clear_line, run_here, run_in, well
from test_config import composed
from test_folders import BAD

Calib: TypeAlias = Callable[..., Outcome]
OFFLINE = ("lpips_effnet", "kid_effnet", "fd_effnet")
SETS = ("kid_effnet", "fd_effnet", "fid", "kid", "precision", "recall", "cmmd")
ALL = f"evaluation.metrics=[psnr,ssim,{','.join(OFFLINE)}]"
#: Of their own, as other tests compare what lies beside the shared run.
DATA = "data_dir=dataset"
HALF = "calibration_cache/evaluation/.control.json.x.tmp"
SIZES = ("evaluation.num_images=4", "evaluation.steps=1", "sampler.num_steps=2", "sampler.batch_size=2")


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run directory ``all`` of an evaluation by all measures, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("measures")
    (folder / HALF).parent.mkdir(parents=True)
    (folder / HALF).write_text("of a killed process")
    well(run_in(folder, "evaluate", f"plan={tiny_run}", DATA, ALL, *SIZES, "hydra.run.dir=all"))
    return folder


@pytest.fixture
def calib(evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Calib:
    monkeypatch.chdir(evaluated)
    return lambda *arguments: run_here(arguments, capsys)


def of_folders(calib: Calib, a: Path, b: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        well(calib("evaluate", str(a), str(b), "--metrics", ",".join(OFFLINE), "--json")).out
    )
    return found


def test_figures_are_those_of_the_pictures_folders(calib: Calib, evaluated: Path) -> None:
    """To the last digit, and from the cache: features are of pictures as they are stored."""
    metrics = read_json(evaluated / "all" / METRICS)
    entries = {path: path.stat().st_mtime_ns for path in (evaluated / "calibration_cache" / "features").rglob("*")}
    found = of_folders(calib, evaluated / "all" / FULL_PICTURES, evaluated / "all" / QUANTIZED_PICTURES)
    for name in OFFLINE:
        own = found["measures"][name]
        assert metrics[name] == own["value"] and metrics[f"{name}_low"] == own["low"] < own["high"]
    assert metrics["kid_effnet_std"] == found["measures"]["kid_effnet"]["std"]
    assert metrics["fd_effnet_unbiased"] == found["measures"]["fd_effnet"]["unbiased"]
    by_prompt = read_json(evaluated / "all" / DETAILS)["quantized"]["further"]["lpips_effnet"]
    by_name = {pair["name"]: pair["lpips_effnet"] for pair in found["pairs"]}
    assert [by_name[f"{number:04d}"] for number in range(4)] == by_prompt and min(by_prompt) > 0
    assert {path: path.stat().st_mtime_ns for path in entries} == entries


def test_a_report_shows_them_with_intervals_and_the_control(evaluated: Path) -> None:
    lines = (evaluated / "all" / FIDELITY).read_text().splitlines()
    row = next(line for line in lines if line.startswith("perceptual distance (EfficientNet, 0: equal)"))
    assert row.count("[") == 2
    assert any(
        line.startswith("KID (EffNet), lower is closer: ") and "over subsets of 2 pictures" in line for line in lines
    )
    assert any(line.startswith("FD (EffNet), Fréchet distance, lower is closer: ") for line in lines)
    assert any(line.startswith("note: fd_effnet: of 4 pictures") for line in lines)
    metrics = read_json(evaluated / "all" / METRICS)
    assert 0 < metrics["control_lpips_effnet"] < metrics["lpips_effnet"] and not (evaluated / HALF).exists()


def test_a_page_and_comparisons_show_them(calib: Calib, evaluated: Path) -> None:
    page = (evaluated / "all" / PAGE).read_text()
    document = json.loads(well(calib("compare", "all", "--json")).out)
    columns = {column["key"]: column for column in document["columns"]}
    for name in OFFLINE:
        assert metric_of(name).title in page
        assert columns[name]["better"] == "lower"
    details = read_json(evaluated / "all" / DETAILS)["quantized"]
    for decibels, distance in zip(details["psnr"], details["further"]["lpips_effnet"], strict=True):
        assert f">{decibels:.1f} dB, perceptual distance {distance:.4f}<" in page
    assert "fd_effnet: of 4 pictures a Fréchet distance is biased" in page


def test_prompts_seen_in_training_are_noted(calib: Calib, evaluated: Path) -> None:
    """By the page and by comparisons, as by the report; of what is stored, as earlier versions stored it."""
    shutil.copytree(evaluated / "all", "seen")
    write_json(Path("seen") / METRICS, read_json(Path("seen") / METRICS) | {"prompts_seen": 3})
    said = "3 of 4 prompts were calibrated or trained on, and say little of others"
    assert said in run_page(Path("seen")) and "calibrated or trained on" not in run_page(Path("all"))
    out = well(calib("compare", "all", "seen")).out
    assert "note: evaluated on prompts that were calibrated or trained on, which say little of others: seen (3)" in out


def test_every_measure_has_a_title_and_belongs_to_pairs_or_sets() -> None:
    assert [*MEASURES, "output_error"] == list(TITLES)
    for name, measure in MEASURES.items():
        assert TITLES[name].of_sets == (measure.sets is not None) == (measure.pair is None and measure.seen is None)


def test_a_reference_of_the_users_own(calib: Calib, evaluated: Path, tiny_run: Path) -> None:
    """Sets are compared with it; another number of pictures will do, and changed ones are another job."""
    shutil.copytree(evaluated / "all" / QUANTIZED_PICTURES, "own", dirs_exist_ok=True)
    shutil.copy(evaluated / "all" / FULL_PICTURES / "0000.png", "own/other.png")
    command = ("evaluate", f"plan={tiny_run}", DATA, *SIZES, "evaluation.metrics=[kid_effnet,fd_effnet]", "report=none")
    command = (*command, "evaluation.reference=own", "hydra.run.dir=own_run")
    well(calib(*command))
    metrics, other = (read_json(evaluated / run / METRICS) for run in ("own_run", "all"))
    assert metrics["fd_effnet"] < other["fd_effnet"] and metrics["psnr"] == other["psnr"]
    assert "the whole set of pictures against own" in (evaluated / "own_run" / FIDELITY).read_text()
    assert "Already complete" in well(calib(*command)).out
    Path("own/other.png").unlink()
    assert "Already complete" not in well(calib(*command)).out


def test_other_weights_of_inception_are_another_job(folder: Path) -> None:
    """By their content; where nothing is drawn they are not read."""
    asked = ("evaluation.metrics=[kid]", "evaluation.inception=w.pth")
    found = []
    for content in ("a", "b", "a"):
        Path("w.pth").write_text(content)
        found.append(reference_sources(build(composed(*asked))))
    assert found[0] == found[2] != found[1]
    Path("w.pth").unlink()
    assert reference_sources(build(composed(*asked, "evaluation.num_images=0"))) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("evaluation.metrics=[psrn]",), "evaluation.metrics=psrn: no such measure. Did you mean 'psnr'?"),
        (("evaluation.metrics=[ssim,ssim]",), "evaluation.metrics: ssim is named twice"),
        (("evaluation.metrics=[kid_effnet]", "evaluation.num_images=3"), "of 4 pictures or more, and there are 3"),
        (("evaluation.reference=own",), f"it is what {', '.join(SETS)} compare with"),
        (
            ("evaluation.inception=x.pth",),
            "evaluation.inception=x.pth: no measure that is asked for reads it; it is for f",
        ),
        (
            ("evaluation.clip=x", "evaluation=none"),
            "evaluation.clip=x: no measure that is asked for reads it; it is for c",
        ),
        (("evaluation.metrics=[precision]", "evaluation.num_images=7"), "of 8 pictures or more, and there are 7"),
        (("evaluation=effnet", "evaluation.reference=few"), "of 4 pictures or more, and there are 1"),
        (("evaluation=effnet", "evaluation.reference=none"), "none: cannot be read as a folder of pictures"),
        (("evaluation=effnet", "evaluation.reference=empty"), "empty: no picture in it"),
    ],
)
def test_wrong_settings_are_one_line(calib: Calib, evaluated: Path, settings: tuple[str, ...], words: str) -> None:
    Path("few").mkdir(exist_ok=True), Path("empty").mkdir(exist_ok=True)
    shutil.copy(evaluated / "all" / FULL_PICTURES / "0000.png", "few")
    outcome = calib(*settings, "hydra.run.dir=wrong")
    assert words in is_one_clear_line(outcome, outcome.status) and outcome.status in (1, 2)
    assert not Path("wrong").exists()


#: Pictures of a reference that cannot be compared, as folders' own cannot, and when that is said.
@pytest.mark.parametrize("case", ["truncated", "no picture", "animated PNG", "animated GIF", "16 bits", "CMYK"])
def test_a_bad_reference_is_one_line_before_anything_is_drawn(
    calib: Calib, evaluated: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    harm, words = BAD[case]
    for name in "ab":
        shutil.copytree(evaluated / "all" / FULL_PICTURES, tmp_path / name)
        for path in sorted((tmp_path / name).iterdir()):
            path.rename(path.with_name(f"p{path.stem[-1]}.png"))
    monkeypatch.chdir(tmp_path)
    harm()
    reference, said = words[0].split("/", 1)
    command = ("evaluate", f"plan={tiny_run}", "evaluation.metrics=[kid_effnet]", "evaluation.num_images=4")
    outcome = calib(*command, "data_dir=drawn", f"evaluation.reference={reference}", "hydra.run.dir=bad")
    assert outcome.status == 1 and outcome.err.splitlines()[-1].startswith(f"calib: {reference}/{said}"), outcome.err
    assert not list(tmp_path.glob("*evaluation*"))
    assert case == "truncated" or not Path("bad").exists()


def test_names_are_checked() -> None:
    check_names("key", ["kid_effnet"])
    check_config_error(lambda: check_names("key", ["kid_effnet"], 2), ["key=kid_effnet", "4 pictures or more"])
