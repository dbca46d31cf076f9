"""How an endpoint is called: call, call_one, choose, stream, broadcast, and the options of a call."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, ParamSpec, TypeVar

from . import wire
from .attachment import BODY_APART_BYTES
from .choice import pick
from .context import current_instance, current_key, local_proc
from .errors import CallTimeoutError, MailboxFull, MessageError
from .future import in_event_loop
from .lockstep import LockstepStream
from .payload import Payload, dump, dump_plain, is_plain_tuple
from .reduction import reducer
from .replies import Arrivals, Call, Gather, ItemStream, OneReply, gone_error, open_stream
from .scatter import Scatter, scattered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .actor import EndpointSpec
    from .actor_mesh import ActorMesh
    from .attachment import Outgoing
    from .future import Future
    from .link import Lane
    from .proc import LocalProc
    from .value_mesh import ValueMesh

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
_PING: Final = "__ping__"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What ``endpoint.options(...)`` sets.

    Attributes:
        timeout: Seconds until the call fails with CallTimeoutError and is called off; None waits.
        on_error: ``"first"`` fails a call with its first error; ``"all"`` returns each rank's outcome, errors too.
        reduce: Name of an operation, or a function of two values, that joins a call's values in rank order.
    """

    timeout: float | None = None
    on_error: Literal["first", "all"] = "first"
    reduce: Any = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"options(timeout={self.timeout!r}): expected seconds above zero, or None")
        if self.on_error not in {"first", "all"}:
            raise ValueError(f'options(on_error={self.on_error!r}): expected "first" or "all"')
        if self.reduce is not None:
            reducer(self.reduce)
            if self.on_error == "all":
                raise ValueError('options(reduce=..., on_error="all"): errors cannot be reduced; use one of the two')


class _Caller:
    """The sending half that all adverbs share."""

    def __init__(self, mesh: ActorMesh, spec: EndpointSpec, options: CallOptions, flags: int = 0) -> None:
        self._mesh, self._spec, self._options, self._flags = mesh, spec, options, flags
        self._name = f"{mesh.name}.{spec.name}"
        self._implied_credit = not (spec.is_stream or spec.options.explicit_response_port)
        self._is_simple = self._implied_credit and options == CallOptions()

    def __call__(self, *_args: object, **_kwargs: object) -> Any:
        raise TypeError(
            f"{self._name}: an endpoint is not called directly; say how: .call(...) for all ranks, .call_one(...) "
            "for one, .choose(...), .stream(...) or .broadcast(...)"
        )

    def __repr__(self) -> str:
        return f"<Endpoint {self._name} on {self._mesh!r}>"

    def _fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, CallOptions]:
        """Check the arguments against the signature; take ``reduce=`` out unless it is one of them."""
        options = self._options
        if "reduce" in kwargs and "reduce" not in self._spec.parameters:
            options = replace(options, reduce=kwargs.pop("reduce"))
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
            proc.ports[port] = sink
        outs = self._snapshots(proc, payloads, lanes)
        call.size_bytes = outs[0].size_bytes if outs else 0
        if len(payloads) > 1:
            call.slot_sizes = [out.size_bytes for out in outs]
        sender = current_key()
        for slot, (lane, out) in enumerate(zip(lanes, outs, strict=True)):
            head = [wire.CALL, lane.actor, self._spec.name, proc.proc_id, sender, port, slot, shape, flags]
            data = wire.pack([*head, out.body, out.attachment])
            if not lane.try_post(data, out.frames, out.size_bytes):
                try:
                    self._post_waiting(proc, lane, port, data, out, sink, deadline_s)
                except BaseException:
                    call.give_up(outs, num_sent=slot, is_awaited=sink is not None)
                    raise
        if proc.gone:
            self._fail_gone(call, sink, outs)
        if options.timeout is not None and deadline_s is not None and sink is not None:
            proc.run_at(deadline_s, partial(_time_out, weakref.ref(sink), options.timeout))

    def _snapshots(self, proc: LocalProc, payloads: Sequence[Payload], lanes: list[Lane]) -> list[Outgoing]:
        if len(payloads) == 1:
            out = proc.snapshot(payloads[0], [lane.proc for lane in lanes])
            return [out] * len(lanes)
        return [proc.snapshot(payload, [lane.proc]) for payload, lane in zip(payloads, lanes, strict=True)]

    def _dump(self, arguments: Any, num_ranks: int) -> list[Payload]:
        args, kwargs = arguments
        try:
            for value in (*args, *kwargs.values()):
                if type(value) is Scatter:
                    return [dump(each) for each in scattered(args, kwargs, self._mesh.extent, num_ranks)]
            return [dump(arguments)]
        except (ValueError, IndexError):
            raise
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


class _Adverbs(_Caller):
    def options(
        self,
        *,
        timeout: float | None = None,
        on_error: Literal["first", "all"] = "first",
        reduce: Any = None,
    ) -> Any:
        """Return the same endpoint with other options (see :class:`CallOptions`)."""
        return type(self)(
            self._mesh, self._spec, CallOptions(timeout=timeout, on_error=on_error, reduce=reduce), self._flags
        )

    def _lanes(self, proc: LocalProc) -> list[Lane]:
        return self._mesh._lanes(proc, current_key())

    def _one(self, lane: Lane, arguments: Any, options: CallOptions) -> Any:
        call = self._new_call(local_proc(), [lane])
        if self._spec.is_stream:
            items, stream = open_stream(call)
            self._send(call, items, arguments, options)
            return stream
        future: OneReply[Any] = OneReply(call)
        self._send(call, future, arguments, options)
        return future

    def call_one(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mesh's only rank.

        Returns:
            A Future of the value; for a generator endpoint, an iterator of its items.

        Raises:
            ValueError: The mesh has not exactly one rank.
            TypeError: The arguments do not fit the signature.
        """
        lanes = self._lanes(local_proc())
        if self._is_simple and not kwargs and len(lanes) == 1 and is_plain_tuple(args):
            self._spec.check(*args)
            future = self._call_simply(lanes[0], args)
            if future is not None:
                return future
        arguments, options = self._fit(args, kwargs)
        if len(lanes) != 1:
            first = ", ".join(f"{label}=0" for label in self._mesh.extent.labels)
            raise ValueError(
                f"{self._name}.call_one: the mesh has {len(lanes)} ranks {self._mesh.extent}; "
                f"slice it to one, as in mesh.slice({first}).{self._spec.name}.call_one(...), or use call"
            )
        return self._one(lanes[0], arguments, options)

    def _call_simply(self, lane: Lane, args: tuple[Any, ...]) -> Future[Any] | None:
        """What :meth:`_one` does, for the most frequent call, plain and without options; else None."""
        proc = local_proc()
        call = Call(proc, self._name, [lane], implied_credit=True)
        future: OneReply[Any] = OneReply(call)
        body = dump_plain((args, {}))
        # Before it is sent: the reply may come first.
        call.size_bytes = len(body)
        proc.ports[call.port] = future
        if not self._post_simply(proc, lane, body, call.port, self._flags):
            call.forget()
            return None
        if lane.proc in proc.gone:
            call.tell_gone(future)
        return future

    def _post_simply(self, proc: LocalProc, lane: Lane, body: bytes, port: int, flags: int) -> bool:
        """Send plain arguments without waiting; return whether they were sent."""
        if len(body) >= BODY_APART_BYTES:
            return False
        extent = self._mesh._region.extent
        shape = (extent.labels, extent.sizes) if extent.labels else None
        data = wire.pack(
            [wire.CALL, lane.actor, self._spec.name, proc.proc_id, lane.sender, port, 0, shape, flags, body, None]
        )
        return lane.try_post(data, (), len(body))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call every rank; fails with the first error or death unless ``on_error="all"``.

        Returns:
            A Future of a ValueMesh shaped like this mesh (or of the joined value, with ``reduce=``); for a generator
            endpoint, an iterator of ValueMeshes, one item of each rank at a time.

        Raises:
            TypeError: The arguments do not fit the signature.
        """
        arguments, options = self._fit(args, kwargs)
        proc = local_proc()
        lanes = self._lanes(proc)
        if self._spec.is_stream:
            return LockstepStream(self._mesh.extent, [self._part(slot, args, kwargs) for slot in range(len(lanes))])
        finish = reducer(options.reduce)
        gather = Gather(
            self._new_call(proc, lanes), self._mesh._region, on_error=options.on_error, finish=finish
        )  # fmt: skip
        if not lanes:
            gather.future._resolve(gather._collect)
            return gather.future
        self._send(gather.call, gather, arguments, options)
        return gather.future

    def _part(self, slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ItemStream[Any]:
        proc = local_proc()
        lanes = self._lanes(proc)
        own = scattered(args, kwargs, self._mesh.extent, len(lanes))[slot]
        return self._one(lanes[slot], own, self._options)

    def choose(self, *args: Any, session: object = None, **kwargs: Any) -> Any:
        """Call one rank: of two random ones the less loaded.

        Args:
            *args: For the endpoint.
            session: Calls with an equal (hashable) session go to the same rank while it lives.
            **kwargs: For the endpoint.

        Returns:
            A Future of the value; for a generator endpoint, an iterator of its items.
        """
        arguments, options = self._fit(args, kwargs)
        lanes = self._lanes(local_proc())
        if not lanes:
            raise ValueError(f"{self._name}.choose: the mesh is empty")
        return self._one(pick(lanes, local_proc().gone, session), arguments, options)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Call every rank; return an iterator of futures (of items, for a generator) in order of arrival."""
        arguments, options = self._fit(args, kwargs)
        proc = local_proc()
        lanes = self._lanes(proc)
        if self._spec.is_stream:
            parts = [self._part(slot, args, kwargs) for slot in range(len(lanes))]
            return (item for part in parts for item in part)
        arrivals: Arrivals[Any] = Arrivals(self._new_call(proc, lanes))
        if lanes:
            self._send(arrivals.call, arrivals, arguments, options)
        return iter(arrivals.futures)

    def broadcast(self, *args: Any, **kwargs: Any) -> None:
        """Send to every rank and return; nothing comes back. An exception in it fails that actor.

        Blocks while a receiver's mailbox is full.

        Raises:
            MailboxFull: On an event loop, which may not block.
            SupervisionError: A rank is gone.
        """
        proc = local_proc()
        lanes = self._lanes(proc)
        if self._is_simple and not kwargs and len(lanes) == 1 and not proc.gone and is_plain_tuple(args):
            self._spec.check(*args)
            if self._post_simply(proc, lanes[0], dump_plain((args, {})), 0, self._flags | wire.RETURN_CREDIT):
                return
        arguments, options = self._fit(args, kwargs)
        call = self._new_call(proc, lanes)
        if call.lanes:
            self._send(call, None, arguments, options)

    def rref(self, *_args: object, **_kwargs: object) -> Any:
        """Reserved for distributed tensors.

        Raises:
            TypeError: Always, for now.
        """
        raise TypeError(
            f"{self._name}.rref: distributed tensors are not part of this version; use call and return the value"
        )


def _time_out(sink: weakref.ref[Any], timeout_s: float) -> None:
    # Not the sink itself: a call that was answered long before would stay in memory until its deadline.
    waiting = sink()
    if waiting is not None:
        waiting.on_timeout(timeout_s)


if TYPE_CHECKING:

    class Endpoint(_Caller, Generic[P, R]):
        """A method of an actor mesh that can be called remotely. Made by attribute access on the mesh."""

        def options(
            self, *, timeout: float | None = ..., on_error: Literal["first", "all"] = ..., reduce: Any = ...
        ) -> Endpoint[P, R]: ...
        def call(self, *args: P.args, **kwargs: P.kwargs) -> Future[ValueMesh[R]]: ...
        def call_one(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...
        def choose(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...
        def stream(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[Future[R]]: ...
        def broadcast(self, *args: P.args, **kwargs: P.kwargs) -> None: ...

    class StreamingEndpoint(_Caller, Generic[P, R]):
        """A generator method of an actor mesh; its caller iterates."""

        def options(self, *, timeout: float | None = ...) -> StreamingEndpoint[P, R]: ...
        def call(self, *args: P.args, **kwargs: P.kwargs) -> LockstepStream[R]: ...
        def call_one(self, *args: P.args, **kwargs: P.kwargs) -> ItemStream[R]: ...
        def choose(self, *args: P.args, **kwargs: P.kwargs) -> ItemStream[R]: ...
        def stream(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]: ...
        def broadcast(self, *args: P.args, **kwargs: P.kwargs) -> None: ...

else:

    class Endpoint(_Adverbs):
        """A method of an actor mesh that can be called remotely. Made by attribute access on the mesh."""

    StreamingEndpoint = Endpoint


def send(
    endpoint: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    port: Any = None,
    selection: ActorMesh | None = None,
) -> None:
    """Send one message per rank, with replies going to ``port``: the primitive beneath the adverbs.

    Args:
        endpoint: The endpoint, as in ``mesh.method``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        port: A :class:`Port` opened by this process, or None to drop the replies.
        selection: A slice of the endpoint's mesh to send to, instead of all of it.
    """
    target = endpoint if selection is None else getattr(selection, endpoint._spec.name)
    if port is None:
        target.broadcast(*args, **kwargs)
        return
    for future in target.stream(*args, **kwargs):
        future.add_done_callback(lambda done: _forward(done, port))


def _forward(done: Future[Any], port: Any) -> None:
    error = done.exception()
    if error is None:
        port.send(done.get())
    else:
        port.exception(error)


__all__ = ["CallOptions", "Endpoint", "StreamingEndpoint", "current_instance", "send"]
