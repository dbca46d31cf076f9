"""Lets in who holds the key: CURVE on every tcp socket, and a ZAP handler that knows the allowed callers.

CURVE alone proves only who listens. Without a ZAP handler in the listener's context libzmq lets every caller in, so a
listener cannot be made without a door, and closing the door closes its listeners first. A door is served by the loop of
its owner, not by a thread: while that loop is held up, callers wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.utils import z85

from .endpoints import resolve

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .keys import KeyPair

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Default bound of one frame: what a stranger can make us hold, per connection, before the handshake has failed."""

HANDSHAKE_MS: Final = 5000
BACKLOG: Final = 1024
"""Connections that wait to be accepted: a burst of them, of whoever, is not to have others wait for the kernel."""
HEARTBEAT_MS: Final = 1000
HEARTBEAT_TIMEOUT_MS: Final = 3000
RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 1000
CONNECT_MS: Final = 2000
"""A connection that is not made by then is tried anew: the kernel's own pauses between tries grow to many seconds."""

_ZAP: Final = "inproc://zeromq.zap.01"
_ZAP_VERSION: Final = b"1.0"
_DOMAIN: Final = b"danaus"
_ENFORCE_DOMAIN: Final = 93
"""libzmq's ZMQ_ZAP_ENFORCE_DOMAIN, which pyzmq has no name for: no handler, no connection."""
_CURVE_BYTES: Final = 33
"""What encryption adds to a frame."""
_BATCH: Final = 256


class Door:
    """The ZAP handler of one context: answers who may come in.

    Args:
        context: Whose listeners it guards; one door per context.
        allowed: Public keys (Z85) of the callers that may come in.

    Attributes:
        socket: Poll it for input, then call :meth:`serve`.
        refused: How many callers were turned away.
        last_refused: Network address of the last of them.
    """

    def __init__(self, context: zmq.Context[Any], allowed: Iterable[bytes]) -> None:
        self.context = context
        self._allowed = frozenset(z85.decode(key) for key in allowed)
        self._listeners: list[zmq.Socket[Any]] = []
        self.refused = 0
        self.last_refused = ""
        self.socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        try:
            self.socket.bind(_ZAP)
        except zmq.ZMQError:
            self.socket.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether it guards nothing any more."""
        return self.socket.closed

    def guard(self, listener: zmq.Socket[Any]) -> None:
        """Have ``listener`` closed before this door is."""
        self._listeners = [each for each in self._listeners if not each.closed]
        self._listeners.append(listener)

    def serve(self) -> None:
        """Answer every caller that waits, without blocking."""
        for _ in range(_BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            reply = self._answer(frames)
            if reply is not None:
                self.socket.send_multipart(reply)

    def _answer(self, frames: list[bytes]) -> list[bytes] | None:
        # libzmq's: sender, "", version, request, domain, address, identity, mechanism, the client's key.
        if len(frames) < 8 or frames[2] != _ZAP_VERSION:
            return None
        sender, empty, version, request, domain, address, _, mechanism, *credentials = frames
        is_known = domain == _DOMAIN and mechanism == b"CURVE" and len(credentials) == 1
        if is_known and credentials[0] in self._allowed:
            return [sender, empty, version, request, b"200", b"", b"", b""]
        self.refused += 1
        self.last_refused = address.decode("ascii", "replace")[:64]
        return [sender, empty, version, request, b"400", b"", b"", b""]

    def close(self) -> None:
        """Close the listeners, then the door."""
        for listener in self._listeners:
            listener.close(0)
        self._listeners.clear()
        self.socket.close(0)


def listen(
    context: zmq.Context[Any],
    socket_type: int,
    address: str,
    keys: KeyPair | None,
    door: Door | None,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    options: Mapping[int, int | bytes] | None = None,
) -> zmq.Socket[Any]:
    """Bind a socket that only callers allowed by ``door`` can reach; see ``endpoints.endpoint_of`` for where.

    Args:
        context: Of the socket and of the door.
        socket_type: ``zmq.ROUTER``, ``zmq.PULL``...
        address: ``tcp://HOST:PORT``; port 0 for a free one. On ``ipc://`` the directory is the door.
        keys: The listener's.
        door: Who may come in.
        max_message_bytes: A peer that sends a longer frame is dropped.
        options: Further socket options, set before the bind.

    Raises:
        ValueError: The address is malformed or cannot be found, or there is no key or door for it.
        zmq.ZMQError: The address is taken or not ours.
    """
    bind_to, is_ipv6 = resolve(address)
    if address.startswith("tcp://"):
        _check_guarded(context, address, keys, door)
    socket: zmq.Socket[Any] = context.socket(socket_type)
    try:
        if keys is not None and door is not None and address.startswith("tcp://"):
            socket.curve_server = True
            socket.curve_secretkey = keys.secret
            socket.zap_domain = _DOMAIN
            socket.setsockopt(_ENFORCE_DOMAIN, 1)
            door.guard(socket)
        socket.backlog = BACKLOG
        _configure(socket, is_ipv6=is_ipv6, max_message_bytes=max_message_bytes, options=options)
        socket.bind(bind_to)
    except BaseException:
        socket.close(0)
        raise
    return socket


def _check_guarded(context: zmq.Context[Any], address: str, keys: KeyPair | None, door: Door | None) -> None:
    if keys is None or door is None:
        missing = "a key" if keys is None else "a door"
        raise ValueError(
            f"refused to listen on {address} without {missing}: messages are pickles, so whoever can connect could run "
            "code here; make a key with `danaus key FILE` and pass it as --key FILE (or key=)"
        )
    # libzmq looks for the handler in the listener's own context, and asks nobody where it finds none.
    if door.closed or door.context is not context:
        raise ValueError(f"refused to listen on {address}: its door is closed or of another context")


def connect(
    context: zmq.Context[Any],
    socket_type: int,
    address: str,
    keys: KeyPair,
    server_public: bytes,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    options: Mapping[int, int | bytes] | None = None,
) -> zmq.Socket[Any]:
    """Connect to a listener that must own ``server_public``; returns at once, the connection is made meanwhile.

    Args:
        context: Of the socket.
        socket_type: ``zmq.DEALER``, ``zmq.PUSH``...
        address: ``tcp://HOST:PORT``.
        keys: The caller's.
        server_public: The listener's public key.
        max_message_bytes: The connection is dropped where the peer sends a longer frame.
        options: Further socket options, set before the connection is made (``zmq.ROUTING_ID``, high-water marks).

    Raises:
        ValueError: The address is malformed or cannot be found.
    """
    connect_to, is_ipv6 = resolve(address, is_passive=False)
    socket: zmq.Socket[Any] = context.socket(socket_type)
    try:
        if address.startswith("tcp://"):
            socket.curve_publickey = keys.public
            socket.curve_secretkey = keys.secret
            socket.curve_serverkey = server_public
        socket.reconnect_ivl = RECONNECT_MS
        socket.reconnect_ivl_max = RECONNECT_MAX_MS
        socket.connect_timeout = CONNECT_MS
        _configure(socket, is_ipv6=is_ipv6, max_message_bytes=max_message_bytes, options=options)
        socket.connect(connect_to)
    except BaseException:
        socket.close(0)
        raise
    return socket


def _configure(
    socket: zmq.Socket[Any], *, is_ipv6: bool, max_message_bytes: int, options: Mapping[int, int | bytes] | None
) -> None:
    socket.linger = 0
    socket.ipv6 = is_ipv6
    socket.maxmsgsize = max_message_bytes + _CURVE_BYTES
    socket.handshake_ivl = HANDSHAKE_MS
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
    for option, value in (options or {}).items():
        socket.setsockopt(option, value)
