"""``calib compare`` on odd folders, damaged files, options with parameters of their own, and narrow terminals."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from calib.base.errors import ConfigError
from calib.base.layout import ENVIRONMENT, HYDRA, METRICS, PLAN, STATUS, STEPS, SWEEP
from calib.cli.compare import compare_command
from calib.runs.compare.comparison import compare
from calib.runs.compare.tables import json_text, terminal_table
from calib.runs.find import read_runs
from calib.runs.record import RunRecord, Scalar
from calib.runs.standing import RunState

import pytest
import yaml
from helpers import command, environment, run_here, run_without_rights
from test_compare import Compare, changed, comparing, sweep

__all__ = ["comparing", "sweep"]  # fixtures


def record(name: str, config: Mapping[str, Scalar], asked: tuple[str, ...] = (), **metrics: float) -> RunRecord:
    config = {"model": "emoji", "model.name": "emoji", **config}
    return RunRecord(Path(name), name, RunState.COMPLETE, config=config, asked=frozenset(asked), metrics=metrics)


# Folders


def test_files_beside_runs(sweep: Path, comparing: Compare) -> None:
    """`calib compare sweep/*`: multirun.yaml lies beside the jobs of every sweep."""
    outcome = comparing(*sorted(sweep.glob("[!.]*")), "--json")
    assert outcome.status == 0, outcome.err
    assert len(json.loads(outcome.out)["runs"]) == 7
    outcome = comparing(sweep / "multirun.yaml")
    assert outcome.status == 2 and "multirun.yaml" in outcome.err


def test_link_to_parent(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "analysis=range", tmp_path / "jobs" / "one")
    (tmp_path / "jobs" / "back").symlink_to("..", target_is_directory=True)
    assert [run.name for run in read_runs([str(tmp_path / "jobs")])] == ["one"]


@pytest.mark.parametrize("left", [PLAN, ENVIRONMENT, HYDRA])
def test_remains_of_a_run(sweep: Path, tmp_path: Path, left: str) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "jobs" / "one"))
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (found,) = read_runs([str(tmp_path / "jobs")])
    assert (found.name, found.state) == ("one", RunState.INCOMPLETE)
    assert "status.json: no such file" in found.why


def test_order_of_numbers(sweep: Path, tmp_path: Path) -> None:
    names = ["analysis.average_bits=4", "analysis.average_bits=4.5", "analysis.average_bits=10"]
    for name in reversed(names):
        shutil.copytree(sweep / "analysis=range", tmp_path / name)
    assert [run.name for run in read_runs([str(tmp_path)])] == names
    assert [run.name for run in read_runs([str(tmp_path / "*")])] == names


def test_unreadable_folder(sweep: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    for name in ("one", "two", "three"):
        shutil.copytree(sweep / "analysis=range", jobs / name)
    (jobs / "two").chmod(0)
    (jobs / "three" / STATUS).chmod(0)
    outcome = run_without_rights(jobs, "compare", str(jobs), "--json")
    (jobs / "two").chmod(0o755)
    assert outcome.status == 0, outcome.err
    runs = {run["run"]: run for run in json.loads(outcome.out)["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "one": "complete",
        "two": "damaged",
        "three": "damaged",
    }
    assert "Permission denied" in runs["two"]["error"] and "Permission denied" in runs["three"]["error"]


# Files


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.json", b'{"psnr": 1', "metrics.json: not valid JSON"),
        ("metrics.json", b"[1, 2]", "metrics.json: holds no keys"),
        ("metrics.json", b'{"psnr": NaN, "x": "4", "y": null}', "metrics.json: psnr and 1 more: no finite number"),
        ("metrics.json", b'{"x": 1' + 400 * b"0" + b"}", "metrics.json: x: no finite number"),
        ("metrics.json", b'{"x": 1' + 5000 * b"0" + b"}", "metrics.json: not valid JSON"),
        ("metrics.json", 100_000 * b"[", "metrics.json: not valid JSON"),
        ("metrics.json", b"\xff\xfe{}", "metrics.json: not valid JSON"),
        ("config.resolved.yaml", b"when: 2026-13-45\n", "config.resolved.yaml: not valid YAML"),
        ("config.resolved.yaml", b"a: [1, 2\n", "config.resolved.yaml: not valid YAML"),
        ("config.resolved.yaml", b"a: \xff\n", "config.resolved.yaml: not valid YAML"),
        ("config.resolved.yaml", b"", "config.resolved.yaml: holds no keys"),
    ],
)
def test_damaged_files(sweep: Path, tmp_path: Path, comparing: Compare, name: str, content: bytes, words: str) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "run"))
    (run / name).write_bytes(content)
    outcome = comparing(run, sweep / "analysis=sqnr")
    assert outcome.status == 0, outcome.err
    assert any(line.startswith("note: run: " + words) for line in outcome.out.splitlines()), outcome.out
    assert "42.00" in outcome.out


def test_lost_metrics(sweep: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "lost"))
    (run / METRICS).unlink()
    (found,) = read_runs([str(run)])
    assert found.state is RunState.COMPLETE and "metrics.json is lost" in found.why
    notes = compare([*read_runs([str(sweep)]), found]).notes
    assert any("metrics.json is lost" in note for note in notes)
    assert not any("not evaluated" in note for note in notes)


def test_jobs_not_begun(sweep: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(sweep / "analysis=range", killed / "seed=1")
    (killed / SWEEP).write_text(json.dumps({"jobs": ["seed=1", "seed=2", "seed=10", "../elsewhere"]}))
    runs = read_runs([str(killed)])
    assert [run.name for run in runs] == ["seed=1", "seed=2", "seed=10"]
    assert [run.state for run in runs] == [RunState.COMPLETE, RunState.INCOMPLETE, RunState.INCOMPLETE]
    assert "was not begun" in runs[1].why


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"jobs": 3}', '{"jobs": [{}]}'])
def test_damaged_list_of_jobs(sweep: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(sweep / "analysis=range", tmp_path / "sweep" / "seed=1")
    (tmp_path / "sweep" / SWEEP).write_text(content)
    assert "seed=1" in [run.name for run in read_runs([str(tmp_path / "sweep")])]


@pytest.mark.parametrize("flag", ["--sort=psnr", "--where=psnr>3", "--baseline=x"])
def test_options_without_layers(sweep: Path, comparing: Compare, flag: str) -> None:
    outcome = comparing(sweep / "analysis=range", sweep / "analysis=sqnr", "--layers", flag)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and flag.partition("=")[0] in outcome.err


def test_escape_sequences(sweep: Path, tmp_path: Path, comparing: Compare) -> None:
    """An error cannot send any to the terminal."""
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "run"))
    changed(run / STATUS, state="failed", error="\x1b[2J gone\r\nand more")
    assert "  failed      run  [2J gone and more\n" in comparing(run).out


# Columns


def test_defaults_are_no_columns() -> None:
    uniform = record("a", {"analysis": "uniform", "analysis.weight_bits": 4, "analysis.group_size": 64})
    allocate = record("b", {"analysis": "allocate", "analysis.weight_bits": "[2,3,4]", "analysis.average_bits": 4.5})
    tighter = record("c", {"analysis": "allocate", "analysis.weight_bits": "[2,3,4]", "analysis.average_bits": 4.0})

    def keys(*runs: RunRecord, every: bool = False) -> list[str]:
        return [column.key for column in compare(runs, every=every).columns]

    assert keys(uniform, allocate) == ["analysis"]
    assert keys(uniform, allocate, tighter) == ["analysis", "analysis.average_bits"]
    assert keys(allocate, tighter) == ["analysis.average_bits"]
    assert keys(uniform, allocate, every=True) == [
        *("analysis", "analysis.weight_bits", "analysis.group_size", "analysis.average_bits")
    ]
    # What somebody chose is no default.
    asked = record("d", {"analysis": "uniform", "analysis.weight_bits": 8}, ("analysis", "analysis.weight_bits"))
    assert keys(asked, record("e", {"analysis": "range"})) == ["analysis", "analysis.weight_bits"]


def test_keys_of_the_command_line(sweep: Path) -> None:
    (run,) = read_runs([str(sweep / "analysis=range")])
    assert {"num_images", "sampler.num_steps", "timestep_schedule", "data_dir"} <= run.asked


def test_plans_of_origin() -> None:
    runs = [record(name, {"stage": "evaluate", "plan": f"runs/{name}"}) for name in "ab"]
    assert [column.key for column in compare(runs).columns] == ["plan"]


def test_different_models_are_not_ranked() -> None:
    runs = [
        record("a", {}, psnr=20.0, output_error=0.4, quantized_bytes=9.0),
        record("b", {"model": "sd3_medium", "model.name": "sd3_medium"}, psnr=30, output_error=0.1, quantized_bytes=8),
    ]
    found = compare(runs)
    assert not any(found.best.values()) and not found.pareto
    assert "figures do not compare" in found.notes[0] and "--where model=" in found.notes[0]
    assert compare(runs[1:]).pareto == {"b"}
    # Runs without a model, or none with one, are no error.
    assert compare([RunRecord(Path("x"), "x", RunState.INCOMPLETE)]).notes == ()


@pytest.mark.parametrize(("key", "other"), [("evaluation.seed", 1), ("sampler.cfg_weight", 1.5), ("prompts.seed", 2)])
def test_metrics_of_other_pictures(key: str, other: float) -> None:
    same = {"evaluation.dequantize": True, "sampler.batch_size": 2, key: 0}
    runs = [record("a", same, psnr=20.0), record("b", same | {"sampler.batch_size": 4}, psnr=21.0)]
    assert compare(runs).notes == ()
    (note,) = compare([*runs, record("c", same | {key: other}, psnr=22.0)]).notes
    assert f"({key})" in note and "with care" in note


def test_titles_as_keys(sweep: Path, comparing: Compare) -> None:
    outcome = comparing(sweep, "--sort", "PSNR", "--where", "Size<7", "--where", "state=complete", "--csv")
    assert [line.partition(",")[0] for line in outcome.out.splitlines()[1:]] == ["analysis=range", "analysis=uniform"]


def test_units_of_conditions(sweep: Path) -> None:
    runs = read_runs([str(sweep)])
    for condition in ("quantized_bytes<7e6", "size<7", "size < 7", "output error>0.05", "output_error>0.05"):
        assert {run.name for run in compare(runs, where=[condition, "state=complete"]).runs} == {
            "analysis=range",
            "analysis=uniform",
        }


@pytest.mark.parametrize("axes", [("state", "psnr"), ("control_psnr", "psnr"), ("analysis", "psnr")])
def test_pareto_axes(sweep: Path, axes: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"{axes[0]} has no better side; these have one: .*output_error"):
        compare(read_runs([str(sweep)]), pareto=axes)


def test_baseline_stays(sweep: Path) -> None:
    found = compare(read_runs([str(sweep)]), where=["analysis=sqnr"], baseline="analysis=uniform")
    assert {run.name for run in found.runs} == {"analysis=sqnr", "analysis=uniform"}
    found = compare(read_runs([str(sweep)]), baseline="analysis=mse")
    assert "the baseline, analysis=mse, has no figures" in found.notes


def test_units_in_json(sweep: Path) -> None:
    document = json.loads(json_text(compare(read_runs([str(sweep)]))))
    units = {column["key"]: column["unit"] for column in document["columns"]}
    assert (units["quantized_bytes"], units["psnr"], units["ssim"]) == ("bytes", "dB", "")
    assert {run["run"]: run["values"]["quantized_bytes"] for run in document["runs"]}["analysis=sqnr"] == 7_600_000


# Output


def named(prefix: str) -> list[RunRecord]:
    figures = {"psnr": 20.0, "ssim": 0.9, "output_error": 0.1, "average_weight_bits": 4.5, "quantized_bytes": 5e6}
    return [record(f"{prefix}{o}", {"analysis": o}, ("analysis",), **figures) for o in ("range", "sqnr")]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_long_names(width: int) -> None:
    runs = named("timestep_schedule=uniform,timestep_schedule.count=20,analysis=")
    lines = terminal_table(compare(runs), width).splitlines()
    assert lines[1].removeprefix("◆").strip() == runs[0].name
    assert all(len(line) <= width for line in lines[:5:2])
    assert all(title in lines[0] for title in ("PSNR", "SSIM", "output error"))
    assert "20.00" in lines[2] and "20.00" in lines[4]


def test_columns_that_stay() -> None:
    runs = named("2026-01-31/08-00-00-00000")
    table = terminal_table(compare(runs), 80).splitlines()
    assert "analysis" in table[0] and "PSNR" in table[0] and "size" not in table[0]
    assert "analysis" not in terminal_table(compare(named("analysis=")), 70).splitlines()[0]


@pytest.mark.parametrize(("form", "arrow"), [((), b"?"), (("--markdown",), "↑".encode())], ids=["table", "document"])
def test_ascii_terminal(sweep: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...], arrow: bytes) -> None:
    """A table lacks signs there, a document is UTF-8 wherever it goes."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert compare_command([str(sweep), *form]) == 0
    assert b"PSNR (dB) " + arrow in out.getvalue()


def test_two_printed_documents(sweep: Path, comparing: Compare) -> None:
    outcome = comparing(sweep, "--csv", "--json")
    assert outcome.status == 2 and "--csv --json: only one" in outcome.err and outcome.out == ""


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n  compare DIR…" in run_here(["--help"], capsys).out
    assert "'compare'" in run_here(["comapre"], capsys).err
    assert "nowhere: no such folder" in run_here(["compare", "nowhere"], capsys).err


def test_exit_status(sweep: Path, comparing: Compare) -> None:
    for arguments, status in ((["nowhere"], 2), ([sweep, "--csv=/dev/null/x.csv"], 1), ([sweep], 0)):
        outcome = comparing(*arguments)
        assert outcome.status == status, outcome.err
        assert len(outcome.err.splitlines()) == (status > 0)


def test_closed_pipe(sweep: Path) -> None:
    arguments = command("compare", str(sweep), "--json")
    piped = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.stdout is not None and piped.stderr is not None
    piped.stdout.close()
    assert piped.wait() == 0 and piped.stderr.read() == b""


# Plans


def altered(run: Path, into: Path, file: str, change: Mapping[str, object], *keys: str) -> Path:
    """A copy whose ``file`` holds ``change`` within ``keys``."""
    copy = Path(shutil.copytree(run, into))
    document = node = json.loads((copy / file).read_text())
    for key in keys:
        node = node.setdefault(key, {})
    node |= change
    (copy / file).write_text(json.dumps(document))
    return copy


@pytest.mark.parametrize(
    ("file", "change", "keys", "shown"),
    [
        (STEPS, {"t_embedder.0": 7}, ("phases", "early", "activation_bits"), "4 → 4 (early 7)"),
        (STEPS, {"t_embedder.0": 3}, ("phases", "mid", "weight_bits"), "4 → 4 (mid 3)"),
        (
            PLAN,
            {"use_percentile_clipping": True, "clip_percentile": [5, 95]},
            ("t_embedder.0",),
            "none → 5–95%",
        ),
    ],
)
def test_phases_and_clipping(
    sweep: Path,
    tmp_path: Path,
    comparing: Compare,
    file: str,
    change: dict[str, object],
    keys: tuple[str, ...],
    shown: str,
) -> None:
    bare = {"suggested_weight_bits": 4, "suggested_activation_bits": 4, "use_percentile_clipping": False}
    one = altered(sweep / "analysis=range", tmp_path / "one", PLAN, bare, "t_embedder.0")
    for phase in (steps := json.loads((one / STEPS).read_text()))["phases"].values():
        phase["activation_bits"].pop("t_embedder.0", None)
    (one / STEPS).write_text(json.dumps(steps))
    other = altered(one, tmp_path / "other", file, change, *keys)
    outcome = comparing(one, other, "--layers")
    assert outcome.status == 0, outcome.err
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("t_embedder.0 "))
    assert shown in line
    assert "1 layer differ" in outcome.out and "60 agree" in outcome.out
    for form in ("--csv", "--json", "--markdown"):
        assert "t_embedder.0" in comparing(one, other, "--layers", form).out


BITS = {"suggested_weight_bits": 4, "suggested_activation_bits": 4, "use_percentile_clipping": False}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (PLAN, [], "holds no layers"),
        (PLAN, {}, "holds no layers"),
        (PLAN, {"x": 3}, "layer 'x' is 3: must be an object"),
        (PLAN, {"x": {"suggested_weight_bits": 4}}, "layer 'x' lacks suggested_activation_bits, an integer"),
        (PLAN, {"x": BITS}, "layer 'x' lacks clip_percentile, two numbers"),
        (
            PLAN,
            {"x": BITS | {"clip_percentile": [0, 100], "group_size": "64"}},
            """'x' has group_size="64": must be an integer""",
        ),
        (PLAN, None, "not valid JSON"),
        (STEPS, [], "lacks or garbles"),
        (STEPS, {"num_steps": 4}, "lacks or garbles 'timesteps'"),
        (STEPS, None, "not valid JSON"),
    ],
)
def test_damaged_plan(sweep: Path, tmp_path: Path, comparing: Compare, file: str, content: object, words: str) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "run"))
    (run / file).write_text("{" if content is None else json.dumps(content))
    outcome = comparing(sweep / "analysis=sqnr", run, "--layers")
    assert outcome.status == 1 and outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert str(run / file) in line and words in line


def test_yaml_reader() -> None:
    assert hasattr(yaml, "CSafeLoader"), "200 runs take a second more without"
