"""Measures what raw ZeroMQ allows between hosts: over TCP, and through two processes that pass on, as agents do.

The file is also each of these two (``python -m danaus.tools.bench.tcp_limit``, what it needs on standard input).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import Any, Final

from .limits import SMALL, WAIT_S, Child, Wires, _die_with_parent, wait_readable

_WAIT_MS: Final = int(WAIT_S * 1000)
_LOOPBACK: Final = "tcp://127.0.0.1"


class TcpPingPong:
    """Raw PAIR over tcp loopback, in the clear: 64 bytes to another process and back."""

    def __init__(self) -> None:
        import zmq

        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.rcvtimeo = self._socket.sndtimeo = _WAIT_MS
        self._socket.set_hwm(0)
        port = self._socket.bind_to_random_port(_LOOPBACK)
        self._child = Child("echo", f"{_LOOPBACK}:{port}")
        self._socket.recv()

    def times(self, count: int) -> list[float]:
        """Return the seconds of each of ``count`` round trips."""
        return _round_trips(self._socket, count)

    def close(self) -> None:
        """End the other process."""
        self._child.close()
        self._context.destroy(linger=0)


class RelayedPingPong:
    """Raw PAIR to another process and back through two that pass on: ipc to them, tcp with CURVE between them."""

    def __init__(self) -> None:
        import zmq

        self._wires = Wires()
        self._relays: list[subprocess.Popen[str]] = []
        self._socket = self._wires.bind("PAIR", "near")
        (own, own_secret), (other, other_secret) = zmq.curve_keypair(), zmq.curve_keypair()
        far = {"ipc": self._wires.address("far"), "public": own.decode(), "secret": own_secret.decode()}
        port = self._start(far)
        near = {"ipc": self._wires.address("near"), "public": other.decode(), "secret": other_secret.decode()}
        self._start({**near, "tcp": f"{_LOOPBACK}:{port}", "server": own.decode()})
        self._echo = Child("echo", self._wires.address("far"))
        self._socket.recv()

    def _start(self, needs: dict[str, str]) -> int:
        command = [sys.executable, "-m", "danaus.tools.bench.tcp_limit"]
        relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._relays.append(relay)
        assert relay.stdin is not None
        assert relay.stdout is not None
        relay.stdin.write(json.dumps(needs) + "\n")
        relay.stdin.flush()
        wait_readable(relay.stdout.fileno(), "a relay said nothing")
        return int(relay.stdout.readline())

    def times(self, count: int) -> list[float]:
        """Return the seconds of each of ``count`` round trips."""
        return _round_trips(self._socket, count)

    def close(self) -> None:
        """End the other processes."""
        self._echo.close()
        for relay in self._relays:
            relay.kill()
            relay.communicate(timeout=WAIT_S)
        self._wires.close()


def _round_trips(socket: Any, count: int) -> list[float]:
    times: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        socket.send(SMALL)
        socket.recv()
        times.append(time.perf_counter() - start)
    return times


def _relay(needs: dict[str, str]) -> None:
    """Pass on between the two sockets. The far one binds, and so does its other end."""
    import zmq

    context: zmq.Context[Any] = zmq.Context()
    near, far = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    far.curve_publickey, far.curve_secretkey = needs["public"].encode(), needs["secret"].encode()
    port = 0
    if "server" in needs:
        far.curve_serverkey = needs["server"].encode()
        far.connect(needs["tcp"])
        near.connect(needs["ipc"])
    else:
        far.curve_server = True
        port = far.bind_to_random_port(_LOOPBACK)
        near.bind(needs["ipc"])
    print(port, flush=True)
    poller = zmq.Poller()
    for socket in (near, far):
        poller.register(socket, zmq.POLLIN)
    while True:
        for socket, _ in poller.poll():
            (far if socket is near else near).send(socket.recv())


if __name__ == "__main__":
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _relay(json.loads(sys.stdin.readline()))
