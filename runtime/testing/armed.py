"""The faults that wait in this process, and what happens when one strikes.

While none waits, ``armed`` is None, and looking at it is all that an endpoint or a point costs. Faults come and go on
the I/O thread; they strike on the thread that runs the endpoint or passes the point, which first tells the process that
injected it and hears back, so that who sees the consequence can see the fault.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from ..context import current_key
from ..messages import wire
from ..messages.payload import load
from ..proc import NONE, ROOT
from .faults import Fault, FaultKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..proc import LocalProc

_NOTED_LIMIT_S: Final = 1.0
"""How long a fault waits for the injector to have heard of it; the injector may be stopped itself."""

armed: Armed | None = None
"""The faults that wait in this process; None where there are none."""

_all: Armed | None = None
_released: dict[tuple[str, int], threading.Event] = {}
"""By fault, for those that strike just now: set once it is withdrawn."""


def point(name: str, *, step: int | None = None) -> None:
    """Name a place in the code at which faults may be injected; otherwise it does nothing, and costs next to nothing.

    >>> from danaus import testing
    >>> testing.point("forward", step=12)

    Args:
        name: What ``Fault.kill(point=...)`` names.
        step: What its ``step=`` is compared with.
    """
    if armed is not None:
        armed.pass_point(name, step)


class _Waiting:
    """One fault that has not struck yet."""

    __slots__ = ("actor", "error", "fault", "injector", "number", "seen")

    def __init__(self, injector: str, number: int, actor: str, fault: Fault, error: bytes | None) -> None:
        self.injector, self.number, self.actor = injector, number, actor
        self.fault, self.error = fault, error
        self.seen = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.injector, self.number


class Armed:
    """The faults that wait in this process."""

    def __init__(self, local: LocalProc) -> None:
        self.local = local
        self._faults: list[_Waiting] = []
        self._lock = threading.Lock()

    def pass_point(self, name: str, step: int | None) -> None:
        """Code of this process passes a point."""
        at = f"point {name!r}" + ("" if step is None else f" of step {step}")
        for waiting in self._due(current_key(), lambda fault: fault.matches_point(name, step)):
            self._strike(waiting, at)

    def pass_endpoint(self, actor: str, name: str, when: str) -> None:
        """A sync endpoint is about to run, or has run."""
        for waiting in self._due(actor, lambda fault: fault.matches_endpoint(name, when)):
            self._strike(waiting, f"{when} {name!r}")

    async def pass_endpoint_async(self, actor: str, name: str, when: str) -> None:
        """Same for an async endpoint: what only takes time leaves its thread to others."""
        for waiting in self._due(actor, lambda fault: fault.matches_endpoint(name, when)):
            if waiting.fault.kind is FaultKind.SLOW:
                import asyncio

                may_strike = self._tell(waiting, f"{when} {name!r}")
                _released.pop(waiting.key, None)
                await asyncio.sleep((waiting.fault.seconds or 0.0) if may_strike else 0.0)
            else:
                self._strike(waiting, f"{when} {name!r}")

    def add(self, faults: list[_Waiting]) -> None:
        """Have them strike when their time comes (I/O thread)."""
        global armed
        with self._lock:
            self._faults += faults
            armed = self

    def remove(self, keys: set[tuple[str, int]]) -> None:
        """Have those that have not struck yet never strike (I/O thread)."""
        with self._lock:
            self._keep([each for each in self._faults if each.key not in keys])

    def _keep(self, faults: list[_Waiting]) -> None:
        global armed
        self._faults = faults
        armed = self if faults else None

    def _due(self, actor: str, matches: Callable[[Fault], bool]) -> list[_Waiting]:
        """Count this moment for every fault that it matches; take out and return those whose time it is."""
        due: list[_Waiting] = []
        with self._lock:
            for waiting in self._faults:
                # A thread that the user's code started belongs to no actor that we could tell.
                if waiting.actor and actor not in {waiting.actor, ROOT}:
                    continue
                if matches(waiting.fault):
                    waiting.seen += 1
                    if waiting.seen == waiting.fault.nth:
                        due.append(waiting)
                        # From here on withdrawing it has to end it.
                        _released[waiting.key] = threading.Event()
            if due:
                self._keep([each for each in self._faults if each not in due])
        return due

    def _tell(self, waiting: _Waiting, at: str) -> bool:
        """Say that it strikes, and wait until the injector has heard of it; return whether it still may."""
        local = self.local
        noted = _Noted(waiting.injector)
        port = local.next_port()
        local.ports[port] = noted
        fields = {
            "number": waiting.number,
            "proc": local.proc_id,
            "pid": local.pid,
            "at": at,
            "port": port,
            "kind": waiting.fault.kind.value,
            "seconds": waiting.fault.seconds,
        }
        local.send(waiting.injector, [wire.EVENT, "fault_fired", fields])
        if waiting.injector not in local.gone:
            noted.wait()
        local.ports.pop(port, None)
        return not noted.is_withdrawn

    def _strike(self, waiting: _Waiting, at: str) -> None:
        released = _released[waiting.key]
        try:
            if self._tell(waiting, at):
                self._act(waiting, released)
        finally:
            _released.pop(waiting.key, None)

    def _act(self, waiting: _Waiting, released: threading.Event) -> None:
        fault = waiting.fault
        if fault.kind is FaultKind.KILL:
            os.kill(self.local.pid, signal.SIGKILL)
        elif fault.kind is FaultKind.STOP:
            # To this thread: a signal to the process might stop it only after another instruction or two of ours.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        elif fault.kind is FaultKind.EXIT:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(fault.code)
        elif fault.kind is FaultKind.RAISE:
            raise load(waiting.error or NONE)
        elif fault.kind is FaultKind.SLOW:
            released.wait(fault.seconds)
        else:
            _hang(fault, released)


def _hang(fault: Fault, released: threading.Event) -> None:
    if not fault.holds_gil:
        released.wait(fault.seconds)
        return
    import ctypes

    # Of all ways to call C from here, PyDLL alone keeps the lock.
    poll = ctypes.PyDLL(None).poll
    end_s = None if fault.seconds is None else time.monotonic() + fault.seconds
    # A signal's handler cuts it short.
    while end_s is None or time.monotonic() < end_s:
        poll(None, 0, -1 if end_s is None else int((end_s - time.monotonic()) * 1000) + 1)


class _Noted:
    """The sink of the injector's answer."""

    def __init__(self, injector: str) -> None:
        self._injector = injector
        self.is_withdrawn = False
        self._event = threading.Event()

    def wait(self) -> None:
        self._event.wait(_NOTED_LIMIT_S)

    def on_reply(self, _slot: int, status: int, *_body: object) -> bool:
        self.is_withdrawn = status != wire.OK
        self._event.set()
        return True

    def on_gone(self, proc: str, _failure: object) -> bool:
        if proc == self._injector:
            self._event.set()
        return proc == self._injector


# the I/O thread:


def on_inject(local: LocalProc, fields: dict[str, Any]) -> None:
    """Arm the faults that another process sends, or forget those that it takes back, and answer."""
    global _all
    if _all is None or _all.local is not local:
        _all = Armed(local)
    injector = fields["injector"]
    # What the one before this could not be sent any more comes here, but is not for this one.
    faults = fields["faults"] if fields["to"] == local.proc_id else []
    _all.add(
        [
            _Waiting(injector, number, fields["actor"], Fault.from_fields(fault), error)
            for number, fault, error in faults
        ]
    )
    withdrawn = {(injector, number) for number in fields["withdrawn"]}
    _all.remove(withdrawn)
    for key in withdrawn:
        released = _released.get(key)
        if released is not None:
            released.set()
    if fields["port"]:
        local.send(injector, [wire.REPLY, fields["port"], fields["slot"], wire.OK, 0, NONE, None])
