"""Peers who have no key and speak ZMTP badly on purpose, over plain sockets; and what they try it on."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from danaus.runtime.network.door import connect

if TYPE_CHECKING:
    from collections.abc import Generator

    from danaus.runtime.network.keys import KeyPair

LIMIT_S = 10.0
COMMAND, LONG = 0x04, 0x02
HELLO_BYTES = 200


@dataclass(frozen=True)
class Target:
    """A listener in some process, and the keys of those who may come in.

    Attributes:
        pid: The process.
        endpoint: Where it listens.
        caller: Keys of a good caller.
        listener_public: The listener's public key, which no stranger has.
        max_message_bytes: What it takes in one frame.
    """

    pid: int
    endpoint: str
    caller: KeyPair
    listener_public: bytes
    max_message_bytes: int

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def is_alive(self) -> bool:
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
        return False

    def rss_bytes(self) -> int:
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def num_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def wait_num_fds(self, most: int, limit_s: float = LIMIT_S) -> None:
        deadline_s = time.monotonic() + limit_s
        while self.num_fds() > most:
            assert time.monotonic() < deadline_s, f"{self.num_fds()} descriptors are open, {most} were before"
            time.sleep(0.02)

    def check_lets_in(self, limit_s: float = LIMIT_S) -> None:
        """A caller with the key still gets through the handshake."""
        context: zmq.Context[Any] = zmq.Context()
        caller = connect(context, zmq.DEALER, self.endpoint, self.caller, self.listener_public)
        monitor = caller.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            assert self.is_alive()
            assert monitor.poll(int(limit_s * 1000)), "who has the key does not get in any more"
            assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        finally:
            caller.disable_monitor()
            monitor.close(0)
            caller.close(0)
            context.term()


def greeting(mechanism: bytes = b"CURVE", *, version: bytes = b"\x03\x01", is_server: int = 0) -> bytes:
    """What both sides of ZMTP 3 say first."""
    signature = b"\xff" + bytes(8) + b"\x7f"
    return signature + version + mechanism.ljust(20, b"\0")[:20] + bytes([is_server]) + bytes(31)


def frame(body: bytes, flags: int = COMMAND, *, announced: int | None = None) -> bytes:
    """A frame; one may announce another length than it has."""
    length = len(body) if announced is None else announced
    if length > 255 or flags & LONG:
        return bytes([flags | LONG]) + struct.pack(">Q", length & ((1 << 64) - 1)) + body
    return bytes([flags, length]) + body


def command(name: bytes, data: bytes = b"") -> bytes:
    """A frame with a command of the handshake."""
    return frame(bytes([len(name)]) + name + data)


def hello(data: bytes | None = None) -> bytes:
    """The first command of CURVE, right in form: the stranger's own key, and a box that was made with another."""
    rest = b"\x01\x00" + bytes(72) + os.urandom(32) + bytes(7) + b"\x01" + os.urandom(80)
    return command(b"HELLO", rest if data is None else data)


@contextmanager
def connected(target: Target, *, small_buffer: bool = False) -> Generator[socket.socket]:
    """A plain connection to the target."""
    with open_connection(target, small_buffer=small_buffer) as connection:
        yield connection


def open_connection(target: Target, *, small_buffer: bool = False) -> socket.socket:
    connection = socket.socket()
    if small_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection.settimeout(LIMIT_S)
    try:
        connection.connect(("127.0.0.1", target.port))
    except OSError:
        connection.close()
        raise
    return connection


def send(connection: socket.socket, data: bytes) -> bool:
    """Send as much as is taken; False where the other side has hung up."""
    try:
        connection.sendall(data)
    except (ConnectionError, TimeoutError):
        return False
    return True


def pour(connection: socket.socket, data: bytes, *, limit_s: float, most_bytes: int) -> int:
    """Send again and again until the other side hangs up; return how many bytes it took."""
    deadline_s = time.monotonic() + limit_s
    sent_bytes = 0
    while time.monotonic() < deadline_s and sent_bytes < most_bytes and send(connection, data):
        sent_bytes += len(data)
    return sent_bytes


def hung_up(connection: socket.socket, limit_s: float = LIMIT_S) -> bool:
    """Whether the other side ends the connection within the limit."""
    deadline_s = time.monotonic() + limit_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        connection.settimeout(left_s)
        try:
            if not connection.recv(65536):
                return True
        except TimeoutError:
            return False
        except ConnectionError:
            return True
    return False


def reset(connection: socket.socket) -> None:
    """End a connection rudely."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
