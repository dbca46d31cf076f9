"""Sends faults to the ranks that they are for, and hears which of them have struck."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..address import incarnation_of, place_of
from ..calls.replies import Call, Gather
from ..context import local_proc
from ..messages import wire
from ..messages.payload import dump
from ..proc import NONE
from .faults import Fault, FaultKind
from .places import check_rank, lane_to, places_of, procs_of
from .signals import resume_stopped

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from ..failure import MeshFailure
    from ..messages.link import Lane
    from ..proc import LocalProc

LIMIT_S: Final = 10.0
_WITHDRAW_LIMIT_S: Final = 2.0

_numbers = itertools.count(1)
_injections: dict[int, Injection] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """A fault that has struck.

    Attributes:
        fault: Which one.
        rank: Where, as a rank of the mesh given to :func:`inject`.
        incarnation: Which incarnation of that rank.
        pid: Which process.
        at: The endpoint or point, as text.
    """

    fault: Fault
    rank: int
    incarnation: int
    pid: int
    at: str

    def __str__(self) -> str:
        return f"{self.fault.kind} struck rank {self.rank} (incarnation {self.incarnation}, pid {self.pid}) {self.at}"


class Injection:
    """Faults that were injected together. A ``with`` block withdraws them at its end.

    Attributes:
        faults: What was injected.
    """

    def __init__(self, local: LocalProc, mesh: Any, faults: tuple[Fault, ...]) -> None:
        self.faults = faults
        self._local = local
        self._procs = procs_of(mesh, "inject")
        self._places = places_of(self._procs)
        self._actor: str = getattr(mesh, "_key", "")
        self._by_number = {next(_numbers): fault for fault in faults}
        self._errors = {number: _pickled(fault) for number, fault in self._by_number.items()}
        self._armed: set[str] = set()
        self._is_withdrawn = False
        self._fired: list[Fired] = []
        self._changed = threading.Condition()

    @property
    def fired(self) -> list[Fired]:
        """What has struck so far. A fault is here before anyone can see what it did."""
        with self._changed:
            return list(self._fired)

    def wait_fired(self, num: int = 1, *, timeout: float = 30.0) -> list[Fired]:
        """Block until ``num`` faults have struck, and return them.

        Raises:
            TimeoutError: Fewer had after ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._fired) >= num, timeout):
                waiting = "; ".join(map(str, self.faults))
                raise TimeoutError(
                    f"{len(self._fired)} of {num} faults have struck within {timeout:g} s; injected were: {waiting}. "
                    "Look whether the endpoint or point is passed that often, by that rank"
                )
            return list(self._fired)

    def withdraw(self) -> None:
        """Take back what has not struck yet, and let what hangs go on; returns when the ranks have done so.

        Nothing strikes any more from here on. A rank that a fault has stopped, or whose interpreter's lock it holds,
        forgets the others once it can.
        """
        with self._changed:
            self._is_withdrawn = True
            alive = self._armed - self._local.gone.keys()
        for number in self._by_number:
            _injections.pop(number, None)
        if self._on_gone in self._local.on_gone:
            self._local.on_gone.remove(self._on_gone)
        deaf = {self._places[fired.rank] for fired in self.fired if _makes_deaf(fired.fault)}
        answering = [proc for proc in alive if place_of(proc) not in deaf]
        for proc in alive.difference(answering):
            self._local.send(proc, self._message(proc, [], withdrawn=list(self._by_number)))
        with contextlib.suppress(TimeoutError):
            lanes = [lane_to(self._local, proc, self._procs) for proc in answering]
            messages = [self._message(proc, [], withdrawn=list(self._by_number)) for proc in answering]
            self._ask(lanes, messages, on_error="all").exception(_WITHDRAW_LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.withdraw()

    def __repr__(self) -> str:
        return f"<Injection into {self._procs.name!r}: {len(self.fired)} of {len(self.faults)} faults have struck>"

    def _arm(self, timeout: float) -> None:
        _injections.update(dict.fromkeys(self._by_number, self))
        if any(fault.incarnation != "current" for fault in self.faults):
            self._local.on_gone.append(self._on_gone)
        lanes: list[Lane] = []
        messages: list[wire.Envelope] = []
        for rank, place in enumerate(self._places):
            lane = lane_to(self._local, self._local.resolve(place), self._procs)
            numbers = self._numbers_for(rank, incarnation_of(lane.proc), is_current=True)
            if numbers:
                lanes.append(lane)
                messages.append(self._message(lane.proc, numbers))
                self._armed.add(lane.proc)
        try:
            self._ask(lanes, messages, on_error="first").get(timeout)
        except TimeoutError as error:
            raise TimeoutError(
                f"inject: not every one of {', '.join(lane.name for lane in lanes)} has armed within {timeout:g} s: it "
                "is not up yet, or stopped, or something holds its interpreter's lock"
            ) from error

    def _numbers_for(self, rank: int, incarnation: int, *, is_current: bool) -> list[int]:
        return [
            number
            for number, fault in self._by_number.items()
            if fault.rank in {None, rank}
            and (fault.incarnation in {"every", incarnation} or (is_current and fault.incarnation == "current"))
        ]

    def _message(self, proc: str, numbers: Iterable[int], *, withdrawn: list[int] | None = None) -> wire.Envelope:
        fields: dict[str, Any] = {
            "to": proc,
            "injector": self._local.proc_id,
            "actor": self._actor,
            "faults": [(number, self._by_number[number].as_fields(), self._errors[number]) for number in numbers],
            "withdrawn": withdrawn or [],
            "port": 0,
            "slot": 0,
        }
        return [wire.EVENT, "inject", fields]

    def _ask(self, lanes: list[Lane], messages: list[wire.Envelope], *, on_error: str) -> Any:
        """Send each lane its message; return a future of all answers."""
        local = self._local
        call = Call(local, f"inject into {self._procs.name!r}", lanes, implied_credit=False)
        gather = Gather(call, self._procs._region, on_error=on_error, finish=lambda _values: None)
        if not lanes:
            gather.future._resolve(lambda: None)
            return gather.future
        local.ports[call.port] = gather
        for slot, (lane, message) in enumerate(zip(lanes, messages, strict=True)):
            message[2].update(port=call.port, slot=slot)
            lane.link.send(wire.pack(message))
        if any(lane.proc in local.gone for lane in lanes):
            call.tell_gone(gather)
        return gather.future

    # the I/O thread:

    def _note(self, fields: dict[str, Any]) -> bool:
        """A fault is about to strike; return whether it may."""
        proc = fields["proc"]
        fired = Fired(
            fault=self._by_number[fields["number"]],
            rank=self._places.index(place_of(proc)),
            incarnation=incarnation_of(proc),
            pid=fields["pid"],
            at=fields["at"],
        )
        with self._changed:
            if not self._is_withdrawn:
                self._fired.append(fired)
                self._changed.notify_all()
            return not self._is_withdrawn

    def _on_gone(self, proc: str, _failure: MeshFailure) -> None:
        """A rank may have another incarnation now, for which some faults are meant."""
        place = place_of(proc)
        following = self._local.resolve(place)
        if place not in self._places or following in {proc, *self._armed}:
            return
        numbers = self._numbers_for(self._places.index(place), incarnation_of(following), is_current=False)
        with self._changed:
            if numbers and not self._is_withdrawn:
                self._armed.add(following)
                self._local.send(following, self._message(following, numbers))


def inject(mesh: Any, *faults: Fault, timeout: float = LIMIT_S) -> Injection:
    """Have faults strike ranks of ``mesh`` at their moments; returns when these ranks know of them.

    >>> from danaus import Actor, endpoint, testing, this_host
    >>> class Trainer(Actor):
    ...     @endpoint
    ...     def step(self) -> int:
    ...         return 1
    >>> with this_host().spawn_procs({"rank": 2}) as procs:
    ...     trainers = procs.spawn("trainers", Trainer)
    ...     fault = testing.Fault.raises(ValueError("no luck"), rank=1, endpoint="step", nth=2)
    ...     with testing.inject(trainers, fault) as faults:
    ...         steps = [trainers.step.call().exception() for _ in range(3)]
    >>> [type(error).__name__ for error in steps]
    ['NoneType', 'ActorError', 'NoneType']
    >>> len(faults.fired)
    1

    Args:
        mesh: Actors, or procs: then calls of any actor there count. It may be a slice; ranks are those of the slice.
        *faults: What strikes.
        timeout: Seconds for the ranks to answer.

    Raises:
        ValueError: A fault names a rank or an endpoint that ``mesh`` does not have.
        SupervisionError: A rank that a fault is for is gone.
        TimeoutError: A rank does not answer.
    """
    local = local_proc()
    injection = Injection(local, mesh, faults)
    for fault in faults:
        if fault.rank is not None:
            check_rank(fault.rank, injection._procs, f"inject: {fault}")
        _check_endpoint(fault, mesh)
    local.on_event.setdefault("fault_fired", lambda fields: _on_fired(local, fields))
    try:
        injection._arm(timeout)
    except BaseException:
        injection.withdraw()
        raise
    return injection


def _check_endpoint(fault: Fault, mesh: Any) -> None:
    actor_class = getattr(mesh, "_actor_class", None)
    if fault.endpoint is None or actor_class is None or callable(getattr(actor_class, fault.endpoint, None)):
        return
    known = ", ".join(sorted(mesh._specs)) or "none"
    raise ValueError(f"inject: {fault}: {actor_class.__qualname__} has no such endpoint; its endpoints: {known}")


def _pickled(fault: Fault) -> bytes | None:
    return None if fault.exception is None else dump(fault.exception).body


def _makes_deaf(fault: Fault) -> bool:
    return fault.kind is FaultKind.STOP or fault.holds_gil


def _on_fired(local: LocalProc, fields: dict[str, Any]) -> None:
    """A fault is about to strike (I/O thread): note it, and say so; or say that it was withdrawn."""
    injection = _injections.get(fields["number"])
    may_strike = injection is not None and injection._note(fields)
    if may_strike and fields["kind"] == FaultKind.STOP and fields["seconds"] is not None:
        local.run_at(time.monotonic() + fields["seconds"], lambda: resume_stopped(local, fields["pid"]))
    status = wire.OK if may_strike else wire.ERROR
    local.send(fields["proc"], [wire.REPLY, fields["port"], 0, status, 0, NONE, None])
