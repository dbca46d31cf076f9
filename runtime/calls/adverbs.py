"""How an endpoint is called: call, call_one, choose, stream, broadcast, and the options of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar

from ..context import current_instance, current_key, local_proc
from ..messages import wire
from ..messages.attachment import BODY_APART_BYTES
from ..messages.payload import dump_plain, is_plain_tuple
from .caller import Caller, CallOptions
from .choice import pick
from .item_stream import ItemStream, open_stream
from .lockstep import LockstepStream
from .reduction import reducer
from .replies import Arrivals, Call, Gather, OneReply
from .scatter import scattered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..actor_mesh import ActorMesh
    from ..messages.link import Lane
    from ..proc import LocalProc
    from .future import Future
    from .value_mesh import ValueMesh

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class _Adverbs(Caller):
    def options(
        self,
        *,
        timeout: float | None = None,
        on_error: Literal["first", "all"] = "first",
        reduce: Any = None,
        session: object = None,
        retries: int = 0,
    ) -> Any:
        """Return the same endpoint with other options (see :class:`CallOptions`)."""
        options = CallOptions(timeout=timeout, on_error=on_error, reduce=reduce, session=session, retries=retries)
        return type(self)(self._mesh, self._spec, options, self._flags)

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
        arguments, options = self._fit(args, kwargs, may_reduce=not self._spec.is_stream)
        proc = local_proc()
        lanes = self._lanes(proc)
        if self._spec.is_stream:
            return LockstepStream(self._mesh.extent, [self._part(slot, args, kwargs) for slot in range(len(lanes))])
        finish = reducer(options.reduce)
        gather = Gather(
            self._new_call(proc, lanes),
            self._mesh._region,
            on_error=options.on_error,
            finish=finish,
            reduce=options.reduce,
        )
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
            session: Calls whose session has an equal ``repr`` go to the same rank while it lives. It is the endpoint's
                where that has a parameter of this name.
            **kwargs: For the endpoint.

        Returns:
            A Future of the value; for a generator endpoint, an iterator of its items.
        """
        if session is not None and "session" in self._spec.parameters:
            kwargs["session"], session = session, None
        arguments, options = self._fit(args, kwargs)
        lanes = self._lanes(local_proc())
        if not lanes:
            raise ValueError(f"{self._name}.choose: the mesh is empty")
        chosen = pick(lanes, local_proc().gone, options.session if session is None else session)
        return self._one(chosen, arguments, options)

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


if TYPE_CHECKING:

    class Endpoint(Caller, Generic[P, R]):
        """A method of an actor mesh that can be called remotely. Made by attribute access on the mesh."""

        def options(
            self,
            *,
            timeout: float | None = ...,
            on_error: Literal["first", "all"] = ...,
            reduce: Any = ...,
            session: object = ...,
            retries: int = ...,
        ) -> Endpoint[P, R]: ...
        def call(self, *args: P.args, **kwargs: P.kwargs) -> Future[ValueMesh[R]]: ...
        def call_one(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...
        def choose(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...
        def stream(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[Future[R]]: ...
        def broadcast(self, *args: P.args, **kwargs: P.kwargs) -> None: ...

    class StreamingEndpoint(Caller, Generic[P, R]):
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
