"""Runs one call after another on an actor's thread: loads the arguments, calls the method, sends what comes of it."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar

from .actor import EndpointOptions, EndpointSpec, spec_of
from .calls.port import Port
from .collectives.root_cause import cause_of
from .context import ActorInstance, current_message
from .failure import MeshFailure
from .invoke import ActiveCall, GeneratorCall, dump_error, dump_value, where
from .messages import wire
from .messages.attachment import Outgoing, load_body, size_of
from .messages.credits import CreditDebt
from .testing import armed as faults

if TYPE_CHECKING:
    from queue import SimpleQueue

    from .actor_mesh import ActorMesh
    from .errors import GroupBroken
    from .proc import LocalProc

_log = logging.getLogger("danaus")
AnyCall = TypeVar("AnyCall", bound=ActiveCall)
_NO_VALUE = Outgoing(None)


class Fatal(Exception):  # noqa: N818  names a state
    """An error that has no caller to go to: the actor fails with it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class CallHandler:
    """The calls of one actor.

    Attributes:
        active: Calls that can still be cancelled, by caller and port.
        in_hand: The last call begun; where the actor fails in it, its caller is told.
        cancelled: Calls whose cancellation came before their turn.
        num_gated: Calls that wait for a place among an endpoint's concurrent ones.
        is_ending: Whether the actor stops, so that a cancellation of a task is its doing.
    """

    def __init__(
        self,
        proc: LocalProc,
        instance: ActorInstance,
        mesh: ActorMesh,
        actor: Any,
        queue: SimpleQueue[wire.Envelope],
        cancelled: set[tuple[str, int]],
    ) -> None:
        self.actor = actor
        self.active: dict[tuple[str, int], ActiveCall] = {}
        self.cancelled = cancelled
        self.num_gated = 0
        self.is_ending = False
        self.in_hand: wire.Envelope | None = None
        self._proc, self._instance, self._queue = proc, instance, queue
        self._key, self._bound = instance.key, mesh._mailbox
        self._specs = mesh._specs
        self._debts: dict[tuple[str, str], CreditDebt] = {}

    def spec_for(self, envelope: wire.Envelope) -> EndpointSpec | None:
        """Return the endpoint that a CALL names: declared, or named by ``as_endpoint`` at the call site."""
        spec = self._specs.get(envelope[2])
        if spec is not None or not envelope[8] & wire.UNDECORATED:
            return spec
        method = getattr(type(self.actor), envelope[2], None)
        if method is None:
            return None
        explicit = bool(envelope[8] & wire.EXPLICIT_PORT)
        return spec_of(type(self.actor), envelope[2], method, EndpointOptions(explicit_response_port=explicit))

    def begin(self, spec: EndpointSpec | None, envelope: wire.Envelope) -> tuple[Any, Any] | None:
        """Load a call's arguments; where it cannot run, answer it and return None."""
        if envelope[8] & wire.RETURN_CREDIT:
            self._return_credit(envelope)
        if self.cancelled and self._was_cancelled(envelope):
            return None
        current_message.set(envelope)
        self.in_hand = envelope
        try:
            if spec is None:
                known = ", ".join(sorted(self._specs)) or "none"
                raise AttributeError(  # noqa: TRY301  told like any other
                    f"{type(self.actor).__qualname__} has no endpoint {envelope[2]!r}; its endpoints: {known}"
                )
            attachment = envelope[10]
            if attachment is None:
                args, kwargs = load_body(envelope[9], None)
            else:
                envelope[10] = None
                incoming = self._proc.attachments.incoming(attachment)
                args, kwargs = load_body(envelope[9], incoming, borrow=spec.options.borrow)
        except Exception as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            self.reply_error(envelope, error, while_loading=True)
            return None
        if spec.options.explicit_response_port:
            args = (Port(envelope[3], envelope[5], envelope[6]), *args)
        return args, kwargs

    def run_sync(self, spec: EndpointSpec | None, envelope: wire.Envelope) -> None:
        """Run a sync endpoint from start to end.

        Raises:
            Fatal: It raised, and nobody waits for its reply.
        """
        arguments = self.begin(spec, envelope)
        if arguments is None or spec is None:
            return
        args, kwargs = arguments
        armed = faults.armed
        try:
            if armed is not None:
                armed.pass_endpoint(self._key, spec.name, "before")
            result = getattr(self.actor, spec.name)(*args, **kwargs)
            if spec.is_stream:
                self._run_generator(result, envelope)
                return
            if armed is not None:
                armed.pass_endpoint(self._key, spec.name, "after")
        except Fatal:
            raise
        except Exception as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            del arguments, args, kwargs
            self.on_error(spec, envelope, error)
            return
        # Arguments that lie in shared memory go back before the reply invites the next call.
        del arguments, args, kwargs
        if envelope[5] and not spec.options.explicit_response_port:
            self._reply(envelope, wire.OK, result)
        elif self._proc.attachments.has_returns:
            self._proc.return_leases()

    async def run_async(self, spec: EndpointSpec, envelope: wire.Envelope, arguments: tuple[Any, Any]) -> None:
        """Run an async endpoint, as a task of its own.

        Raises:
            Fatal: It raised, and nobody waits for its reply.
        """
        args, kwargs = arguments
        del arguments
        armed = faults.armed
        try:
            if armed is not None:
                await armed.pass_endpoint_async(self._key, spec.name, "before")
            result = getattr(self.actor, spec.name)(*args, **kwargs)
            if spec.is_stream:
                await self._run_async_generator(result, envelope)
                return
            result = await result
            if armed is not None:
                await armed.pass_endpoint_async(self._key, spec.name, "after")
        except Fatal:
            raise
        except CancelledError as error:
            del args, kwargs
            call = self.active.get((envelope[3], envelope[5]))
            if self.is_ending or (call is not None and call.is_cancelled):
                raise
            # Its own doing, not the caller's, who still waits.
            self.on_error(spec, envelope, error)
            return
        except Exception as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            del args, kwargs
            self.on_error(spec, envelope, error)
            return
        del args, kwargs
        if envelope[5] and not spec.options.explicit_response_port:
            self._reply(envelope, wire.OK, result)
        elif self._proc.attachments.has_returns:
            self._proc.return_leases()

    def track(self, call: AnyCall) -> AnyCall:
        """Note a call that can be cancelled from now on; :meth:`untrack` ends it."""
        key = call.envelope[3], call.envelope[5]
        self.active[key] = call
        if key in self.cancelled:
            # It came while the arguments were being loaded.
            self.cancelled.discard(key)
            call.cancel()
        return call

    def untrack(self, envelope: wire.Envelope) -> None:
        """The call is over."""
        self.active.pop((envelope[3], envelope[5]), None)

    def on_cancel(self, key: tuple[str, int]) -> None:
        """A caller gave up (I/O thread): stop what runs, or leave a tombstone for what is queued."""
        call = self.active.get(key)
        if call is None:
            self.cancelled.add(key)
        else:
            call.cancel()

    def on_error(self, spec: EndpointSpec, envelope: wire.Envelope, error: BaseException) -> None:
        """Send an endpoint's exception to its caller, or fail the actor with it."""
        cause = cause_of(self._key, error)
        if cause is not None:
            self._on_secondary(envelope, error, cause)
            return
        if not envelope[5] or spec.options.explicit_response_port:
            raise Fatal(error)
        self.reply_error(envelope, error)

    def _on_secondary(self, envelope: wire.Envelope, error: BaseException, cause: MeshFailure | GroupBroken) -> None:
        """The error follows from the loss of another member of a group: the caller hears of that; the actor lives."""
        if not envelope[5]:
            _log.warning("%s: %s", where(self._instance, envelope), cause)
        elif isinstance(cause, MeshFailure):
            self._proc.reply_gone(envelope, cause, with_credit=False)
        else:
            cause.__cause__ = error
            self.reply_error(envelope, cause)

    def reply_error(self, envelope: wire.Envelope, error: BaseException, *, while_loading: bool = False) -> None:
        """Answer a call with an exception."""
        if not envelope[5]:
            raise Fatal(error)
        body = dump_error(where(self._instance, envelope), error, while_loading=while_loading)
        out = self._proc.snapshot(body, [envelope[3]])
        self._proc.reply(envelope[3], envelope[5], envelope[6], wire.ERROR, out, load=0, lazy=False)

    def _was_cancelled(self, envelope: wire.Envelope) -> bool:
        key = envelope[3], envelope[5]
        if key in self.cancelled:
            self.cancelled.discard(key)
            self._proc.attachments.discard(envelope[10])
            return True
        if self._queue.empty() and not self.num_gated:
            # What is left are calls that had ended before their cancellation came.
            self.cancelled.clear()
        return False

    def _run_generator(self, items: Any, envelope: wire.Envelope) -> None:
        call = self.track(GeneratorCall(envelope))
        try:
            for item in items:
                if envelope[5] and not (call.wait_window() and self._reply(envelope, wire.ITEM, item)):
                    break
            else:
                if faults.armed is not None:
                    faults.armed.pass_endpoint(self._key, envelope[2], "after")
                self._reply_end(envelope)
        finally:
            self.untrack(envelope)
            items.close()

    async def _run_async_generator(self, items: Any, envelope: wire.Envelope) -> None:
        # Broadcasts share one key, so another's end may have removed it.
        call = self.active.get((envelope[3], envelope[5]))
        if not isinstance(call, GeneratorCall):
            call = GeneratorCall(envelope)
        try:
            async for item in items:
                if envelope[5] and not (await call.wait_window_async() and self._reply(envelope, wire.ITEM, item)):
                    break
            else:
                if faults.armed is not None:
                    await faults.armed.pass_endpoint_async(self._key, envelope[2], "after")
                self._reply_end(envelope)
        finally:
            await items.aclose()

    def _reply(self, envelope: wire.Envelope, status: int, value: Any) -> bool:
        """Send a value; return False where an error went in its place."""
        proc, sender = self._proc, envelope[3]
        is_partial = len(envelope) > 11
        try:
            out = proc.snapshot(dump_value(value), [envelope[11][0] if is_partial else sender])
        except Exception as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            self.reply_error(envelope, error)
            return False
        del value
        waiting = self._queue.qsize()
        if proc.attachments.has_returns:
            proc.return_leases(before_reply_to=sender)
        if is_partial:
            proc.contribute(envelope, out)
            return True
        joined = bool(envelope[8] & wire.JOINED)
        proc.reply(sender, envelope[5], envelope[6], status, out, load=waiting, lazy=waiting > 0, joined=joined)
        return True

    def _reply_end(self, envelope: wire.Envelope) -> None:
        if envelope[5]:
            self._proc.reply(envelope[3], envelope[5], envelope[6], wire.END, _NO_VALUE, load=0, lazy=False)

    def _return_credit(self, envelope: wire.Envelope) -> None:
        sender = envelope[3], envelope[4]
        debt = self._debts.get(sender)
        if debt is None:
            debt = self._debts[sender] = CreditDebt(self._bound)
        body, attachment = envelope[9], envelope[10]
        if debt.add(len(body) if attachment is None else size_of(body, attachment)):
            self._proc.send(sender[0], [wire.CREDIT, self._proc.proc_id, self._key, sender[1], *debt.take()])
