"""Sends a call's messages: checks the arguments, pickles them once, spends credit, waits for room."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..context import current_key
from ..errors import CallTimeoutError, MailboxFull, MessageError
from ..messages import wire
from ..messages.payload import Payload, dump
from .casting import cast
from .future import in_event_loop
from .reduction import reducer
from .replies import Call, Gather, gone_error
from .retry import Retry
from .scatter import Scatter, scattered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..actor import EndpointSpec
    from ..actor_mesh import ActorMesh
    from ..messages.attachment import Outgoing
    from ..messages.link import Lane
    from ..proc import LocalProc


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What ``endpoint.options(...)`` sets.

    Attributes:
        timeout: Seconds until the call fails with CallTimeoutError and is called off; None waits.
        on_error: ``"first"`` fails a call with its first error; ``"all"`` returns each rank's outcome, errors too.
        reduce: Name of an operation, or a function of two values, that joins a call's values in rank order.
        session: What ``choose`` keeps affinity by; see there.
        retries: How often a rank may be asked again that was lost while it had the call, and that a policy starts
            again. Only for endpoints that are declared ``@endpoint(idempotent=True)``.
    """

    timeout: float | None = None
    on_error: Literal["first", "all"] = "first"
    reduce: Any = None
    session: object = None
    retries: int = 0

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"options(timeout={self.timeout!r}): expected seconds above zero, or None")
        if self.on_error not in {"first", "all"}:
            raise ValueError(f'options(on_error={self.on_error!r}): expected "first" or "all"')
        if type(self.retries) is not int or self.retries < 0:
            raise ValueError(f"options(retries={self.retries!r}): expected a number, 0 or more")
        if self.reduce is not None:
            reducer(self.reduce)
            if self.on_error == "all":
                raise ValueError('options(reduce=..., on_error="all"): errors cannot be reduced; use one of the two')


class Caller:
    """The sending half that all adverbs share."""

    def __init__(self, mesh: ActorMesh, spec: EndpointSpec, options: CallOptions, flags: int = 0) -> None:
        self._mesh, self._spec, self._options, self._flags = mesh, spec, options, flags
        self._name = f"{mesh.name}.{spec.name}"
        self._implied_credit = not (spec.is_stream or spec.options.explicit_response_port)
        self._is_simple = self._implied_credit and options == CallOptions()
        if options.retries and not (spec.options.idempotent and self._implied_credit):
            raise ValueError(
                f"{self._name}.options(retries={options.retries}): the endpoint may run twice then; declare it "
                "@endpoint(idempotent=True) if that does no harm (generators and explicit ports cannot be)"
            )

    def __call__(self, *_args: object, **_kwargs: object) -> Any:
        raise TypeError(
            f"{self._name}: an endpoint is not called directly; say how: .call(...) for all ranks, .call_one(...) "
            "for one, .choose(...), .stream(...) or .broadcast(...)"
        )

    def __repr__(self) -> str:
        return f"<Endpoint {self._name} on {self._mesh!r}>"

    def _fit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, may_reduce: bool = False
    ) -> tuple[Any, CallOptions]:
        """Check the arguments against the signature; take ``reduce=`` out unless it is one of them."""
        options = self._options
        if may_reduce and "reduce" in kwargs and "reduce" not in self._spec.parameters:
            options = replace(options, reduce=kwargs.pop("reduce"))
        if options.reduce is not None and not may_reduce:
            raise TypeError(f"{self._name}: reduce= joins the values of call(); the other adverbs have none to join")
        self._spec.check(*args, **kwargs)
        return (args, kwargs), options

    def _new_call(self, proc: LocalProc, lanes: list[Lane]) -> Call:
        return Call(proc, self._name, lanes, implied_credit=self._implied_credit)

    def _send(self, call: Call, sink: Any, arguments: Any, options: CallOptions) -> None:
        """Send one message to each lane of ``call``, whose replies go to ``sink``."""
        proc, port = call.proc, call.port if sink is not None else 0
        lanes = call.lanes
        payloads = self._dump(arguments, len(lanes))
        deadline_s = None if options.timeout is None else time.monotonic() + options.timeout
        flags = self._flags if call.implied_credit and sink is not None else self._flags | wire.RETURN_CREDIT
        extent = self._mesh.extent
        shape = (extent.labels, extent.sizes) if extent.labels else None
        if sink is not None:
            if options.retries:
                call.retry = Retry(self._spec.name, shape, flags, payloads, options.retries, len(lanes))
            proc.ports[port] = sink
        outs = self._snapshots(proc, payloads, lanes)
        call.size_bytes = outs[0].size_bytes if outs else 0
        if len(payloads) > 1:
            call.slot_sizes = [out.size_bytes for out in outs]
        self._post(call, sink, outs, (shape, flags), deadline_s)
        if proc.gone:
            self._fail_gone(call, sink, outs)
        if options.timeout is not None and deadline_s is not None and sink is not None:
            proc.run_at(deadline_s, partial(_time_out, weakref.ref(sink), options.timeout))

    def _post(
        self, call: Call, sink: Any, outs: Sequence[Outgoing], after: tuple[Any, int], deadline_s: float | None
    ) -> None:
        """Send ``outs`` to the lanes of ``call``; ``after`` are the fields of its messages behind the slot."""
        proc, lanes, port = call.proc, call.lanes, call.port if sink is not None else 0
        sender = current_key()
        sent: set[int] = set()
        if call.slot_sizes is None and len(lanes) > 1:
            before = (wire.CALL, lanes[0].actor, self._spec.name, proc.proc_id, sender, port)
            is_gather = isinstance(sink, Gather)
            reduce = dump(sink.reduce).body if is_gather and sink.reduce is not None and call.implied_credit else b""
            # One that is asked again answers for itself.
            sent = cast(proc, lanes, before, after, outs[0], port if is_gather else 0, b"" if call.retry else reduce)
        for slot, (lane, out) in enumerate(zip(lanes, outs, strict=True)):
            if slot in sent:
                continue
            head = [wire.CALL, lane.actor, self._spec.name, proc.proc_id, sender, port, slot, *after]
            data = wire.pack([*head, out.body, out.attachment])
            if not lane.try_post(data, out.frames, out.size_bytes):
                try:
                    self._post_waiting(proc, lane, port, data, out, sink, deadline_s)
                except BaseException:
                    call.give_up(outs, num_sent=slot, also_sent=sent, is_awaited=sink is not None)
                    raise

    def _snapshots(self, proc: LocalProc, payloads: Sequence[Payload], lanes: list[Lane]) -> list[Outgoing]:
        if len(payloads) == 1:
            out = proc.snapshot(payloads[0], [lane.proc for lane in lanes])
            return [out] * len(lanes)
        return [proc.snapshot(payload, [lane.proc]) for payload, lane in zip(payloads, lanes, strict=True)]

    def _dump(self, arguments: Any, num_ranks: int) -> list[Payload]:
        args, kwargs = arguments
        is_scattered = any(type(value) is Scatter for value in (*args, *kwargs.values()))
        distinct = scattered(args, kwargs, self._mesh.extent, num_ranks) if is_scattered else [arguments]
        try:
            return [dump(each) for each in distinct]
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            reason = f"an argument cannot be pickled here ({why}); pass plain data, arrays, tensors or handles"
            raise MessageError(self._name, error, reason) from error

    def _post_waiting(
        self, proc: LocalProc, lane: Lane, port: int, data: bytes, out: Outgoing, sink: Any, deadline_s: float | None
    ) -> None:
        """The mailbox is full: wait for room on this thread, or, on an event loop, queue at the sender."""
        if in_event_loop():
            if sink is None:
                raise MailboxFull(lane.name, lane.account.bound)
            lane.post_later(port, data, out)
            return
        sender = current_key()
        proc.blocked[sender] = lane
        try:
            while not lane.try_post(data, out.frames, out.size_bytes):
                if lane.proc in proc.gone:
                    return
                if not lane.wait_room(proc.proc_id, deadline_s, lambda: lane.proc in proc.gone):
                    assert deadline_s is not None
                    raise CallTimeoutError(
                        f"{self._name} (its mailbox is full)", self._options.timeout or 0, (lane.name,)
                    )
        finally:
            proc.blocked.pop(sender, None)

    def _fail_gone(self, call: Call, sink: Any, outs: Sequence[Outgoing]) -> None:
        proc = call.proc
        gone = [(lane, out) for lane, out in zip(call.lanes, outs, strict=True) if lane.proc in proc.gone]
        for lane, out in gone:
            proc.attachments.take_back(out, lane.proc)
        if gone and sink is None:
            raise gone_error(proc.gone[gone[0][0].proc], self._name)
        if gone:
            call.tell_gone(sink)


def _time_out(sink: weakref.ref[Any], timeout_s: float) -> None:
    # Not the sink itself: a call that was answered long before would stay in memory until its deadline.
    waiting = sink()
    if waiting is not None:
        waiting.on_timeout(timeout_s)
