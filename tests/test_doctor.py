"""``calib doctor``: the report, its advice, and a self-test that notices what is wrong."""

import json
import os
import subprocess
import sys

from calib.activations import observer_mlx as plain
from calib.base import blas
from calib.base.device import on_cuda
from calib.base.versions import versions
from calib.cli.main import doctor, selftest

import mlx.core as mx
import numpy as np
import pytest

CODE = "import sys; from calib.cli.doctor import main; sys.exit(main(sys.argv[1:]))"


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``calib doctor`` in a process of its own, as the command runs it."""
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_json_report():
    run = run_doctor("--json")
    assert run.returncode == 0, run.stderr + run.stdout
    report = json.loads(run.stdout)
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
def test_reference_blas_gives_advice_and_no_failure():
    run = run_doctor(CALIB_BLAS="none")
    assert run.returncode == 0, run.stderr + run.stdout
    assert "advice: no fast BLAS" in run.stdout
    assert "libopenblas0-pthread" in run.stdout


@pytest.fixture
def quick(monkeypatch):
    """No timing of products."""
    monkeypatch.setattr(doctor, "measure_blas", lambda kind: {"gflops": 200.0, "reference_gflops": 8.0, "ratio": 25.0})


def test_report_names_everything(quick, capsys):
    assert doctor.main([]) == 0
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
def test_broken_packages(quick, monkeypatch, capsys, package, version, word):
    monkeypatch.setattr(doctor, "versions", lambda: versions() | {package: version})
    assert doctor.main([]) == 1
    assert any(word in line for line in capsys.readouterr().out.splitlines() if line.startswith("broken: "))


def test_mlx_that_does_not_work_is_a_problem(quick, monkeypatch, capsys):
    def fail():
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "describe_device", fail)
    assert doctor.main([]) == 1
    assert "broken: MLX does not work (ImportError: libmlx.so" in capsys.readouterr().out


def test_little_memory_and_disk_are_advice(quick, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "available_memory", lambda: 1e9)
    monkeypatch.setattr(doctor, "LEAST_DISK_GB", 1e9)
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert "only 1.0 GB of memory are free" in output
    assert "GB of disk are free here" in output


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main(["--help"])
    assert end.value.code == 0
    assert "--selftest" in capsys.readouterr().out


def test_selftest_passes_in_a_process_of_its_own():
    run = run_doctor("--selftest")
    assert run.returncode == 0, run.stderr + run.stdout
    assert "checks passed" in run.stdout
    assert "FAIL" not in run.stdout


def test_selftest_as_json(capsys):
    assert doctor.main(["--selftest", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert len(report["checks"]) > 30


@pytest.mark.parametrize("name", ["latents", "pixels", "fingerprint"])
def test_selftest_notices_one_corrupted_value(monkeypatch, tmp_path, capsys, name):
    with np.load(selftest.REFERENCE) as stored:
        values = dict(stored)
    if name == "fingerprint":
        values[name] = np.array("0123456789abcdef")
    else:
        values[name][100] += 0.1
    np.savez(tmp_path / "corrupted.npz", **values)
    monkeypatch.setattr(selftest, "REFERENCE", tmp_path / "corrupted.npz")
    assert doctor.main(["--selftest"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL " in line]
    assert len(failed) == 1
    assert name in failed[0]


def narrow_counts(bits: mx.array) -> mx.array:
    """A histogram that loses counts, as one without atomic additions does."""
    return mx.minimum(right_counts(bits), 20)


right_counts = selftest.count_bits


def narrow_variance(*arguments):
    """A summary that lost digits of Σx², as one without a shift does."""
    summary = right_summary(*arguments)
    return summary | {"second": summary["second"] * 0.999}


right_summary = plain.summarize
plain_operations = pytest.mark.skipif(on_cuda(), reason="CUDA kernels gather statistics here")


@pytest.mark.parametrize(
    ("target", "attribute", "wrong", "check"),
    [
        (selftest, "count_bits", narrow_counts, "scatter add"),
        pytest.param(plain, "count_bits", narrow_counts, "collection, float16: percentiles", marks=plain_operations),
        pytest.param(plain, "summarize", narrow_variance, "collection, bfloat16: std", marks=plain_operations),
        pytest.param(
            plain, "is_sound", lambda summary: True, "float32: NaN and inf are noticed", marks=plain_operations
        ),
        (selftest, "ordered_keys", lambda bits: bits, "order keys"),
        (mx, "dequantize", lambda w, *rest, **settings: mx.zeros((128, 512)), "quantize 2 bits"),
        (mx, "min", mx.max, "min over rows"),
    ],
    ids=["counts", "collected counts", "variance", "soundness", "keys", "dequantize", "min"],
)
def test_selftest_notices_wrong_operations(monkeypatch, target, attribute, wrong, check):
    monkeypatch.setattr(target, attribute, wrong)
    assert any(check in result.name for result in selftest.run() if not result.passed)


def test_selftest_reports_what_the_device_cannot_do(monkeypatch, capsys):
    def missing(*arguments, **settings):
        raise ValueError("not on this device")

    monkeypatch.setattr(mx, "quantize", missing)
    assert doctor.main(["--selftest"]) == 1
    output = capsys.readouterr().out
    assert "ValueError: not on this device" in output
    assert "ok    collection" in output, "the other checks go on"
