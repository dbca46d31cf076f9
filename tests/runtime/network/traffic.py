"""Actors on hosts in namespaces that send numbered messages to one another, while something else happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import danaus
from danaus import Actor, current_rank, endpoint
from danaus.runtime.network.keys import create_key_file

from .hosts import address_of, agent_of, end_daemons

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from danaus import HostMesh, ProcMesh

    from .namespaces import Network

LIMIT_S = 60.0


class Receiver(Actor):
    """Counts what each sender has sent; numbers begin with 0."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.wrong: list[tuple[int, int, int]] = []

    @endpoint
    def note(self, sender: int, number: int, padding: bytes = b"") -> None:
        expected = self.counts.get(sender, 0)
        if number != expected:
            self.wrong.append((sender, expected, number))
        self.counts[sender] = number + 1

    @endpoint
    def result(self) -> tuple[dict[int, int], list[tuple[int, int, int]]]:
        return self.counts, self.wrong[:10]

    @endpoint
    def echo(self, value: Any) -> Any:
        return value

    @endpoint
    def wait_for_ever(self) -> None:
        threading.Event().wait()


class Sender(Actor):
    """Sends numbered messages to all receivers, in casts and one by one."""

    @endpoint
    def send(self, receivers: Sequence[Receiver], count: int, over_s: float) -> None:
        send_all(current_rank().rank, receivers, count, over_s)


def send_all(me: int, receivers: Sequence[Any], count: int, over_s: float) -> None:
    """``receivers`` are meshes of one rank each, but for the first, which is of all of them."""
    everybody, *each = receivers
    began_s = time.monotonic()
    for number in range(count):
        padding = bytes(100_000 if number % 500 == 0 else 10)
        if number % 2:
            everybody.note.broadcast(me, number, padding)
        else:
            for one in each:
                one.note.broadcast(me, number, padding)
        ahead_s = began_s + over_s * number / count - time.monotonic()
        if ahead_s > 0.01:
            time.sleep(ahead_s)


@dataclass
class Job:
    """Hosts in their namespaces, and the daemons on them."""

    network: Network
    key: str
    processes: list[subprocess.Popen[str]]
    addresses: list[str]

    def agent(self, index: int) -> int:
        """Pid of the agent of one host."""
        return agent_of(self.processes[index].pid)


@contextlib.contextmanager
def daemons_on(network: Network, directory: Path, *, grace_s: float, fan_out: int) -> Generator[Job]:
    """Have a daemon on every host of ``network``; the controller that attaches has the same settings."""
    key = str(directory / "key")
    create_key_file(key)
    settings = {"DANAUS_GRACE_S": str(grace_s), "DANAUS_FAN_OUT": str(fan_out)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        processes = [_start(host.command(), host.address, key, f"ns{n}") for n, host in enumerate(network.hosts)]
        try:
            yield Job(network, key, processes, [address_of(process) for process in processes])
        finally:
            danaus.shutdown_context()
            network.heal()
            end_daemons(processes)


def _start(prefix: list[str], address: str, key: str, name: str) -> subprocess.Popen[str]:
    words = ["-m", "danaus.tools.host", "--listen", f"tcp://{address}:0", "--key", key, "--name", name]
    return subprocess.Popen([*prefix, sys.executable, *words], stdout=subprocess.PIPE, text=True)


@dataclass
class Traffic:
    """Ranks that send to one another while something else happens."""

    procs: ProcMesh
    receivers: Any
    senders: Any
    indices: Sequence[int]
    """Of the hosts that send and receive."""

    def run(self, count: int, over_s: float, meanwhile: Callable[[], object]) -> float:
        """Send ``count`` messages from everywhere to everywhere; return how long after ``meanwhile`` the last came."""
        ranks = [self.receivers.slice(hosts=index) for index in self.indices]
        everybody = self.receivers.slice(hosts=slice(self.indices[0], self.indices[-1] + 1))
        targets = [everybody, *ranks]
        calls = [self.senders.slice(hosts=index).send.call_one(targets, count, over_s) for index in self.indices]
        mine = threading.Thread(target=send_all, args=(-1, targets, count, over_s))
        mine.start()
        try:
            meanwhile()
        finally:
            over_at_s = time.monotonic()
            mine.join(LIMIT_S)
        for call in calls:
            call.get(timeout=LIMIT_S)
        expected = dict.fromkeys([-1, *self.indices], count)
        for index, rank in zip(self.indices, ranks, strict=True):
            counts, wrong = _result(rank, expected)
            assert not wrong, f"at host {index} (sender, expected, came): {wrong}"
            assert counts == expected, f"at host {index}"
        return time.monotonic() - over_at_s


def _result(rank: Any, expected: dict[int, int]) -> tuple[dict[int, int], list[tuple[int, int, int]]]:
    """What has arrived once it is enough, or too much, or the time is over: nothing orders one sender after another."""
    limit_s = time.monotonic() + LIMIT_S
    while True:
        counts, wrong = rank.result.call_one().get(timeout=LIMIT_S)
        if wrong or counts == expected or time.monotonic() > limit_s:
            return counts, wrong


@contextlib.contextmanager
def traffic_on(hosts: HostMesh, indices: Sequence[int]) -> Generator[Traffic]:
    with hosts.spawn_procs() as procs:
        receivers = procs.spawn("receivers", Receiver)
        senders = procs.spawn("senders", Sender)
        receivers.result.call().get(timeout=LIMIT_S)
        yield Traffic(procs, receivers, senders, indices)


def pause(seconds: float) -> None:
    """Let traffic flow, or a cut last: the time is what is tested."""
    time.sleep(seconds)


def kill_soon(pid: int) -> Callable[[], None]:
    def kill() -> None:
        pause(0.3)
        os.kill(pid, signal.SIGKILL)

    return kill
