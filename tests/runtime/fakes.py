"""A process and a link that only keep what they are told, and a call under way that a test answers by hand."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

from danaus.runtime.calls.replies import Call
from danaus.runtime.failure import FailureKind, MeshFailure
from danaus.runtime.invoke import dump_error
from danaus.runtime.messages import wire
from danaus.runtime.messages.attachment import Outgoing
from danaus.runtime.messages.link import Lane
from danaus.runtime.messages.payload import dump, load

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE_BYTES = 100
"""What each message of a call costs."""


class FakeLink:
    """Keeps what it is told to send."""

    def __init__(self, proc: str) -> None:
        self.proc, self.lock = proc, threading.Lock()
        self.sent: list[wire.Envelope] = []

    def send_locked(self, data: bytes, frames: Any = (), *, lazy: bool = False) -> bool:
        self.sent += wire.unpack([data, *frames])
        return False

    def send(self, data: bytes, frames: Any = (), *, lazy: bool = False) -> None:
        self.send_locked(data, frames)

    def wake(self) -> None:
        pass


class FakeProc:
    """What callers and sinks need of a process: lanes, ports, the dead, the I/O thread's queue, a way to send."""

    def __init__(self) -> None:
        self.proc_id = "me.0"
        self.next_port = itertools.count(1).__next__
        self.ports: dict[int, Any] = {}
        self.gone: dict[str, MeshFailure] = {}
        self.sent: list[tuple[str, wire.Envelope]] = []
        self.tasks: list[Callable[[], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.taken_back: list[tuple[Outgoing, str]] = []
        self.links: dict[str, FakeLink] = {}
        self.attachments = self
        self.num_droppable = 0
        self.epoch = 0
        self.current: dict[str, str] = {}

    def resolve(self, place: str) -> str:
        return self.current.get(place, place)

    def lane(self, proc: str, actor: str, *, sender: str, name: str, bound: int) -> Lane:
        link = self.links.setdefault(proc, FakeLink(proc))
        return Lane(link, actor, sender, name, bound)  # type: ignore[arg-type]

    def snapshot(self, payload: Any, holders: list[str]) -> Outgoing:
        return Outgoing(payload.body, len(payload.buffers) or None, payload.buffers)

    def take_back(self, out: Outgoing, holder: str) -> None:
        self.taken_back.append((out, holder))

    def send(self, proc: str, envelope: wire.Envelope, *, lazy: bool = False) -> None:
        self.sent.append((proc, envelope))

    def run_soon(self, task: Callable[[], None]) -> None:
        self.tasks.append(task)

    def run_at(self, at_s: float, task: Callable[[], None]) -> None:
        self.timers.append((at_s, task))

    def on_dropped(self, task: Callable[[], None]) -> None:
        self.tasks.append(task)
        self.num_droppable -= 1

    def run_tasks(self) -> None:
        """Do what the I/O thread does when it is woken."""
        while self.tasks:
            self.tasks.pop(0)()

    def feed(self, port: int, slot: int, status: int, body: bytes | None) -> None:
        """Dispatch a reply as the I/O thread does."""
        sink = self.ports.get(port)
        if sink is not None and sink.on_reply(slot, status, body, None):
            self.ports.pop(port, None)

    def die(self, proc: str, kind: FailureKind = FailureKind.KILLED) -> MeshFailure:
        """Have a process be dead, as ``mark_gone`` does."""
        failure = MeshFailure(kind=kind, mesh="m", rank=int(proc.rpartition(".")[2]), host="h", signum=9)
        self.gone[proc] = failure
        for port, sink in list(self.ports.items()):
            if sink.on_gone(proc, failure):
                self.ports.pop(port, None)
        return failure

    def cancelled(self) -> list[str]:
        """Processes that were told to cancel, and nothing else was sent."""
        assert all(envelope[0] == wire.CANCEL for _, envelope in self.sent)
        return [proc for proc, _ in self.sent]

    def calls(self) -> dict[str, list[wire.Envelope]]:
        """The CALLs that were sent over links, by process."""
        return {proc: link.sent for proc, link in sorted(self.links.items()) if link.sent}

    def arguments(self) -> dict[str, list[Any]]:
        """What the endpoints are to be called with, by process."""
        return {proc: [load(call[9]) for call in calls] for proc, calls in self.calls().items()}


class Fed:
    """A call under way to some lanes, and the means to answer it."""

    def __init__(self, procs: list[str], *, implied_credit: bool = True) -> None:
        self.proc = FakeProc()
        self.lanes = [
            Lane(FakeLink(proc), "actor", "root", f"m rank {rank}", 8)  # type: ignore[arg-type]
            for rank, proc in enumerate(procs)
        ]
        self.call = Call(self.proc, "m.f", self.lanes, implied_credit=implied_credit)  # type: ignore[arg-type]
        self.call.size_bytes = SIZE_BYTES
        for lane in self.lanes:
            lane.account.spend(SIZE_BYTES)

    def listen(self, sink: Any) -> Any:
        self.proc.ports[self.call.port] = sink
        return sink

    def reply(self, slot: int, value: Any, status: int = wire.OK) -> None:
        self.proc.feed(self.call.port, slot, status, dump(value).body)

    def item(self, value: Any) -> None:
        self.reply(0, value, wire.ITEM)

    def end(self) -> None:
        self.proc.feed(self.call.port, 0, wire.END, None)

    def fail(self, slot: int, error: Exception) -> None:
        self.proc.feed(self.call.port, slot, wire.ERROR, dump_error(f"m.f on rank {slot}", error).body)

    def under_way(self) -> list[tuple[int, int]]:
        """Messages and bytes whose credit has not come back, by lane."""
        self.proc.run_tasks()
        accounts = [lane.account for lane in self.lanes]
        return [(account.under_way, account.spent_bytes - account.returned_bytes) for account in accounts]

    @property
    def is_listening(self) -> bool:
        return self.call.port in self.proc.ports


def ranks(count: int) -> list[str]:
    return [f"w.{rank}" for rank in range(count)]
