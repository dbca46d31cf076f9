"""Private memory that stays warm: received tensors are copied into it, and it is used again once they are gone.

Touching fresh pages costs several times more than a copy, so a buffer goes back to a bounded pool when the last
reference to it has gone.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import defaultdict
from typing import Any, Final

POOLED_FROM_BYTES: Final = 1 << 20
"""Smaller buffers come from the allocator, which keeps them warm itself."""

KEEP_BYTES: Final = 512 << 20
"""How much idle memory the pool may keep."""

_free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)


def warm(size_bytes: int) -> Any:
    """Return a writable buffer of ``size_bytes``, preferably of memory that was touched before."""
    if size_bytes < POOLED_FROM_BYTES:
        return bytearray(size_bytes)
    capacity = 1 << (size_bytes - 1).bit_length()
    try:
        memory = _free[capacity].pop()
    except IndexError:
        memory = mmap.mmap(-1, capacity)
    owner = (ctypes.c_char * size_bytes).from_buffer(memory)
    # May run on any thread, within a garbage collection: list.append takes no lock of ours.
    weakref.finalize(owner, _give_back, capacity, memory).atexit = False
    return owner


def _give_back(capacity: int, memory: mmap.mmap) -> None:
    if sum(size * len(free) for size, free in list(_free.items())) + capacity <= KEEP_BYTES:
        _free[capacity].append(memory)
