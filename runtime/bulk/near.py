"""Copies between this process and another of its host, by the kernel, without the other's help.

Before and after each part the other process is known to be the one meant (its table says so, its pidfd says that it
lives, so its pid cannot have been given to another), and the buffer to be registered; its owner does not let go of the
memory meanwhile, see table.py.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from . import stream, vm
from .errors import BufferDropped, TransferError
from .layout import Layout, contiguous
from .memory import address_of
from .serving import staging_for
from .table import ForeignTable

if TYPE_CHECKING:
    from .handle import Handle
    from .memory import Memory
    from .progress import Progress

CHUNK_BYTES: Final = 64 << 20
"""Between parts of this size a copy looks whether it is still wanted: some 5 ms."""

MIN_RUN_BYTES: Final = 1024
"""Strided memory with shorter runs goes through its owner, or a staging area here: each run costs some 200 ns."""


class Unreachable(Exception):  # noqa: N818  names a state; never leaves this package
    """The other process cannot be looked at: it is gone, or in another pid namespace, or this is not permitted."""


class OwnerGone(Exception):  # noqa: N818  names a state; never leaves this package
    """The other process ended."""


class Visit:
    """A look at another process's buffer, which is not let go of until :meth:`close`."""

    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name
        try:
            self._pidfd = os.pidfd_open(handle.pid)
        except OSError as error:
            raise Unreachable(str(error)) from error
        try:
            self._table = ForeignTable(handle.pid, *handle.table)
        except OSError as error:
            os.close(self._pidfd)
            raise Unreachable(str(error)) from error
        try:
            self._table.enter(handle.slot)
            self.check()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise where the process is gone, or the buffer was dropped."""
        if self.has_ended():
            raise OwnerGone
        if not self._table.is_registered(self._handle.slot, self._handle.number):
            raise BufferDropped(self._name)

    def has_ended(self, wait_s: float = 0.0) -> bool:
        """Whether the process has ended, or does so within ``wait_s``."""
        return stream.is_readable(self._pidfd, wait_s)

    def close(self) -> None:
        """End the look."""
        self._table.close()
        os.close(self._pidfd)


def transfer(handle: Handle, offset: int, memory: Memory, progress: Progress, *, is_read: bool) -> None:
    """Copy between the buffer's bytes from ``offset`` on and ``memory``.

    Raises:
        Unreachable: This way is closed; nothing was copied.
        OwnerGone: The owner ended.
        DanausError: It did not succeed.
    """
    visit = Visit(handle, progress.name)
    try:
        if memory.device is None and memory.layout.run_bytes >= min(MIN_RUN_BYTES, memory.layout.size_bytes):
            _copy(visit, handle, (offset, 0), memory.layout, progress, progress.size_bytes, is_read=is_read)
        else:
            _copy_staged(visit, handle, offset, memory, progress, is_read=is_read)
        visit.check()
    finally:
        visit.close()


def _copy(
    visit: Visit, handle: Handle, at: tuple[int, int], ours: Layout, progress: Progress, length: int, *, is_read: bool
) -> None:
    theirs, done = handle.layout, 0
    while done < length:
        visit.check()
        place = at[0] + done, at[1] + done
        try:
            moved = vm.copy(handle.pid, theirs, ours, place, min(length - done, CHUNK_BYTES), is_read=is_read)
        except vm.NotPermitted as error:
            raise Unreachable(str(error)) from error
        except ProcessLookupError as error:
            raise OwnerGone from error
        except OSError as error:
            # A process that ends gives up its memory before it is seen to have ended.
            if visit.has_ended(0.05 if error.errno == errno.EFAULT else 0.0):
                raise OwnerGone from error
            raise TransferError(progress.name, f"{error}; was its memory unmapped without drop()?") from error
        done += moved
        progress.on_moved(moved)


def _copy_staged(
    visit: Visit, handle: Handle, offset: int, memory: Memory, progress: Progress, *, is_read: bool
) -> None:
    staging = staging_for(memory, progress.size_bytes)
    while progress.left_bytes:
        start = progress.done_bytes
        part = staging[: progress.left_bytes]
        ours = contiguous(address_of(part), len(part))
        if not is_read:
            memory.gather(start, part)
        _copy(visit, handle, (offset + start, 0), ours, progress, len(part), is_read=is_read)
        if is_read:
            memory.scatter(start, part)
