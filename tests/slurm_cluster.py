"""A real SLURM of four nodes on this one host, for tests: ``python tests/slurm_cluster.py start DIR`` and ``stop DIR``.

It needs root and Debian's ``slurm-wlm`` and ``munge``: configuration, keys, logs and state lie in a folder
of their own, ports are free ones, and no systemd, cgroup or database takes part. Where there is no accounting database
``sacct``, which submitit asks how jobs ended, has nothing to say: a stand-in reads it off the controller's own list.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NODES, CPUS = 4, 1
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
START_SECONDS, STOP_SECONDS = 30, 15

CONFIG = """\
ClusterName=calib
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
# A job that was requeued waits until credentials of its former self have expired: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups, which a container may not have: processes are found by their parents, and no processor is bound.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Nodes have the processors that are named here, whatever the host has.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait=2
# Ended jobs are remembered for so long: what the stand-in of sacct reads.
MinJobAge=600
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

SACCT = """\
#!/bin/sh
# Stands in for sacct: submitit calls sacct -o JobID,State,NodeList --parsable2 -j ID …
echo 'JobID|State|NodeList'
exec squeue --array --states=all --noheader --format='%i|%T|%N'
"""


class NoSlurm(Exception):
    """Why no SLURM runs here."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster in ``folder``."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to talk to it."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def run(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """The state of every job that the controller knows, by id; those of an array each as ID_INDEX."""
        lines = self.run("squeue", "--array", "--states=all", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def processes(self) -> dict[int, dict[str, str]]:
        """Environments of the processes that belong to jobs, by process id."""
        found = {}
        mine = f"SLURM_CONF={self.folder / 'slurm.conf'}"
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):  # it has ended
                    words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    if mine in words:
                        found[int(entry.name)] = dict(word.split("=", 1) for word in words if "=" in word)
        return {pid: own for pid, own in found.items() if "SLURM_JOB_ID" in own}


def why_not() -> str | None:
    """What keeps a cluster from starting here; None where nothing is known to."""
    if sys.platform != "linux":
        return "SLURM runs on Linux"
    if os.geteuid():
        return "starting SLURM needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"no {', '.join(missing)}; apt-get install --no-install-recommends slurm-wlm munge"
    return None


def start(folder: Path, with_this_process: bool = False) -> Cluster:
    """Start a cluster in ``folder``, which must be empty; raises NoSlurm where it does not come up.

    Args:
        with_this_process: end the daemons when this process ends, however it does.
    """
    if reason := why_not():
        raise NoSlurm(reason)
    folder = folder.resolve()
    cluster = Cluster(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "bin", *(f"spool-n{i + 1}" for i in range(NODES))):
        (folder / name).mkdir()
    _write_private(folder / "munge.key", os.urandom(1024))
    (folder / "bin" / "sacct").write_text(SACCT)
    (folder / "bin" / "sacct").chmod(0o755)
    controller, *ports = _free_ports(NODES + 1)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            folder=folder,
            host=socket.gethostname().partition(".")[0],
            controller=controller,
            nodes=NODES,
            cpus=CPUS,
            ports=f"[{','.join(map(str, ports))}]",
        )
    )
    config = str(folder / "slurm.conf")
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    daemons = {
        "munged": ["--foreground", "--force", *(f"--{flag}={folder / name}" for flag, name in files.items())],
        "slurmctld": ["-D", "-c", "-f", config],
        **{f"slurmd-n{i + 1}": ["-D", "-f", config, "-N", f"n{i + 1}"] for i in range(NODES)},
    }
    tied = ["setpriv", "--pdeathsig", "KILL"] if with_this_process else []
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, arguments in daemons.items():
            program = shutil.which(name.partition("-")[0])
            assert program is not None
            with open(folder / f"{name}.out", "wb") as out:
                started[name] = subprocess.Popen(
                    [*tied, program, *arguments],
                    cwd=folder,
                    env=cluster.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            (folder / "pids.json").write_text(json.dumps({key: process.pid for key, process in started.items()}))
            if name == "munged":
                _until(lambda: (folder / "munge.socket").exists(), started, folder, "munged")
        _until(lambda: _idle_nodes(cluster) == NODES, started, folder, "slurmctld")
    except BaseException:
        stop(folder)
        raise
    return cluster


def _write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _idle_nodes(cluster: Cluster) -> int:
    with contextlib.suppress(RuntimeError):
        return cluster.run("sinfo", "--Node", "--noheader", "--format=%t").split().count("idle")
    return 0


def _until(
    condition: Callable[[], bool], started: dict[str, "subprocess.Popen[bytes]"], folder: Path, waiting_for: str
) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        ended = [name for name, process in started.items() if process.poll() is not None]
        if ended or time.monotonic() > end:
            name = (ended or [waiting_for])[0]
            what = "ended" if ended else f"did not come up in {START_SECONDS} s"
            raise NoSlurm(f"{name} {what}: {_last_line(folder, name)}")
        time.sleep(0.1)


def _last_line(folder: Path, name: str) -> str:
    for suffix in (".log", ".out"):
        path = folder / f"{name}{suffix}"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        if lines:
            return lines[-1]
    return "it logged nothing"


def stop(folder: Path) -> None:
    """End the jobs and the daemons of the cluster in ``folder``; the folder stays."""
    folder = folder.resolve()
    cluster = Cluster(folder)
    pids: dict[str, int] = json.loads((folder / "pids.json").read_text()) if (folder / "pids.json").exists() else {}
    for pid in cluster.processes():
        _signal(pid, signal.SIGKILL)
    ours = {name: pid for name, pid in pids.items() if _is_daemon(pid, name)}
    for pid in reversed(ours.values()):
        _signal(pid, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while (left := [pid for name, pid in ours.items() if _is_daemon(pid, name)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in [*left, *cluster.processes()]:
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_daemon(pid: int, name: str) -> bool:
    """Whether a process lives and is what was started under ``name``: the number may have gone to another since."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return name.partition("-")[0].encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster in a folder of its own; both are gone afterwards, and the daemons even if this process is killed."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        cluster = start(folder, with_this_process=True)
        try:
            yield cluster
        finally:
            stop(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[0] not in ("start", "stop"):
        sys.exit("usage: python tests/slurm_cluster.py start|stop DIR")
    folder = Path(arguments[1])
    if arguments[0] == "stop":
        stop(folder)
        return
    try:
        cluster = start(folder)
    except NoSlurm as error:
        sys.exit(f"no SLURM: {error}")
    environment = cluster.environment
    print(f"export SLURM_CONF={environment['SLURM_CONF']} PATH={cluster.folder / 'bin'}:$PATH")


if __name__ == "__main__":
    main(sys.argv[1:])
