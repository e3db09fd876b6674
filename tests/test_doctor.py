"""``calib doctor``: the report, its advice, a self-test that notices what is wrong; and the BLAS that MLX binds to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from calib.activations import observer_mlx
from calib.base import VERSION, blas, device
from calib.base.versions import versions
from calib.cli import doctor, selftest, selftest_kernels, selftest_model
from calib.cli.doctor import doctor_command
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from helpers import CHECKOUT, environment, run_process

Capture = pytest.CaptureFixture[str]


def checking(monkeypatch: pytest.MonkeyPatch, *groups: str) -> None:
    """Let the self-test make these groups of checks alone."""
    monkeypatch.setattr(selftest, "GROUPS", {name: selftest.GROUPS[name] for name in groups})


# The BLAS

BINDING = """
import sys, ctypes, calib
assert not {"mlx", "numpy", "ctypes.util"} & set(sys.modules), "calib itself imports nothing"
import mlx.core
from calib.base import blas
status = blas.status()
address = lambda library: ctypes.cast(ctypes.CDLL(library).cblas_sgemm, ctypes.c_void_p).value
print(status.library, status.library is None or address(None) == address(status.library))
"""


def test_import_of_calib_binds_the_blas() -> None:
    """Even if MLX is imported without any module of calib's."""
    done = subprocess.run([sys.executable, "-c", BINDING], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(blas.status().library), "True"]


#: Whoever computes has a model; two have one, and the library that MLX's products run on is printed.
MODEL = """
from calib.models.model import DiffusionModel
DiffusionModel(*[None] * 12), DiffusionModel(*[None] * 12)
from calib.base import blas
print(blas.bound_library())
"""
#: Beside a checkout named calib, with an editable installation: setuptools' finder comes after Python's own, which
#: takes the checkout for a namespace package; the package's own __init__ never runs.
BESIDE = f"""
import sys
from importlib.machinery import PathFinder

class Editable:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(CHECKOUT / "calib")!r}]) if name.count(".") == 1 else None

sys.meta_path.append(Editable)
import calib
assert calib.__file__ is None and not hasattr(calib, "__version__")
"""
WHEEL = Path(mx.__file__).parents[1] / "mlx_cpu.libs"
FAST = str(blas.status().library)
needs_blas = pytest.mark.skipif(not blas.needed(), reason="MLX brings its own fast BLAS here")
needs_fast = pytest.mark.skipif(blas.status().library is None, reason="there is no fast BLAS here")
NOTE = "calib: note: no fast BLAS ("
INSTALL = "apt install libopenblas0-pthread"


def beside_a_checkout(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that runs ``code`` in ``folder``, in which a checkout named calib lies, and nothing else to import."""
    if not (folder / "calib").exists():
        (folder / "calib").symlink_to(CHECKOUT)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CALIB_BLAS")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environ | variables, capture_output=True, text=True, check=True)


@needs_blas
@pytest.mark.parametrize(
    ("code", "variables", "words"),
    [
        ("import mlx.core", {}, ("mlx was imported before calib; import calib first",)),
        ("import mlx.nn", {}, ("mlx was imported before calib; import calib first",)),
        (f"{BESIDE}import mlx.core", {}, ("mlx was imported before calib; import calib first",)),
        ("from calib.base import blas\nblas.candidates = list", {}, ("no OpenBLAS or MKL found", INSTALL)),
        ("", {"CALIB_BLAS": "/nowhere/lib.so"}, ("/nowhere/lib.so: cannot open", "unset CALIB_BLAS", INSTALL)),
        ("", {"CALIB_BLAS": "libm.so.6"}, ("libm.so.6: has no cblas_sgemm", "unset CALIB_BLAS")),
        pytest.param("", {"LD_PRELOAD": "reference"}, ("was loaded before", "LD_PRELOAD"), marks=needs_fast),
    ],
    ids=["core first", "nn first", "beside, core first", "none found", "not there", "no BLAS", "reference first"],
)
def test_a_slow_blas_is_noted_once(
    tmp_path: Path, code: str, variables: dict[str, str], words: tuple[str, ...]
) -> None:
    if "LD_PRELOAD" in variables:
        variables = {"LD_PRELOAD": str(next(WHEEL.glob("libblas*")))}
    folder = tmp_path if code.startswith(BESIDE) else CHECKOUT
    done = beside_a_checkout(folder, f"{code}\n{MODEL}", **variables)
    assert Path(done.stdout.strip()).name.startswith("libblas-"), "the wheel's own"
    (line,) = done.stderr.splitlines()
    assert line.startswith(NOTE) and "some 30 times slower" in line
    assert all(word in line for word in words), line


@needs_blas
@needs_fast
@pytest.mark.parametrize(
    ("code", "variables"),
    [
        ("", {}),
        ("import calib, mlx.core", {}),
        ("import mlx, calib", {}),
        ("import mlx.core", {"LD_PRELOAD": FAST}),
        ("", {"CALIB_BLAS": FAST}),
        *((f"{BESIDE}{more}", {}) for more in ("", "import calib.models.noise", "import calib.analysis.grid")),
    ],
    ids=["calib", "calib first", "no core yet", "preloaded", "named", "beside", "beside, noise", "beside, grid"],
)
def test_nothing_is_said_of_a_fast_blas(tmp_path: Path, code: str, variables: dict[str, str]) -> None:
    folder = tmp_path if code.startswith(BESIDE) else CHECKOUT
    done = beside_a_checkout(folder, f"{code}\n{MODEL}", **variables)
    assert done.stderr == ""
    assert done.stdout.strip() == str(Path(FAST).resolve())


@needs_blas
def test_a_slow_blas_may_be_wished_for() -> None:
    done = beside_a_checkout(CHECKOUT, MODEL, CALIB_BLAS="none")
    assert done.stderr == "" and "libblas-" in done.stdout


def test_calib_runs_beside_a_checkout(tmp_path: Path) -> None:
    done = beside_a_checkout(tmp_path, f"{BESIDE}from calib.cli.main import main\nmain(['--version'])")
    assert done.stdout == f"calib {VERSION}\n"
    beside_a_checkout(tmp_path, f"{BESIDE}import calib.runs.pages.page\nfrom calib.cli.conf import groups\ngroups()")


# The report


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing of products."""
    monkeypatch.setattr(doctor, "measure_blas", lambda kind: {"gflops": 200.0, "reference_gflops": 8.0, "ratio": 25.0})


def test_json_report(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(doctor, "MATRIX_SIZE", 512)  # the reference BLAS takes 64 times as long for the usual size
    assert doctor_command(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["device"]["kind"] in ("cpu", "metal", "cuda")
    assert report["blas"]["gflops"] > 0
    assert report["memory"]["total_gb"] > 0
    assert report["disk"]["free_gb"] > 0
    assert report["versions"].pop("torch") in ("absent", "present")
    assert report["versions"] == versions()
    if report["blas"]["library"] and report["device"]["kind"] == "cpu":
        assert report["blas"]["ratio"] > 3, "20 is usual; less only on a machine busy with other work"


@needs_blas
@pytest.mark.parametrize(
    ("setting", "advice"),
    [("/nowhere/lib.so", "advice: no fast BLAS (/nowhere/lib.so: cannot open"), ("none", "advice: no fast BLAS, as")],
)
def test_advice_on_blas(setting: str, advice: str) -> None:
    """In the words of the note, as a process of its own meets it."""
    code = "from calib.cli import doctor\ndoctor.MATRIX_SIZE = 64\ndoctor.doctor_command([])"
    said = beside_a_checkout(CHECKOUT, code, CALIB_BLAS=setting).stdout
    (line,) = (line for line in said.splitlines() if line.startswith("advice: no fast"))
    assert line.startswith(advice) and "some 30 times slower" in line


def test_report(quick: None, capsys: Capture) -> None:
    assert doctor_command([]) == 0
    output = capsys.readouterr().out
    for word in ("device", "BLAS", "GFLOP/s", "memory", "disk", "mlx 0", "diffusionkit 0.5.2", "torch"):
        assert word in output


@pytest.mark.parametrize(
    ("package", "version", "word"),
    [
        ("mlx", "0.17.3", "mlx 0.17.3 is too old"),
        ("mlx", "absent", "mlx is missing"),
        ("diffusionkit", "absent", "pip install --no-deps diffusionkit==0.5.2"),
        ("h5py", "absent", "pip install h5py"),
    ],
)
def test_broken_packages(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture, package: str, version: str, word: str
) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: versions() | {package: version})
    assert doctor_command([]) == 1
    assert any(word in line for line in capsys.readouterr().out.splitlines() if line.startswith("broken: "))


def test_broken_mlx(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail() -> None:
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(device, "describe_device", fail)
    assert doctor_command([]) == 1
    assert "broken: MLX does not work (ImportError: libmlx.so" in capsys.readouterr().out
    assert doctor_command(["--selftest"]) == 1
    assert "the self-test cannot start (ImportError: libmlx.so" in capsys.readouterr().out


def test_advice_on_memory_and_disk(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 1e9)
    monkeypatch.setattr(doctor, "LEAST_DISK_GB", 1e9)
    assert doctor_command([]) == 0
    output = capsys.readouterr().out
    assert "only 1.0 GB of memory are free" in output
    assert "GB of disk are free here" in output


def test_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        doctor_command(["--help"])
    assert end.value.code == 0
    assert "--selftest" in capsys.readouterr().out


# The self-test


def test_selftest(tmp_path: Path) -> None:
    outcome = run_process(tmp_path, "doctor", "--selftest", "--json")
    assert outcome.status == 0, outcome.err + outcome.out
    report = json.loads(outcome.out)
    assert report["passed"] is True
    assert len(report["checks"]) > 30


def test_selftest_as_text(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    checking(monkeypatch, "scatter add", "reductions")
    assert doctor_command(["--selftest"]) == 0
    output = capsys.readouterr().out
    assert "all 5 checks passed" in output
    assert "FAIL" not in output


@pytest.fixture(scope="module")
def drawn(model: DiffusionModel) -> dict[str, Any]:
    """What the self-test draws with the shipped model."""
    return selftest_model.drawn_values(model)


@pytest.mark.parametrize("name", ["latents", "pixels", "fingerprint"])
def test_selftest_of_corrupted_values(
    drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture, name: str
) -> None:
    with np.load(selftest_model.REFERENCE) as stored:
        values = dict(stored)
    if name == "fingerprint":
        values[name] = np.array("0123456789abcdef")
    else:
        values[name][100] += 0.1
    np.savez(tmp_path / "corrupted.npz", **values)
    monkeypatch.setattr(selftest_model, "REFERENCE", tmp_path / "corrupted.npz")
    monkeypatch.setattr(selftest_model, "drawn_values", lambda model: drawn)
    checking(monkeypatch, "sampling")
    assert doctor_command(["--selftest"]) == 1
    (failed,) = (line for line in capsys.readouterr().out.splitlines() if "FAIL " in line)
    assert name in failed


def narrow_counts(bits: mx.array) -> mx.array:
    """A histogram that loses counts, as one without atomic additions does."""
    return mx.minimum(right_counts(bits), 20)


right_counts = selftest_kernels.count_bits


def narrow_variance(*arguments: Any) -> dict[str, mx.array]:
    """A summary that lost digits of Σx², as one without a shift does."""
    summary = right_summary(*arguments)
    return summary | {"second": summary["second"] * 0.999}


right_summary = observer_mlx.summarize
#: Observers in MLX's own operations gather statistics but for CUDA, which has kernels.
on_observer = pytest.mark.skipif(device.on_cuda(), reason="CUDA kernels gather statistics here")


@pytest.mark.parametrize(
    ("target", "attribute", "wrong", "group", "check"),
    [
        (selftest_kernels, "count_bits", narrow_counts, "scatter add", "scatter add"),
        (selftest_kernels, "ordered_keys", lambda bits: bits, "order keys", "order keys"),
        (
            *(mx, "dequantize", lambda w, *rest, **settings: mx.zeros((128, 512))),
            *("quantize", "quantize 2 bits"),
        ),
        (mx, "min", mx.max, "reductions", "min over rows"),
        pytest.param(
            *(observer_mlx, "count_bits", narrow_counts, "collection", "collection, float16: percentiles"),
            marks=on_observer,
        ),
        pytest.param(
            *(observer_mlx, "summarize", narrow_variance, "collection", "collection, bfloat16: std"), marks=on_observer
        ),
        pytest.param(
            *(observer_mlx, "is_sound", lambda summary: True, "collection", "float32: NaN and inf are noticed"),
            marks=on_observer,
        ),
    ],
    ids=["counts", "keys", "dequantize", "min", "collected counts", "variance", "soundness"],
)
def test_selftest_of_wrong_operations(
    monkeypatch: pytest.MonkeyPatch, target: Any, attribute: str, wrong: Any, group: str, check: str
) -> None:
    checking(monkeypatch, group)
    monkeypatch.setattr(target, attribute, wrong)
    assert any(check in result.name for result in selftest.run() if not result.passed)


def test_selftest_of_missing_operations(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def missing(*arguments: Any, **settings: Any) -> None:
        raise ValueError("not on this device")

    monkeypatch.setattr(mx, "quantize", missing)
    checking(monkeypatch, "quantize", "reductions")
    assert doctor_command(["--selftest"]) == 1
    output = capsys.readouterr().out
    assert "ValueError: not on this device" in output
    assert "ok    min over rows" in output, "the other checks go on"
