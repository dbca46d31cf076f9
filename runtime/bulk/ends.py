"""The local end of a stream: where the bytes of a transfer go to or come from, in place or through a staging area."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from . import stream
from .serving import staging_for

if TYPE_CHECKING:
    import socket

    from .memory import Memory
    from .progress import Progress


class End(Protocol):
    """Offsets are those within the transfer."""

    itemsize: int
    """A transfer that was cut begins again at a multiple of it."""

    def receive(self, connection: socket.socket, offset: int, length: int, progress: Progress) -> None:
        """Take ``length`` bytes from the connection."""
        ...

    def send(self, connection: socket.socket, offset: int, length: int, progress: Progress) -> None:
        """Give ``length`` bytes to the connection."""
        ...


class Flat:
    """Contiguous host memory."""

    def __init__(self, whole: memoryview, itemsize: int = 1) -> None:
        self._whole, self.itemsize = whole, itemsize

    def receive(self, connection: socket.socket, offset: int, length: int, progress: Progress) -> None:
        """Take the bytes in place."""
        stream.receive(connection, self._whole[offset : offset + length], progress)

    def send(self, connection: socket.socket, offset: int, length: int, progress: Progress) -> None:
        """Give the bytes in place."""
        stream.send(connection, self._whole[offset : offset + length], progress)


class Staged:
    """Strided or CUDA memory: the bytes pass through a staging area, a part at a time."""

    def __init__(self, memory: Memory, size_bytes: int) -> None:
        self._memory, self.itemsize = memory, memory.layout.itemsize
        self._staging = staging_for(memory, size_bytes)

    def receive(self, connection: socket.socket, offset: int, length: int, progress: Progress) -> None:
        """Take parts, and put each in its place."""
        watch = _Stalls(progress)
        for start in range(offset, offset + length, len(self._staging) or 1):
            part = self._staging[: offset + length - start]
            stream.receive(connection, part, watch)
            self._memory.scatter(start, part)
            progress.on_moved(len(part))

    def send(self, connection: socket.socket, offset: int, length: int, progress: Progress) -> None:
        """Collect each part, and send it."""
        for start in range(offset, offset + length, len(self._staging) or 1):
            part = self._staging[: offset + length - start]
            self._memory.gather(start, part)
            stream.send(connection, part, progress)


class _Stalls:
    """A part counts as done once it is in its place, not when it has come."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_moved(self, _size_bytes: int) -> None:
        self._progress.check()

    def on_stall(self) -> None:
        self._progress.on_stall()


def end_for(memory: Memory, size_bytes: int) -> End:
    """The local end for the first ``size_bytes`` of ``memory``."""
    if memory.is_flat:
        return Flat(memory.flat(0, size_bytes), memory.layout.itemsize)
    return Staged(memory, size_bytes)
