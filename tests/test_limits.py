"""Limits of memory, of a process and of the control groups around it."""

import math
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

from calib.base import limits
from calib.models import memory

import pytest

GB = 10**9
#: What version 1 says where there is no limit.
NONE_V1 = "9223372036854771712"

#: The process's groups, files below the mount, and the limit.
GROUPS = {
    "version 2": ("0::/a/b\n", {"a/b/memory.max": "3000"}, 3000),
    "of a group around it": (
        "0::/a/b\n",
        {"memory.max": "9000", "a/memory.max": "2000", "a/b/memory.max": "max"},
        2000,
    ),
    "of another group": ("0::/a/b\n", {"c/memory.max": "1000", "a/b/c/memory.max": "1000"}, math.inf),
    "a high mark": ("0::/a\n", {"a/memory.max": "max", "a/memory.high": "4000"}, 4000),
    "in a container": ("0::/\n", {"memory.max": "5000"}, 5000),
    "named as outside": ("0::/../../other\n", {"memory.max": "5000"}, 5000),
    "version 1": ("4:memory:/a\n3:cpuset:/b\n", {"memory/a/memory.limit_in_bytes": "6000"}, 6000),
    "version 1, shared": ("4:cpu,memory:/a\n", {"cpu,memory/a/memory.limit_in_bytes": "6000"}, 6000),
    "version 1, a container": ("4:memory:/docker/f00\n", {"memory/memory.limit_in_bytes": "6000"}, 6000),
    "version 1, none": ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": NONE_V1}, math.inf),
    "both": (
        "4:memory:/a\n0::/a\n",
        {"memory/a/memory.limit_in_bytes": "8000", "unified/a/memory.max": "7000"},
        7000,
    ),
    "nothing there": ("0::/a\n", {}, math.inf),
    "no number": ("0::/a\nnonsense\n\n::\n", {"a/memory.max": "-1\n", "memory.max": ""}, math.inf),
}


@pytest.mark.parametrize("case", GROUPS)
def test_control_groups(case: str, tmp_path: Path) -> None:
    listed, files, expected = GROUPS[case]
    (tmp_path / "cgroup").write_text(listed)
    for name, text in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert limits.of_control_groups(tmp_path / "cgroup", tmp_path / "mounted") == expected


@pytest.mark.skipif(memory.on_gpu(), reason="a limit of main memory")
def test_plans_are_of_a_control_groups_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(f"{2 * GB}\n")
    monkeypatch.setattr(limits, "of_control_groups", partial(limits.of_control_groups, tmp_path / "cgroup", tmp_path))
    assert memory.device_memory() == 2 * GB * memory.SHARE


def test_no_control_groups(tmp_path: Path) -> None:
    """On a Mac."""
    assert limits.of_control_groups(tmp_path / "cgroup", tmp_path) == math.inf


@pytest.mark.skipif(memory.on_gpu() or sys.platform != "linux", reason="a limit of main memory, on Linux")
@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_the_smallest_counts(kind: str) -> None:
    """Eight tenths of it, in a process that has such a limit."""
    limit = 4 * GB
    code = "from calib.base import limits\nfrom calib.models.memory import device_memory\n"
    code += f"assert limits.of_process() == {limit}\nprint(device_memory())"

    def limited() -> None:
        resource.setrlimit(getattr(resource, kind), (limit, limit))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limited, capture_output=True, text=True)
    assert int(done.stdout) == min(limits.of_control_groups(), limit) * memory.SHARE, done.stderr
