"""What the command line refuses: one line with the right hint before anything is made, and what it takes instead."""

import re
import shlex
from pathlib import Path

from calib.base.errors import ConfigError
from calib.cli.commands import COMMANDS
from calib.cli.compose import Planned, planned
from calib.cli.names import job_name, sweep_name
from calib.cli.overrides import take_apart
from calib.stages import Stage

import pytest
from helpers import TINY, everything, is_one_clear_line, run_here
from omegaconf import OmegaConf

GLOBAL = "# @package _global_\n"

#: Configuration of the user's own, in a folder beside the working folder.
OWN: dict[str, str | bytes] = {
    "experiment/mine.yaml": f"{GLOBAL}num_images: 3\n",
    "experiment/team/ours.yaml": f"{GLOBAL}num_images: 4\n",
    "experiment/old.yml": f"{GLOBAL}num_images: 3\n",
    "experiment/no_option.yaml": f"{GLOBAL}defaults:\n  - override /analysis: rnge\n",
    "experiment/no_group.yaml": f"{GLOBAL}defaults:\n  - override /analyses: range\n",
    "experiment/relative.yaml": f"{GLOBAL}defaults:\n  - override analysis: range\n",
    "experiment/second.yaml": f"{GLOBAL}defaults:\n  - /analysis: uniform\n",
    "experiment/circle.yaml": f"{GLOBAL}defaults:\n  - round\n",
    "experiment/round.yaml": f"{GLOBAL}defaults:\n  - circle\n",
    "experiment/no_list.yaml": f"{GLOBAL}defaults: analysis\n",
    "experiment/open.yaml": f"{GLOBAL}num_images: [1\n",
    "experiment/tab.yaml": f"{GLOBAL}sampler:\n\tnum_steps: 1\n",
    "experiment/twice.yaml": f"{GLOBAL}num_images: 1\nnum_images: 2\n",
    "experiment/zero.yaml": f"{GLOBAL}num_images: 1\0\n",
    "experiment/list.yaml": f"{GLOBAL}- num_images: 1\n",
    "experiment/text.yaml": f"{GLOBAL}a text\n",
    "experiment/number.yaml": f"{GLOBAL}1: 2\n",
    "experiment/empty.yaml": "",
    "experiment/no_header.yaml": "num_images: 1\n",
    "experiment/latin.yaml": f"{GLOBAL}data_dir: für\n".encode("latin-1"),
    "experiment/mark.yaml": f"\ufeff{GLOBAL}num_images: 1\n".encode(),
    "experiment/nowhere.yaml": f"{GLOBAL}num_images: ${{num_imges}}\n",
    "experiment/brace.yaml": f"{GLOBAL}num_images: ${{num_images\n",
    "experiment/python.yaml": f"{GLOBAL}num_images: !!python/object/apply:os.getpid []\n",
    "experiment/hydras.yaml": f"{GLOBAL}hydra:\n  nosuch: 1\n",
    "analysis/strange.yaml": "_target_: calib.analysis.heuristics.range.plan_layer\nlarg: 3\n",
    "hydra/launcher/nobodys.yaml": "_target_: nowhere.Launcher\n",
}

#: Command lines, and what their one line says, in this order; the status is 2.
REFUSED = {
    # Words
    "-m analyze stats=x": "analyze: comes first, .*: calib analyze -m stats=x$",
    "seed=1 'taps.include=[a, b]' analyze": r"analyze: .*: calib analyze seed=1 'taps.include=\[a, b\]'$",
    "generate collect": "collect: .*one at a time: calib collect$",
    "-m verify DIR": "verify: comes first, .*: calib verify -m DIR$",
    "analyse": "analyse: unknown stage. Did you mean 'analyze'[?]$",
    "num_images = 3": "num_images: unknown stage.*key=value, without spaces$",
    "-m num_images": "num_images: neither a flag nor a setting.*key=value",
    "analyze stage=collect": "stage=collect: the stage is analyze already",
    "''": "unknown stage",
    # Flags
    "--config-dir=/nonexistent": "--config-dir=/nonexistent: no such folder",
    "-cd ../file": "--config-dir=../file: is a file",
    "--config-dir=../own --config-dir=nowhere": "--config-dir=nowhere: no such folder",
    "--config-dir=": "--config-dir: needs a value",
    "hydra.searchpath=[nowhere]": "hydra.searchpath=nowhere: no such folder",
    "hydra.searchpath=[pkg://nowhere]": "hydra.searchpath: nowhere is not available",
    "hydra.searchpath=3": "hydra.searchpath=3: must be a list",
    "--config-name other": "--config-name other: .*experiment/NAME.yaml.*--config-dir",
    "--config-path=/tmp": "--config-path=/tmp: .*--config-dir",
    "--experimental-rerun x.pickle": "--experimental-rerun x.pickle: .*pickle",
    "-sc install=bash": "-sc: is not offered",
    "--cfg": "--cfg: needs a value, job, hydra, all",
    "--cfg jobs": "--cfg jobs: must be one of job, hydra, all. Did you mean 'job'",
    "--info wrong": "--info wrong: must be one of all, config, defaults",
    "-m --cfg job --info": "--cfg and --info: one of them",
    "--run -m": "--run and --multirun: one of them",
    "--resolve": "--resolve: is for what --cfg",
    "--package sampler": "--package: is for what --cfg",
    "--cfg job --package samplr": "--package samplr: .*'sampler'",
    "--multirun=true": "--multirun=true: --multirun takes no value",
    "--help=yes": "--help=yes: --help takes no value",
    # Keys and options
    "~export_config": "~export_config: a key cannot be removed; .*export_config=VALUE",
    "~analysis": "~analysis: one option of this group is needed; choose with analysis=…. Known: allocate",
    "~sampler.shift": "~sampler.shift: a key cannot be removed",
    "~hydra/launcher": "~hydra/launcher: one option.*Known: basic",
    "~sampler.shft": "~sampler.shft: no such key. Did you mean 'sampler.shift'",
    "-m ~seed num_images=1,2": "~seed: a key cannot be removed",
    "+num_images=1": "[+]num_images: there is such a key; leave out the [+]",
    "+experiment=quick": "[+]experiment=quick: .*leave out the [+]",
    "++experiment=quick": "[+][+]experiment=quick: .*leave out the [+][+]",
    "analysis=": "analysis=: no such option. Known: allocate",
    "analysis=null": "analysis=null: names no option. Known: allocate",
    "experiment=null": "experiment=null: names no option.*Leave it out for none",
    "model={nam:a}": "model={nam:a}: is a group; model=OPTION chooses emoji",
    "experiment=[a,b]": "experiment=b: no such option. Known: origin, quick",
    "experiment=[quick,taqdi]": "experiment=taqdi: no such option. Did you mean 'taqdit'",
    "model=[emoji,sd3_medium]": r"model=\[emoji,sd3_medium\]: one option .*: -m model=emoji,sd3_medium",
    "-m analysis=[range,cv],mse": r"analysis=\[range,cv\],mse: one option .*: -m analysis=range,cv",
    "hydra/launcher=[basic,joblib]": r"hydra/launcher=\[basic,joblib\]: one option .*; name one",
    "analysis=range,": "analysis=range,: not a valid override",
    "=1": "=1: not a valid override",
    "hydra/callbacks=nosuch": "hydra/callbacks=nosuch: no such group",
    "hydra.launcher.n_jobs=2": "hydra.launcher.n_jobs=2: .*hydra/launcher=joblib takes it",
    "hydra.launchr=2": "hydra.launchr=2: no such key. Did you mean 'hydra.launcher'",
    "hydra/launcher=": "hydra/launcher=: no such launcher",
    "hydra.run.dir=": "hydra.run.dir: is empty",
    "hydra.verbose=3": "hydra.verbose=3: must be true, false",
    "hydra.job.env_copy=[NO_SUCH]": "hydra.job.env_copy=.*'NO_SUCH'",
    "+hydra.callbacks.x._target_=nowhere.X": "hydra: cannot start the job .*nowhere.X",
    # Sweeps
    "-m seed=range(3,1)": r"seed=range\(3,1\): gives no values",
    "-m seed=range(0,1,0)": r"seed=range\(0,1,0\): gives no values .*zero",
    "-m analysis=glob(x*)": r"analysis=glob\(x\*\): gives no values",
    "-m seed=1,2 seed=3": "seed=3: undoes the list",
    "-m seed=1,2 hydra.sweep.dir=": "hydra.sweep.dir: is empty",
    "-m seed=1,2 hydra.sweep.dir=out/${seed}": r"hydra.sweep.dir=out/\$\{seed\}: .*cannot depend on seed",
    "-m seed=1,2 hydra.sweep.subdir=../${seed}": "hydra.sweep.subdir=../1: must be a folder within",
    "-m seed=1,2 hydra.sweep.subdir=/tmp/${seed}": "hydra.sweep.subdir=/tmp/1: must be a folder within",
    "-m seed=1,2 hydra.sweeper.max_batch_size=0": "hydra.sweeper.max_batch_size=0: must be 1 or more",
    "-m hydra/launcher=basic,joblib": "hydra/launcher=basic,joblib: is one for the whole sweep",
    "-m hydra.sweep.dir=a,b": "hydra.sweep.dir=a,b: is one for the whole sweep",
    "-m hydra.job.chdir=true,false": "hydra.job.chdir=true,false: is one for the whole sweep",
    "-m hparams_search=budgets,heuristics": "hparams_search/budgets.yaml: sets hydra.sweeper.params.*by itself",
}

#: Of the user's own folder, likewise.
OWN_REFUSED = {
    "experiment=mne": "experiment=mne: no such option. Did you mean 'mine'",
    "-m experiment=mine,mne": "experiment=mne: no such option. Did you mean 'mine'",
    "experiment=team/our": "experiment=team/our: no such option. Did you mean 'team/ours'",
    "experiment=old": "experiment=old: .*end in .yaml, not .yml",
    "analysis=strnge": "analysis=strnge: no such option. Did you mean 'strange'",
    "analysis=strange": "analysis.larg: no parameter.*'large'",
    "subset=mine": "subset=mine: no such option.*own has no folder subset/",
    "experiment=no_option": "own/experiment/no_option.yaml: analysis=rnge: no such option. Did you mean 'range'",
    "experiment=no_group": "own/experiment/no_group.yaml: .*analyses: no such group. Did you mean 'analysis'",
    "experiment=relative": "own/experiment/relative.yaml: .*'override /analysis: …'",
    "experiment=second": "own/experiment/second.yaml: chooses a second option of analysis; .*override /analysis",
    "experiment=circle": "own/experiment/circle.yaml: its defaults lead back to itself",
    "experiment=no_list": "own/experiment/no_list.yaml: .*must be a list",
    "experiment=open": "own/experiment/open.yaml: line 3: not valid YAML",
    "experiment=tab": "own/experiment/tab.yaml: line 3: not valid YAML",
    "experiment=twice": "own/experiment/twice.yaml: line 3: not valid YAML .*duplicate key num_images",
    "experiment=zero": "own/experiment/zero.yaml: not valid YAML",
    "experiment=python": "own/experiment/python.yaml: line 2: not valid YAML",
    "experiment=list": "own/experiment/list.yaml: ",
    "experiment=text": "a text: no such key",
    "experiment=number": "1: no such key",
    "experiment=empty": "own/experiment/empty.yaml: its first line must be '# @package _global_'",
    "experiment=no_header": "own/experiment/no_header.yaml: its first line must be '# @package _global_'",
    "experiment=latin": "own/experiment/latin.yaml: not UTF-8",
    "experiment=mark": "own/experiment/mark.yaml: .*byte order mark",
    "experiment=nowhere": "num_images: .*'num_imges' not found",
    "experiment=brace": "own/experiment/brace.yaml: .*num_images",
    "experiment=hydras": "own/experiment/hydras.yaml: .*'nosuch'",
    "-m seed=1,2 hydra/launcher=nobodys": "hydra/launcher=nobodys: nowhere.Launcher is no launcher that is installed",
}

#: What a sweep has once, as an experiment that sets it, with what its line names. The second sort is used by each job.
FOR_ALL = {
    "launcher": ("defaults: [override /hydra/launcher: joblib]", "hydra/launcher=joblib"),
    "jobs": ("hydra: {launcher: {n_jobs: 3}}", "hydra.launcher.n_jobs=3"),
    "folder": ("hydra: {sweep: {dir: elsewhere}}", "hydra.sweep.dir=elsewhere"),
    "search": ("hydra: {sweeper: {params: {seed: '1,2'}}}", "hydra.sweeper.params"),
    "batches": ("hydra: {sweeper: {max_batch_size: 2}}", "hydra.sweeper.max_batch_size=2"),
    "callbacks": ("hydra: {callbacks: {a: {_target_: a.B}}}", "hydra.callbacks.a"),
    "logging": ("hydra: {hydra_logging: {formatters: {a: {format: b}}}}", "hydra.hydra_logging.formatters"),
}
FOR_EACH = {
    "subdir": "hydra: {sweep: {subdir: 'images=${num_images}'}}",
    "mode": "hydra: {mode: RUN}",
    "job_logging": "hydra: {job_logging: {formatters: {a: {format: b}}}}",
    "variables": "hydra: {job: {env_set: {A: b}}}",
}


@pytest.fixture
def own(folder: Path) -> Path:
    """A folder of configuration beside the working folder, in which there is a file, too."""
    (folder.parent / "file").write_text("in the way")
    written = {f"experiment/{name}.yaml": f"{GLOBAL}num_images: 3\n{text}\n" for name, (text, _) in FOR_ALL.items()}
    written |= {f"experiment/{name}.yaml": f"{GLOBAL}num_images: 3\n{text}\n" for name, text in FOR_EACH.items()}
    for name, content in {**OWN, **written}.items():
        path = folder.parent / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder.parent / "own"


def sweep_of(*arguments: str) -> Planned:
    OmegaConf.register_new_resolver("calib_job", job_name, replace=True)
    OmegaConf.register_new_resolver("calib_sweep", sweep_name, replace=True)
    return planned(take_apart(["-m", *arguments]))


@pytest.mark.parametrize(
    ("line", "told"),
    [*REFUSED.items(), *((f"--config-dir=../own {line}", told) for line, told in OWN_REFUSED.items())],
    ids=[*REFUSED, *OWN_REFUSED],
)
def test_refused(own: Path, folder: Path, capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    before = everything(folder.parent)
    said = is_one_clear_line(run_here(shlex.split(line), capsys))
    assert re.search(told, said), said
    assert "file://" not in said, "what calib adds is nothing to show"
    assert everything(folder.parent) == before


@pytest.mark.parametrize("word", [*Stage, *COMMANDS])
def test_flag_before_a_word(folder: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    """Every stage and command is known where it cannot stand."""
    assert f"calib {word} -m seed=1" in is_one_clear_line(run_here(["-m", str(word), "seed=1"], capsys))


@pytest.mark.parametrize("others", [pytest.param("{},mine", marks=pytest.mark.slow), "mine,{}", "{}"])
@pytest.mark.parametrize("name", FOR_ALL)
def test_what_a_sweep_has_once(own: Path, folder: Path, name: str, others: str) -> None:
    """An option that varies cannot set it; one for all jobs can."""
    given = [f"experiment={others.format(name)}", "--config-dir=../own"]
    given += ["hydra/launcher=joblib"] if name == "jobs" else []
    if others == "{}":
        assert {folder.name for folder in sweep_of(*given, "subset=first,stride").folders}
    else:
        with pytest.raises(ConfigError) as error:
            sweep_of(*given, "seed=1,2")
        assert f"own/experiment/{name}.yaml: sets {FOR_ALL[name][1]}," in str(error.value)
        assert "cannot vary with experiment" in str(error.value)
        assert f"run experiment={name} by itself (job " in str(error.value)
        assert "\n" not in str(error.value)
    assert everything(folder) == []


@pytest.mark.parametrize("name", FOR_EACH)
def test_what_each_job_of_a_sweep_has(own: Path, name: str) -> None:
    what = sweep_of(f"experiment=mine,{name}", "--config-dir=../own")
    assert len(what.folders) == 2
    assert what.overrides.count("hydra.mode=MULTIRUN") == 1


def test_launcher_of_any_option(own: Path) -> None:
    """Hydra takes it from the options of all groups that do not vary, and so must what is planned."""
    target = "analysis:\n  _target_: calib.analysis.heuristics.uniform.plan_layer\n"
    (own / "analysis" / "wide.yaml").write_text(f"{GLOBAL}{FOR_ALL['launcher'][0]}\n{target}")
    what = sweep_of("analysis=wide", "seed=1,2", "--config-dir=../own")
    assert any(o.startswith("hydra.launcher.n_jobs=") for o in what.overrides)
    with pytest.raises(ConfigError, match=r"own/analysis/wide.yaml: sets hydra/launcher=joblib, .*with analysis;"):
        sweep_of("analysis=wide,uniform", "seed=1,2", "--config-dir=../own")


def test_one_value_for_options_that_vary(tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default option of the group does not take it, and Hydra composes that first."""
    given = [*TINY, f"stats={tiny_run}", "timestep_schedule=uniform,ndtc", "timestep_schedule.count=3"]
    outcome = run_here(["analyze", "-m", *given], capsys)
    assert outcome.status == 0, outcome.err
    (sweep,) = folder.glob("multirun/*")
    for run in sweep.glob("analyze,timestep_schedule=*"):
        assert "count: 3" in (run / ".hydra" / "config.yaml").read_text()
    assert outcome.out.count("Run directory: ") == 2


def test_nested_folders_of_jobs(tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is about the sweep lies in its own folder, not in that of one of its jobs."""
    given = [*TINY, f"stats={tiny_run}", "analysis=range,cv", "hydra.sweep.dir=sweep"]
    outcome = run_here(["analyze", "-m", *given, "hydra.sweep.subdir=${hydra.job.num}/job"], capsys)
    assert outcome.status == 0, outcome.err
    assert "Sweep: sweep: 2 jobs, 2 complete" in outcome.out
    assert {path.name for path in (folder / "sweep").iterdir()} == {"0", "1", "multirun.yaml", "sweep.json"}


def test_sweep_over_stages() -> None:
    what = sweep_of("stage=generate,run")
    assert [folder.name for folder in what.folders] == ["generate", "default"]
    assert {folder.parent for folder in what.folders} == {what.sweep} == {Path("multirun/stage")}


@pytest.mark.parametrize("name", ["own, two", "it's own=[1]", 'ü "b"', "back\\slash"])
def test_names_of_folders(own: Path, folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Several folders of configuration, one of them in the key that Hydra has for it; Hydra itself composes here."""
    other = own.rename(folder / name)
    (folder / "more" / "experiment").mkdir(parents=True)
    (folder / "more" / "experiment" / "another.yaml").write_text(f"{GLOBAL}num_images: 5\n")
    for more, experiment, images in (("-cd=more", "mine", 3), ("hydra.searchpath=[file://more]", "another", 5)):
        outcome = run_here([f"--config-dir={other.name}", more, f"experiment={experiment}", "--cfg=job"], capsys)
        assert f"num_images: {images}\n" in outcome.out, outcome.err
        assert outcome.err == ""


def test_info_needs_no_value(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--info"], ["-i", "seed=1"]):
        outcome = run_here(given, capsys)
        assert outcome.status == 0 and "Config search path" in outcome.out
    assert everything(folder) == []
