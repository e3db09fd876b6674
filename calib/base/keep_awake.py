"""Keep the machine from sleeping while work goes on."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from calib.base.progress import note

SECONDS_TO_FAIL = 0.3


def _command() -> list[str] | None:
    """What holds sleep off until this process ends, however it ends; None where the system offers nothing."""
    pid = str(os.getpid())
    if sys.platform == "darwin":
        return ["caffeinate", "-i", "-s", "-w", pid]
    if sys.platform == "linux":
        why = ["--what=idle:sleep", "--who=calib", "--why=drawing images", "--mode=block"]
        return ["systemd-inhibit", *why, "tail", f"--pid={pid}", "-f", "/dev/null"]
    return None


@contextmanager
def keep_awake() -> Iterator[None]:
    """The machine does not fall asleep in this context, where the system lets calib ask for that; else a note says so.

    A laptop whose lid is closed sleeps nevertheless, unless it is on power with a display.
    """
    command = _command()
    if command is None or shutil.which(command[0]) is None:
        note("keep_awake: nothing found that holds sleep off (caffeinate, systemd-inhibit); keep it awake yourself")
        yield
        return
    # A session of its own: an interrupt from the keyboard must not reach it, and it is ended with its child.
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(SECONDS_TO_FAIL)
            note(f"keep_awake: {command[0]} ended with status {status}; the machine may fall asleep")
        yield
    finally:
        with suppress(OSError):  # gone already; macOS says of an ended one that it may not
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
