"""A `danaus host` in a process of its own, with stand-ins for agents, and a caller who has its key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

from danaus.runtime.network.door import connect
from danaus.runtime.network.keys import create_key_file, derive, read_key_file

from .stand_in_agent import RECORD

if TYPE_CHECKING:
    from collections.abc import Generator

STAND_IN = Path(__file__).with_name("stand_in_agent.py")
LIMIT_S = 10.0
SECRET = b"J" * 32
"""Of the jobs in these tests."""
ALONE = {"DANAUS_GRACE_S": "3600"}
"""Variables for an agent that no other agent speaks to: it does not leave for that."""


@dataclass
class Caller:
    """Speaks the daemon's protocol."""

    context: zmq.Context[Any]
    socket: zmq.Socket[Any]
    number: int = 0
    unasked: list[list[Any]] = field(default_factory=list[list[Any]])

    def send(self, *message: Any) -> None:
        self.socket.send(msgpack.packb(list(message)) or b"")

    def receive(self, limit_s: float = LIMIT_S) -> list[Any]:
        assert self.socket.poll(int(limit_s * 1000)), "the daemon does not answer"
        return msgpack.unpackb(self.socket.recv())

    def ask(self, kind: str, *fields: Any) -> list[Any]:
        """Return kind and fields of the answer; what comes before it is put aside."""
        number = self.start(kind, *fields)
        return self.answer(number)

    def start(self, kind: str, *fields: Any) -> int:
        self.number += 1
        self.send(kind, self.number, *fields)
        return self.number

    def answer(self, number: int) -> list[Any]:
        while True:
            message = self.receive()
            if message[0] != "exited" and message[1] == number:
                return [message[0], *message[2:]]
            self.unasked.append(message)

    def attach(self, job: str, slot: int = 1, incarnation: int = 0, **fields: Any) -> list[Any]:
        return self.ask("attach", {"job": job, "slot": slot, "incarnation": incarnation, "secret": SECRET, **fields})

    def wait_exited(self) -> dict[str, Any]:
        for message in self.unasked:
            if message[0] == "exited":
                self.unasked.remove(message)
                return message[1]
        message = self.receive()
        assert message[0] == "exited", message
        return message[1]


@dataclass
class DaemonProcess:
    """A daemon's process."""

    process: subprocess.Popen[bytes]
    endpoint: str
    key: Path
    output: Path
    """Its standard output and error."""
    records: Path
    context: zmq.Context[Any]
    callers: list[Caller] = field(default_factory=list[Caller])

    def call(self, **options: Any) -> Caller:
        secret = read_key_file(self.key)
        keys, listener = derive(secret, "caller", "host"), derive(secret, "listener", "host")
        socket = connect(self.context, zmq.DEALER, self.endpoint, keys, listener.public, **options)
        self.callers.append(Caller(self.context, socket))
        return self.callers[-1]

    def agents(self) -> list[dict[str, Any]]:
        """What its agents have recorded, oldest first."""
        text = self.records.read_text(encoding="utf-8") if self.records.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_said(self, words: str) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while words not in self.said():
            assert time.monotonic() < deadline_s, f"not said: {words!r}, but: {self.said()}"
            time.sleep(0.01)


def rss_bytes(pid: int) -> int:
    """What a process has in memory."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def wait_file(path: Path, process: subprocess.Popen[bytes], output: Path) -> str:
    deadline_s = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None, output.read_text(encoding="utf-8")
        assert time.monotonic() < deadline_s, "the daemon is not up"
        time.sleep(0.01)
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def run_daemon(
    directory: Path, *arguments: str, command: tuple[str, ...] = (sys.executable, str(STAND_IN))
) -> Generator[DaemonProcess]:
    """Run a daemon; it is ended by SIGINT where the test has not ended it.

    Args:
        directory: For its files.
        *arguments: Of the command line, besides the key, the ready file and the name ``nest``.
        command: What to run; by default a daemon with stand-ins for agents.
    """
    key, ready, output, records = (directory / name for name in ("key", "ready", "output", "records"))
    create_key_file(key)
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--key", str(key), "--ready-file", str(ready), "--name", "nest", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, RECORD: str(records)},
        )
    context: zmq.Context[Any] = zmq.Context()
    daemon = None
    try:
        daemon = DaemonProcess(process, wait_file(ready, process, output), key, output, records, context)
        yield daemon
    finally:
        for caller in daemon.callers if daemon is not None else []:
            caller.socket.close(0)
        context.term()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
