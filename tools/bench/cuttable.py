"""A network that can be cut: stands between the two ends of TCP connections, on another address of this machine.

A cut holds bytes back, as a network does that drops packets; whoever gives such a connection up loses what is in it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import Final

LIMIT_S: Final = 30.0
_CHUNK_BYTES: Final = 1 << 16
_LISTENS: Final = "0A"


class Cuttable:
    """Passes connections to ``host`` on to ``target``, both with the same port."""

    def __init__(self, host: str, target: str, port: int) -> None:
        self.num_held = 0
        """Pieces that a cut has held back."""
        self._target = target, port
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((host, port))
        self._start(self._accept)

    def cut(self) -> None:
        """Let nothing pass in either direction, also on new connections."""
        self._open.clear()

    def heal(self) -> None:
        """Let pass what was held back, and what comes."""
        self._open.set()

    def close(self) -> None:
        """End all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        # No connection is added after this one.
        self._threads[0].join(LIMIT_S)
        with self._lock:
            for each in self._sockets:
                _end(each)
        self._open.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
        for each in self._sockets:
            each.close()

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name="cuttable")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, LIMIT_S)
            except OSError:
                near.close()
                continue
            for each in (near, far):
                each.settimeout(None)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += (near, far)
            self._start(self._pump, near, far)
            self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, dest: socket.socket) -> None:
        try:
            while data := source.recv(_CHUNK_BYTES):
                if not self._open.is_set():
                    self.num_held += 1
                    self._open.wait()
                dest.sendall(data)
        except OSError:
            pass
        finally:
            _end(source)
            _end(dest)


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def wait_port(parent: int) -> int:
    """Wait until the one child of a process listens for TCP connections; return its port.

    Raises:
        TimeoutError: It does not within ``LIMIT_S``.
    """
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        for child in _children(parent):
            # Just forked, it has its parent's.
            ports = _ports(child) - _ports(parent)
            if ports:
                return min(ports)
        time.sleep(0.01)
    raise TimeoutError(f"no child of process {parent} listens after {LIMIT_S:g} s")


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(each) for each in file.read().split()]
    except OSError:
        return []


def _ports(pid: int) -> set[int]:
    inodes: set[str] = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTENS and f"socket:[{row[9]}]" in inodes}
