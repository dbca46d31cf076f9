"""The receiver's side of shared memory: cached mappings, read-only views, and leases that end with the last view."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .segment_memory import Mapping, SegmentRef, empty_in_children, map_foreign

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a receiver has mapped at this moment."""

    mappings: int
    mapped_bytes: int


class SegmentCache:
    """The receiver's mappings of other processes' segments. Every method may be called from any thread.

    Args:
        on_release: called with the ref when the last view of one :meth:`open` has gone. It runs on whatever thread
            dropped it, from the garbage collector at times, in the middle of any code: it must take no lock and call
            nothing that may block. Append to a ``collections.deque`` and send from elsewhere.
        max_mappings: beyond it the least recently used mapping is forgotten (views keep theirs alive).
    """

    def __init__(self, on_release: Callable[[SegmentRef], object], *, max_mappings: int = 1024) -> None:
        self._on_release, self._max_mappings = on_release, max_mappings
        self._lock = threading.Lock()
        self._mappings: OrderedDict[tuple[int, int, int], Mapping] = OrderedDict()
        empty_in_children(self)

    def open(self, ref: SegmentRef) -> list[memoryview]:
        """Return a read-only view of each buffer of ``ref``.

        The views, and arrays built on them, hold the lease together; ``on_release`` follows the last of them.

        Raises:
            OSError: the segment cannot be opened, or is not the one meant (its sender has gone): no lease is held then,
                and a live sender can be asked to send inline.
        """
        mapping = self._mapping(ref)
        owner = _owner_type(mapping.size).from_address(mapping.address)
        owner.mapping, owner.ref, owner.pid, owner.on_release = mapping, ref, os.getpid(), self._on_release
        whole = memoryview(owner).cast("B").toreadonly()
        return [whole[offset : offset + length] for offset, length in ref.extents]

    def forget(self, pid: int) -> int:
        """Drop the mappings of a process that has died, so that its memory is freed. Return how many there were."""
        with self._lock:
            gone = [key for key in self._mappings if key[0] == pid]
            for key in gone:
                del self._mappings[key]
        return len(gone)

    def stats(self) -> CacheStats:
        """Count what is mapped."""
        with self._lock:
            return CacheStats(len(self._mappings), sum(mapping.size for mapping in self._mappings.values()))

    def close(self) -> None:
        """Forget every mapping; each is unmapped when its last view has gone."""
        with self._lock:
            self._mappings.clear()

    def forget_after_fork(self) -> None:
        """Start empty, in a child; views that it inherited stay readable, but their leases are the parent's."""
        self._lock = threading.Lock()
        self._mappings = OrderedDict()

    def _mapping(self, ref: SegmentRef) -> Mapping:
        key = (ref.pid, ref.segment_id, ref.inode)
        with self._lock:
            mapping = self._mappings.get(key)
            if mapping is None:
                mapping = self._mappings[key] = map_foreign(ref)
                if len(self._mappings) > self._max_mappings:
                    self._mappings.popitem(last=False)
            self._mappings.move_to_end(key)
            return mapping


class _LeaseEnd:
    """What the views of one lease hold on to, and what hears that they have gone.

    Before Python 3.12 no pure Python class can export a buffer. A ctypes array at an address can; every view and array
    on it keeps it alive; and a class made of both, unlike a bare array, has attributes and a ``__del__``.
    """

    mapping: Mapping
    ref: SegmentRef
    pid: int
    on_release: Callable[[SegmentRef], object]
    # Looked up here, because module globals may be gone when the interpreter ends.
    _getpid = staticmethod(os.getpid)

    def __del__(self) -> None:
        if self.pid == self._getpid():
            self.on_release(self.ref)


@functools.lru_cache(maxsize=256)
def _owner_type(size: int) -> Any:
    return type("SegmentLease", (_LeaseEnd, ctypes.c_char * size), {})
