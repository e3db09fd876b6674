"""``calib doctor``: report on this machine, with advice for what is slow or missing."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calib.base import blas
from calib.base.errors import in_a_line
from calib.base.versions import versions
from calib.cli.parser import Parser

TARGET_RATIO = 20.0
MATRIX_SIZE = 2048
LEAST_MLX = (0, 32)
DIFFUSIONKIT = "0.5.2"
LEAST_MEMORY_GB, LEAST_DISK_GB = 2.0, 5.0

DESCRIPTION = """\
Report on this machine: device, BLAS and its measured speed, versions, memory and disk, and one line for each
thing that is slow or missing, with what to install or do. Takes some seconds: on a Linux CPU the reference
BLAS is timed too.

With --selftest: check that this device computes what calib relies on. The shipped model draws two pictures, which
are compared with stored values; MLX's operations and collected statistics are compared with NumPy; and whatever the
machine, what a Mac would run is looked up among the kernels of MLX's Metal backend. The report is short enough to
paste into an issue.
"""
EPILOG = """\
exit status: 0 all is well, or there is only advice; 1 something is broken, or a check failed

examples:
  calib doctor
  calib doctor --selftest
  CALIB_BLAS=/path/to/libopenblas.so calib doctor     try another BLAS
"""


@dataclass
class Report:
    """The report; sizes in GB (10^9 bytes). ``problems`` prevent calib from working, ``advice`` improves it."""

    device: dict[str, Any] = field(default_factory=dict)
    blas: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    memory: dict[str, float | None] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def measure_gflops(size: int, seconds: float = 0.4) -> float:
    """GFLOP/s of a float32 product (size, size) by (size, size) on the default device, the best of several runs."""
    import mlx.core as mx

    a, b = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(a, b, a[:256, :256] @ b[:256, :256])  # the first product starts threads, or compiles
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def reference_gflops(size: int) -> float | None:
    """GFLOP/s of the reference BLAS in MLX's CPU wheel, measured in a process of its own; None where that fails."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    code = f"from calib.cli.doctor import measure_gflops; print(measure_gflops({size}))"
    try:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"CALIB_BLAS": "none", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return float(run.stdout)
    except (subprocess.SubprocessError, OSError, ValueError):
        return None


def available_memory() -> float | None:
    """Bytes available without swapping; None where the system does not report them."""
    try:
        if sys.platform == "linux":
            lines = Path("/proc/meminfo").read_text().splitlines()
            return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        pages = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
        counts = dict(line.rstrip(".").split(":") for line in pages.splitlines()[1:] if ":" in line)
        free = sum(int(counts[f"Pages {kind}"]) for kind in ("free", "inactive", "speculative"))
        return float(free * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, subprocess.SubprocessError, LookupError, ValueError, StopIteration):
        return None


def examine() -> Report:
    """Measure this machine and judge the results; problems of the machine are reported, not raised."""
    report = Report(versions=versions())
    report.versions["torch"] = "present" if importlib.util.find_spec("torch") else "absent"
    available = available_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    report.memory = {"total_gb": total / 1e9, "available_gb": None if available is None else available / 1e9}
    usage = shutil.disk_usage(Path.cwd())
    report.disk = {"total_gb": usage.total / 1e9, "free_gb": usage.free / 1e9}
    report.blas = {"library": blas.status().library, "reason": blas.status().reason, "needed": blas.needed()}
    try:
        from calib.base.device import describe_device
        from calib.models.memory import device_memory

        report.device = describe_device()
        report.memory["planned_gb"] = device_memory() / 1e9
        report.blas |= measure_blas(report.device["kind"])
    except Exception as error:  # MLX fails in many ways where its backend is missing or does not match
        report.problems.append(f"MLX does not work ({in_a_line(error, 'mlx')}): {mlx_advice()}")
    judge_packages(report)
    judge_speed(report)
    return report


def measure_blas(kind: str) -> dict[str, float | None]:
    """Speed of a product, that of the reference BLAS where MLX would use it otherwise, and their ratio."""
    gflops = measure_gflops(MATRIX_SIZE)
    reference = reference_gflops(MATRIX_SIZE) if kind == "cpu" and blas.needed() else None
    return {"gflops": gflops, "reference_gflops": reference, "ratio": gflops / reference if reference else None}


def mlx_advice() -> str:
    """The command that installs MLX on this system."""
    if sys.platform == "darwin":
        return "pip install -U mlx"
    return "pip install -U 'mlx[cpu]', or 'mlx[cuda12]' or 'mlx[cuda13]' for an NVIDIA GPU"


def judge_packages(report: Report) -> None:
    """Add lines about packages that are missing, too old or untested."""
    found = report.versions
    for package, version in found.items():
        if version == "absent" and package == "diffusionkit":
            report.problems.append(f"diffusionkit is missing: pip install --no-deps diffusionkit=={DIFFUSIONKIT}")
        elif version == "absent" and package != "torch":
            report.problems.append(f"{package} is missing: pip install {package}")
    if found["diffusionkit"] not in ("absent", DIFFUSIONKIT):
        report.advice.append(
            f"diffusionkit is {found['diffusionkit']}, tested is {DIFFUSIONKIT}: "
            f"pip install --no-deps diffusionkit=={DIFFUSIONKIT}"
        )
    if found["mlx"] != "absent" and tuple(int(part) for part in found["mlx"].split(".")[:2]) < LEAST_MLX:
        report.problems.append(f"mlx {found['mlx']} is too old, calib needs 0.32 or later: {mlx_advice()}")


def judge_speed(report: Report) -> None:
    """Add lines about BLAS, an idle GPU, memory and disk."""
    if blas.needed() and report.device.get("kind") == "cpu":
        judge_blas(report)
    if sys.platform == "linux" and report.device.get("kind") == "cpu" and Path("/proc/driver/nvidia/version").exists():
        report.advice.append(
            "there is an NVIDIA GPU that MLX does not use: pip install 'mlx[cuda13]', "
            "or uv run --no-group cpu --group cuda13 calib"
        )
    available = report.memory["available_gb"]
    if available is not None and available < LEAST_MEMORY_GB:
        report.advice.append(f"only {available:.1f} GB of memory are free: close something, or lower the batch sizes")
    if report.disk["free_gb"] < LEAST_DISK_GB:
        report.advice.append(
            f"only {report.disk['free_gb']:.1f} GB of disk are free here: work in another folder, or set data_dir"
        )


def judge_blas(report: Report) -> None:
    """Add a line about how to make MLX's products on a Linux CPU faster, if they are slow."""
    slow, ratio = blas.slow(), report.blas.get("ratio")
    if slow is not None:
        report.advice.append(slow)
    elif blas.is_switched_off():
        report.advice.append("no fast BLAS, as CALIB_BLAS=none: products are some 30 times slower; unset it")
    elif ratio is not None and ratio < TARGET_RATIO:
        report.advice.append(
            f"{blas.status().library} is {ratio:.1f} times the reference BLAS, usual is {TARGET_RATIO:.0f} or more: "
            f"is the machine busy, OMP_NUM_THREADS set? If not: {blas.install()}"
        )


def device_line(device: dict[str, Any]) -> str:
    """The default device in words."""
    if not device:
        return "unknown"
    kind = {"metal": "Metal", "cuda": "CUDA", "cpu": "CPU"}[device["kind"]]
    return f"{kind}, {device.get('device_name', 'unknown')}, {device['cpus']} CPU cores"


def blas_lines(found: dict[str, Any]) -> list[str]:
    """The BLAS in use and its speed."""
    lines = [f"{found['library']} ({found['reason']})" if found["library"] else found["reason"]]
    if "gflops" in found:
        speed = f"{found['gflops']:.0f} GFLOP/s in a float32 product of {MATRIX_SIZE} by {MATRIX_SIZE}"
        lines.append(speed)
    if found.get("ratio"):
        times = f"{found['ratio']:.1f} times the reference BLAS ({found['reference_gflops']:.1f} GFLOP/s)"
        lines.append(f"{times}; target: {TARGET_RATIO:.0f}")
    return lines


def version_lines(found: dict[str, str], columns: int = 4) -> list[str]:
    """Names and versions, aligned in columns."""
    entries = [f"{name} {version}" for name, version in found.items()]
    width = max(map(len, entries)) + 2
    rows = [entries[i : i + columns] for i in range(0, len(entries), columns)]
    return ["".join(entry.ljust(width) for entry in row).rstrip() for row in rows]


def render(report: Report) -> str:
    """The report as an aligned table, with problems and advice at the end."""
    memory, disk = report.memory, report.disk
    available = "" if memory["available_gb"] is None else f", {memory['available_gb']:.1f} GB available"
    planned = memory.get("planned_gb")
    limits = "" if planned is None else f"; calib plans with {planned:.1f} GB"
    rows = {
        "system": [platform.platform()],
        "device": [device_line(report.device)],
        "BLAS": blas_lines(report.blas),
        "memory": [f"{memory['total_gb']:.1f} GB{available}{limits}"],
        "disk": [f"{disk['free_gb']:.1f} GB free of {disk['total_gb']:.1f} GB, where the current folder lies"],
        "versions": version_lines({name: text for name, text in report.versions.items() if name != "torch"}),
        "torch": [f"{report.versions['torch']} (not needed)"],
    }
    lines = ["calib doctor", ""]
    for label, values in rows.items():
        lines += [f"  {label if i == 0 else '':10}{value}" for i, value in enumerate(values)]
    lines.append("")
    lines += [f"broken: {problem}" for problem in report.problems]
    lines += [f"advice: {advice}" for advice in report.advice]
    if not report.problems and not report.advice:
        lines.append("All good.")
    return "\n".join(lines)


def doctor_command(arguments: Sequence[str]) -> int:
    """Run ``calib doctor`` with command-line ``arguments``; returns the exit status."""
    parser = Parser("doctor", DESCRIPTION, EPILOG)
    parser.add_argument("--selftest", action="store_true", help="check the numerics of this device instead")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(arguments)
    if options.selftest:
        return selftest_main(options.json)
    report = examine()
    print(json.dumps(asdict(report), indent=2, default=str) if options.json else render(report))
    return 1 if report.problems else 0


def selftest_main(as_json: bool) -> int:
    """Run the self-test and print its report; 1 if a check failed or the test cannot start."""
    start = time.perf_counter()
    try:
        from calib.base.device import describe_device
        from calib.cli import selftest

        device = describe_device()
    except Exception as error:
        print(f"calib doctor: the self-test cannot start ({in_a_line(error, 'mlx')}); see `calib doctor`")
        return 1
    checks = selftest.run()
    failed = [check for check in checks if not check.passed]
    if as_json:
        results = [asdict(check) | {"passed": check.passed} for check in checks]
        report = {"device": device, "versions": versions(), "checks": results, "passed": not failed}
        print(json.dumps(report, indent=2, default=str))
        return 1 if failed else 0
    loaded = blas.status().library
    used = Path(loaded).name if loaded else blas.status().reason
    print(f"calib doctor --selftest\n\n  {platform.platform()}\n  {device_line(device)}\n  BLAS: {used}")
    print("\n".join(f"  {line}" for line in version_lines(versions())) + "\n")
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = "ok  " if check.passed else "FAIL"
        numbers = f"error {check.error:<8.2g} bound {check.bound:<8.2g} {check.note}".rstrip()
        print(f"  {verdict}  {check.name:{width}}  {numbers}")
    summary = f"{len(failed)} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks passed"
    print(f"\n{summary} ({time.perf_counter() - start:.1f} s)")
    return 1 if failed else 0
