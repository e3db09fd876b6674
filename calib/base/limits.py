"""How much memory the system lets this process have, where it limits that."""

import math
import resource
from pathlib import Path

#: Files with the limits of a control group of Linux, of version 2 (above ``high`` it is stopped until it has less), and
#: of version 1.
FILES = {2: ("memory.max", "memory.high"), 1: ("memory.limit_in_bytes",)}

#: Version 1 says the largest number of whole pages where there is no limit; no machine has as much.
NO_LIMIT = 1 << 60


def of_process() -> float:
    """Bytes of data (``ulimit -d``, ``ulimit -v``); infinity where there is no limit."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=math.inf)


def of_control_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the process's control groups and those around them have at most: of a container, a job, a service.

    Infinity where there is no limit, and no such group.

    Args:
        groups: the file that lists the process's groups.
        root: where they are mounted.
    """
    found = [math.inf]
    for line in _read(groups).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if "memory" in controllers.split(","):
            mounts, names = [root / controllers, root / "memory"], FILES[1]
        elif not controllers:
            mounts, names = [root, root / "unified"], FILES[2]
        else:
            continue
        # In a container the group's name may be that outside, and what is mounted the group itself.
        parts = [part for part in place.split("/") if part and part != ".."]
        folders = [mount.joinpath(*parts[:count]) for mount in mounts for count in range(len(parts) + 1)]
        found += [int(text) for folder in folders for name in names if (text := _read(folder / name).strip()).isdigit()]
    least = min(found)
    return least if least < NO_LIMIT else math.inf


def _read(path: Path) -> str:
    """The text of a file; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
