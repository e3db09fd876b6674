"""Sweeps and shards on a real SLURM: four nodes on this host. Skipped where none can be started."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import Outcome, command, contents, environment, run_in
from slurm_cluster import NoSlurm, running, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.xdist_group("slurm"),
]

#: Eight blocks of two images.
DATASET = ("num_images=16", "sampler.num_steps=2", "sampler.batch_size=2", "data_dir=dataset", "report=none")
COLLECT = (*DATASET, "timestep_schedule=all", "taps.include=['*.fc2','*.q_proj']", "collect.batch_size=2")
SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10")


def array(shards: int) -> tuple[str, ...]:
    """What makes a command a sweep over so many shards."""
    return ("-m", f"shard.index=range(0,{shards})", f"shard.count={shards}")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment that speaks to the cluster."""
    try:
        with running() as cluster:
            found = cluster.environment
            yield {**environment(), **{name: found[name] for name in ("PATH", "SLURM_CONF")}}
    except NoSlurm as error:
        pytest.skip(str(error))


def run(folder: Path, env: dict[str, str], *arguments: str) -> Outcome:
    done = subprocess.run(command(*arguments), cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    return Outcome(done.returncode, done.stdout, done.stderr)


def asked(env: dict[str, str], *arguments: str) -> str:
    return subprocess.run(arguments, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset and its collection by one process."""
    folder = tmp_path_factory.mktemp("whole")
    for arguments in (("generate", *DATASET), ("collect", *COLLECT, "hydra.run.dir=run")):
        outcome = run_in(folder, *arguments)
        assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def work(whole: Path, folder: Path) -> Path:
    """The working folder with a copy of that dataset."""
    shutil.copytree(whole / "dataset", folder / "dataset")
    return folder


@pytest.fixture(scope="module")
def drawn(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dataset by an array of eight jobs."""
    folder = tmp_path_factory.mktemp("drawn")
    outcome = run(folder, slurm, "generate", *array(8), *DATASET, *SLURM)
    assert outcome.status == 0, outcome.err + outcome.out
    assert "8 jobs, 8 complete" in outcome.out
    return folder


def same_statistics(one: Path, other: Path) -> None:
    """Every dataset of the two files is equal, to the bit."""
    with h5py.File(one) as a, h5py.File(other) as b:
        names: list[str] = []
        a.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        assert len(names) > 20
        for name in names:
            np.testing.assert_array_equal(a[name][()], b[name][()], err_msg=name)


@pytest.mark.slow
def test_a_dataset_drawn_by_an_array_is_that_of_one_process(whole: Path, drawn: Path) -> None:
    def images(folder: Path) -> dict[str, bytes]:
        found = contents(folder / "dataset")
        return {name: content for name, content in found.items() if not name.startswith(".lock")}

    assert images(drawn) == images(whole)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 8])
def test_shards_one_of_them_killed_and_requeued_merge_to_what_one_process_collects(
    slurm: dict[str, str], whole: Path, work: Path, shards: int
) -> None:
    given = command("collect", *array(shards), *COLLECT, *SLURM, "hydra.sweep.dir=shards")
    pipe = subprocess.PIPE
    process = subprocess.Popen(given, cwd=work, env=slurm, stdout=pipe, stderr=pipe, text=True)
    shard = work / "shards"
    requeued = ""
    while not requeued and process.poll() is None:
        for status in shard.glob("*/status.json"):
            if json.loads(status.read_text())["state"] == "running" and not requeued:
                running = asked(slurm, "squeue", "-h", "-t", "running", "-o", "%i").split()
                requeued = running[-1] if running else ""
        time.sleep(0.05)
    asked(slurm, "scontrol", "requeue", requeued)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    restarts = asked(slurm, "scontrol", "show", "job", requeued)
    assert "Restarts=1" in restarts, restarts
    outcome = run_in(work, "merge", "shards", "--into", "joined")
    assert outcome.status == 0 and f"16 images of {shards} shards" in outcome.out, outcome.err
    same_statistics(whole / "run" / "activations.h5", work / "joined" / "activations.h5")
    name = "layer_statistics.json"
    assert (whole / "run" / name).read_bytes() == (work / "joined" / name).read_bytes()


@pytest.mark.slow
def test_an_array_of_a_script_of_ones_own_does_the_same(slurm: dict[str, str], whole: Path, work: Path) -> None:
    script = work / "collect.sh"
    quoted = " ".join(f'"{word}"' for word in command("collect", *COLLECT))
    script.write_text(
        f"#!/bin/bash\n#SBATCH --array=0-3\n#SBATCH --output={work}/array-%a.log\n"
        f'{quoted} shard.index="$SLURM_ARRAY_TASK_ID" shard.count=4 hydra.run.dir="own/$SLURM_ARRAY_TASK_ID"\n'
    )
    done = subprocess.run(["sbatch", "--wait", str(script)], cwd=work, env=slurm, capture_output=True, text=True)
    logs = "\n".join(path.read_text() for path in work.glob("array-*.log"))
    assert done.returncode == 0, done.stderr + logs
    outcome = run_in(work, "merge", *(f"own/{i}" for i in range(4)), "--into", "from_script")
    assert outcome.status == 0, outcome.err
    same_statistics(whole / "run" / "activations.h5", work / "from_script" / "activations.h5")


@pytest.mark.slow
def test_a_job_that_fails_on_the_cluster_is_named_and_the_others_are_done(slurm: dict[str, str], work: Path) -> None:
    (work / "broken").mkdir(exist_ok=True)
    (work / "broken" / "manifest.json").write_text("{")
    given = ["collect", "-m", "data_dir=dataset,broken", *(w for w in COLLECT if "data_dir" not in w), *SLURM]
    outcome = run(work, slurm, *given, "cache_dir=another", "generate_missing=false", "hydra.sweep.dir=failing")
    assert outcome.status == 1
    assert "2 jobs, 1 complete, 1 failed" in outcome.out
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("calib: ")]
    assert "1 of the sweep's 2 jobs failed" in line and "data_dir=broken" in line
    assert "Traceback" not in outcome.err
