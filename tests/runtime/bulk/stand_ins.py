"""A process that only looks like one to bulk transfers, and a proxy that cuts what goes through it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from danaus.runtime.bulk.client import Clients
from danaus.runtime.bulk.memory import Memory, wrap
from danaus.runtime.bulk.progress import Progress
from danaus.runtime.bulk.protocol import Op, Request
from danaus.runtime.bulk.registry import Registration, Registry
from danaus.runtime.bulk.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from danaus.runtime.failure import MeshFailure

LIMIT_S = 10.0


class StandIn:
    """What bulk transfers ask of a LocalProc."""

    def __init__(self, proc_id: str, directory: Path) -> None:
        self.proc_id, self.directory, self.host, self.pid = proc_id, directory, "here", 0
        self.host_address = "127.0.0.1"
        self.gone: dict[str, MeshFailure] = {}
        self.watched: list[str] = []
        self.tasks: list[tuple[float, Callable[[], None]]] = []
        self.attachments: Any = None

    def job_directory(self) -> str:
        return str(self.directory)

    def link(self, proc: str) -> None:
        self.watched.append(proc)

    def run_at(self, at_s: float, task: Callable[[], None]) -> None:
        self.tasks.append((at_s, task))

    def wait_gone(self, proc: str, _timeout_s: float) -> MeshFailure | None:
        return self.gone.get(proc)


class Served:
    """One piece of memory behind a server, and a client that asks for it."""

    def __init__(self, directory: Path, thing: Any, *, is_plain: bool = False) -> None:
        self.registry = Registry()
        self.memory: Memory = wrap(thing)
        self.registration: Registration = self.registry.add(self.memory)
        self.server = Server(str(directory), "127.0.0.1", self.registry, is_plain=is_plain)
        self.clients = Clients(lambda: str(directory), is_plain=is_plain, run_at=lambda _at_s, _task: None)
        self.endpoint = self.server.endpoint

    def request(self, op: Op, *, offset: int = 0, length: int | None = None, **fields: Any) -> Request:
        size = self.memory.size_bytes - offset if length is None else length
        found = self.registration
        return Request(op, found.token, found.slot, found.number, offset, size)._replace(**fields)

    def close(self) -> None:
        self.clients.close()
        self.server.close()
        self.registry.close()


def progress(
    size_bytes: int, *, timeout_s: float = LIMIT_S, check_owner: Callable[[], None] = lambda: None
) -> Progress:
    return Progress("the buffer", size_bytes, timeout_s, check_owner)


class CuttingProxy:
    """Passes bytes on to ``port``, and cuts each connection after the next of ``cuts`` bytes, both ways together."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._target, self._cuts = port, cuts
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT_S)
        self._listener.close()

    def _run(self) -> None:
        passers = list[threading.Thread]()
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                break
            self.num_connections += 1
            limit = self._cuts.pop(0) if self._cuts else 1 << 60
            passers.append(threading.Thread(target=self._pass, args=(near, limit), daemon=True))
            passers[-1].start()
        for passer in passers:
            passer.join(LIMIT_S)

    def _pass(self, near: socket.socket, limit: int) -> None:
        far = socket.create_connection(("127.0.0.1", self._target))
        with near, far, contextlib.suppress(OSError):
            while limit:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(min(limit, 1 << 16)) if limit else b""
                    if not data:
                        return
                    (far if source is near else near).sendall(data)
                    limit -= len(data)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
