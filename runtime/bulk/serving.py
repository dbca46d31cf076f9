"""Answers one request after the other on a connection: checks token and bounds, then moves the bytes."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..messages.buffers import warm
from . import stream
from .protocol import REQUEST_BYTES, Op, ProtocolError, Request, Status, pack_reply, unpack_request

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .lending import Lender
    from .memory import Memory
    from .registry import Registration, Registry

CHUNK_BYTES: Final = 4 << 20
"""What is gathered from strided or CUDA memory at a time."""


class Service:
    """What a server does with its connections. Each connection has a thread of its own.

    Args:
        registry: What is served.
        lender: Returns what lends payloads, if anything was lent.
        on_request: Called with a connection over which a request came that makes sense.
    """

    def __init__(
        self,
        registry: Registry,
        lender: Callable[[], Lender | None],
        on_request: Callable[[socket.socket], None],
    ) -> None:
        self._registry, self._lender, self._on_request = registry, lender, on_request
        self._served: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def has_served(self, connection: socket.socket) -> bool:
        """Whether a request that made sense came over ``connection``."""
        return connection in self._served

    def forget(self, connection: socket.socket) -> None:
        """The connection has ended."""
        self._served.discard(connection)

    def serve_one(self, connection: socket.socket) -> bool:
        """Serve one request; return True where another may follow.

        Raises:
            ProtocolError: What came is no request, or one that the peer may not make.
            OSError: The connection ended, or nothing came in time.
        """
        request = unpack_request(stream.receive_exactly(connection, REQUEST_BYTES))
        self._served.add(connection)
        self._on_request(connection)
        connection.settimeout(stream.STALL_S)
        if request.op == Op.FETCH:
            self._fetch(connection, request)
        else:
            self._use(connection, request)
        return True

    def _use(self, connection: socket.socket, request: Request) -> None:
        registration = self._registry.find(request.slot, request.number, request.token)
        if registration is None:
            connection.sendall(pack_reply(Status.DROPPED))
            return
        memory = registration.memory
        itemsize, end = memory.layout.itemsize, request.offset + request.length
        if end > memory.size_bytes or request.offset % itemsize or request.length % itemsize:
            self._refuse(connection, f"[{request.offset}, {end}) lies outside its {memory.size_bytes} bytes")
        if request.op == Op.WRITE and not memory.is_writable:
            self._refuse(connection, "it is read-only")
        if request.op == Op.DROP:
            self._registry.close_to_others(registration)
            self._registry.let_go(registration)
            connection.sendall(pack_reply(Status.OK))
            return
        user = self._registry.enter(registration, partial(stream.cut, connection))
        if user is None:
            connection.sendall(pack_reply(Status.DROPPED))
            return
        try:
            self._move(connection, request, registration)
        finally:
            self._registry.leave(registration, user)

    def _move(self, connection: socket.socket, request: Request, registration: Registration) -> None:
        connection.sendall(pack_reply(Status.OK, request.length))
        if request.op == Op.READ:
            _send_from(connection, registration.memory, request.offset, request.length)
            return
        _receive_into(connection, registration.memory, request.offset, request.length)
        if registration.is_dropped:
            raise stream.Cut("the buffer was dropped")
        connection.sendall(pack_reply(Status.OK, request.length))

    def _fetch(self, connection: socket.socket, request: Request) -> None:
        lender = self._lender()
        lent = None if lender is None else lender.enter(request.slot, request.token)
        if lender is None or lent is None:
            connection.sendall(pack_reply(Status.DROPPED))
            return
        try:
            if request.offset + request.length != len(lent.view):
                self._refuse(connection, f"the payload has {len(lent.view)} bytes")
            connection.sendall(pack_reply(Status.OK, request.length))
            stream.send(connection, lent.view[request.offset :])
        finally:
            lender.leave(request.slot)

    @staticmethod
    def _refuse(connection: socket.socket, reason: str) -> None:
        connection.sendall(pack_reply(Status.REFUSED, text=reason))
        raise ProtocolError(reason)


def _send_from(connection: socket.socket, memory: Memory, offset: int, length: int) -> None:
    if memory.is_flat:
        stream.send(connection, memory.flat(offset, length))
        return
    staging = staging_for(memory, length)
    for start in range(offset, offset + length, len(staging) or 1):
        part = staging[: offset + length - start]
        memory.gather(start, part)
        stream.send(connection, part)


def _receive_into(connection: socket.socket, memory: Memory, offset: int, length: int) -> None:
    if memory.is_flat:
        stream.receive(connection, memory.flat(offset, length))
        return
    staging = staging_for(memory, length)
    for start in range(offset, offset + length, len(staging) or 1):
        part = staging[: offset + length - start]
        stream.receive(connection, part)
        memory.scatter(start, part)


def staging_for(memory: Memory, length: int, chunk_bytes: int = CHUNK_BYTES) -> memoryview:
    """Host memory to move a part of ``memory`` through: whole elements; pinned where they come from a GPU."""
    itemsize = memory.layout.itemsize
    size_bytes = min(length, max(itemsize, chunk_bytes // itemsize * itemsize))
    if memory.device is not None:
        import torch

        pinned: Any = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memoryview(pinned).cast("B") if size_bytes else memoryview(bytearray())
    return memoryview(warm(size_bytes)).cast("B")[:size_bytes]
