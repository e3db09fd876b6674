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
    """The command that prevents sleep until this process ends, however it ends; None where there is none."""
    pid = str(os.getpid())
    if sys.platform == "darwin":
        return ["caffeinate", "-i", "-s", "-w", pid]
    if sys.platform == "linux":
        why = ["--what=idle:sleep", "--who=calib", "--why=drawing images", "--mode=block"]
        return ["systemd-inhibit", *why, "tail", f"--pid={pid}", "-f", "/dev/null"]
    return None


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep the machine from falling asleep within the context; prints a note where the system offers no way.

    A laptop whose lid is closed sleeps nevertheless, unless it is on power with a display.
    """
    command = _command()
    if command is None or shutil.which(command[0]) is None:
        note("keep_awake: nothing found that holds sleep off (caffeinate, systemd-inhibit); keep it awake yourself")
        yield
        return
    # In a session of its own, which an interrupt from the keyboard does not reach and which is ended as a whole.
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(SECONDS_TO_FAIL)
            note(f"keep_awake: {command[0]} ended with status {status}; the machine may fall asleep")
        yield
    finally:
        with suppress(OSError):  # it has ended already, which macOS reports as a lack of permission
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
