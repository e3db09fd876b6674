"""Keep freed memory in the process, for MLX on a Linux CPU.

MLX asks the C library for each array, and glibc gives those of some megabytes back to the system as soon as they are
freed: a sixth of a forward pass of the emoji model was the kernel's clearing of pages.
"""

import ctypes
from functools import cache

#: Of glibc's malloc.h; larger requests than the second are always given back.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST, _LITTLE = 256 << 20, 32 << 20, 1 << 20


def keep_freed(much: bool = True) -> None:
    """Let up to 256 MB stay with the process, where its C library is glibc; unless ``much`` next to nothing."""
    library = _library()
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGEST if much else _LITTLE)
        library.mallopt(_TRIM_THRESHOLD, _KEPT if much else _LITTLE)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
