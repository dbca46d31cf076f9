"""Asks owners for transfers, over connections that are kept for the next one, and begins again where one was cut."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Final

from ..errors import DanausError
from . import certificate, stream
from .errors import BufferDropped, TransferError
from .protocol import REPLY_BYTES, Op, ProtocolError, Request, Status, unpack_reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ends import End
    from .handle import Endpoint
    from .progress import Progress

CONNECT_S: Final = 5.0
POLL_S: Final = 0.5
"""How often a read that gets nothing looks whether the owner still lives."""

KEEP_S: Final = 10.0
"""How long an unused connection is kept."""

KEEP_PER_OWNER: Final = 4
WRITE_BYTES: Final = 64 << 20
"""A write is confirmed after so many bytes, and begins again at the last confirmed one."""

_FIRST_PAUSE_S: Final = 0.005
_LAST_PAUSE_S: Final = 0.5


class Clients:
    """The connecting half of a process's streams. Every method may be called from any thread.

    Args:
        directory: Returns the job's directory, where its certificate is.
        is_plain: Whether streams between hosts go unencrypted.
        run_at: Has a task run at a time, as ``LocalProc.run_at`` does.

    Attributes:
        is_closed: Whether this process's runtime has ended.
        num_connected: Connections made so far.
    """

    def __init__(
        self, directory: Callable[[], str], *, is_plain: bool, run_at: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self._directory, self._is_plain, self._run_at = directory, is_plain, run_at
        self._lock = threading.Lock()
        self._idle: dict[tuple[Endpoint, int], list[tuple[float, socket.socket]]] = {}
        self._tls: ssl.SSLContext | None = None
        self._prunes = self.is_closed = False
        self.num_connected = 0

    def run(self, endpoint: Endpoint, request: Request, progress: Progress, end: End, *, pid: int = 0) -> None:
        """Carry out a transfer; begin again where the connection is cut, until it succeeds or the time is over.

        Args:
            endpoint: The owner's server.
            request: What is wanted, as a whole.
            progress: Gets how far it came.
            end: This process's memory.
            pid: Process that a unix socket has to lead to.

        Raises:
            DanausError: It did not succeed.
            CalledOff: Nobody wants it any more.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            progress.check()
            done_bytes = progress.done_bytes
            try:
                if self._go_on(endpoint, request, progress, end, pid):
                    return
                continue
            except DanausError:
                raise
            except (OSError, ProtocolError) as error:
                if _is_final(error):
                    raise TransferError(progress.name, f"its owner's server refused the connection: {error}") from error
                progress.last_error = f"{endpoint.host}:{endpoint.port}: {error}" if not pid else str(error)
            progress.done_bytes -= progress.done_bytes % end.itemsize
            progress.check_owner()
            pause_s = _FIRST_PAUSE_S if progress.done_bytes > done_bytes else min(2 * pause_s, _LAST_PAUSE_S)
            progress.pause(pause_s)

    def _go_on(self, endpoint: Endpoint, request: Request, progress: Progress, end: End, pid: int) -> bool:
        """Make one request; return True where nothing is left to do."""
        connection = self._take((endpoint, pid)) or self._connect(endpoint, progress, pid)
        try:
            self._ask(connection, request, progress, end)
        except BaseException:
            stream.close(connection)
            raise
        self._give((endpoint, pid), connection)
        return not progress.left_bytes

    def _ask(self, connection: socket.socket, request: Request, progress: Progress, end: End) -> None:
        done, length = progress.done_bytes, progress.left_bytes
        if request.op == Op.WRITE:
            length = min(length, WRITE_BYTES // end.itemsize * end.itemsize or end.itemsize)
        _limit(connection, progress, stream.STALL_S)
        connection.sendall(request._replace(offset=request.offset + done, length=length).pack())
        _limit(connection, progress, POLL_S)
        self._expect_agreement(connection, progress)
        if request.op == Op.WRITE:
            try:
                _limit(connection, progress, stream.STALL_S)
                end.send(connection, done, length, progress)
                _limit(connection, progress, POLL_S)
                self._expect_agreement(connection, progress)
            except BaseException:
                progress.done_bytes = done
                raise
        elif length:
            end.receive(connection, done, length, progress)

    @staticmethod
    def _expect_agreement(connection: socket.socket, progress: Progress) -> None:
        header = bytearray(REPLY_BYTES)
        stream.receive(connection, memoryview(header), _Waiting(progress))
        status, text_bytes, _ = unpack_reply(bytes(header))
        text = stream.receive_exactly(connection, text_bytes).decode(errors="replace")
        if status == Status.DROPPED:
            raise BufferDropped(progress.name)
        if status == Status.REFUSED:
            raise TransferError(progress.name, f"its owner refused: {text}")

    def _take(self, key: tuple[Endpoint, int]) -> socket.socket | None:
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                connection = idle.pop()[1]
            # Nothing is due on it: what can be read is its end.
            if not stream.is_readable(connection.fileno()):
                return connection
            stream.close(connection)

    def _give(self, key: tuple[Endpoint, int], connection: socket.socket) -> None:
        now_s = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(key, [])
            if not self.is_closed and len(idle) < KEEP_PER_OWNER:
                idle.append((now_s, connection))
                has_timer, self._prunes = self._prunes, True
            else:
                stream.close(connection)
                return
        if not has_timer:
            self._run_at(now_s + KEEP_S, self._prune)

    def _prune(self) -> None:
        """Close what has not been used for a while (I/O thread)."""
        now_s = time.monotonic()
        with self._lock:
            for key, idle in list(self._idle.items()):
                old = [entry for entry in idle if now_s - entry[0] >= KEEP_S]
                for entry in old:
                    idle.remove(entry)
                    stream.close(entry[1])
                if not idle:
                    del self._idle[key]
            self._prunes = bool(self._idle)
        if self._prunes:
            self._run_at(now_s + KEEP_S / 2, self._prune)

    def _connect(self, endpoint: Endpoint, progress: Progress, pid: int) -> socket.socket:
        limit_s = min(CONNECT_S, stream.remaining_s(progress.deadline_s) + 0.001)
        if pid:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        elif not endpoint.port:
            reason = "its owner cannot be reached from other hosts: its job has no certificate (tls.pem)"
            raise TransferError(progress.name, reason)
        elif endpoint.scheme == "tcp" and not self._is_plain:
            reason = "its owner sends unencrypted (DANAUS_PLAIN_BULK), which is not switched on here"
            raise TransferError(progress.name, reason)
        else:
            connection = socket.create_connection((endpoint.host, endpoint.port), limit_s)
        try:
            connection.settimeout(limit_s)
            if pid:
                connection.connect(f"\0{endpoint.unix}")
                _check_peer(connection, pid)
            elif endpoint.scheme != "tcp":
                connection = stream.wrapped(self._context(progress.name), connection, is_server=False)
                connection.do_handshake()
            stream.prepare(connection)
        except BaseException:
            stream.close(connection)
            raise
        self.num_connected += 1
        return connection

    def _context(self, name: str) -> ssl.SSLContext:
        if self._tls is None:
            directory = self._directory()
            if not certificate.exists(directory):
                reason = "this process's job has no certificate (tls.pem): it reaches no other host"
                raise TransferError(name, reason)
            self._tls = certificate.contexts(directory)[1]
        return self._tls

    def close(self) -> None:
        """Close what is kept."""
        with self._lock:
            self.is_closed = True
            for _, connection in (entry for idle in self._idle.values() for entry in idle):
                stream.close(connection)
            self._idle.clear()


class _Waiting:
    """Waits for a header: nothing of the transfer moves."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_moved(self, _size_bytes: int) -> None:
        self._progress.check()

    def on_stall(self) -> None:
        self._progress.on_stall()


def _check_peer(connection: socket.socket, pid: int) -> None:
    if not stream.is_own_user(connection, os.geteuid()) or stream.peer_pid(connection) != pid:
        raise ConnectionRefusedError(f"another process than {pid} listens at its socket")


def _limit(connection: socket.socket, progress: Progress, most_s: float) -> None:
    connection.settimeout(min(most_s, stream.remaining_s(progress.deadline_s) + 0.001))


def _is_final(error: Exception) -> bool:
    """Whether trying again would end the same way: the two ends do not trust each other."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return True
    is_cut = isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError))
    return isinstance(error, ssl.SSLError) and not is_cut
