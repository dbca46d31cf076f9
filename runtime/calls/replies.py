"""Collects replies: one sink per call in flight, fed by the I/O thread, read by whoever made the call.

The rules are pure given the feed: which reply completes a call, which error fails it, what is still missing.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from ..context import local_proc
from ..errors import ActorError, CallTimeoutError, DanausError, MessageError, StoppedError, SupervisionError
from ..failure import FailureKind, MeshFailure, unpack_failure
from ..messages import wire
from ..messages.attachment import Incoming, load_body
from .future import Future
from .reduction import join_partials
from .value_mesh import ValueMesh

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..messages.attachment import Outgoing
    from ..messages.link import Lane
    from ..proc import LocalProc
    from ..shapes.shape import Region
    from .retry import Retry

R = TypeVar("R")

LOSS_S: Final = 1.0
"""How long to wait for the word of a death that something else has shown already."""


def load_reply(endpoint: str, status: int, body: bytes | None, incoming: Incoming | None) -> Any:
    """Return the value of a reply, or raise the error it carries; runs user code."""
    if status in {wire.OK, wire.ITEM}:
        try:
            return load_body(body, incoming)
        except Exception as error:
            owner = incoming.owner if incoming is not None and isinstance(error, OSError) else None
            failure = None if owner is None else local_proc().wait_gone(owner, LOSS_S)
            if failure is not None:
                # Its process died after it had answered, and the answer's memory went with it.
                raise gone_error(failure, endpoint) from None
            import traceback

            text = f"the reply could not be loaded here\n{''.join(traceback.format_exception(error))}"
            raise MessageError(endpoint, error, text) from error
    if status == wire.GONE:
        raise gone_error(unpack_failure(body or b""), endpoint)
    place, pickled, text, while_loading = load_body(body, incoming)
    try:
        exception = load_body(pickled, None) if pickled else None
    except Exception:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
        exception = None
    if not isinstance(exception, BaseException):
        exception = None
    raise (MessageError if while_loading else ActorError)(place, exception, text)


def gone_error(failure: MeshFailure, endpoint: str | None) -> SupervisionError:
    """The error for a call whose target has ended as ``failure`` says."""
    kind = StoppedError if failure.kind is FailureKind.STOPPED else SupervisionError
    return kind(failure, endpoint)


class Call:
    """What all sinks share: the lanes asked, what each message cost in credit, and how to call them off."""

    __slots__ = ("endpoint", "implied_credit", "lanes", "port", "proc", "retry", "size_bytes", "slot_sizes")

    def __init__(self, proc: LocalProc, endpoint: str, lanes: list[Lane], *, implied_credit: bool) -> None:
        self.proc, self.endpoint, self.lanes = proc, endpoint, lanes
        self.port = proc.next_port()
        self.size_bytes = 0
        self.slot_sizes: list[int] | None = None
        self.implied_credit = implied_credit
        self.retry: Retry | None = None

    def on_answered(self, slot: int) -> None:
        """The slot's last reply is there: its message is handled, so its credit is back."""
        if self.implied_credit:
            # Scattered arguments differ from rank to rank.
            size_bytes = self.size_bytes if self.slot_sizes is None else self.slot_sizes[slot]
            self.lanes[slot].give_back(1, size_bytes)

    def cancel_slots(self, slots: list[int], *, overdue_s: float = 0.0) -> None:
        """Tell the actors at ``slots`` that nobody waits any more; ``overdue_s``: for the time, which was so much."""
        for slot in slots:
            lane = self.lanes[slot]
            unsent = lane.take_back(self.port)
            if unsent is not None:
                self.proc.attachments.take_back(unsent, lane.proc)
            elif lane.proc not in self.proc.gone:
                self.proc.send(lane.proc, [wire.CANCEL, lane.actor, self.proc.proc_id, self.port, overdue_s])
                # Credit is counted by the I/O thread alone.
                self.proc.run_soon(partial(self.on_answered, slot))

    def waits_for(self, slots: list[int]) -> list[tuple[Lane, int]]:
        """The actors at ``slots``, with the port that they answer to; none where somebody else may answer for them."""
        return [(self.lanes[slot], self.port) for slot in slots] if self.implied_credit else []

    def forget(self) -> None:
        """Stop listening."""
        self.proc.ports.pop(self.port, None)

    def tell_gone(self, sink: Any) -> None:
        """Have the I/O thread tell ``sink`` of targets gone before it was known; only that thread feeds sinks."""

        def tell() -> None:
            for proc in dict.fromkeys(lane.proc for lane in self.lanes):
                failure = self.proc.gone.get(proc)
                if failure is not None and sink.on_gone(proc, failure):
                    self.forget()

        self.proc.run_soon(tell)

    def give_up(self, outs: Sequence[Outgoing], *, num_sent: int, also_sent: set[int], is_awaited: bool) -> None:
        """Take back what could not be sent, and call off what was: the first ``num_sent``, and ``also_sent``."""
        sent = also_sent.union(range(num_sent))
        for slot, (lane, out) in enumerate(zip(self.lanes, outs, strict=True)):
            if slot not in sent:
                self.proc.attachments.take_back(out, lane.proc)
        if is_awaited:
            self.forget()
            self.cancel_slots(sorted(sent))


class _Question(Call):
    """A PING or STOP, which every actor answers for itself, though it spends no credit."""

    __slots__ = ()

    def waits_for(self, slots: list[int]) -> list[tuple[Lane, int]]:
        return [(self.lanes[slot], self.port) for slot in slots if self.lanes[slot].actor]


class OneReply(Future[R]):
    """The future of a call to one rank; its own sink."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        super().__init__(call.endpoint)
        self.call = call

    def on_reply(self, _slot: int, status: int, body: bytes | None, incoming: Incoming | None) -> bool:
        """Take the reply (I/O thread)."""
        call = self.call
        if call.retry is not None and status == wire.GONE and call.retry.after_reply(call, 0, body):
            return False
        if call.implied_credit:
            # A cancellation on its way gives nothing back a second time.
            call.implied_credit = False
            call.lanes[0].give_back(1, call.size_bytes)
        self._resolve(partial(load_reply, call.endpoint, status, body, incoming))
        return True

    def on_gone(self, proc: str, failure: MeshFailure) -> bool:
        """Fail, if it was this call's process (I/O thread)."""
        call = self.call
        if proc != call.lanes[0].proc or (call.retry is not None and call.retry.after_loss(call, 0, failure)):
            return False
        return self._reject(gone_error(failure, call.endpoint))

    def on_timeout(self, timeout_s: float) -> None:
        """Fail and call it off (I/O thread)."""
        if not self.done():
            # Called off before the caller hears of it: what the caller does next comes after it at the actor.
            self.call.forget()
            self.call.cancel_slots([0], overdue_s=timeout_s)
            self._reject(CallTimeoutError(self.call.endpoint, timeout_s, (self.call.lanes[0].name,)))

    def _waits_for(self) -> Sequence[tuple[Lane, int]]:
        return self.call.waits_for([0])

    def _on_cancelled(self) -> None:
        self.call.forget()
        self.call.cancel_slots([0])


class Gather:
    """The sink of a call to many ranks: completes with all replies, or fails with the first error.

    Args:
        call: The lanes asked.
        region: Shape of the result.
        on_error: ``"first"`` fails on the first error or death; ``"all"`` collects each rank's outcome, errors too.
        finish: Turns the ValueMesh into the result, on the asker's thread.
        reduce: The operation that hosts may carry out on the values of their ranks.
    """

    def __init__(
        self,
        call: Call,
        region: Region,
        *,
        on_error: str,
        finish: Callable[[ValueMesh[Any]], Any],
        reduce: Any = None,
    ) -> None:
        self.call, self.region, self.finish, self.reduce = call, region, finish, reduce
        self.fails_fast = on_error == "first"
        self.future: Future[Any] = _GatherFuture(self)
        self.loads: list[Callable[[], Any] | None] = [None] * len(call.lanes)
        self.missing = len(call.lanes)

    def on_reply(self, slot: int | list[int], status: int, body: bytes | None, incoming: Incoming | None) -> bool:
        """Take one rank's reply, or the joined values of several ranks of a host (I/O thread)."""
        if isinstance(slot, list):
            return self._take_joined(slot, partial(load_reply, self.call.endpoint, status, body, incoming))
        if self.loads[slot] is not None:
            return False
        retry = self.call.retry
        if retry is not None and status == wire.GONE and retry.after_reply(self.call, slot, body):
            return False
        self.call.on_answered(slot)
        return self._take(slot, partial(load_reply, self.call.endpoint, status, body, incoming), status == wire.OK)

    def _take_joined(self, slots: list[int], load: Callable[[], Any]) -> bool:
        waiting = sorted(slot for slot in slots if self.loads[slot] is None)
        for slot in waiting:
            self.call.on_answered(slot)
            self.loads[slot] = _covered
        self.missing -= len(waiting) - 1
        return bool(waiting) and self._take(waiting[0], load, True)

    def on_gone(self, proc: str, failure: MeshFailure) -> bool:
        """Fail what the dead process owed (I/O thread)."""
        is_done = False
        retry = self.call.retry
        for slot, lane in enumerate(self.call.lanes):
            if lane.proc == proc and self.loads[slot] is None:
                if retry is not None and retry.after_loss(self.call, slot, failure):
                    continue
                is_done |= self._take(slot, partial(raise_error, gone_error(failure, self.call.endpoint)), False)
        return is_done

    def _take(self, slot: int, load: Callable[[], Any], succeeded: bool) -> bool:
        self.loads[slot] = load
        self.missing -= 1
        if not succeeded and self.fails_fast:
            if not self.future.done():
                self.call.cancel_slots(self.missing_slots())
                self.future._resolve(load)
            return True
        if self.missing == 0:
            self.future._resolve(self._collect)
            return True
        return False

    def _collect(self) -> Any:
        loads = [load for load in self.loads if load is not None]
        if _covered in loads:
            return join_partials(self.reduce, [load() for load in loads if load is not _covered], len(loads))
        if not self.fails_fast:
            loads = [partial(_outcome, load) for load in loads]
        return self.finish(ValueMesh._lazy(self.region, loads))

    def missing_slots(self) -> list[int]:
        """Slots that have not answered."""
        return [slot for slot, load in enumerate(self.loads) if load is None]

    def on_timeout(self, timeout_s: float) -> None:
        """Fail and call off the ranks that have not answered (I/O thread)."""
        slots = self.missing_slots()
        names = tuple(self.call.lanes[slot].name for slot in slots)
        if not self.future.done():
            self.call.forget()
            self.call.cancel_slots(slots, overdue_s=timeout_s)
            self.future._reject(CallTimeoutError(self.call.endpoint, timeout_s, names))


class _GatherFuture(Future[Any]):
    __slots__ = ("gather",)

    def __init__(self, gather: Gather) -> None:
        super().__init__(gather.call.endpoint)
        self.gather = gather

    def _waits_for(self) -> Sequence[tuple[Lane, int]]:
        return self.gather.call.waits_for(self.gather.missing_slots())

    def _on_cancelled(self) -> None:
        self.gather.call.forget()
        self.gather.call.cancel_slots(self.gather.missing_slots())


def ask_all(
    kind: int, what: str, lanes: list[Lane], region: Region, *, on_error: str, timeout_s: float | None = None
) -> Future[None]:
    """Send a PING or STOP to each lane; return a future that is there when all have answered."""
    proc = local_proc()
    call = _Question(proc, what, lanes, implied_credit=False)
    gather = Gather(call, region, on_error=on_error, finish=_nothing)
    proc.ports[call.port] = gather
    for slot, lane in enumerate(lanes):
        lane.link.send(wire.pack([kind, lane.actor, proc.proc_id, call.port, slot]))
    if any(lane.proc in proc.gone for lane in lanes):
        call.tell_gone(gather)
    if not lanes:
        gather.future._resolve(_nothing)
    if timeout_s is not None:
        proc.run_at(time.monotonic() + timeout_s, partial(gather.on_timeout, timeout_s))
    return gather.future


def _covered() -> None:
    """Stands for a rank whose value is in the one that its host has joined."""


def _nothing(_values: object = None) -> None:
    return None


class Arrivals(Generic[R]):
    """The sink of ``stream``: one future per rank, resolved in the order in which replies arrive."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.futures: list[Future[R]] = [Future(call.endpoint) for _ in call.lanes[1:]]
        if call.lanes:
            self.futures.append(_LastArrival(self))
        self._answered: set[int] = set()

    def on_reply(self, slot: int, status: int, body: bytes | None, incoming: Incoming | None) -> bool:
        """Resolve the next future (I/O thread)."""
        if slot in self._answered:
            return False
        self.call.on_answered(slot)
        return self._take(slot, partial(load_reply, self.call.endpoint, status, body, incoming))

    def on_gone(self, proc: str, failure: MeshFailure) -> bool:
        """Resolve what the dead process owed with its failure (I/O thread)."""
        for slot, lane in enumerate(self.call.lanes):
            if lane.proc == proc and slot not in self._answered:
                self._take(slot, partial(raise_error, gone_error(failure, self.call.endpoint)))
        return len(self._answered) == len(self.futures)

    def on_timeout(self, timeout_s: float) -> None:
        """Resolve the rest with a timeout and call them off (I/O thread)."""
        names = tuple(self.call.lanes[slot].name for slot in self.missing_slots())
        self.call_off(CallTimeoutError(self.call.endpoint, timeout_s, names), overdue_s=timeout_s)

    def call_off(self, error: DanausError, *, overdue_s: float = 0.0) -> None:
        """Resolve the rest with ``error`` and call them off (I/O thread)."""
        slots = self.missing_slots()
        self.call.forget()
        self.call.cancel_slots(slots, overdue_s=overdue_s)
        for slot in slots:
            self._take(slot, partial(raise_error, error))

    def missing_slots(self) -> list[int]:
        """Slots that have not answered."""
        return [slot for slot in range(len(self.futures)) if slot not in self._answered]

    def _take(self, slot: int, load: Callable[[], R]) -> bool:
        index = len(self._answered)
        self._answered.add(slot)
        self.futures[index]._resolve(load)
        return index + 1 == len(self.futures)


class _LastArrival(Future[Any]):
    """The last future of a ``stream``: the only one that needs every rank, where the others need any."""

    __slots__ = ("arrivals",)

    def __init__(self, arrivals: Arrivals[Any]) -> None:
        super().__init__(arrivals.call.endpoint)
        self.arrivals = arrivals

    def _waits_for(self) -> Sequence[tuple[Lane, int]]:
        return self.arrivals.call.waits_for(self.arrivals.missing_slots())

    def _call_off(self, error: DanausError) -> None:
        self.arrivals.call_off(error)


def raise_error(error: DanausError) -> Any:
    raise error


def _outcome(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except DanausError as error:
        return error
