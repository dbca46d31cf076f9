"""The page by which other processes of a host see, without asking, whether a buffer is still registered.

A memfd per owner: 16 random bytes that tell its process from every other, then one number per slot, odd while a buffer
is registered there, never the same twice. Who copies a buffer's memory holds a shared lock on its slot meanwhile (an
open file description's lock: it ends with the descriptor, so also with the process), and the owner, before it lets go
of the memory, changes the number and waits for the exclusive lock.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import struct
from typing import Final

TOKEN_BYTES: Final = 16
NUM_SLOTS: Final = 1 << 16
TABLE_BYTES: Final = TOKEN_BYTES + 8 * NUM_SLOTS

_F_OFD_SETLK: Final = 37
_NUMBER: Final = struct.Struct("<Q")


class Table:
    """The owner's side."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("danaus-buffers", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, TABLE_BYTES)
        self.inode = os.fstat(self.fd).st_ino
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._pages = mmap.mmap(self.fd, TABLE_BYTES)
        self._pages[:TOKEN_BYTES] = self.token
        # Of its own: locks through the descriptor that others open are shared with nobody.
        self._lock_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)

    def number(self, slot: int) -> int:
        """What is written in ``slot``."""
        return _NUMBER.unpack_from(self._pages, _offset(slot))[0]

    def advance(self, slot: int) -> int:
        """Go from free to registered or back; return the new number."""
        number = self.number(slot) + 1
        _NUMBER.pack_into(self._pages, _offset(slot), number)
        return number

    def is_unused(self, slot: int) -> bool:
        """Whether no other process is copying memory of ``slot`` just now."""
        if not _lock(self._lock_fd, slot, fcntl.F_WRLCK):
            return False
        _lock(self._lock_fd, slot, fcntl.F_UNLCK)
        return True

    def close(self) -> None:
        """Let go of the page; who has it open still sees that the buffers are gone."""
        if self.fd >= 0:
            self._pages[:TOKEN_BYTES] = bytes(TOKEN_BYTES)
            os.close(self._lock_fd)
            os.close(self.fd)
            self.fd = -1
            self._pages.close()


class ForeignTable:
    """Another process's page, opened for one transfer.

    Raises:
        OSError: It cannot be opened, or is not the one meant.
    """

    def __init__(self, pid: int, fd: int, inode: int, token: bytes) -> None:
        path = f"/proc/{pid}/fd/{fd}"
        # O_NONBLOCK: the number may by now stand for a pipe, whose opening would wait.
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        same = (status.st_ino, status.st_size) == (inode, TABLE_BYTES)
        if not same or os.pread(self._fd, TOKEN_BYTES, 0) != token:
            os.close(self._fd)
            raise OSError(errno.ESTALE, "the process has gone, or lives in another pid namespace", path)

    def enter(self, slot: int) -> None:
        """Keep the owner from letting go of what :meth:`is_registered` in ``slot`` from now on."""
        # Refused only while the owner looks whether it may let go: then the number has changed.
        _lock(self._fd, slot, fcntl.F_RDLCK)

    def is_registered(self, slot: int, number: int) -> bool:
        """Whether ``slot`` holds ``number`` still."""
        return os.pread(self._fd, 8, _offset(slot)) == _NUMBER.pack(number)

    def close(self) -> None:
        """Give up the lock, too."""
        os.close(self._fd)


def _offset(slot: int) -> int:
    return TOKEN_BYTES + 8 * slot


def _lock(fd: int, slot: int, kind: int) -> bool:
    """Take or give up the lock of one slot; return False where another has it."""
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, _offset(slot), 8, 0)
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True
