"""Data of others is not obeyed: nothing that a file of a run names is imported or called, nothing is unpickled."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from calib.analysis.ranges import Observed, StepRanges, static
from calib.analysis.rules import RULES, checked_rule, recorded_rule, rule_of
from calib.analysis.steps import read_steps
from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json, write_json
from calib.base.layout import MODEL, PLAN, STATISTICS, STEPS
from calib.base.targets import described
from calib.cli.blocked import check_targets
from calib.quantization.checkpoint import load
from calib.runs.pages.run import write_page

import numpy as np
import pytest
from helpers import Outcome, is_one_clear_line, run_in, run_process, well

HOSTILE = """
import os
from pathlib import Path

HERE = Path(__file__).parent
(HERE / "imported").touch()
system = os.system

def touch(*_, **__):
    (HERE / "called").touch()

def rule(observed):
    touch()

def steps(num_steps):
    touch()

def prompts():
    touch()
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """A module on the path that should never be imported; returns what it did."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "hostile_module.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield lambda: {path.name for path in folder.iterdir()} & {"imported", "called"}
    sys.modules.pop("hostile_module", None)


# Rules in files


SEEN = Observed(np.array([0, 2]), -np.ones(2), np.ones(2), np.ones(2), np.linspace(1, 0, 4))


def own_rule(observed: Observed, wider: float = 1.0) -> StepRanges:
    return StepRanges((0,), (-wider,), (wider,))


@pytest.mark.parametrize("name", RULES)
def test_rules_are_recorded_and_found_by_name(name: str) -> None:
    """In the form of today and in that of calib 0.1.0 and 0.2.0, with their parameters."""
    parameters = {"grouped": {"groups": 2}, "polynomial": {"degree": 1, "r_squared": 0.5}}.get(name, {})
    bound = checked_rule(lambda observed: RULES[name](observed, **parameters))
    for document in (
        {"name": name, "parameters": parameters},
        {"_target_": f"calib.analysis.ranges.{name}", **parameters},
    ):
        rule = rule_of(recorded_rule(document), static, Path(STEPS))
        assert described(rule) == {"name": name, "parameters": parameters}
        assert rule(SEEN) == bound(SEEN)


def test_a_rule_of_ones_own_is_the_configured_one() -> None:
    record = described(own_rule)
    assert record == {"name": f"{__name__}.own_rule", "parameters": {}}
    for document in (record, {"_target_": record["name"]}):
        assert rule_of(recorded_rule(document), own_rule, Path(STEPS)) is own_rule
        with pytest.raises(ConfigError, match=rf"^{STEPS}: its ranges are those of {record['name']}, and no function"):
            rule_of(recorded_rule(document), static, Path(STEPS))(SEEN)


NOT_OBEYED = [
    *({"_target_": path} for path in ("hostile_module.rule", "calib.base.files.os.getcwd", "calib.analysis.ranges.np")),
    *({"name": name, "parameters": {}} for name in ("hostile_module.rule", "os.system", "grouped.__class__", "", "x")),
    {"name": "grouped", "parameters": {"groups": {"_target_": "hostile_module.touch"}}},
    {"name": "grouped", "parameters": {"observed": 1}},
    {"_target_": "calib.analysis.ranges.polynomial", "degree": "hostile_module.touch"},
    {"_target_": ["hostile_module.rule"]},
    {"name": "static"},
    ["hostile_module.rule"],
    "hostile_module.rule",
    3,
]


@pytest.mark.parametrize("document", NOT_OBEYED, ids=str)
def test_nothing_else_in_a_file_is_a_rule(
    document: Any, tiny_run: Path, tmp_path: Path, hostile: Callable[[], set[str]]
) -> None:
    path = tmp_path / STEPS
    write_json(path, read_json(tiny_run / STEPS) | {"ranges": document})
    with pytest.raises(CalibError) as error:
        rule_of(read_steps(path).rule, static, path)(SEEN)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not hostile()


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run directory that may be changed; its dataset lies where it was."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def calib(run: Path, *arguments: str) -> Outcome:
    return run_in(run.parent, *arguments, "report=none")


def test_a_plan_of_others_quantizes_without_their_function(run: Path, hostile: Callable[[], set[str]]) -> None:
    """It is needed where the plan's own ranges no longer do; the advice then given is one that works."""
    foreign = {"name": f"{__name__}.own_rule", "parameters": {}}
    write_json(run / STEPS, read_json(run / STEPS) | {"ranges": foreign})
    well(calib(run, "quantize", "plan=run", "quantizer=rtn", "hydra.run.dir=same"))
    assert load(run.parent / "same" / MODEL).about["ranges"] == foreign
    plan = read_json(run / PLAN)
    next(iter(plan.values()))["suggested_activation_bits"] = 5
    write_json(run / PLAN, plan)
    edited = ("quantize", "plan=run", "quantizer=rtn", "hydra.run.dir=edited")
    outcome = calib(run, *edited)
    (line,) = (line for line in outcome.err.splitlines() if "no function is taken from a file" in line)
    assert outcome.status == 2 and not (run.parent / "edited" / MODEL).exists()
    well(calib(run, *edited, line.rpartition(" ")[2], "+ranges.wider=2.0"))
    made = load(run.parent / "edited" / MODEL)
    assert made.about["ranges"] == foreign | {"parameters": {"wider": 2.0}}
    assert {rule.ranges for rule in made.inputs.values()} == {StepRanges((0,), (-2.0,), (2.0,))}
    assert not hostile()


EVERYWHERE = {"_target_": "hostile_module.touch", "name": "hostile_module.touch", "parameters": {}}


def test_no_command_obeys_a_run_directory(run: Path, hostile: Callable[[], set[str]]) -> None:
    """Targets, YAML tags and resolvers in every file that has no fixed keys: they are values."""
    for path in run.rglob("*.json"):
        document = read_json(path)
        if path.name not in (PLAN, STEPS, STATISTICS) and isinstance(document, dict):
            write_json(path, document | EVERYWHERE)
    for path in run.rglob("*.yaml"):
        more = f"extra: {json.dumps(EVERYWHERE)}\nshell: ${{oc.env:HOME}}\n"
        path.write_text(more + ("" if path.name == "overrides.yaml" else path.read_text()))
    tag = "!!python/object/apply:hostile_module.touch []"
    (run / ".hydra" / "overrides.yaml").write_text(f"- {tag}\n")
    assert load(run / MODEL).about.items() >= EVERYWHERE.items()
    assert write_page(run).exists()
    for arguments in (
        ("compare", "run", "--html", "page.html", "--all"),
        ("quantize", "plan=run", "quantizer=rtn", "hydra.run.dir=q", "report=none"),
        ("analyze", "stats=run", "analysis=range", "hydra.run.dir=a", "report=none"),
        ("convergence", "run", "--json"),
    ):
        outcome = run_in(run.parent, *arguments)
        assert outcome.status == 0 and "Traceback" not in outcome.err, outcome
    (run / "config.resolved.yaml").write_text(f"model: {tag}\n")
    assert "not valid YAML" in well(run_in(run.parent, "compare", "run", "--all")).out
    assert not hostile()


# What is only shown, and Hydra's own list


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for group, name in (("prompts", "prompts"), ("timestep_schedule", "steps"), ("ranges", "rule")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "evil.yaml").write_text(f"_target_: hostile_module.{name}\n")
    return tmp_path / "conf"


EVIL = ("prompts=evil", "timestep_schedule=evil", "ranges=evil")


@pytest.mark.parametrize("more", [(), ("-m", "seed=1,2")], ids=["", "sweep"])
def test_what_is_shown_runs_nothing(
    more: tuple[str, ...], conf: Path, tmp_path: Path, hostile: Callable[[], set[str]]
) -> None:
    shown = well(run_in(tmp_path, "--config-dir", str(conf), *EVIL, *more, "--cfg", "job")).out
    assert "_target_: hostile_module.steps" in shown
    is_one_clear_line(run_in(tmp_path, "--config-dir", str(conf), *EVIL, *more, "seeds=3", "--cfg", "job"))
    assert not hostile()
    run_in(tmp_path, "--config-dir", str(conf), *EVIL)
    assert hostile() == {"imported", "called"}, "it is the user's own configuration"


@pytest.mark.parametrize("flag", ["--info=config", "--hydra-help"])
def test_what_hydra_shows_runs_nothing(flag: str, conf: Path, tmp_path: Path, hostile: Callable[[], set[str]]) -> None:
    well(run_process(tmp_path, "--config-dir", str(conf), *EVIL, flag))
    assert not hostile()


def test_no_configuration_is_unpickled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Hostile()))
    line = is_one_clear_line(run_in(tmp_path, "--experimental-rerun", "config.pickle"))
    assert line.startswith("--experimental-rerun config.pickle: reads a pickle, which can run anything")
    assert not (tmp_path / "unpickled").exists()


BLOCKED = ("os.system", "posix.system", "builtins.eval", "subprocess.run", "pickle.loads", "hostile_module.system")


@pytest.mark.parametrize("target", [*BLOCKED, "calib.base.files.os.remove", "shutil.rmtree"])
@pytest.mark.parametrize("key", ["_target_", "skeleton"])
def test_hydras_list_is_honoured(key: str, target: str, hostile: Callable[[], set[str]]) -> None:
    with pytest.raises(ConfigError) as error:
        check_targets({"model": {"_target_": "calib.models.emoji.load", key: target}})
    assert str(error.value).startswith(f"model.{key}={target}: Target ") and "blocklisted" in str(error.value)
    assert "\n" not in str(error.value)


def test_hydras_list_can_be_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE", "shutil.rmtree")
    check_targets({"prompts": {"_target_": "shutil.rmtree"}})


def test_a_shell_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "own" / "prompts").mkdir(parents=True)
    (tmp_path / "own" / "prompts" / "shell.yaml").write_text("_target_: os.system\ncommand: touch ran\n")
    line = is_one_clear_line(run_in(tmp_path, "--config-dir=own", "prompts=shell"))
    assert line.startswith("prompts._target_=os.system: Target 'os.system' is blocklisted")
    assert not (tmp_path / "ran").exists()
