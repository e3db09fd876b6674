"""Which library a function that another library calls is taken from, as the dynamic linker of Linux decided."""

import ctypes
import os
from pathlib import Path

#: Tags of a dynamic section (System V ABI): its strings, symbols, jump slots and their size in bytes.
_STRINGS, _SYMBOLS, _JUMP_SLOTS, _JUMP_SLOT_BYTES = 5, 6, 23, 2
#: Bytes of an entry of a 64-bit library's table of symbols, and of its jump slots.
_SYMBOL, _RELOCATION = 24, 24
_LINK_MAP = 2  # dlinfo's request RTLD_DI_LINKMAP


class _LinkMap(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("dynamic", ctypes.POINTER(ctypes.c_size_t)),
    )


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("library", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def provider(library: Path, function: str) -> Path | None:
    """The library that ``function`` is taken from when ``library`` calls it.

    None where ``library`` is not loaded, does not call it, or is of a kind that is not known here.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    linker = ctypes.CDLL(None)
    try:
        handle = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_NOLOAD)._handle
        found = ctypes.POINTER(_LinkMap)()
        if linker.dlinfo(ctypes.c_void_p(handle), _LINK_MAP, ctypes.byref(found)):
            return None
        slot = _jump_slot(found.contents, function.encode())
    except (OSError, AttributeError, KeyError):
        return None
    symbol = _Symbol()
    if slot is None or not linker.dladdr(ctypes.c_void_p.from_address(slot), ctypes.byref(symbol)):
        return None
    path = Path(os.fsdecode(symbol.library)).resolve()
    return None if path == library.resolve() else path  # its own stub: not bound before the first call


def _jump_slot(linked: _LinkMap, function: bytes) -> int | None:
    """Address of the pointer by which a loaded library calls ``function``."""
    tags, entry = {}, 0
    while tag := linked.dynamic[entry]:
        tags[tag] = linked.dynamic[entry + 1]
        entry += 2
    if tags[_STRINGS] < linked.base:
        return None  # not glibc, which replaces these offsets by addresses
    for slot in range(tags[_JUMP_SLOTS], tags[_JUMP_SLOTS] + tags[_JUMP_SLOT_BYTES], _RELOCATION):
        offset, info = (ctypes.c_uint64 * 2).from_address(slot)
        name = ctypes.c_uint32.from_address(tags[_SYMBOLS] + _SYMBOL * (info >> 32)).value
        if ctypes.string_at(tags[_STRINGS] + name) == function:
            return int(linked.base + offset)
    return None
