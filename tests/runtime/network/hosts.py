"""Hosts for tests: daemons on loopback, each with a key that the test holds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danaus.runtime.network.keys import create_key_file

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

START_S = 20
END_S = 15


@dataclass
class Daemons:
    """Running daemons.

    Attributes:
        addresses: Where they listen.
        key: Path of their key file.
        processes: Theirs, in the same order.
    """

    addresses: list[str]
    key: str
    processes: list[subprocess.Popen[str]]

    def agents(self) -> list[int]:
        """Pids of the job agents of each daemon, one of each."""
        return [agent_of(process.pid) for process in self.processes]


def agent_of(daemon: int) -> int:
    """Pid of the one job agent that a daemon has."""
    with open(f"/proc/{daemon}/task/{daemon}/children") as file:
        (pid,) = map(int, file.read().split())
    return pid


@contextlib.contextmanager
def daemons(count: int, *, env: Mapping[str, str] | None = None) -> Generator[Daemons]:
    """Have ``count`` daemons run."""
    with tempfile.TemporaryDirectory(prefix="danaus-key-") as directory:
        key = os.path.join(directory, "key")
        create_key_file(key)
        processes = [start_daemon(key, f"host{index}", env) for index in range(count)]
        try:
            yield Daemons([address_of(process) for process in processes], key, processes)
        finally:
            end_daemons(processes)


def start_daemon(key: str, name: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start one daemon."""
    command = [sys.executable, "-m", "danaus.tools.host", "--listen", "tcp://127.0.0.1:0", "--key", key, "--name", name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})


def address_of(process: subprocess.Popen[str]) -> str:
    """Wait until a daemon listens; return where."""
    assert process.stdout is not None
    return process.stdout.readline().split()[-1]


def end_daemons(processes: list[subprocess.Popen[str]]) -> None:
    """End daemons, at once where they are slow."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(END_S)
        assert process.stdout is not None
        process.stdout.close()
