"""Serves this process's registered memory to others, as streams: to its host by a unix socket, to other hosts by TLS.

One thread listens, one serves each connection. Whoever does not speak the protocol, has not the job's certificate, or
asks for what it has no token for, is dropped and counted; nothing that it sends is kept or interpreted beyond a header
of fixed size.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import selectors
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Final

from . import certificate, stream
from .handle import Endpoint
from .serving import Service

if TYPE_CHECKING:
    from collections.abc import Callable

    from .lending import Lender
    from .registry import Registry

HANDSHAKE_S: Final = 5.0
"""Limit for a new connection's handshake and first request."""

IDLE_S: Final = 60.0
"""How long a connection may wait for its next request."""

MAX_CONNECTIONS: Final = 256
MAX_STRANGERS: Final = 64
"""Of these, connections that have not made a valid request yet."""

_BACKLOG: Final = 128
_log = logging.getLogger("danaus")


class Server:
    """The listening half of a process's streams.

    Args:
        directory: Job's directory, where its certificate is.
        host: Address that other hosts reach this one at.
        registry: What is served.
        lender: Returns what lends payloads, if anything was lent.
        is_plain: Whether streams between hosts go unencrypted.
        ports: Where to listen for other hosts, on the first that is free; 0 is any.

    Raises:
        OSError: None of them is free.
    """

    def __init__(
        self,
        directory: str,
        host: str,
        registry: Registry,
        lender: Callable[[], Lender | None] = lambda: None,
        *,
        is_plain: bool = False,
        ports: range = range(1),
    ) -> None:
        self._service = Service(registry, lender, self._on_request)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._strangers: dict[socket.socket, float] = {}
        self._is_closed = False
        self._tls: ssl.SSLContext | None = None
        if certificate.exists(directory) and not is_plain:
            self._tls = certificate.contexts(directory)[0]
        self.num_refused = 0
        """Peers that were dropped for what they sent, or did not send."""
        self.num_accepted = 0
        """Connections that there have been."""
        self._listeners = [_listen_on(host, ports)] if self._tls is not None or is_plain else []
        port = self._listeners[0].getsockname()[1] if self._listeners else 0
        name = f"danaus-bulk-{secrets.token_hex(12)}"
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listeners.append(unix)
        unix.bind(f"\0{name}")
        unix.listen(_BACKLOG)
        self.endpoint = Endpoint(name, host, port, "tcp" if is_plain else "tls")
        self._wake_in, self._wake_out = os.pipe()
        self._thread = threading.Thread(target=self._listen, name="danaus-bulk-listen", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end every connection; does not wait for their threads."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for connection in self._connections:
                stream.cut(connection)
        os.write(self._wake_out, b"x")

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_in, selectors.EVENT_READ)
            for listener in self._listeners:
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ)
            while not self._is_closed:
                for key, _ in selector.select(HANDSHAKE_S if self._strangers else None):
                    if isinstance(key.fileobj, socket.socket):
                        self._accept(key.fileobj)
                self._cut_strangers()
        for listener in self._listeners:
            listener.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            # Gone again, or no descriptor left: then the pause keeps this thread from spinning.
            threading.Event().wait(0.05)
            return
        connection.settimeout(HANDSHAKE_S)
        with self._lock:
            self.num_accepted += 1
            is_full = len(self._connections) >= MAX_CONNECTIONS or len(self._strangers) >= MAX_STRANGERS
            may_serve = not self._is_closed and not is_full
            if may_serve:
                self._connections.add(connection)
                self._strangers[connection] = time.monotonic() + HANDSHAKE_S
        thread = threading.Thread(target=self._serve, args=(connection,), name="danaus-bulk-serve", daemon=True)
        try:
            if may_serve:
                thread.start()
                return
        except RuntimeError:
            # The limit of threads.
            self._forget(connection)
        self._refuse("there are too many connections")
        stream.close(connection)

    def _cut_strangers(self) -> None:
        """End those that send so slowly that no single wait of theirs is too long."""
        now_s = time.monotonic()
        with self._lock:
            for connection in [each for each, until_s in self._strangers.items() if now_s > until_s]:
                del self._strangers[connection]
                stream.cut(connection)

    def _serve(self, raw: socket.socket) -> None:
        connection = raw
        try:
            if raw.family == socket.AF_UNIX:
                _check_user(raw)
            elif self._tls is not None:
                connection = tls = stream.wrapped(self._tls, raw, is_server=True)
                self._replace(raw, tls)
                tls.do_handshake()
            stream.prepare(connection)
            while self._service.serve_one(connection):
                connection.settimeout(IDLE_S)
        except (stream.Cut, ConnectionError, TimeoutError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            if not self._service.has_served(connection):
                self._refuse(f"it said nothing that makes sense: {error}")
        except (OSError, ValueError) as error:
            self._refuse(str(error))
        except Exception:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            _log.exception("a stream of a remote buffer could not be served")
        finally:
            self._service.forget(connection)
            self._forget(raw, connection)
            stream.close(connection)

    def _on_request(self, connection: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(connection, None)

    def _replace(self, raw: socket.socket, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(raw)
            self._connections.add(connection)
            self._strangers[connection] = self._strangers.pop(raw, 0.0)
            if self._is_closed:
                stream.cut(connection)

    def _forget(self, *connections: socket.socket) -> None:
        with self._lock:
            for connection in connections:
                self._connections.discard(connection)
                self._strangers.pop(connection, None)

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self.num_refused += 1
            is_first = self.num_refused in {1, 10, 100, 1000}
        if is_first:
            _log.warning("dropped a peer of the bulk server (%d so far): %.200s", self.num_refused, reason)


def _check_user(connection: socket.socket) -> None:
    if not stream.is_own_user(connection, os.geteuid()):
        raise ValueError("a process of another user")


def _listen_on(host: str, ports: range) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # From anywhere: else all processes of a host would try the same ones first.
    turn = secrets.randbelow(len(ports))
    for port in [*ports[turn:], *ports[:turn]]:
        try:
            return socket.create_server((_listen_host(host), port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"no port of {ports[0]} to {ports[-1]} is free: widen DANAUS_BULK_PORTS")


def _listen_host(host: str) -> str:
    """Loopback is listened on alone; any other address may be one that a gateway translates."""
    if host in {"localhost", "::1"} or host.startswith("127."):
        return host
    return "::" if ":" in host else ""
