"""Names of folders and files that people have: umlauts in the locale C, bytes that are not UTF-8, links to nowhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes

from calib.base.files import read_json, write_json, write_text
from calib.base.layout import METADATA
from calib.cli.overrides import parse, with_quotes
from calib.models.tensors import read_weights
from calib.runs.record import RunState, read_run

import mlx.core as mx
import pytest
from helpers import TINY, Outcome, command, environment, everything, is_one_clear_line, run_here, run_in, well
from hypothesis import example, given
from hypothesis import strategies as st

#: The é of Latin-1, which is no UTF-8.
BYTES = os.fsdecode(b"caf\xe9")
UMLAUTS = "Käse #1 & Brot"
SMALLER = ("num_images=1", "sampler.num_steps=1", "timestep_schedule=all", "taps.include=['*.fc2']")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(folder: Path, variables: dict[str, str], *arguments: str) -> Outcome:
    """``calib`` in a process of its own with these environment variables."""
    kept = {name: value for name, value in environment().items() if name not in ("PYTHONIOENCODING", *ASCII)}
    done = subprocess.run(command(*arguments), cwd=folder, env=kept | variables, capture_output=True, timeout=300)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())  # UTF-8, whatever is in it


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        pytest.param(BYTES, {"LC_ALL": "C.UTF-8"}, id="bytes"),
        pytest.param(UMLAUTS, ASCII | {"PYTHONIOENCODING": "ascii"}, id="umlauts in ASCII", marks=pytest.mark.slow),
    ],
)
def test_a_job_with_such_names(tmp_path: Path, name: str, variables: dict[str, str]) -> None:
    """Every file and folder has the name, the working folder too; the page and what is read afterwards find them."""
    work = tmp_path / name
    work.mkdir()
    (work / f"{name}.txt").write_text("eine Tür\nein Käse\n", encoding="utf-8")
    names = {"data_dir": "data", "cache_dir": "cache", "hydra.run.dir": "run", "export_config": "plan.json"}
    given = [*TINY, *SMALLER, "report=html", *(f"{key}={name}-{end}" for key, end in names.items())]
    given += ["prompts=file", f"prompts.path={name}.txt"]
    done = well(run(work, variables, *given))
    assert "could not" not in done.err + done.out, "the page is written"
    assert {path.name for path in work.iterdir()} >= {f"{name}-{end}" for end in names.values()}
    record = read_run(work / f"{name}-run", "run")
    assert (record.state, record.problems) == (RunState.COMPLETE, ())
    assert record.config["prompts"] == "file"
    assert record.config["data_dir"] == f"{name}-data"
    assert well(run(work, variables, *given)).out.startswith("Already complete: ")
    assert read_json(work / f"{name}-run" / METADATA)["data_dir"] == f"{name}-data", "by which later stages find it"
    assert json.loads(well(run(work, variables, "verify", f"{name}-data", "--json")).out)["sound"] is True
    (found,) = json.loads(well(run(work, variables, "compare", f"{name}-run", "--json", "-")).out)["runs"]
    assert found["path"] == f"{name}-run"
    well(run_in(work, "compare", f"{name}-run", "--html", f"{name}.html"))
    links = re.findall(r'<a href="([^"]+)"', (work / f"{name}.html").read_text(encoding="utf-8"))
    assert [os.fsdecode(unquote_to_bytes(link)) for link in links] == [f"{name}-run/report.html"]


def test_a_python_that_insists_on_ascii_is_not_started_again_and_again(tmp_path: Path) -> None:
    call = [sys.executable, "-X", "utf8=0", "-m", "calib", "--version"]
    done = subprocess.run(call, cwd=tmp_path, env=environment() | ASCII, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# On the command line

#: What has a meaning in Hydra's grammar.
MEANINGFUL = ",()[]{}:='\"\\$"


@given(st.text(st.characters(exclude_characters=MEANINGFUL, exclude_categories=["Cc"]), min_size=1))
@example(BYTES)
@example("~/Käse & Brot #1!.txt")
def test_a_text_needs_no_quotes_on_the_command_line(text: str) -> None:
    if re.fullmatch(r"[\w/\-+.*@?|% \t]*", text, re.ASCII):
        assert with_quotes(f"data_dir={text}") == f"data_dir={text}"
        return
    (found,) = parse([with_quotes(f"+data_dir={text}")])
    assert found.value() == os.path.expanduser(text.strip(" \t"))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a=[Käse,b, 'c, ü' , \"d\"]", ["Käse", "b", "c, ü", "d"]),
        ("a={k: Käse, l: 1}", {"k": "Käse", "l": 1}),
        ("a='it\\'s, ü'", "it's, ü"),
        ("a=${oc.env:HOME}/Käse", "${oc.env:HOME}/Käse"),
        ("a=${oc.env:X,ä}", "${oc.env:X,ä}"),
        ("a=b/c_d-1.e", "b/c_d-1.e"),
        ("a=1e-3", 1e-3),
        ("a=null", None),
        ("a=[1,2]", [1, 2]),
    ],
)
def test_what_has_a_meaning_keeps_it(override: str, value: object) -> None:
    (found,) = parse([with_quotes(override)])
    assert found.value() == value


@pytest.mark.parametrize("override", ["seed=1,2", "seed=range(1,5,step=2)", "seed=choice(1,2)", "~seed", "+a=${b}"])
def test_what_hydra_knows_is_left_alone(override: str) -> None:
    assert with_quotes(override) == override


def test_names_are_listed_for_a_sweep() -> None:
    (found,) = parse([with_quotes("prompts.path=Käse.txt,b.txt")])
    assert list(found.sweep_string_iterator()) == ["'Käse.txt'", "b.txt"]


# In files


@given(st.binary(max_size=20))
@example(b"caf\xe9")
def test_a_name_comes_back_from_json(tmp_path_factory: pytest.TempPathFactory, name: bytes) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, {"data_dir": os.fsdecode(name)})
    assert os.fsencode(read_json(path)["data_dir"]) == name


def test_a_text_with_such_a_name_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", f"{BYTES} and Käse")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\\udce9 and Käse"


def test_weights_may_have_such_a_name(tmp_path: Path) -> None:
    path = tmp_path / f"{BYTES}.safetensors"
    with open(path, "wb") as file:
        mx.save_safetensors(file, {"x": mx.arange(5)})
    weights = read_weights(str(path))
    path.unlink()
    assert weights["x"].tolist() == [0, 1, 2, 3, 4], "MLX reads it when it is used"


# Links to nowhere


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "data_dir={}"),
        ("generate", "data_dir={}/below"),
        ("generate", "data_dir=dataset"),
        ("generate", "data_dir=made", "hydra.run.dir={}"),
        ("generate", "data_dir=made", "hydra.run.dir={}/below/it"),
        ("generate", "-m", "data_dir=made", "seed=1,2", "hydra.sweep.dir={}"),
        ("collect", "generate_missing=true", "data_dir=made", "timestep_schedule=all", "cache_dir={}"),
        ("data_dir={}",),
        ("export_config={}/plan.json",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("target", ["nowhere", "link"], ids=["dangling", "loop"])
def test_a_link_to_nowhere(
    folder: Path, capsys: pytest.CaptureFixture[str], target: str, arguments: tuple[str, ...]
) -> None:
    """One clear line, and nothing is made; the folders of a dataset may be links, too."""
    (folder / "link").symlink_to(target)
    (folder / "dataset").mkdir()
    (folder / "dataset" / "samples").symlink_to(folder / "link")
    before = everything(folder)
    given = [argument.format("link") for argument in arguments]
    line = is_one_clear_line(run_here([*given, "num_images=1", "sampler.num_steps=2", "report=none"], capsys))
    link = folder / ("dataset/samples" if "data_dir=dataset" in given else "link")
    assert f"{link} is a link to " in line
    assert "which is not there" in line
    assert everything(folder) == before


def test_shards_are_not_merged_into_a_link(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "link").symlink_to("nowhere")
    line = is_one_clear_line(run_here(["merge", ".", "--into", "link"], capsys))
    assert line == "link: is not an empty folder; name a new one"
