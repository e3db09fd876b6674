"""Give MLX a fast BLAS on Linux CPU, before MLX is imported.

The mlx-cpu wheel contains the reference BLAS, some 30 times slower than a tuned one, and every dense product runs on
it. The dynamic linker resolves ``cblas_sgemm`` to the first library that exports it globally, so that loading OpenBLAS
or MKL with ``RTLD_GLOBAL`` before ``mlx.core`` suffices; MLX itself stays as it is. Later it is of no use, as Python
lets all functions be resolved when MLX is imported.

``CALIB_BLAS`` overrides the search: a path to a shared library, or ``none`` for the reference BLAS.
"""

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from calib.base.linkage import provider

# Debian and Fedora keep threaded builds in places that the linker's cache does not list first (or at all).
SYSTEM_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib/x86_64-linux-gnu/openblas-openmp/libopenblas.so.0",
    "/usr/lib/aarch64-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",
)

#: What MLX multiplies float32 matrices with.
PRODUCT = "cblas_sgemm"
#: Names of the reference BLAS; Debian calls a fast one so, too, in a folder of its name.
REFERENCE, FAST = re.compile(r"lib(c|ref)?blas\b"), re.compile("openblas|mkl|blis|atlas")


@dataclass(frozen=True)
class BlasStatus:
    """Outcome of the search: ``library`` is the path or soname of what was loaded, or None; ``reason`` is why."""

    library: str | None
    reason: str


def needed() -> bool:
    """Whether MLX computes on a Linux CPU; macOS has Accelerate, and with CUDA the CPU does no heavy work."""
    if sys.platform != "linux":
        return False
    try:
        importlib.metadata.distribution("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def candidates() -> Iterator[str]:
    """Yield shared libraries to try, best first: the system's OpenBLAS, the system's MKL, then pip's MKL."""
    yield from (path for path in SYSTEM_LIBRARIES if Path(path).exists())
    if root := os.environ.get("MKLROOT"):  # set by Intel's own environment script
        yield str(Path(root, "lib", "libmkl_rt.so"))
    # Each search runs ldconfig, so it is left to the case that no library lies in a known place.
    yield from filter(None, map(find_library, ("openblas", "mkl_rt")))
    yield from _pip_mkl()


def _pip_mkl() -> list[str]:
    """MKL's single library to load, where the package of that name is installed."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(Path(str(file.locate())).resolve()) for file in files if file.name.startswith("libmkl_rt.so")]


@cache
def status() -> BlasStatus:
    """Load a BLAS where one is needed, once a process; returns the outcome."""
    if not needed():
        return BlasStatus(None, "not needed on this platform")
    if is_switched_off():
        return BlasStatus(None, "switched off by CALIB_BLAS=none")
    if "mlx.core" in sys.modules:
        bound = bound_library()
        if bound is not None and not _is_reference(bound):
            return BlasStatus(str(bound), "loaded before MLX")
        return BlasStatus(None, "mlx was imported before calib; import calib first")
    wanted, failures = os.environ.get("CALIB_BLAS"), []
    for path in (wanted,) if wanted else candidates():
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            failures.append(f"{path}: {str(error).removeprefix(f'{path}: ')}")
            continue
        if hasattr(library, PRODUCT):
            return BlasStatus(path, "CALIB_BLAS" if wanted else "found")
        failures.append(f"{path}: has no {PRODUCT}")
    return BlasStatus(None, "; ".join(failures) or "no OpenBLAS or MKL found")


def is_switched_off() -> bool:
    """Whether the reference BLAS is wished for, with CALIB_BLAS=none."""
    return os.environ.get("CALIB_BLAS", "").lower() == "none"


def bound_library() -> Path | None:
    """The library that MLX's products run on; None where MLX is not loaded, or that cannot be told."""
    core = getattr(sys.modules.get("mlx.core"), "__file__", None)
    return None if core is None else provider(Path(core).parent / "lib" / "libmlx.so", PRODUCT)


def _is_reference(library: Path) -> bool:
    return bool(REFERENCE.match(library.name)) and not FAST.search(library.parent.name)


def slow() -> str | None:
    """A line with the cause and the remedy where MLX's products run on a reference BLAS by mistake; None: all is well.

    A GPU's products do not; whether there is one is not looked at.
    """
    if not needed() or is_switched_off():
        return None
    found, bound, remedy = status(), bound_library(), ""
    if found.library is None:
        why = found.reason
        if os.environ.get("CALIB_BLAS"):
            remedy = f": unset CALIB_BLAS; if that finds none: {install()}"
        elif "imported before" not in why:
            remedy = f": {install()}"
    elif bound is not None and _is_reference(bound):
        why = f"{bound} was loaded before {found.library}; see to it that nothing loads it, as LD_PRELOAD does"
    else:
        return None
    return f"no fast BLAS ({why}), so products are some 30 times slower{remedy}"


def install() -> str:
    """The commands that install a fast BLAS."""
    return "apt install libopenblas0-pthread" + (", or pip install mkl" if platform.machine() == "x86_64" else "")


#: Functions that set the number of threads of a BLAS, by library.
_SET_THREADS = ("MKL_Set_Num_Threads", "openblas_set_num_threads")
_GET_THREADS = ("MKL_Get_Max_Threads", "openblas_get_num_threads")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit products to ``count`` threads within the context, where the library has a function for that."""
    loaded = status().library
    library = ctypes.CDLL(loaded) if loaded is not None else None
    setter, getter = (_first(library, names) for names in (_SET_THREADS, _GET_THREADS))
    if setter is None or getter is None:
        yield
        return
    before = getter()
    setter(min(count, before))  # a user who set fewer has reasons
    try:
        yield
    finally:
        setter(before)


def _first(library: ctypes.CDLL | None, names: Sequence[str]) -> Callable[..., int] | None:
    return next((getattr(library, name) for name in names if hasattr(library, name)), None)
