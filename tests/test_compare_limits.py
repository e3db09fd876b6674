"""``calib compare`` on odd folders, damaged files, options with parameters of their own, and narrow terminals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from calib.base.errors import ConfigError
from calib.dataset.sampling import State
from calib.runs.compare.comparison import compare
from calib.runs.compare.tables import json_text, terminal_table
from calib.runs.find import read_runs
from calib.runs.record import RunRecord, Scalar

import pytest
import yaml
from helpers import command, environment, run_here
from test_compare import changed, copied, sweep_of_copies, told


@pytest.fixture(scope="module")
def sweep(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep_of_copies(tiny_run, tmp_path_factory.mktemp("sweeps") / "analysis")


def record(name: str, config: Mapping[str, Scalar], asked: tuple[str, ...] = (), **metrics: float) -> RunRecord:
    config = {"model": "emoji", "model.name": "emoji", **config}
    return RunRecord(Path(name), name, State.COMPLETE, config=config, asked=frozenset(asked), metrics=metrics)


# Folders


def test_what_a_shell_makes_of_a_pattern_may_hold_files(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`calib compare sweep/*`: multirun.yaml lies beside the jobs of every sweep."""
    outcome = told([*map(str, sorted(sweep.glob("[!.]*"))), "--json"], capsys)
    assert outcome.status == 0, outcome.err
    assert len(json.loads(outcome.out)["runs"]) == 7
    outcome = told([str(sweep / "multirun.yaml")], capsys)
    assert outcome.status == 2 and "multirun.yaml" in outcome.err


def test_a_link_to_a_folder_above_ends(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "analysis=range", tmp_path / "jobs" / "one")
    (tmp_path / "jobs" / "back").symlink_to("..", target_is_directory=True)
    assert [run.name for run in read_runs([str(tmp_path / "jobs")])] == ["one"]


@pytest.mark.parametrize("left", [["quantization_config.json"], ["env.json"], [".hydra"]])
def test_a_run_directory_of_which_little_is_left_is_listed(sweep: Path, tmp_path: Path, left: list[str]) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "jobs" / "one"))
    for path in run.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (found,) = read_runs([str(tmp_path / "jobs")])
    assert (found.name, found.state) == ("one", State.INCOMPLETE)
    assert "status.json: no such file" in found.why


def test_jobs_are_in_the_order_of_their_numbers(sweep: Path, tmp_path: Path) -> None:
    names = ["analysis.average_bits=4", "analysis.average_bits=4.5", "analysis.average_bits=10"]
    for name in reversed(names):
        shutil.copytree(sweep / "analysis=range", tmp_path / name)
    assert [run.name for run in read_runs([str(tmp_path)])] == names
    assert [run.name for run in read_runs([str(tmp_path / "*")])] == names


def test_a_folder_that_may_not_be_read_does_not_hide_the_others(sweep: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    for name in ("one", "two", "three"):
        shutil.copytree(sweep / "analysis=range", jobs / name)
    (jobs / "two").chmod(0)
    (jobs / "three" / "status.json").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:-1]):  # pytest's folders are their owner's alone
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    drop = "os.setuid(65534); " if os.geteuid() == 0 else ""
    code = f"import os, sys; from calib.cli.compare import main; {drop}sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(jobs), "--json"], env=environment(), capture_output=True, text=True
    )
    (jobs / "two").chmod(0o755)
    assert done.returncode == 0, done.stderr
    runs = {run["run"]: run for run in json.loads(done.stdout)["runs"]}
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
def test_damaged_files_of_a_complete_run_are_told_in_a_note(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, words: str
) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "run"))
    (run / name).write_bytes(content)
    outcome = told([str(run), str(sweep / "analysis=sqnr")], capsys)
    assert outcome.status == 0, outcome.err
    assert any(line.startswith("note: run: " + words) for line in outcome.out.splitlines()), outcome.out
    assert "42.00" in outcome.out


def test_figures_that_are_lost_are_not_called_unmeasured(sweep: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "lost"))
    (run / "metrics.json").unlink()
    (found,) = read_runs([str(run)])
    assert found.state is State.COMPLETE and "metrics.json is lost" in found.why
    notes = compare([*read_runs([str(sweep)]), found]).notes
    assert any("metrics.json is lost" in note for note in notes)
    assert not any("not evaluated" in note for note in notes)


def test_jobs_that_a_sweep_did_not_come_to_are_listed(sweep: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(sweep / "analysis=range", killed / "seed=1")
    (killed / "sweep.json").write_text(json.dumps({"jobs": ["seed=1", "seed=2", "seed=10", "../elsewhere"]}))
    runs = read_runs([str(killed)])
    assert [run.name for run in runs] == ["seed=1", "seed=2", "seed=10"]
    assert [run.state for run in runs] == [State.COMPLETE, State.INCOMPLETE, State.INCOMPLETE]
    assert "was not begun" in runs[1].why


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"jobs": 3}', '{"jobs": [{}]}'])
def test_a_damaged_list_of_jobs_hides_no_run(sweep: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(sweep / "analysis=range", tmp_path / "sweep" / "seed=1")
    (tmp_path / "sweep" / "sweep.json").write_text(content)
    assert "seed=1" in [run.name for run in read_runs([str(tmp_path / "sweep")])]


@pytest.mark.parametrize("flag", ["--sort=psnr", "--where=psnr>3", "--baseline=x"])
def test_what_is_for_tables_is_refused_with_layers(sweep: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    outcome = told([str(sweep / "analysis=range"), str(sweep / "analysis=sqnr"), "--layers", flag], capsys)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and flag.partition("=")[0] in outcome.err


def test_an_error_cannot_speak_to_the_terminal(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(sweep / "analysis=range", tmp_path / "run"))
    changed(run / "status.json", state="failed", error="\x1b[2J gone\r\nand more")
    assert "  failed      run  [2J gone and more\n" in told([str(run)], capsys).out


# Columns


def test_parameters_that_follow_from_the_option_are_no_columns() -> None:
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


def test_what_the_command_line_set_is_read_from_hydras_record(sweep: Path) -> None:
    (run,) = read_runs([str(sweep / "analysis=range")])
    assert {"num_images", "sampler.num_steps", "timestep_schedule", "data_dir"} <= run.asked


def test_the_plans_and_statistics_that_runs_started_from_are_told() -> None:
    runs = [record(name, {"stage": "evaluate", "plan": f"runs/{name}"}) for name in "ab"]
    assert [column.key for column in compare(runs).columns] == ["plan"]


def test_runs_of_different_models_are_not_ranked() -> None:
    runs = [
        record("a", {}, psnr=20.0, output_error=0.4, quantized_bytes=9.0),
        record("b", {"model": "sd3_medium", "model.name": "sd3_medium"}, psnr=30, output_error=0.1, quantized_bytes=8),
    ]
    found = compare(runs)
    assert not any(found.best.values()) and not found.pareto
    assert "figures do not compare" in found.notes[0] and "--where model=" in found.notes[0]
    assert compare(runs[1:]).pareto == {"b"}
    # Runs without a model, or none with one, are no error.
    assert compare([RunRecord(Path("x"), "x", State.INCOMPLETE)]).notes == ()


@pytest.mark.parametrize(("key", "other"), [("evaluation.seed", 1), ("sampler.cfg_weight", 1.5), ("prompts.seed", 2)])
def test_figures_of_other_pictures_are_told(key: str, other: float) -> None:
    same = {"evaluation.dequantize": True, "sampler.batch_size": 2, key: 0}
    runs = [record("a", same, psnr=20.0), record("b", same | {"sampler.batch_size": 4}, psnr=21.0)]
    assert compare(runs).notes == ()
    (note,) = compare([*runs, record("c", same | {key: other}, psnr=22.0)]).notes
    assert f"({key})" in note and "with care" in note


def test_keys_may_be_written_as_the_table_shows_them(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = told([str(sweep), "--sort", "PSNR", "--where", "Size<7", "--where", "state=complete", "--csv"], capsys)
    assert [line.partition(",")[0] for line in outcome.out.splitlines()[1:]] == ["analysis=range", "analysis=uniform"]


def test_figures_are_compared_in_the_unit_of_the_word_that_names_them(sweep: Path) -> None:
    runs = read_runs([str(sweep)])
    for condition in ("quantized_bytes<7e6", "size<7", "size < 7", "output error>0.05", "output_error>0.05"):
        assert {run.name for run in compare(runs, where=[condition, "state=complete"]).runs} == {
            "analysis=range",
            "analysis=uniform",
        }


@pytest.mark.parametrize("axes", [("state", "psnr"), ("control_psnr", "psnr"), ("analysis", "psnr")])
def test_a_front_needs_metrics_with_a_better_side(sweep: Path, axes: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"{axes[0]} has no better side; these have one: .*output_error"):
        compare(read_runs([str(sweep)]), pareto=axes)


def test_the_baseline_stays_in_the_table_whatever_is_chosen(sweep: Path) -> None:
    found = compare(read_runs([str(sweep)]), where=["analysis=sqnr"], baseline="analysis=uniform")
    assert {run.name for run in found.runs} == {"analysis=sqnr", "analysis=uniform"}
    found = compare(read_runs([str(sweep)]), baseline="analysis=mse")
    assert "the baseline, analysis=mse, has no figures" in found.notes


def test_units_in_json_are_those_of_its_numbers(sweep: Path) -> None:
    document = json.loads(json_text(compare(read_runs([str(sweep)]))))
    units = {column["key"]: column["unit"] for column in document["columns"]}
    assert (units["quantized_bytes"], units["psnr"], units["ssim"]) == ("bytes", "dB", "")
    assert {run["run"]: run["values"]["quantized_bytes"] for run in document["runs"]}["analysis=sqnr"] == 7_600_000


# Output


def named(prefix: str) -> list[RunRecord]:
    figures = {"psnr": 20.0, "ssim": 0.9, "output_error": 0.1, "average_weight_bits": 4.5, "quantized_bytes": 5e6}
    return [record(f"{prefix}{o}", {"analysis": o}, ("analysis",), **figures) for o in ("range", "sqnr")]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_long_names_stand_on_their_own_lines_and_figures_stay(width: int) -> None:
    runs = named("timestep_schedule=uniform,timestep_schedule.count=20,analysis=")
    lines = terminal_table(compare(runs), width).splitlines()
    assert lines[1].removeprefix("◆").strip() == runs[0].name
    assert all(len(line) <= width for line in lines[:5:2])
    assert all(title in lines[0] for title in ("PSNR", "SSIM", "output error"))
    assert "20.00" in lines[2] and "20.00" in lines[4]


def test_settings_that_names_do_not_say_outlast_later_figures() -> None:
    runs = named("2026-01-31/08-00-00-00000")
    table = terminal_table(compare(runs), 80).splitlines()
    assert "analysis" in table[0] and "PSNR" in table[0] and "size" not in table[0]
    assert "analysis" not in terminal_table(compare(named("analysis=")), 70).splitlines()[0]


def test_an_ascii_terminal_gets_a_table_and_documents_stay_utf8(sweep: Path) -> None:
    ascii_only = {**environment(), "PYTHONIOENCODING": "ascii"}
    table, document = (
        subprocess.run(command("compare", str(sweep), *more), env=ascii_only, capture_output=True, check=True).stdout
        for more in ([], ["--markdown"])
    )
    assert b"PSNR (dB) ?" in table
    assert "PSNR (dB) ↑" in document.decode()


def test_one_document_is_printed_at_a_time(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = told([str(sweep), "--csv", "--json"], capsys)
    assert outcome.status == 2 and "--csv --json: only one" in outcome.err and outcome.out == ""


def test_it_is_among_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n  compare DIR…" in run_here(["--help"], capsys).out
    assert "'compare'" in run_here(["comapre"], capsys).err
    assert "nowhere: no such folder" in run_here(["compare", "nowhere"], capsys).err


def test_exit_status_and_closed_pipes_of_a_process(sweep: Path) -> None:
    for arguments, status in ((["nowhere"], 2), ([str(sweep), "--csv=/dev/null/x.csv"], 1), ([str(sweep)], 0)):
        done = subprocess.run(command("compare", *arguments), env=environment(), capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert len(done.stderr.splitlines()) == (status > 0)
    code = f"from calib.cli.compare import main; import sys; sys.exit(main([{str(sweep)!r}, '--json']))"
    piped = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=-1)
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
    ("file", "change", "keys", "told_as"),
    [
        ("timestep_config.json", {"t_embedder.0": 7}, ("phases", "early", "activation_bits"), "4 → 4 (early 7)"),
        ("timestep_config.json", {"t_embedder.0": 3}, ("phases", "mid", "weight_bits"), "4 → 4 (mid 3)"),
        (
            "quantization_config.json",
            {"use_percentile_clipping": True, "clip_percentile": [5, 95]},
            ("t_embedder.0",),
            "none → 5–95%",
        ),
    ],
)
def test_bits_of_phases_and_clipping_are_differences(
    sweep: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: dict[str, object],
    keys: tuple[str, ...],
    told_as: str,
) -> None:
    bare = {"suggested_weight_bits": 4, "suggested_activation_bits": 4, "use_percentile_clipping": False}
    one = altered(sweep / "analysis=range", tmp_path / "one", "quantization_config.json", bare, "t_embedder.0")
    for phase in (steps := json.loads((one / "timestep_config.json").read_text()))["phases"].values():
        phase["activation_bits"].pop("t_embedder.0", None)
    (one / "timestep_config.json").write_text(json.dumps(steps))
    other = altered(one, tmp_path / "other", file, change, *keys)
    outcome = told([str(one), str(other), "--layers"], capsys)
    assert outcome.status == 0, outcome.err
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("t_embedder.0 "))
    assert told_as in line
    assert "1 layer differ" in outcome.out and "60 agree" in outcome.out
    for form in ("--csv", "--json", "--markdown"):
        assert "t_embedder.0" in told([str(one), str(other), "--layers", form], capsys).out


@pytest.mark.parametrize("content", ["[]", "{}", '{"x": 3}', '{"x": {"suggested_weight_bits": 4}}', "{"])
def test_a_damaged_plan_is_one_clear_line(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    run = copied(sweep / "analysis=range", tmp_path / "run", "range")
    (run / "quantization_config.json").write_text(content)
    outcome = told([str(sweep / "analysis=sqnr"), str(run), "--layers"], capsys)
    assert outcome.status in (1, 2) and outcome.out == ""
    assert len(outcome.err.splitlines()) == 1


def test_yaml_is_read_by_its_fast_reader() -> None:
    assert hasattr(yaml, "CSafeLoader"), "200 runs take a second more without"
