"""This process's part in the runtime: its address, its links, its actors, and the thread that does their I/O.

One `LocalProc` per process, in controller and workers alike. The I/O thread receives everything, routes it to mailboxes
and reply sinks, and never runs user code. Callers send on their own threads (see link.py).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import zmq

from .address import AGENT, GATE, host_of, incarnation_of, place_of
from .failure import MeshFailure, pack_failure, unpack_failure
from .messages import wire
from .messages.attachment import Attachments, Outgoing, size_of
from .messages.far_link import FarLink, Gate
from .messages.link import MULTIPART, Lane, Link
from .messages.payload import Payload, dump

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .calls.partials import Partials
    from .messages.attachment import Incoming
    from .network.attach import AttachedHosts
    from .runner import ActorRunner
    from .supervision.supervisor import Supervisor
    from .supervision.wait_watch import WaitWatch

ROOT: Final = "root"
"""Name of the actor that a process's own threads speak as."""

SWITCH_INTERVAL_S: Final = 0.0002
"""How long a busy Python thread may keep the I/O thread waiting; it is paid twice on the way to a neighbour actor."""

EARLY_S: Final = 20.0
"""How long messages wait for an actor that this process has not heard of."""

NONE: Final = dump(None).body
_IDLE_POLL_S: Final = 0.05
_TRIM_S: Final = 5.0
_NEVER: Final = float("inf")
_log = logging.getLogger("danaus")


class Sink(Protocol):
    """Where replies to one port go. Called by the I/O thread: short, and never user code."""

    def on_reply(self, slot: Any, status: int, body: bytes | None, incoming: Incoming | None, /) -> bool:
        """Take one reply, or one for several slots that a host has joined; return True when no more will come."""
        ...

    def on_gone(self, proc: str, failure: MeshFailure, /) -> bool:
        """A process has died; return True when nothing more is awaited."""
        ...


class LocalProc:
    """The runtime inside this process.

    Args:
        proc_id: This process's address; see address.py.
        directory: The job's private socket directory.
        path: Socket path to bind, inside ``directory``; None where others hear of this process later (:meth:`bind`).
        host: Host name, for reports.
    """

    hosts: AttachedHosts | None = None
    """Those that the controller has attached to."""
    partials: Partials | None = None
    """Values that this process joins for callers elsewhere."""

    def __init__(self, proc_id: str, *, directory: str, path: str | None, host: str) -> None:
        self.proc_id, self.directory, self.host = proc_id, directory, host
        self.pid = os.getpid()
        self.slot, self.mesh_size = host_of(proc_id), 1
        self.host_address = "127.0.0.1"
        """Where processes of other hosts reach this one."""
        self.context: zmq.Context[Any] = zmq.Context()
        self.links: dict[str, Link] = {}
        self.lanes: dict[tuple[str, str, str], Lane] = {}
        self.ports: dict[int, Sink] = {}
        self.actors: dict[str, ActorRunner] = {}
        self.gone: dict[str, MeshFailure] = {}
        self.epoch = 0
        """Grows whenever some rank has a new incarnation."""
        self.gate = Gate(self.context, lambda: os.path.join(self.directory, GATE))
        self.attachments = Attachments(proc_id, self)
        self.on_event: dict[str, Callable[[dict[str, Any]], None]] = {
            "up": self._on_up,
            "died": self._on_died,
            "replaced": lambda fields: self._on_filled(fields["proc"], fields["next"]),
            "host_address": lambda fields: setattr(self, "host_address", fields["address"]),
        }
        self.on_spawn: Callable[[wire.Envelope], None] = self._refuse_spawn
        self.on_unknown_actor: Callable[[str], bool] = lambda _actor: False
        self.on_gone: list[Callable[[str, MeshFailure], None]] = []
        self.next_port: Callable[[], int] = itertools.count(1).__next__
        self.blocked: dict[str, Lane] = {}
        self._waits: WaitWatch | None = None
        self.num_droppable = 0
        self.when_ready: Callable[[Callable[[], None]], None] = lambda task: task()
        self._current: dict[str, str] = {}
        self._early: dict[str, list[wire.Envelope]] = {}
        self._create_lock = threading.Lock()
        self.places_lock = threading.Lock()
        """Held while a place gets another address, and while actors are sent to places."""
        self._dirty: deque[Link] = deque()
        self._tasks: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._next_timer_s = _NEVER
        self._wake_pending = False
        self._wake_lock = threading.Lock()
        self._stopping = self._trims = False
        self._pull: zmq.Socket[bytes] = self.context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.linger = 0
        if path is not None:
            self.bind(path)
        self._pull.bind(f"inproc://{proc_id}")
        self._waker: zmq.Socket[bytes] = self.context.socket(zmq.PUSH)
        self._waker.linger = 0
        self._waker.connect(f"inproc://{proc_id}")
        self.thread = threading.Thread(target=self._run, name="danaus-io", daemon=True)
        from .supervision.supervisor import Supervisor

        self.supervisor: Supervisor = Supervisor(self)

    def start(self, agent_path: str | None) -> None:
        """Start the I/O thread; ``agent_path`` is the agent's socket, if it is known to be bound."""
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        own = self.links[self.proc_id] = Link(self.proc_id, self._mark_dirty)
        own.open(self.context, f"inproc://{self.proc_id}")
        agent = self.links[AGENT] = Link(AGENT, self._mark_dirty)
        if agent_path is not None:
            agent.open(self.context, f"ipc://{agent_path}")
        self.thread.start()

    def stop(self, *, timeout_s: float = 2.0) -> None:
        """End the I/O thread and close every socket; sends what is queued first."""
        self.run_soon(self._set_stopping)
        self.thread.join(timeout_s)

    def bind(self, path: str) -> None:
        """Take messages of other processes at ``path`` (I/O thread, once it runs)."""
        self._pull.bind(f"ipc://{path}")

    def job_directory(self) -> str:
        """The job's private socket directory."""
        return self.directory

    # sending (any thread):

    def resolve(self, place: str) -> str:
        """Return the address of the incarnation at ``place`` that this process last heard of."""
        return self._current.get(place, place)

    def link(self, proc: str) -> Link:
        """Return the link to ``proc``, making it (and asking the agent to watch the process) at first use."""
        link = self.links.get(proc)
        if link is None:
            with self._create_lock:
                link = self.links.get(proc)
                if link is None:
                    is_near = host_of(proc) == self.slot
                    link = Link(proc, self._mark_dirty) if is_near else FarLink(proc, self._mark_dirty, self.gate)
                    self.links[proc] = link
                    if proc in self.gone:
                        link.close()
                    else:
                        self.request("watch", {"proc": proc})
        return link

    def lane(self, proc: str, actor: str, *, sender: str, name: str, bound: int) -> Lane:
        """Return the lane from ``sender`` here to ``actor`` in ``proc``."""
        key = (proc, actor, sender)
        lane = self.lanes.get(key)
        if lane is None:
            link = self.link(proc)
            with self._create_lock:
                # Not under ``proc``: the link may just have been renamed, and its lanes are renamed with it.
                key = (link.proc, actor, sender)
                lane = self.lanes.setdefault(key, Lane(link, actor, sender, name, bound))
        return lane

    @property
    def waits(self) -> WaitWatch:
        """This process's part in the wait-for graph."""
        if self._waits is None:
            from .supervision.wait_watch import WaitWatch

            with self._create_lock:
                self._waits = self._waits or WaitWatch(self)
        return self._waits

    def send(self, proc: str, envelope: wire.Envelope, *, lazy: bool = False) -> None:
        """Send a small envelope without frames."""
        self.link(proc).send(wire.pack(envelope), lazy=lazy)

    def request(self, name: str, fields: Mapping[str, Any]) -> None:
        """Ask the host agent for something; answers come as events."""
        self.links[AGENT].send(wire.pack([wire.REQUEST, name, self.proc_id, fields]))

    def reply(
        self,
        proc: str,
        port: int,
        slot: int | list[int],
        status: int,
        out: Outgoing,
        *,
        load: int,
        lazy: bool,
        joined: bool = False,
    ) -> None:
        """Answer a call; ``joined``: the answer may wait a moment for those of other ranks."""
        data = wire.pack([wire.REPLY, port, slot, status, load, out.body, out.attachment])
        link = self.link(proc)
        if joined and isinstance(link, FarLink):
            link.send_reply(port, data, out.frames)
        else:
            link.send(data, out.frames, lazy=lazy)

    def reply_gone(self, envelope: wire.Envelope, failure: MeshFailure, *, with_credit: bool = True) -> None:
        """Answer a CALL whose actor is no longer there, and return its credit unless it was returned before."""
        if envelope[5]:
            self.send(envelope[3], [wire.REPLY, envelope[5], envelope[6], wire.GONE, 0, pack_failure(failure), None])
        if with_credit and envelope[8] & wire.RETURN_CREDIT:
            size_bytes = size_of(envelope[9], envelope[10])
            self.send(envelope[3], [wire.CREDIT, self.proc_id, envelope[1], envelope[4], 1, size_bytes])
        if with_credit:
            self.attachments.discard(envelope[10])

    def snapshot(self, payload: Payload, holders: list[str]) -> Outgoing:
        """Copy a payload's buffers where its receivers can have them."""
        if not payload.buffers and len(payload.body) < 32 << 10:
            return Outgoing(payload.body)
        if not self._trims:
            self._trims = True
            self.run_at(time.monotonic() + _TRIM_S, self._trim)
        return self.attachments.outgoing(payload, holders)

    def return_leases(self, *, before_reply_to: str | None = None) -> None:
        """Send back the shared memory that nobody here uses any more; what goes where a reply follows, with that."""
        for owner, lease_ids in self.attachments.take_returns().items():
            envelope = [wire.LEASE, self.proc_id, lease_ids]
            if owner == before_reply_to:
                self.link(owner).stage(wire.pack(envelope))
            else:
                self.send(owner, envelope)

    # the I/O thread's queue (any thread):

    def run_soon(self, task: Callable[[], None]) -> None:
        """Have the I/O thread run ``task``, which must be short and never user code."""
        self._tasks.append(task)
        self._wake()

    def on_dropped(self, task: Callable[[], None]) -> None:
        """Same as :meth:`run_soon`, for finalizers: takes no lock, and wakes nobody (see ``_arm_timer``)."""
        self._tasks.append(task)
        self.num_droppable -= 1

    def run_at(self, at_s: float, task: Callable[[], None]) -> None:
        """Have the I/O thread run ``task`` at ``time.monotonic() == at_s``."""
        with self._wake_lock:
            heapq.heappush(self._timers, (at_s, next(self._timer_ids), task))
            is_first = at_s < self._next_timer_s
        if is_first:
            self._wake()

    def _mark_dirty(self, link: Link) -> None:
        self._dirty.append(link)
        self._wake()

    def _wake(self) -> None:
        with self._wake_lock:
            if not self._wake_pending and not self._waker.closed:
                # In this order: an interrupt between them costs a needless wake, not a lost one.
                self._waker.send(b"")
                self._wake_pending = True

    # the I/O thread:

    def _run(self) -> None:
        receive = self._pull.recv
        attachments = self.attachments
        while not self._stopping:
            if (
                self._timers
                or self._tasks
                or self.num_droppable
                or attachments.num_open
                or self._next_timer_s != _NEVER
            ):
                self._arm_timer()
            try:
                frame = receive()
            except zmq.Again:
                self._on_idle()
                continue
            except zmq.ContextTerminated:
                return
            try:
                if frame:
                    self._on_frame(frame)
                else:
                    self._on_wake()
                if self._timers:
                    self._run_timers()
                if attachments.has_returns:
                    self.return_leases()
            except wire.WireError as error:
                _log.warning("dropped a malformed message: %s", error)
            except Exception:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
                _log.exception("the I/O thread could not handle a message")
        self._close()

    def _on_frame(self, frame: bytes) -> None:
        envelope = wire.unpack_one(frame)
        if envelope is not None:
            self._dispatch(envelope)
        elif frame[:1] == MULTIPART:
            frames: list[Any] = [memoryview(frame)[1:]]
            while self._pull.rcvmore:
                frames.append(self._pull.recv(copy=False))
            for part in wire.unpack(frames):
                self._dispatch(part)
        else:
            for part in wire.unpack([frame]):
                self._dispatch(part)

    def _dispatch(self, envelope: wire.Envelope) -> None:
        kind = envelope[0]
        if kind == wire.CALL:
            if type(envelope[6]) is list:
                slot, *elected = envelope[6]
                envelope[6:7], envelope[11:] = [slot], [elected]
            runner = self.actors.get(envelope[1])
            if runner is not None:
                runner.put(envelope)
            else:
                self._on_unknown(envelope)
        elif kind == wire.REPLY:
            _, port, slot, status, _, body, attachment = envelope
            sink = self.ports.get(port)
            if status == wire.GONE and sink is not None:
                self.supervisor.on_told(unpack_failure(body))
            incoming = attachment and self.attachments.incoming(attachment)
            if sink is not None and sink.on_reply(slot, status, body, incoming):
                self.ports.pop(port, None)
        else:
            self._HANDLERS[kind](self, envelope)

    def _on_unknown(self, envelope: wire.Envelope) -> None:
        if self.on_unknown_actor(envelope[1]):
            self.actors[envelope[1]].put(envelope)
        else:
            # Its SPAWN comes over another link and may be behind.
            key = envelope[1]
            if key not in self._early:
                self.run_at(time.monotonic() + EARLY_S, lambda: self._give_up_early(key))
            self._early.setdefault(key, []).append(envelope)

    def _give_up_early(self, key: str) -> None:
        """The actor has not come: it was stopped before this process took over, or its spawner is gone."""
        from .runner import make_tombstone

        if key in self._early:
            self.add_actor(key, make_tombstone(self, key, f"it has not come to this process within {EARLY_S:g} s"))

    def add_actor(self, key: str, runner: ActorRunner) -> None:
        """Register an actor, and hand it what arrived before it."""
        self.actors[key] = runner
        # An actor ends with its owner's process, so this one has to hear of that.
        self.link(runner.owner)
        for envelope in self._early.pop(key, ()):
            runner.put(envelope)

    def _on_cancel(self, envelope: wire.Envelope) -> None:
        if self.partials is not None:
            self.partials.drop(envelope[2], envelope[3])
        self._to_actor(envelope)

    def contribute(self, envelope: wire.Envelope, out: Outgoing) -> None:
        """Hand an endpoint's value to the process that joins those of this host."""
        elected, count, operation = envelope[11]
        head = [wire.PARTIAL, envelope[3], envelope[5], envelope[6], count, operation]
        self.link(elected).send(wire.pack([*head, out.body, out.attachment]), out.frames)

    def _on_partial(self, envelope: wire.Envelope) -> None:
        if self.partials is None:
            from .calls.partials import Partials

            self.partials = Partials(self)
        self.partials.on_value(envelope)

    def _to_actor(self, envelope: wire.Envelope) -> None:
        runner = self.actors.get(envelope[1])
        if runner is not None:
            runner.put(envelope)
        elif envelope[0] == wire.PING and not envelope[1]:
            self.when_ready(lambda: self.send(envelope[2], [wire.REPLY, *envelope[3:], wire.OK, 0, NONE, None]))
        elif envelope[0] in {wire.STOP, wire.PING}:
            self._on_unknown(envelope)

    def _on_credit(self, envelope: wire.Envelope) -> None:
        _, proc, actor, sender, messages, size_bytes = envelope
        lane = self.lanes.get((proc, actor, sender))
        if lane is not None:
            lane.give_back(messages, size_bytes)

    def _on_probe(self, envelope: wire.Envelope) -> None:
        _, actor, proc, origin, wait_id = envelope
        lane = self.blocked.get(actor)
        if lane is None:
            return
        if (proc, origin) == (self.proc_id, actor):
            if lane.wait_id == wait_id:
                lane.account.grant_overdraft()
                lane.wake_waiters()
            return
        self.send(lane.proc, [wire.PROBE, lane.actor, proc, origin, wait_id])

    def _on_waits(self, envelope: wire.Envelope) -> None:
        self.waits.on_probe(envelope)

    def _on_lease(self, envelope: wire.Envelope) -> None:
        self.attachments.on_lease_returned(envelope[1], envelope[2])

    def _on_event(self, envelope: wire.Envelope) -> None:
        handler = self.on_event.get(envelope[1])
        if handler is not None:
            handler(envelope[2])

    def _on_spawn(self, envelope: wire.Envelope) -> None:
        self.on_spawn(envelope)

    def _refuse_spawn(self, envelope: wire.Envelope) -> None:
        _log.warning("%s takes no actors; %s was not spawned", self.proc_id, envelope[1])

    def _on_up(self, fields: dict[str, Any]) -> None:
        self.link(fields["proc"]).open(self.context, f"ipc://{fields['path']}")
        self.supervisor.on_up(fields["proc"])

    def _on_died(self, fields: dict[str, Any]) -> None:
        self.on_died(fields["proc"], unpack_failure(fields["failure"]), fields["next"])

    def on_died(self, proc: str, failure: MeshFailure, following: str | None) -> None:
        """A process is gone; ``following`` is what messages to its place wait for from now on (I/O thread)."""
        if proc in self.gone:
            return
        if following is not None:
            with self.places_lock:
                link = self.links.get(proc)
                if link is not None and not link.was_open:
                    self._rename_link(link, following)
                else:
                    # Before anybody else here finds the new address: an actor comes before what is sent to it.
                    self.supervisor.spawn_again(proc, following)
                self.on_replaced(proc, following)
        self.mark_gone(proc, failure)
        self.supervisor.on_proc_died(proc, failure, following)

    def wait_gone(self, proc: str, timeout_s: float) -> MeshFailure | None:
        """Block until ``proc`` is known to be dead; return how it died, or None where it seems to live."""
        heard = threading.Event()
        callback = partial(_set_if_same, heard, proc)
        self.on_gone.append(callback)
        try:
            if proc not in self.gone:
                heard.wait(timeout_s)
        finally:
            self.on_gone.remove(callback)
        return self.gone.get(proc)

    def _rename_link(self, link: Link, proc: str) -> None:
        """Nothing has been sent over it yet: what is held goes to the next incarnation instead."""
        old = link.proc
        with self._create_lock:
            link.proc = proc
            del self.links[old]
            # The next incarnation may have been heard of, and answered, before the end of this one.
            known = self.links.setdefault(proc, link)
            if known is not link:
                link.forward_to(known)
            for key in [key for key in self.lanes if key[0] == old]:
                lane = self.lanes.pop(key)
                lane.proc = proc
                self.lanes[(proc, *key[1:])] = lane
        self.attachments.on_holder_renamed(old, proc)

    def _on_filled(self, proc: str, following: str) -> None:
        """Another process has started a rank again that was lost for good."""
        if incarnation_of(following) > incarnation_of(self.resolve(place_of(proc))):
            with self.places_lock:
                self.supervisor.spawn_again(proc, following)
                self.on_replaced(proc, following)

    def on_replaced(self, proc: str, following: str) -> None:
        """What is sent to the place of ``proc`` goes to ``following`` from now on (I/O thread)."""
        place = place_of(proc)
        if incarnation_of(following) > incarnation_of(self.resolve(place)):
            self._current[place] = following
            self.epoch += 1

    def rename(self, proc_id: str, path: str) -> None:
        """Take another address; nobody has heard of the old one (I/O thread)."""
        self._pull.bind(f"ipc://{path}")
        self.links[proc_id] = self.links.pop(self.proc_id)
        self.links[proc_id].proc = self.proc_id = proc_id
        self.attachments.rename(proc_id)

    def mark_gone(self, proc: str, failure: MeshFailure) -> None:
        """Fail everything that waits for ``proc`` (I/O thread)."""
        if proc in self.gone:
            return
        self.gone[proc] = failure
        link = self.links.pop(proc, None)
        if link is not None:
            link.close()
        for key in [key for key in list(self.lanes) if key[0] == proc]:
            self.lanes.pop(key).wake_waiters()
        for port, sink in list(self.ports.items()):
            if sink.on_gone(proc, failure):
                self.ports.pop(port, None)
                self.supervisor.on_told(failure)
        for runner in list(self.actors.values()):
            runner.on_caller_gone(proc)
        if self.partials is not None:
            self.partials.drop(proc)
        self.attachments.on_proc_gone(proc)
        for callback in list(self.on_gone):
            callback(proc, failure)

    def _on_wake(self) -> None:
        with self._wake_lock:
            self._wake_pending = False
        while self._dirty:
            self._dirty.popleft().flush()
        self._on_idle()

    def _on_idle(self) -> None:
        while self._tasks:
            self._tasks.popleft()()
        self._run_timers()
        self.return_leases()

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            with self._wake_lock:
                task = heapq.heappop(self._timers)[2]
            task()

    def _arm_timer(self) -> None:
        first_s = self._timers[0][0] if self._timers else _NEVER
        if self.attachments.num_open or self.num_droppable or self._tasks:
            first_s = min(first_s, time.monotonic() + _IDLE_POLL_S)
        if first_s == _NEVER == self._next_timer_s:
            return
        self._next_timer_s = first_s
        wait_s = first_s - time.monotonic()
        self._pull.rcvtimeo = -1 if first_s == _NEVER else max(0, int(wait_s * 1000) + 1)

    def _trim(self) -> None:
        now_s = time.monotonic()
        self._trims = self.attachments.trim(now_s=now_s)
        if self._trims:
            self.run_at(now_s + _TRIM_S, self._trim)

    def _set_stopping(self) -> None:
        self._stopping = True

    def _close(self) -> None:
        for link in list(self.links.values()):
            link.close(linger_ms=200)
        self.gate.close(linger_ms=200)
        with self._wake_lock:
            self._waker.close(0)
        self._pull.close(0)
        self.attachments.close()
        self.context.term()

    _HANDLERS: Final[dict[int, Callable[[LocalProc, wire.Envelope], None]]] = {
        wire.SPAWN: _on_spawn,
        wire.STOP: _to_actor,
        wire.PING: _to_actor,
        wire.CANCEL: _on_cancel,
        wire.MORE: _to_actor,
        wire.CREDIT: _on_credit,
        wire.PROBE: _on_probe,
        wire.WAITS: _on_waits,
        wire.LEASE: _on_lease,
        wire.EVENT: _on_event,
        wire.PARTIAL: _on_partial,
    }


def _set_if_same(heard: threading.Event, wanted: str, proc: str, _failure: MeshFailure) -> None:
    if proc == wanted:
        heard.set()
