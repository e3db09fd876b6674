"""``calib doctor``: the report, its advice, a self-test that notices what is wrong; and the BLAS that MLX binds to."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.activations import observer_mlx
from calib.base import blas, device
from calib.base.versions import versions
from calib.cli import doctor, selftest, selftest_kernels, selftest_model
from calib.cli.doctor import doctor_command
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from helpers import environment, run_process

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


@pytest.mark.skipif(not blas.needed(), reason="MLX brings its own fast BLAS here")
def test_calib_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    search: Callable[[], blas.BlasStatus] = blas.status.__wrapped__
    assert search().reason == "mlx was imported before calib; import calib first"
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setenv("CALIB_BLAS", "/nowhere/libblas.so")
    assert search().library is None and "/nowhere/libblas.so: " in search().reason
    monkeypatch.setenv("CALIB_BLAS", "none")
    assert search() == blas.BlasStatus(None, "switched off by CALIB_BLAS=none")


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


@pytest.mark.skipif(not blas.needed(), reason="MLX brings its own fast BLAS here")
def test_advice_on_blas(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(blas, "status", lambda: blas.BlasStatus(None, "no OpenBLAS or MKL found"))
    assert doctor_command([]) == 0
    output = capsys.readouterr().out
    assert "advice: no fast BLAS (no OpenBLAS or MKL found)" in output
    assert "libopenblas0-pthread" in output


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
