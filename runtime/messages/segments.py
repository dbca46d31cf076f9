"""Shared memory for large buffers between the processes of one host: the sender's pool, and what else users import.

The sender copies buffers into a segment of its :class:`SegmentPool` and sends the :class:`SegmentRef`; the receiver
maps the segment once (:class:`SegmentCache`) and hands out read-only views. The lease that keeps the sender from
overwriting the segment goes back with the last of those views. Segments are reused because the first touch of fresh
memory costs several times the copy itself. Neither class survives a fork: a child starts empty and returns no lease of
its parent.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..host.admission import available_memory_bytes
from .segment_cache import CacheStats, SegmentCache
from .segment_memory import (
    MIN_SEGMENT_BYTES,
    Mapping,
    Segment,
    SegmentRef,
    empty_in_children,
    segments_available,
    segments_unavailable_reason,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "ALIGNMENT_BYTES",
    "MIN_SEGMENT_BYTES",
    "CacheStats",
    "Lent",
    "PoolStats",
    "SegmentCache",
    "SegmentPool",
    "SegmentRef",
    "segments_available",
    "segments_unavailable_reason",
]

# A cache line, and enough for every vector unit: views start aligned for any dtype.
ALIGNMENT_BYTES = 64
# A free segment may be this many times larger than what it is used for.
_MAX_WASTE = 4


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool holds at this moment, and what it has done since it was made."""

    segments: int
    free_segments: int
    total_bytes: int
    free_bytes: int
    max_bytes: int
    leases: int
    copies: int
    copied_bytes: int
    reused: int
    """Copies that found a warm segment."""
    refused: int
    """Copies that found no room: the caller sent inline."""


@dataclass(frozen=True, slots=True)
class Lent:
    """The memory of a lease, for its own process to read."""

    view: memoryview
    mapping: Mapping
    """What the view lies in; it does not keep it."""


class SegmentPool:
    """The sender's segments: bounded, reused, leased to holders.

    Every method may be called from any thread, but not from a finalizer: they take a lock. A pool that is no longer
    needed must be closed; the end of its process does that too.

    Args:
        max_bytes: sum of all segments; default a quarter of the memory available at the first copy.
        max_segments: bound on the number of segments, each of which costs one descriptor.
        keep_bytes: free segments up to this sum stay warm for ``keep_s``, those beyond it only for ``idle_s``.
    """

    def __init__(
        self,
        *,
        max_bytes: int | None = None,
        max_segments: int = 256,
        keep_bytes: int = 256 << 20,
        idle_s: float = 5.0,
        keep_s: float = 60.0,
    ) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes}: give a size in bytes, or 0 to send everything inline")
        self._max_bytes, self._max_segments = max_bytes, max_segments
        self._keep_bytes, self._idle_s, self._keep_s = keep_bytes, idle_s, keep_s
        self._reset()
        empty_in_children(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._ids = itertools.count(1)
        self._segments: dict[int, Segment] = {}
        self._leases: dict[int, _Lease] = {}
        self._copies = self._copied_bytes = self._reused = self._refused = 0

    def copy_in(self, views: Sequence[Any], *, holders: Iterable[str]) -> SegmentRef | None:
        """Copy ``views`` (C-contiguous buffers) into one segment and lease it to ``holders``.

        A name given n times (a process that will open the ref n times) releases n times. Copies of 1 MiB and more let
        other threads run.

        Returns:
            The ref to send, or None where there is no room: send the buffers inline.

        Raises:
            ValueError: no holders.
            TypeError: a buffer that is not C-contiguous.
        """
        if isinstance(holders, str):
            raise TypeError(f"copy_in: holders={holders!r} is one string; give a list of names")
        wanted = Counter(holders)
        if not wanted:
            raise ValueError("copy_in needs at least one holder: a lease without one would never end")
        flat = [_as_bytes(view) for view in views]
        extents, total_bytes = _lay_out([len(view) for view in flat])
        reserved = self._reserve(total_bytes, wanted)
        if reserved is None:
            return None
        segment, lease_id = reserved
        mapping = segment.mapping  # close() may drop the segment's own reference while we copy
        try:
            for view, (offset, length) in zip(flat, extents, strict=True):
                mapping.write(offset, view, length)
        except BaseException:
            self._end(lease_id, lambda lease: lease.holders.clear())
            raise
        finally:
            self._end(lease_id, _Lease.on_written)
        return SegmentRef(os.getpid(), segment.fd, segment.inode, segment.segment_id, segment.size, lease_id, extents)

    def release(self, lease_id: int, holder: str) -> bool:
        """Note that ``holder`` has let go once. Return False where it held nothing (a late or repeated release)."""
        return self._end(lease_id, lambda lease: lease.on_release(holder))

    def add_holder(self, lease_id: int, holder: str) -> bool:
        """Lease what is leased already to one more. Return False where the lease has ended."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is not None:
                lease.holders[holder] += 1
            return lease is not None

    def lend(self, lease_id: int, size_bytes: int, holder: str) -> Lent | None:
        """Lease to one more, in this process, who reads the first bytes. Return None where the lease has ended."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None:
                return None
            lease.holders[holder] += 1
            mapping = lease.segment.mapping
            return Lent(mapping.view(0, size_bytes), mapping)

    def is_leased(self, lease_id: int) -> bool:
        """Whether anybody holds the lease."""
        return lease_id in self._leases

    def rename_holder(self, old: str, new: str) -> None:
        """What ``old`` held is held by ``new``."""
        with self._lock:
            for lease in self._leases.values():
                if old in lease.holders:
                    lease.holders[new] += lease.holders.pop(old)

    def release_holder(self, holder: str) -> int:
        """End everything that the dead ``holder`` held. Return the number of leases it held."""
        with self._lock:
            held = [lease_id for lease_id, lease in self._leases.items() if holder in lease.holders]
        return sum(self._end(lease_id, lambda lease: lease.on_holder_lost(holder)) for lease_id in held)

    def trim(self, *, now_s: float) -> int:
        """Give idle segments back to the system. Call it now and then; return the bytes given back."""
        with self._lock:
            idle = [segment for segment in self._segments.values() if segment.lease_id is None]
            for segment in idle:
                segment.idle_since_s = now_s if segment.idle_since_s is None else segment.idle_since_s
            dropped = list[Segment]()
            free_bytes = sum(segment.size for segment in idle)
            for segment in sorted(idle, key=lambda s: (s.idle_since_s or 0.0, -s.size)):
                idle_s = now_s - (segment.idle_since_s or 0.0)
                if idle_s < (self._idle_s if free_bytes > self._keep_bytes else self._keep_s):
                    continue
                free_bytes -= segment.size
                dropped.append(self._segments.pop(segment.segment_id))
        return _free(dropped)

    def stats(self) -> PoolStats:
        """Count what there is."""
        with self._lock:
            free = [segment.size for segment in self._segments.values() if segment.lease_id is None]
            return PoolStats(
                segments=len(self._segments),
                free_segments=len(free),
                total_bytes=sum(segment.size for segment in self._segments.values()),
                free_bytes=sum(free),
                max_bytes=self._limit_bytes(),
                leases=len(self._leases),
                copies=self._copies,
                copied_bytes=self._copied_bytes,
                reused=self._reused,
                refused=self._refused,
            )

    def close(self) -> None:
        """Drop every segment. Views that receivers already hold stay valid; ``copy_in`` returns None from now on."""
        with self._lock:
            segments, self._segments, self._leases = list(self._segments.values()), {}, {}
            self._closed = True
        _free([segment for segment in segments if segment.lease_id is None])
        for segment in segments:
            segment.close()

    def forget_after_fork(self) -> None:
        """Start empty, in a child: the segments are the parent's, and its lock may have been held at the fork."""
        inherited = list(self._segments.values())
        self._reset()
        for segment in inherited:
            segment.close()

    def _limit_bytes(self) -> int:
        if self._max_bytes is None:
            self._max_bytes = available_memory_bytes() // 4
        return self._max_bytes

    def _reserve(self, total_bytes: int, holders: Counter[str]) -> tuple[Segment, int] | None:
        evicted: list[Segment] = []
        try:
            with self._lock:
                segment = None if self._closed else self._find_or_create(_size_class(total_bytes), evicted)
                if segment is None:
                    self._refused += 1
                    return None
                lease_id = next(self._ids)
                self._leases[lease_id] = _Lease(segment, holders)
                self._copies += 1
                self._copied_bytes += total_bytes
                self._reused += segment.warm
                segment.lease_id, segment.idle_since_s, segment.warm = lease_id, None, True
                return segment, lease_id
        finally:
            _free(evicted)

    def _find_or_create(self, size: int, evicted: list[Segment]) -> Segment | None:
        """Prefer a free segment that fits well, then a new one (in the place of free ones), then any that fits."""
        free = sorted((s for s in self._segments.values() if s.lease_id is None), key=lambda s: s.size)
        fitting = next((s for s in free if s.size >= size), None)
        if fitting is not None and fitting.size <= size * _MAX_WASTE:
            return fitting
        used_bytes = sum(s.size for s in self._segments.values())
        if not self._has_room(size, used_bytes - sum(s.size for s in free), len(self._segments) - len(free)):
            return None
        if fitting is not None and not self._has_room(size, used_bytes, len(self._segments)):
            return fitting
        for segment in free:
            if self._has_room(size, used_bytes, len(self._segments)):
                break
            used_bytes -= segment.size
            evicted.append(self._segments.pop(segment.segment_id))
        try:
            segment = Segment(next(self._ids), size)
        except OSError:
            # Out of descriptors or memory: inline is slower, and works.
            return None
        self._segments[segment.segment_id] = segment
        return segment

    def _has_room(self, size: int, used_bytes: int, num_segments: int) -> bool:
        return used_bytes + size <= self._limit_bytes() and num_segments < self._max_segments

    def _end(self, lease_id: int, event: Callable[[_Lease], bool | None]) -> bool:
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None:
                return False
            counted = event(lease) is not False
            if not lease.holders and not lease.writing:
                del self._leases[lease_id]
                lease.segment.lease_id = None
            return counted


@dataclass(slots=True)
class _Lease:
    segment: Segment
    holders: Counter[str]
    # Until the copy is done, the segment stays leased even where every holder has died.
    writing: bool = True

    def on_written(self) -> None:
        self.writing = False

    def on_release(self, holder: str) -> bool:
        if holder not in self.holders:
            return False
        self.holders[holder] -= 1
        if not self.holders[holder]:
            del self.holders[holder]
        return True

    def on_holder_lost(self, holder: str) -> bool:
        return self.holders.pop(holder, None) is not None


def _as_bytes(view: Any) -> memoryview:
    raw = memoryview(view)
    if not raw.c_contiguous:
        raise TypeError(f"copy_in: a buffer of shape {raw.shape} is not C-contiguous; copy it first")
    # A view with a zero in its shape cannot be cast.
    return raw.cast("B") if raw.nbytes else memoryview(b"")


def _lay_out(lengths: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], int]:
    extents, end = list[tuple[int, int]](), 0
    for length in lengths:
        offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        extents.append((offset, length))
        end = offset + length
    return tuple(extents), end


def _size_class(size_bytes: int) -> int:
    """Round up to one of four steps per power of two: at most a quarter is wasted, and sizes recur."""
    if size_bytes <= MIN_SEGMENT_BYTES:
        return MIN_SEGMENT_BYTES
    step = 1 << ((size_bytes - 1).bit_length() - 3)
    return -(-size_bytes // step) * step


def _free(segments: Sequence[Segment]) -> int:
    """Free unleased segments; outside the pool's lock, because freeing 64 MiB of pages takes milliseconds."""
    for segment in segments:
        segment.free_pages()
        segment.close()
    return sum(segment.size for segment in segments)
