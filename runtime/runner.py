"""Runs one actor: its mailbox, its thread, and its event loop once it needs one.

    CONSTRUCTING --init returned--> RUNNING --stop--> STOPPED
         |                             |
         +------init raised------------+--nobody to tell of an error--> FAILED

The thread takes one message at a time. It blocks on the mailbox until the first async endpoint, from then on it serves
the mailbox from inside its loop, so that background tasks go on between messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections import defaultdict, deque
from contextvars import Context, copy_context
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from .address import incarnation_of
from .calls.future import call_soon
from .collectives.registry import end_groups
from .context import ActorInstance, bind_instance
from .failure import FailureKind, MeshFailure, pack_failure, unpack_failure
from .handler import CallHandler, Fatal
from .hooks import Hooks, Question, call
from .invoke import ActiveCall, GeneratorCall, hidden_loop, local_traceback
from .messages import wire
from .messages.attachment import load_body
from .overdue import tell_overdue
from .proc import NONE
from .supervision.slots import Slot, bind_slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from .actor import EndpointSpec
    from .proc import LocalProc

_log = logging.getLogger("danaus")

TASK: Final = -1
"""Kind of an envelope that never travels: something to run on the actor's thread between messages."""

CLEANUP_LIMIT_S: Final = 3.0
"""Time for an async ``__cleanup__``, and for cancelled tasks to end before it."""

FOLLOW_LIMIT_S: Final = 5.0
"""How long an actor that is made again waits for the one before it to end."""


class RunnerState(Enum):
    """Where an actor is in its life; the module's docstring draws it."""

    CONSTRUCTING = auto()
    RUNNING = auto()
    FAILED = auto()
    STOPPED = auto()


class _Stop(Exception):  # noqa: N818  names a state
    def __init__(self, envelope: wire.Envelope) -> None:
        super().__init__()
        self.envelope = envelope


class _RestoreFailed(Exception):  # noqa: N818  names a state
    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class ActorRunner:
    """One actor of this process.

    Args:
        proc: The process's runtime.
        spawn: The SPAWN envelope; its body is loaded on the actor's thread.
    """

    def __init__(self, proc: LocalProc, spawn: wire.Envelope) -> None:
        self.proc, self.key = proc, str(spawn[1])
        self.owner = str(spawn[2])
        times, self._may_again, self.kept_file, self._why = spawn[3]
        self.incarnation = times + incarnation_of(proc.proc_id)
        self.state = RunnerState.CONSTRUCTING
        self.failure: MeshFailure | None = None
        self.instance: ActorInstance | None = None
        self.ended = threading.Event()
        self._spawn = spawn
        self._queue: SimpleQueue[wire.Envelope] = SimpleQueue()
        self._handler: CallHandler | None = None
        self._cancelled: set[tuple[str, int]] = set()
        self._interrupted: list[wire.Envelope] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: Context | None = None
        self._idle = False
        self._stop_first: wire.Envelope | None = None
        self._leaving: BaseException | None = None
        self._overlapping: dict[str, int] = defaultdict(int)
        self._gated: dict[str, deque[tuple[EndpointSpec, wire.Envelope]]] = defaultdict(deque)
        self._tasks: set[asyncio.Task[None]] = set()
        self._answer_lock = threading.Lock()
        self._slot = Slot(proc, self.key)
        self.thread_id = 0
        self._hooks = Hooks(self._on_hook_raised)
        self._cause: MeshFailure | None = None
        self._before: ActorRunner | None = None
        self._stop_kind = FailureKind.STOPPED
        self._is_silent = False
        self._is_to_stop = False

    def has_hook(self, name: str) -> bool:
        """Whether the actor lives and defines ``name``."""
        return self.instance is not None and hasattr(self.instance.actor, name)

    @property
    def creator(self) -> str | None:
        """Address of the actor that spawned this one."""
        return self.instance.creator if self.instance is not None else None

    # the I/O thread:

    def put(self, envelope: wire.Envelope) -> None:
        """Take one envelope from the I/O thread."""
        kind = envelope[0]
        if kind == wire.CANCEL:
            key = envelope[2], envelope[3]
            if envelope[4]:
                tell_overdue(self, envelope)
            if self._handler is not None:
                self._handler.on_cancel(key)
            else:
                self._cancelled.add(key)
        elif kind == wire.MORE:
            call = self._handler and self._handler.active.get((envelope[2], envelope[3]))
            if call is not None:
                call.allow(envelope[4])
        else:
            self._is_to_stop |= kind == wire.STOP
            self._queue.put(envelope)
            if self.failure is not None:
                # What comes after the failure waits for the actor to be made again, if that may happen.
                if not self._may_again or kind == wire.STOP:
                    self.on_abandoned()
            elif self._idle:
                self._wake()

    def put_task(self, task: Callable[[], object]) -> None:
        """Have the actor's thread run ``task`` between messages, in turn (I/O thread)."""
        self.put([TASK, task])

    def ask(self, question: Question) -> None:
        """Call a hook of the actor before the next message, or at the next await (I/O thread)."""
        self._hooks.ask(question)
        self.put([TASK, self._run_hooks])
        if self._loop is not None:
            call_soon(self._loop, self._run_hooks, context=self._context)

    def on_abandoned(self) -> None:
        """It has failed and is not made again: answer what waits for it (I/O thread)."""
        self._may_again = False
        # One that ended with its process, to be started again, is made again in the next.
        if self.failure is not None and self._stop_kind is not FailureKind.RESTARTED:
            self.failure = replace(self.failure, restarts=False)
        self._answer_queue()

    def follow(self, before: ActorRunner) -> None:
        """Take the place of an actor that has failed, or that is to end now (I/O thread)."""
        self._before = before
        if before.failure is None:
            cause = None if self._why is None else unpack_failure(self._why)
            before._stop_kind, before._cause = FailureKind.RESTARTED, cause
            before.request_stop()
            return
        with contextlib.suppress(Empty):
            while True:
                envelope = before._queue.get_nowait()
                if envelope[0] != TASK:
                    self._queue.put(envelope)

    def on_caller_gone(self, proc: str) -> None:
        """End with the owner's process; cancel what a dead process had asked for."""
        if proc == self.owner and self.failure is None:
            self.request_stop()
        if self._handler is not None:
            for key in [key for key in list(self._handler.active) if key[0] == proc]:
                self._handler.on_cancel(key)

    def request_stop(self, restart: MeshFailure | None = None) -> None:
        """Stop after the current message, ahead of what is queued; async and generator endpoints are cancelled.

        Args:
            restart: Why, if that is to start the process again.
        """
        if restart is not None:
            self._stop_kind, self._cause = FailureKind.RESTARTED, restart.cause
            # The end of the process answers: until then, who asks again would only come here again.
            self._is_silent = True
        self._stop_first = [wire.STOP, self.key, "", 0, 0]
        if self._handler is not None:
            for key in list(self._handler.active):
                self._handler.on_cancel(key)
        self.put(self._stop_first)

    def _wake(self) -> None:
        self._idle = False
        if self._loop is not None:
            # Not in the context of the I/O thread, which is no actor's.
            call_soon(self._loop, self._pump, context=self._context)

    # the actor's thread:

    def run(self) -> None:
        """Construct the actor and serve its mailbox until it stops or fails."""
        self.thread_id = threading.get_ident()
        if self._before is not None:
            # The state that both would touch is the first one's until it has ended.
            self._before.ended.wait(FOLLOW_LIMIT_S)
            self._before = None
        try:
            bind_slot(self._slot)
            self._serve_blocking(self._construct())
        except _Stop as stop:
            self._stop(stop.envelope)
        except Fatal as fatal:
            self._fail(FailureKind.ACTOR_ERROR, fatal.error)
        except _RestoreFailed as failed:
            self._fail(FailureKind.RESTORE_ERROR, failed.error)
        except BaseException as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            is_new = self.state is RunnerState.CONSTRUCTING
            self._fail(FailureKind.INIT_ERROR if is_new else FailureKind.ACTOR_ERROR, error)
        finally:
            self._close_loop()
            bind_slot(None)
            self.ended.set()

    def _construct(self) -> CallHandler:
        _, _, _, _, body, attachment = self._spawn
        incoming = attachment and self.proc.attachments.incoming(attachment)
        mesh, args, kwargs, owner = load_body(body, incoming)
        self._spawn = []
        self.instance = ActorInstance(self.proc, mesh, self.key, owner)
        self.instance.incarnation = self.incarnation
        bind_instance(self.instance)
        actor_class = mesh._actor_class
        actor = actor_class.__new__(actor_class)
        self.instance.actor = actor
        actor.__init__(*args, **kwargs)
        if self.incarnation and hasattr(actor, "restore"):
            self._restore(actor)
        self._handler = CallHandler(self.proc, self.instance, mesh, actor, self._queue, self._cancelled)
        self.state = RunnerState.RUNNING
        return self._handler

    def _restore(self, actor: Any) -> None:
        """Give the actor what it last handed to ``checkpoint``."""
        from .keeping import recall

        try:
            found, state = recall(self.proc, self.key)
            if found:
                call(actor, "restore", state)
        except Exception as error:
            raise _RestoreFailed(error) from error

    def _run_hooks(self) -> None:
        if self.instance is not None and self.instance.actor is not None:
            self._hooks.run(self.instance.actor)

    def _on_hook_raised(self, question: Question, error: BaseException) -> None:
        if question.cause is None:
            _log.error("%s: %s raised", self.key, question.hook, exc_info=error)
            return
        self._cause = question.cause
        if self._loop is None:
            raise Fatal(error) from error
        self._leave(Fatal(error))

    def _serve_blocking(self, handler: CallHandler) -> None:
        get = self._queue.get
        while True:
            envelope = get()
            if self._stop_first is not None:
                self._give_up(envelope)
            if self._hooks.is_due:
                self._run_hooks()
            if envelope[0] == wire.CALL:
                spec = handler.spec_for(envelope)
                if spec is not None and spec.needs_loop:
                    self._serve_in_loop(envelope)
                handler.run_sync(spec, envelope)
            elif envelope[0] == wire.STOP:
                raise _Stop(envelope)
            elif envelope[0] == TASK:
                envelope[1]()
            else:
                self._acknowledge(envelope)

    def _serve_in_loop(self, envelope: wire.Envelope) -> None:
        """Serve the mailbox by callbacks of an event loop, from here to the actor's end."""
        self._context = copy_context()
        loop = self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.call_soon(self._pump, envelope)
        try:
            loop.run_forever()
        except BaseException as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            # SystemExit and KeyboardInterrupt of a task go through the loop; callbacks still due may not go on.
            self._leave(error)
        self._cancel_tasks(loop)
        assert self._leaving is not None
        raise self._leaving

    def _pump(self, envelope: wire.Envelope | None = None) -> None:
        """Handle messages while the actor's one slot is free; whoever takes the slot calls again when it is done."""
        self._idle = False
        try:
            while self._leaving is None:
                if envelope is None:
                    try:
                        envelope = self._queue.get_nowait()
                    except Empty:
                        self._idle = True
                        if self._queue.empty():
                            return
                        self._idle = False
                        continue
                if not self._handle_in_loop(envelope):
                    return
                envelope = None
        except BaseException as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            self._leave(error)

    def _handle_in_loop(self, envelope: wire.Envelope) -> bool:
        """Start on one message; return whether the slot is free for the next."""
        handler = self._handler
        assert handler is not None
        if self._stop_first is not None:
            self._give_up(envelope)
        if self._hooks.is_due:
            self._run_hooks()
        if envelope[0] == wire.PING:
            self._acknowledge(envelope)
            return True
        if envelope[0] == wire.STOP:
            raise _Stop(envelope)
        if envelope[0] == TASK:
            with hidden_loop():
                envelope[1]()
            return True
        spec = handler.spec_for(envelope)
        if spec is None or not spec.needs_loop:
            with hidden_loop():
                handler.run_sync(spec, envelope)
            # Background tasks get their turn between messages.
            asyncio.get_running_loop().call_soon(self._pump)
            return False
        if spec.options.concurrency == 1:
            task = self._start(spec, envelope)
            if task is None:
                return True
            self._slot.task, self._slot.envelope = task, envelope
            task.add_done_callback(self._after_exclusive)
            return False
        self._start_overlapping(spec, envelope)
        return True

    def _start(self, spec: EndpointSpec, envelope: wire.Envelope) -> asyncio.Task[None] | None:
        handler, loop = self._handler, self._loop
        assert handler is not None
        assert loop is not None
        arguments = handler.begin(spec, envelope)
        if arguments is None:
            return None
        call = handler.track(GeneratorCall(envelope) if spec.is_stream else ActiveCall(envelope))
        task = loop.create_task(handler.run_async(spec, envelope, arguments))
        call.task = task
        call.on_cancel(lambda: call_soon(loop, task.cancel))
        task.add_done_callback(partial(self._on_task_end, envelope))
        return task

    def _start_overlapping(self, spec: EndpointSpec, envelope: wire.Envelope) -> None:
        assert self._handler is not None
        if self._overlapping[spec.name] >= spec.options.concurrency:
            self._gated[spec.name].append((spec, envelope))
            self._handler.num_gated += 1
            return
        task = self._start(spec, envelope)
        if task is not None:
            self._overlapping[spec.name] += 1
            self._tasks.add(task)
            task.add_done_callback(partial(self._after_overlapping, spec.name))

    def _on_task_end(self, envelope: wire.Envelope, task: asyncio.Task[None]) -> None:
        if self._handler is not None:
            self._handler.untrack(envelope)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._leave(error)

    def _after_exclusive(self, _task: asyncio.Task[None]) -> None:
        self._slot.task = self._slot.envelope = None
        self._pump()

    def _after_overlapping(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._overlapping[name] -= 1
        gated = self._gated[name]
        # Several, where some turn out to be cancelled or broken.
        while gated and self._leaving is None and self._overlapping[name] < gated[0][0].options.concurrency:
            assert self._handler is not None
            self._start_overlapping(*gated.popleft())
            self._handler.num_gated -= 1

    def _leave(self, error: BaseException) -> None:
        if self._leaving is None:
            self._leaving = error
        if self._loop is not None and self._loop.is_running():
            self._loop.stop()

    def _give_up(self, envelope: wire.Envelope) -> None:
        """Stop now: the message just taken goes back to be answered with the others."""
        assert self._stop_first is not None
        if envelope[0] != wire.STOP:
            self._queue.put(envelope)
        raise _Stop(envelope if envelope[0] == wire.STOP else self._stop_first)

    # the end:

    def _stop(self, envelope: wire.Envelope) -> None:
        self._cleanup(None)
        self._may_again = False
        if envelope[3]:
            # By its owner, and not only with its process.
            self.proc.request("forget", {"actor": self.key})
        self._end(RunnerState.STOPPED, self._record(self._stop_kind, ""))
        self._acknowledge(envelope)

    def _fail(self, kind: FailureKind, error: BaseException) -> None:
        failure = self._record(kind, local_traceback(error))
        self._cleanup(error)
        self._end(RunnerState.FAILED, failure)
        fields = {"actor": self.key, "proc": self.proc.proc_id, "failure": pack_failure(failure)}
        self.proc.send(self.owner, [wire.EVENT, "actor_failed", fields])

    def _acknowledge(self, envelope: wire.Envelope) -> None:
        if envelope[3]:
            self.proc.send(envelope[2], [wire.REPLY, *envelope[3:], wire.OK, 0, NONE, None])

    def _record(self, kind: FailureKind, traceback: str) -> MeshFailure:
        instance = self.instance
        return MeshFailure(
            kind=kind,
            mesh=instance.name if instance else self.key.rsplit("-", 1)[0],
            rank=instance.rank.rank if instance else None,
            host=self.proc.host,
            pid=self.proc.pid,
            incarnation=self.incarnation,
            traceback=traceback,
            cause=self._cause,
            restarts=self._may_again or kind is FailureKind.RESTARTED,
        )

    def _end(self, state: RunnerState, failure: MeshFailure) -> None:
        end_groups(self.key, failure)
        self.failure, self.state = failure, state
        if self._is_to_stop:
            self._may_again = False
        if self.instance is not None:
            self.instance.actor = None
        for waiting in self._gated.values():
            for _, envelope in waiting:
                self._queue.put(envelope)
        # Counted before the first answer: what comes after it may be a call that is sent again, for the next one.
        num_waiting = self._queue.qsize()
        handler = self._handler
        if handler is not None:
            handler.actor = None
            in_hand = () if handler.in_hand is None else (handler.in_hand,)
            open_calls = [*self._interrupted, *(call.envelope for call in list(handler.active.values())), *in_hand]
            # Each once: a second answer would be taken for that of the call sent again.
            once = {id(envelope): envelope for envelope in open_calls}
            for envelope in () if self._is_silent else once.values():
                self.proc.reply_gone(envelope, failure, with_credit=False)
        # What stays is a tombstone that says what happened.
        self._handler = None
        if not self._may_again:
            self._answer_queue()
        elif failure.kind is FailureKind.ACTOR_ERROR:
            # What comes from now on, or came before the actor had ever run, is for the next.
            self._answer_queue(num_waiting)

    def _answer_queue(self, limit: int = sys.maxsize) -> None:
        """Answer what nobody will handle any more (the actor's thread at its end, then the I/O thread)."""
        with self._answer_lock:
            failure = self.failure
            if failure is None or self._is_silent:
                return
            for _ in range(limit):
                try:
                    envelope = self._queue.get_nowait()
                except Empty:
                    return
                if envelope[0] == wire.CALL:
                    self.proc.reply_gone(envelope, failure)
                elif envelope[0] == wire.STOP:
                    self._acknowledge(envelope)
                elif envelope[0] != TASK:
                    reply = [wire.REPLY, *envelope[3:], wire.GONE, 0, pack_failure(failure), None]
                    self.proc.send(envelope[2], reply)

    def _cleanup(self, error: BaseException | None) -> None:
        """Stop what the actor owns, then call its ``__cleanup__``."""
        if self.instance is None:
            return
        self.instance.stop_owned()
        cleanup: Callable[[BaseException | None], Any] | None = getattr(self.instance.actor, "__cleanup__", None)
        if cleanup is None:
            return
        try:
            outcome = cleanup(error)
            if asyncio.iscoroutine(outcome):
                loop = self._loop = self._loop or asyncio.new_event_loop()
                loop.run_until_complete(asyncio.wait_for(outcome, CLEANUP_LIMIT_S))
        except Exception:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            _log.exception("%s: __cleanup__ raised", self.key)

    def _cancel_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the endpoints that are still under way and wait for them, before anything is cleaned up."""
        tasks = [task for task in self._tasks if not task.done()]
        if self._handler is not None:
            self._handler.is_ending = True
            self._interrupted = [call.envelope for call in list(self._handler.active.values())]
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=CLEANUP_LIMIT_S))

    def _close_loop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None:
            return
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(Exception):
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=CLEANUP_LIMIT_S))
            loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


def make_tombstone(proc: LocalProc, key: str, detail: str) -> ActorRunner:
    """What answers for an actor that is not there, and never was in this process."""
    runner = ActorRunner(proc, [wire.SPAWN, key, proc.proc_id, [0, False, None, None], None, None])
    runner.state = RunnerState.STOPPED
    runner.failure = replace(runner._record(FailureKind.STOPPED, ""), detail=detail)
    runner.ended.set()
    return runner
