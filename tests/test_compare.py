"""``calib compare``: run directories beside each other, whatever state they are in."""

import csv
import fcntl
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from calib.base.errors import ConfigError
from calib.base.layout import ACTIVATIONS, CONFIG, DETAILS, HYDRA, HYDRA_CONFIG, LOCK, METRICS, PLAN, STATUS, STEPS
from calib.runs.compare.best import Ranking
from calib.runs.compare.comparison import compare, pareto_front, value_of
from calib.runs.find import read_runs, short_names
from calib.runs.record import RunRecord
from calib.runs.standing import RunState

import pytest
import yaml
from helpers import Outcome, environment, run_here
from hypothesis import given
from hypothesis import strategies as st

#: Runs ``calib compare`` with arguments.
Compare: TypeAlias = Callable[..., Outcome]

#: psnr, output error and bytes of the complete runs: range is beaten by uniform, the other two by none.
FIGURES = {"range": (20.0, 4e-1, 6_000_000), "uniform": (30.5, 1e-1, 5_300_000), "sqnr": (42.0, 1e-2, 7_600_000)}


def copied(run: Path, into: Path, analysis: str) -> Path:
    """A copy of a run directory as a job of another heuristic would have left it, with figures of its own."""
    shutil.copytree(run, into)
    changed(into / STATUS, made={})
    config = yaml.safe_load((into / CONFIG).read_text())
    config["analysis"] = {"_target_": f"calib.analysis.heuristics.{analysis}.plan_layer"}
    (into / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    hydra = yaml.safe_load((into / HYDRA_CONFIG).read_text())
    hydra["hydra"]["runtime"]["choices"]["analysis"] = analysis
    (into / HYDRA_CONFIG).write_text(yaml.safe_dump(hydra))
    return into


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def evaluated(run: Path, psnr: float, error: float) -> None:
    """Give a run values by prompt of these means, of enough prompts to be told from others."""
    details = json.loads((run / DETAILS).read_text())
    details["prompts"] += [f"prompt {number}" for number in range(8)]
    spread = [0.1 * (-1) ** number for number in range(len(details["prompts"]))]
    own = details["quantized"]
    own |= {"psnr": [psnr + s for s in spread], "error": [[error * (1 + s)] * len(own["steps"]) for s in spread]}
    own["ssim"] = [0.9] * len(spread)
    (run / DETAILS).write_text(json.dumps(details))


def sweep_of_copies(run: Path, sweep: Path) -> Path:
    """Three complete runs, one that failed, one whose process was killed, one half deleted, one damaged."""
    for analysis, (psnr, error, size) in FIGURES.items():
        job = copied(run, sweep / f"analysis={analysis}", analysis)
        changed(job / METRICS, psnr=psnr, output_error=error, quantized_bytes=size)
        evaluated(job, psnr, error)
    failed = copied(run, sweep / "analysis=mse", "mse")
    changed(failed / STATUS, state="failed", error="RuntimeError: out of\nmemory")
    (failed / METRICS).unlink()
    killed = copied(run, sweep / "analysis=cv", "cv")
    changed(killed / STATUS, state="running")
    half = copied(run, sweep / "analysis=allocate", "allocate")
    for name in (STATUS, CONFIG, ACTIVATIONS):
        (half / name).unlink()
    damaged = copied(run, sweep / "analysis=sensitivity", "sensitivity")
    (damaged / STATUS).write_text('{"state": "comp')
    (sweep / ".submitit").mkdir()
    (sweep / "multirun.yaml").write_text("hydra: {}\n")
    return sweep


@pytest.fixture(scope="module")
def sweep(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep_of_copies(tiny_run, tmp_path_factory.mktemp("sweeps") / "analysis")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal with room for every column."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def comparing(capsys: pytest.CaptureFixture[str]) -> Compare:
    return lambda *arguments: run_here(["compare", *map(str, arguments)], capsys)


def test_states(sweep: Path) -> None:
    runs = {run.name: run for run in read_runs([str(sweep)])}
    assert {name.partition("=")[2]: run.state.value for name, run in runs.items()} == {
        **dict.fromkeys(FIGURES, "complete"),
        "mse": "failed",
        "cv": "incomplete",
        "allocate": "incomplete",
        "sensitivity": "damaged",
    }
    assert runs["analysis=mse"].why == "RuntimeError: out of memory"
    assert "status.json" in runs["analysis=sensitivity"].why
    assert "config.resolved.yaml" in runs["analysis=allocate"].why
    for run in runs.values():
        assert (run.why == "") == (run.state is RunState.COMPLETE)
        assert "\n" not in run.why
    assert runs["analysis=range"].config["analysis"] == "range"
    assert runs["analysis=range"].config["sampler.num_steps"] == 4


@pytest.mark.parametrize("module", ["calib.analysis.heuristics", "calib.analysis"], ids=["now", "0.1.0"])
def test_options_without_hydras_record(sweep: Path, tmp_path: Path, module: str) -> None:
    run = Path(shutil.copytree(sweep / "analysis=sqnr", tmp_path / "run"))
    shutil.rmtree(run / HYDRA)
    config = (run / CONFIG).read_text()
    (run / CONFIG).write_text(config.replace("calib.analysis.heuristics", module))
    (record,) = read_runs([str(run)])
    assert (record.config["analysis"], record.config["timestep_schedule"]) == ("sqnr", "quarters")
    assert record.config["model"] == "emoji"


def test_running_or_killed(sweep: Path) -> None:
    with open(sweep / "analysis=cv" / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert {r.name: r.state for r in read_runs([str(sweep)])}["analysis=cv"] is RunState.RUNNING


def test_table(sweep: Path, comparing: Compare) -> None:
    outcome = comparing(sweep)
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert re.split(r"  +", lines[0].strip())[:3] == ["run", "analysis", "PSNR (dB) ↑"]
    text = {name: next(line for line in lines if f"analysis={name} " in line) for name in FIGURES}
    assert text["sqnr"].startswith("◆") and text["uniform"].startswith("◆") and not text["range"].startswith("◆")
    assert "42.00*" in text["sqnr"] and "5.30*" in text["uniform"] and "*" not in text["range"].partition("20.00")[0]
    assert "Not complete: 4 runs" in outcome.out
    assert "RuntimeError: out of memory" in outcome.out
    assert "* best of its column" in outcome.out and "◆ Pareto-optimal" in outcome.out
    assert max(map(len, lines)) <= 160


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--sort", "-psnr"], ["sqnr", "uniform", "range"]),
        (["--sort", "quantized_bytes"], ["uniform", "range", "sqnr"]),
        (["--sort=-analysis"], ["uniform", "sqnr", "range"]),
        (["--where", "psnr>30"], ["sqnr", "uniform"]),
        (["--where", "psnr>30", "--where", "quantized_bytes<=5.3e6"], ["uniform"]),
        (["--where", "analysis=range"], ["range"]),
        (["--where", "analysis!=range", "--where", "state=complete"], ["sqnr", "uniform"]),
        (["--where", "state=failed"], ["mse"]),
    ],
)
def test_sort_and_where(sweep: Path, comparing: Compare, arguments: list[str], names: list[str]) -> None:
    outcome = comparing(sweep, *arguments, "--json")
    assert outcome.status == 0, outcome.err
    runs = [run for run in json.loads(outcome.out)["runs"] if run["state"] == "complete" or "failed" in str(arguments)]
    found = [run["run"].partition("=")[2] for run in runs]
    assert found == names if any("sort" in a for a in arguments) else sorted(found) == sorted(names)


def test_baseline(sweep: Path, comparing: Compare) -> None:
    for name in ("analysis=uniform", str(sweep / "analysis=uniform")):
        outcome = comparing(sweep, "--baseline", name)
        assert outcome.status == 0, outcome.err
        assert "42.00 (+11.50)" in outcome.out and "20.00 (-10.50)" in outcome.out
        assert "30.50 (" not in outcome.out
        assert "(±) difference to analysis=uniform" in outcome.out


def test_forms(sweep: Path, tmp_path: Path, comparing: Compare) -> None:
    changed(sweep / "analysis=range" / METRICS, ssim=1 / 3)
    paths = {form: tmp_path / f"runs.{form}" for form in ("csv", "json", "markdown", "html")}
    outcome = comparing(sweep, *(f"--{form}={path}" for form, path in paths.items()))
    assert outcome.status == 0, outcome.err
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(paths["csv"].read_text()))}
    document = json.loads(paths["json"].read_text())
    assert float(rows["analysis=range"]["ssim"]) == 1 / 3
    assert {run["run"]: run["values"]["ssim"] for run in document["runs"]}["analysis=range"] == 1 / 3
    assert len(rows) == len(document["runs"]) == 7
    assert rows["analysis=mse"]["psnr"] == "" and rows["analysis=mse"]["error"] == "RuntimeError: out of memory"
    table = [line for line in paths["markdown"].read_text().splitlines() if line.startswith("|")]
    assert len(table) == 9 and len({line.replace(r"\|", "").count("|") for line in table}) == 1
    assert paths["html"].read_text().startswith("<!doctype html>")


def test_narrow_terminal(sweep: Path, comparing: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    outcome = comparing(sweep)
    assert outcome.status == 0, outcome.err
    table = outcome.out.splitlines()[:4]
    assert max(map(len, table)) <= 60
    left_out = next(line for line in outcome.out.splitlines() if line.startswith("left out"))
    assert "analysis" in left_out and "PSNR" in table[0]


def test_missing_metrics(sweep: Path, tmp_path: Path, comparing: Compare) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "statistics"))
    metrics = json.loads((run / METRICS).read_text())
    (run / METRICS).write_text(json.dumps({key: metrics[key] for key in ("images", "steps")} | {"nan": "x"}))
    outcome = comparing(sweep / "analysis=sqnr", run)
    assert outcome.status == 0
    assert re.search(r"statistics .*–", outcome.out)
    assert "not evaluated, so without PSNR and errors: 1 of 2 runs" in outcome.out


def test_different_models(sweep: Path, tmp_path: Path, comparing: Compare) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "other"))
    config = (run / CONFIG).read_text()
    (run / CONFIG).write_text(config.replace("name: emoji", "name: sd3_medium"))
    outcome = comparing(sweep / "analysis=sqnr", run)
    assert outcome.status == 0
    assert "note: these are runs of different models (emoji, sd3_medium): their figures do not compare" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere: no such folder"]),
        (["{empty}"], ["holds no run directory"]),
        ([], ["DIR", "compare --help"]),
        (["{sweep}", "--sort", "pnsr"], ["pnsr: no such column", "psnr"]),
        (["{sweep}", "--where", "psnr~3"], ["psnr~3", "is no condition"]),
        (["{sweep}", "--where", "psnr>good"], ["'good' is no number"]),
        (["{sweep}", "--where", "psnr>99"], ["none of the 7 runs is left"]),
        (["{sweep}", "--baseline", "analysis=rage"], ["names no run", "analysis=range"]),
        (["{sweep}", "--pareto", "psnr"], ["--pareto psnr", "two metrics"]),
        (["{sweep}", "--pareto", "psnr,bytes"], ["bytes: no such column"]),
        (["{sweep}", "--csv={empty}/file/x.csv"], ["empty/file"]),
        (["{sweep}", "--layers"], ["--layers", "two runs", "7 runs"]),
        (["{sweep}/analysis=range", "{noplan}", "--layers"], [f"no {PLAN}"]),
    ],
)
def test_bad_input(sweep: Path, tmp_path: Path, comparing: Compare, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    noplan = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "noplan"))
    (noplan / PLAN).unlink()
    folders = {"sweep": sweep, "empty": tmp_path / "empty", "noplan": noplan}
    outcome = comparing(*(argument.format(**folders) for argument in arguments))
    assert outcome.status in (1, 2)
    assert outcome.out == ""
    (line,) = outcome.err.strip().splitlines()
    for word in words:
        assert word in line


def test_patterns_folders_and_runs_mixed(sweep: Path) -> None:
    given = [str(sweep / "analysis=s*"), str(sweep / "analysis=sqnr"), str(sweep)]
    runs = read_runs(given)
    assert len(runs) == 7
    assert [run.name for run in runs[:2]] == ["analysis=sensitivity", "analysis=sqnr"]


@pytest.mark.parametrize(("which", "loaded"), [("analysis=range", []), ("", ["numpy"])])
def test_imports(sweep: Path, which: str, loaded: list[str]) -> None:
    """Neither MLX nor Hydra; NumPy where measures are to be told apart."""
    code = (
        "import sys; from calib.__main__ import main; sys.argv = ['calib', 'compare', sys.argv[1]]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*(m for m in ('mlx', 'hydra', 'matplotlib', 'diffusionkit', 'scipy', 'numpy') if m in sys.modules))"
    )
    given = [sys.executable, "-c", code, str(sweep / which)]
    done = subprocess.run(given, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == loaded, done.stderr


# Plans


def test_plans(sweep: Path, tmp_path: Path, comparing: Compare) -> None:
    other = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "other"))
    plan = json.loads((other / PLAN).read_text())
    before = plan["x_embedder"]["suggested_weight_bits"]
    plan["x_embedder"] |= {"suggested_weight_bits": 5, "group_size": 32}
    (other / PLAN).write_text(json.dumps(plan))
    steps = json.loads((other / STEPS).read_text())
    steps["activation_ranges"]["final_layer.linear"] = {"from_step": [0, 2], "low": [-1, -2], "high": [1, 6]}
    seen = steps["drift"]["final_layer.linear"]
    assert 0 < seen < 1, "of what was seen, also where one range serves all steps"
    steps["drift"]["final_layer.linear"] = 0.75
    (other / STEPS).write_text(json.dumps(steps))
    given = [sweep / "analysis=range", other, "--layers"]
    outcome = comparing(*given)
    assert outcome.status == 0, outcome.err
    assert f"{before} → 5" in outcome.out and "64 → 32" in outcome.out and "→ 75%" in outcome.out
    assert "2 layers differ, 59 agree" in outcome.out
    document = json.loads(comparing(*given, "--json").out)
    assert set(document["layers"]) == {"x_embedder", "final_layer.linear"}
    drifts = [document["layers"]["final_layer.linear"][side]["drift"] for side in ("a", "b")]
    assert drifts == [pytest.approx(seen), 0.75]
    rows = list(csv.DictReader(io.StringIO(comparing(*given, "--csv", "--all").out)))
    assert len(rows) == 61
    assert comparing(*given, "--markdown").out.count("\n| ") == 3


def test_plans_that_mlx_cannot_run(sweep: Path, tmp_path: Path, comparing: Compare) -> None:
    """A heuristic of the user's own could plan them with calib 0.1.0."""
    other = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "other"))
    plan = json.loads((other / PLAN).read_text())
    plan["x_embedder"] |= {"suggested_weight_bits": 7, "suggested_activation_bits": 1, "group_size": 16}
    (other / PLAN).write_text(json.dumps(plan))
    outcome = comparing(sweep / "analysis=range", other, "--layers")
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("x_embedder "))
    assert all(f"→ {value}" in line for value in (7, 16, 1))


def test_plans_of_other_layers(sweep: Path, tmp_path: Path, comparing: Compare) -> None:
    other = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "other"))
    plan = json.loads((other / PLAN).read_text())
    plan.pop("x_embedder")
    (other / PLAN).write_text(json.dumps(plan))
    outcome = comparing(sweep / "analysis=range", other, "--layers")
    assert outcome.status == 2 and "x_embedder" in outcome.err and "different layers" in outcome.err


# Properties

COSTS = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 5)), st.one_of(st.none(), st.integers(0, 5))), max_size=12
)


@given(costs=COSTS)
def test_pareto_front(costs: list[tuple[int | None, int | None]]) -> None:
    named = [(str(number), own) for number, own in enumerate(costs)]
    front = pareto_front(named)
    whole = {name: own for name, own in named if None not in own}
    for name, (x, y) in whole.items():
        assert x is not None and y is not None
        others = [(a, b) for a, b in whole.values() if a is not None and b is not None]
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in others)
        assert (name in front) == (not beaten)
    assert front <= set(whole)


NUMBERS = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=32))


@given(values=st.lists(NUMBERS, min_size=1, max_size=20), descending=st.booleans())
def test_sorting(values: list[float | None], descending: bool) -> None:
    runs = [
        RunRecord(Path(str(i)), str(i), RunState.COMPLETE, metrics={} if value is None else {"psnr": value})
        for i, value in enumerate(values)
    ]
    if all(value is None for value in values):
        with pytest.raises(ConfigError):
            compare(runs, sort=["psnr"])
        return
    ordered = compare(runs, sort=["-psnr" if descending else "psnr"]).runs
    assert sorted(run.name for run in ordered) == sorted(run.name for run in runs)
    found = [value_of(run, "psnr") for run in ordered]
    numbers = [value for value in found if isinstance(value, float)]
    assert numbers == sorted(numbers, reverse=descending)
    assert found[: len(numbers)] == numbers


PARTS = st.lists(st.sampled_from(["a", "b", "run"]), min_size=1, max_size=4)


@given(paths=st.lists(PARTS, min_size=1, max_size=6, unique_by=tuple))
def test_short_names(paths: list[list[str]]) -> None:
    folders = [Path("/root", *("x" * depth for depth in range(1, 2)), *parts) for parts in paths]
    names = short_names(folders)
    assert len(set(names)) == len(names)
    for folder, name in zip(folders, names, strict=True):
        assert str(folder).endswith(name)


def test_only_finite_metrics(sweep: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "run"))
    (run / METRICS).write_text('{"psnr": NaN, "ssim": null, "images": true, "steps": 5, "x": Infinity}')
    (record,) = read_runs([str(run)])
    assert record.metrics == {"steps": 5.0}
    assert all(math.isfinite(value) for value in record.metrics.values())


@pytest.mark.parametrize("name", ["fid", "fd_effnet", "kid_effnet", "psnr"])
@pytest.mark.parametrize("differing", ["evaluation.num_images", "evaluation.reference", ""])
def test_figures_of_different_sets_are_not_ranked(name: str, differing: str) -> None:
    runs = [
        RunRecord(Path(own), own, RunState.COMPLETE, config={differing: own}, metrics={name: value, **ends})
        for own, value in (("a", 40.0), ("b", 60.0))
        for ends in [{f"{name}_low": value - 2, f"{name}_high": value + 2}]
    ]
    best = "b" if name == "psnr" else "a"
    of_different_sets = bool(differing) and name != "psnr"
    assert Ranking(runs).best(name) == (frozenset() if of_different_sets else {best})
