"""Keeping the machine awake: a helper process runs for as long as the work does, and not longer."""

import os
import subprocess
import sys
import time
from pathlib import Path

from calib.base import progress
from calib.base.keep_awake import keep_awake

import pytest


def fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for init to collect it does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_for(path: Path) -> list[str]:
    for _ in range(100):
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text().split()
        time.sleep(0.05)
    raise AssertionError(f"{path.name} was not written")


@pytest.fixture(autouse=True)
def notes_are_new() -> None:
    progress.note.cache_clear()


@pytest.mark.parametrize(("platform", "name"), [("darwin", "caffeinate"), ("linux", "systemd-inhibit")])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_helper_lives_as_long_as_the_work(
    platform: str,
    name: str,
    error: type[BaseException] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The fake has a child, as systemd-inhibit has; both must end.
    fake(tmp_path, name, f'sleep 60 &\necho $$ $! "$@" > {tmp_path}/started\nwait')
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    try:
        with keep_awake():
            helper, child, *arguments = wait_for(tmp_path / "started")
            assert alive(int(helper)) and alive(int(child))
            if error is not None:
                raise error
    except (KeyboardInterrupt, ValueError) as raised:
        assert type(raised) is error
    for pid in (int(helper), int(child)):
        for _ in range(100):
            if not alive(pid):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the helper runs on")
    assert str(os.getpid()) in " ".join(arguments), "it ends with this process even if that is killed"
    assert capsys.readouterr().err == ""


def test_no_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = False
    with keep_awake():
        done = True
    assert done
    error = capsys.readouterr().err
    assert error.startswith("calib: note: keep_awake: ") and error.count("\n") == 1


def test_helper_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake(tmp_path, "systemd-inhibit", "exit 1")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with keep_awake():
        pass
    assert "systemd-inhibit ended with status 1" in capsys.readouterr().err
