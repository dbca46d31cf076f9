"""Nameless shared memory, the ref that names it in a message, and opening it from another process of the host.

A segment is a memfd. Another process of the same user opens it as ``/proc/<pid>/fd/<fd>``, which the kernel permits
between processes of one user, and checks inode and size against the ref, so that a number used again is noticed.
Nothing has a name in a file system, so a crash leaks nothing.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_SEGMENT_BYTES = 64 << 10
# A copy of this size or more must not hold the GIL: 1 MiB takes 20 us warm and up to 3 ms at first touch.
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Where a message's buffers lie: a segment of process ``pid``, and the lease that holds it."""

    pid: int
    fd: int
    inode: int
    segment_id: int
    segment_bytes: int
    lease_id: int
    extents: tuple[tuple[int, int], ...]
    """(offset, length) of each buffer, in bytes."""

    def pack(self) -> tuple[Any, ...]:
        """Return plain integers and tuples, for msgpack."""
        return (self.pid, self.fd, self.inode, self.segment_id, self.segment_bytes, self.lease_id, self.extents)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> SegmentRef:
        """Rebuild a ref from :meth:`pack`'s result, lists in place of tuples allowed.

        Raises:
            ValueError: the value is no packed ref, or an extent lies outside the segment.
        """
        try:
            *head, extents = packed
            pid, fd, inode, segment_id, segment_bytes, lease_id = (int(number) for number in head)
            spans = tuple((int(offset), int(length)) for offset, length in extents)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a packed SegmentRef: {packed!r}") from error
        for offset, length in spans:
            if offset < 0 or length < 0 or offset + length > segment_bytes:
                raise ValueError(f"buffer [{offset}, +{length}) lies outside its segment of {segment_bytes} bytes")
        return cls(pid, fd, inode, segment_id, segment_bytes, lease_id, spans)


def segments_available() -> bool:
    """Tell whether this process can make segments and open them through /proc. Looked up once."""
    return segments_unavailable_reason() is None


@functools.cache
def segments_unavailable_reason() -> str | None:
    """Say why there are no shared segments here, or return None where there are."""
    if not hasattr(os, "memfd_create"):
        return "os.memfd_create is missing: it needs Linux and a Python built against glibc 2.27 or later"
    try:
        segment = Segment(1, MIN_SEGMENT_BYTES)
    except OSError as error:
        return f"cannot create shared memory: {error}"
    try:
        map_foreign(SegmentRef(os.getpid(), segment.fd, segment.inode, 1, segment.size, 1, ()))
    except OSError as error:
        return f"cannot open another process's segment through /proc: {error}"
    finally:
        segment.close()
    return None


class Mapping:
    """Mapped pages, unmapped with the last reference.

    mmap(2) itself and not the mmap module: that keeps a descriptor per mapping, and a read-only mmap object cannot be
    exported by the ctypes arrays that carry the leases.
    """

    def __init__(self, fd: int, size: int, prot: int) -> None:
        address = _libc.mmap(None, size, prot, mmap.MAP_SHARED, fd, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, f"mmap of {size} bytes of shared memory: {os.strerror(code)}")
        self.address, self.size = int(address), size
        self._pages = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")
        self._munmap = _libc.munmap  # module globals may be gone when the interpreter ends

    def __del__(self) -> None:
        if hasattr(self, "_munmap"):
            self._munmap(self.address, self.size)

    def write(self, offset: int, source: memoryview, length: int) -> None:
        """Copy ``source`` to ``offset``; with the GIL released where it is large and its address can be had."""
        if length >= _CHUNK_BYTES and not source.readonly:
            export = ctypes.c_char.from_buffer(source)
            ctypes.memmove(self.address + offset, ctypes.addressof(export), length)
            return
        for start in range(0, length, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, length)
            self._pages[offset + start : offset + end] = source[start:end]

    def view(self, offset: int, length: int) -> memoryview:
        """A part of the pages, which whoever reads it has to keep mapped."""
        return self._pages[offset : offset + length]


class Segment:
    """One memfd of the sender, mapped for writing."""

    def __init__(self, segment_id: int, size: int) -> None:
        self.segment_id, self.size = segment_id, size
        self.lease_id: int | None = None
        self.idle_since_s: float | None = None
        self.warm = False
        self.fd = os.memfd_create("danaus", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self.inode = os.fstat(self.fd).st_ino
            self.mapping = Mapping(self.fd, size, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(self.fd)
            raise

    def free_pages(self) -> None:
        """Give the memory back although receivers still map the (unleased) segment: they would read zeros."""
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, self.size)

    def close(self) -> None:
        """Close the descriptor and unmap, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            del self.mapping


def map_foreign(ref: SegmentRef) -> Mapping:
    """Map another process's segment for reading.

    Raises:
        OSError: it cannot be opened, or is not the one meant.
    """
    path = f"/proc/{ref.pid}/fd/{ref.fd}"
    # O_NONBLOCK: the number may by now stand for a pipe, whose opening would wait.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if (found.st_ino, found.st_size) != (ref.inode, ref.segment_bytes):
            text = f"inode {found.st_ino} of {found.st_size} bytes, not {ref.inode} of {ref.segment_bytes}: the sender"
            raise OSError(errno.ESTALE, f"{text} has gone, or lives in another pid namespace", path)
        return Mapping(fd, ref.segment_bytes, mmap.PROT_READ)
    finally:
        os.close(fd)


class StartsEmptyInChild(Protocol):
    """What must not be used by a forked child."""

    def forget_after_fork(self) -> None:
        """Drop what belongs to the parent."""
        ...


def empty_in_children(thing: StartsEmptyInChild) -> None:
    """Call ``thing.forget_after_fork()`` in every child forked from now on, while ``thing`` lives."""
    _not_inherited.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_not_inherited):
        thing.forget_after_fork()


_not_inherited: weakref.WeakSet[StartsEmptyInChild] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork_in_child)

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
