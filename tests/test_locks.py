"""Files in use elsewhere are never called damaged, moved or drawn again; jobs under every setting of HDF5's locks."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calib.activations.reader import ActivationFile
from calib.base import files
from calib.base.errors import CalibError, Unsettled
from calib.base.files import checksum, read_json, write_text
from calib.base.locks import refuse_unsettled, settled
from calib.dataset.load import load_manifest
from calib.dataset.rebuild import rebuild_manifest
from calib.dataset.store import StorageFormat, read_state
from calib.dataset.verify import verify

import h5py
import pytest
from damage import IMAGES, LATENT, PICTURE, STATE, STATES
from helpers import (
    TINY,
    Outcome,
    command,
    contents,
    environment,
    flip_byte,
    lines_of,
    run_here,
    run_in,
    run_without_rights,
    well,
)

IN_USE = "in use, another program holds it open for writing; close it there and run the same command again"

HOLDER = """
import fcntl, sys, h5py
held = []
for path in sys.argv[2:]:
    if sys.argv[1] == "hdf5":
        held.append(h5py.File(path, "r+", locking=True))
    else:
        held.append(open(path, "r+b"))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(how: str, *paths: Path) -> Iterator[None]:
    """Within the context another process has ``paths`` open for writing: by h5py, or locked alone."""
    arguments = [sys.executable, "-c", HOLDER, how, *map(str, paths)]
    holder = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        yield
    finally:
        holder.communicate()
    assert holder.returncode == 0


def with_variables(folder: Path, variables: dict[str, str], *arguments: str) -> Outcome:
    """``calib`` in a process of its own, in ``folder``, with environment ``variables``."""
    environ = {name: value for name, value in environment().items() if name != "HDF5_USE_FILE_LOCKING"} | variables
    done = subprocess.run(command(*arguments), cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


# In use elsewhere

DATASET = (
    ("verify", "dataset"),
    ("verify", "dataset", "--json"),
    ("verify", "dataset", "--repair"),
    ("rebuild-manifest", "dataset", "--force"),
    ("generate", *TINY, "data_dir=dataset", "hydra.run.dir=other"),
    ("collect", *TINY, "data_dir=dataset", "hydra.run.dir=other"),
)
RUN = (
    ("analyze", "stats=run", "report=none", "hydra.run.dir=other"),
    ("quantize", "plan=run", "report=none", "hydra.run.dir=other"),
    ("convergence", "run"),
    ("merge", "run", "--into", "merged"),
)


@pytest.fixture(scope="module", params=["hdf5", "flock"])
def held(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with a dataset and a run, of both of which another process has a file open for writing."""
    folder = tmp_path_factory.mktemp("held")
    for name in ("dataset", "run"):
        shutil.copytree(tiny_run.with_name(name), folder / name)
    with holding(request.param, folder / "dataset" / STATES, folder / "run" / "activations.h5"):
        yield folder


@pytest.mark.parametrize("arguments", [*DATASET, *RUN], ids=lambda arguments: " ".join(arguments[:3])[:24])
def test_what_is_in_use_is_told_and_left_alone(held: Path, arguments: tuple[str, ...]) -> None:
    before = [contents(held / name) for name in ("dataset", "run")]
    outcome = run_in(held, *arguments)
    assert outcome.status == 1, outcome
    file = STATES if arguments in DATASET else "activations.h5"
    said = outcome.out or lines_of(outcome.err)[-1]
    assert file in said and IN_USE in said
    assert "damaged" not in outcome.out + outcome.err
    assert [contents(held / name) for name in ("dataset", "run")] == before
    assert not (held / "merged").exists()


def test_a_finished_job_outlives_statistics_in_use(tiny_run: Path, tmp_path: Path) -> None:
    """Opening a file for writing changes a byte of it, and so what the job would start from."""
    shutil.copytree(tiny_run, tmp_path / "run")
    analyze = ("analyze", "stats=run", "analysis=range", "report=none", "hydra.run.dir=plan")
    well(run_in(tmp_path, *analyze))
    before = contents(tmp_path / "plan")
    with holding("hdf5", tmp_path / "run" / "activations.h5"):
        assert run_in(tmp_path, *analyze).status == 1
    assert contents(tmp_path / "plan") == before
    assert "Already complete" in well(run_in(tmp_path, *analyze)).out


def test_the_page_says_what_is_in_use(tiny_run: Path, tmp_path: Path) -> None:
    from calib.runs.pages.run import run_page

    shutil.copytree(tiny_run, tmp_path / "run")
    with holding("flock", tmp_path / "run" / "activations.h5"):
        assert IN_USE in run_page(tmp_path / "run")


@pytest.mark.parametrize("form", ["text", "json"])
def test_repair_moves_what_is_damaged_and_leaves_what_is_in_use(
    dataset: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    (dataset / "samples/0009.h5").write_bytes(b"x")  # foreign, and in use
    flip_byte(dataset / "images/0002.png", 200)
    flip_byte(dataset / PICTURE, 200)  # an image that cannot be judged as a whole stays, too
    before = contents(dataset)
    arguments = ["verify", str(dataset), "--repair", *(["--json"] if form == "json" else [])]
    with holding("hdf5", dataset / STATES), holding("flock", dataset / "samples/0009.h5"):
        outcome = run_here(arguments, capsys)
    assert outcome.status == 1
    if form == "json":
        document = json.loads(outcome.out)
        assert document["bad_images"] == [2] and document["repair"]["sound"] is False
        assert {f["file"] for f in document["findings"] if f["kind"] == "not judged"} == {STATES, "samples/0009.h5"}
    else:
        assert f"sound but for 2 files not judged ({STATES}: {IN_USE}): 2 images" in outcome.out
    moved = {"images/0002.png", "latents/0002.npy", "samples/0002.h5"}
    assert before.keys() - contents(dataset).keys() == moved
    flip_byte(dataset / PICTURE, 200)
    (dataset / "samples/0009.h5").unlink()
    assert verify(dataset).sound, "once it is closed"
    assert len(verify(dataset).manifest.images) == IMAGES - 1


@pytest.mark.parametrize("name", [PICTURE, LATENT, STATES, STATE])
def test_what_another_program_is_changing_is_not_judged(
    drawn: dict[StorageFormat, Path], tmp_path: Path, name: str
) -> None:
    storage = StorageFormat.NPZ if name == STATE else StorageFormat.HDF5
    folder = Path(shutil.copytree(drawn[storage], tmp_path / "dataset"))
    with holding("flock", folder / name):
        os.truncate(folder / name, 99)
        (finding,) = verify(folder).findings
        assert (finding.kind, finding.file, finding.detail) == ("not judged", name, IN_USE)
        with pytest.raises(Unsettled):
            rebuild_manifest(folder, force=True)
    assert {finding.kind for finding in verify(folder).findings} == {"altered"}


@pytest.mark.parametrize("storage", list(StorageFormat))
def test_states_are_read_under_a_lock_of_others(
    drawn: dict[StorageFormat, Path], tmp_path: Path, storage: StorageFormat
) -> None:
    """A collection goes on, as checksums were compared before; what cannot be read then is not called damaged."""
    folder = Path(shutil.copytree(drawn[storage], tmp_path / "dataset"))
    manifest = load_manifest(folder)
    expected = read_state(folder, manifest, 1, 1)
    path = folder / manifest.images[1].samples[0 if storage is StorageFormat.HDF5 else 1]
    with holding("flock", path):
        assert (read_state(folder, manifest, 1, 1) == expected).all()
        os.truncate(path, 99)
        with pytest.raises(Unsettled):
            read_state(folder, manifest, 1, 1)
    with pytest.raises(CalibError, match="calib generate draws it again"):
        read_state(folder, manifest, 1, 1)


def test_what_may_not_be_read_is_not_judged(dataset: Path) -> None:
    before = contents(dataset)
    (dataset / STATES).chmod(0)
    outcome = run_without_rights(dataset.parent, "verify", "dataset", "--repair")
    (dataset / STATES).chmod(0o644)
    assert outcome.status == 1
    assert "1 file not judged (samples/0001.h5: cannot be read now (Permission denied); mend that and" in outcome.out
    assert contents(dataset) == before


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((OSError(code, os.strerror(code)), True) for code in (errno.EAGAIN, errno.EACCES, errno.EMFILE)),
        *((OSError(code, os.strerror(code)), True) for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)),
        *((OSError(code, os.strerror(code)), True) for code in (errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)),
        (MemoryError(), True),
        *((OSError(code, os.strerror(code)), False) for code in (errno.EIO, errno.ENOENT, errno.EISDIR)),
        *((error, False) for error in (ValueError("x"), OSError("file signature not found"), None)),
    ],
    ids=repr,
)
def test_errors_that_say_nothing_of_a_files_content(tmp_path: Path, error: Exception | None, passes: bool) -> None:
    path = tmp_path / "file"
    path.touch()
    if not passes:
        refuse_unsettled(path, error)
        return
    with pytest.raises(Unsettled) as refused:
        refuse_unsettled(path, error)
    line = str(refused.value)
    assert line.startswith(f"{path}: cannot be read now (") and "\n" not in line
    assert str(pickle.loads(pickle.dumps(refused.value))) == line, "it comes out of a launcher's worker"


# What calib itself locks


def test_a_file_just_written_is_not_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer may still wait for the disk."""
    found = []
    monkeypatch.setattr(files, "sync_folder", lambda folder: found.append(checksum(folder / "file")))
    write_text(tmp_path / "file", "text")
    assert found == [checksum(tmp_path / "file")]


def test_others_read_while_calib_reads_and_do_not_write(tiny_run: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_run / "activations.h5", tmp_path))
    with h5py.File(path, locking=True), ActivationFile(path) as file, settled(path):
        assert file.layers
    with ActivationFile(path) as file:
        with pytest.raises(BlockingIOError):
            h5py.File(path, "r+", locking=True)
        assert file.statistics(file.layers[0]).count.any()
    h5py.File(path, "r+", locking=True).close()


# HDF5's own setting


#: Draws, writes, reads and collects.
JOB = ("collect", *TINY, "taps.include=[x_embedder]", "generate_missing=true", "data_dir=dataset", "hydra.run.dir=run")


@pytest.mark.parametrize(
    "setting", ["TRUE", *(pytest.param(s, marks=pytest.mark.slow) for s in ("BEST_EFFORT", "FALSE"))]
)
def test_jobs_under_every_setting_of_hdf5(tmp_path: Path, tiny_run: Path, setting: str) -> None:
    well(with_variables(tmp_path, {"HDF5_USE_FILE_LOCKING": setting}, *JOB))
    found, whole = (read_json(run / "layer_statistics.json") for run in (tmp_path / "run", tiny_run))
    assert found == {"x_embedder": whole["x_embedder"]}
    assert verify(tmp_path / "dataset").sound


# File systems without locks

NO_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""
COMPILER = shutil.which("gcc")


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for a process whose ``flock`` fails, as on a file system without locks."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("no gcc to make a file system without locks with")
    library = tmp_path_factory.mktemp("library") / "no_locks.so"
    build = [COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(build, input=NO_LOCKS, text=True, check=True)
    return {"LD_PRELOAD": str(library), "FLOCK_ERRNO": str(errno.ENOLCK)}


NOTE = "this file system has no locks"


@pytest.mark.parametrize(
    "code",
    [errno.ENOLCK, *(pytest.param(code, marks=pytest.mark.slow) for code in (errno.ENOSYS, errno.EOPNOTSUPP))],
    ids=errno.errorcode.get,
)
def test_a_job_without_locks(tmp_path: Path, no_locks: dict[str, str], code: int) -> None:
    outcome = well(with_variables(tmp_path, no_locks | {"FLOCK_ERRNO": str(code)}, *JOB))
    (note,) = (line for line in lines_of(outcome.err) if NOTE in line)
    assert note.endswith("start one at a time")
    assert verify(tmp_path / "dataset").sound


REPAIR, SHARD = ("verify", "dataset", "--repair"), ("generate", *TINY, "data_dir=new", "shard.count=2", "shard.index=0")


@pytest.mark.parametrize(
    ("arguments", "hdf5", "status", "words"),
    [
        (REPAIR, "", 0, "repaired: 1 file moved"),
        (SHARD, "", 1, "new: this file system has no locks (No locks available), which processes side by side need"),
        (JOB, "TRUE", 1, "activations.h5: HDF5_USE_FILE_LOCKING=TRUE asks for locks, which this file system does"),
    ],
    ids=["repair", "shard", "HDF5 must lock"],
)
def test_commands_without_locks(
    tiny_run: Path,
    tmp_path: Path,
    no_locks: dict[str, str],
    arguments: tuple[str, ...],
    hdf5: str,
    status: int,
    words: str,
) -> None:
    dataset = Path(shutil.copytree(tiny_run.with_name("dataset"), tmp_path / "dataset"))
    if arguments == REPAIR:
        (dataset / "samples/0009.h5").write_bytes(b"x")
        (dataset / "samples/.0001.h5.abc.tmp").write_bytes(b"its writer may live")
    outcome = with_variables(tmp_path, no_locks | {"HDF5_USE_FILE_LOCKING": hdf5}, *arguments)
    assert outcome.status == status, outcome
    assert words in (outcome.out.splitlines()[-1] if status == 0 else lines_of(outcome.err)[-1])
    assert (dataset / "samples/.0001.h5.abc.tmp").exists() == (arguments == REPAIR)
