"""Joins the values of a ``reduce=`` on the host that they come from: one of its ranks' processes is chosen to do so.

Agents never unpickle, so they cannot. The chosen process folds in rank order, on the thread for callbacks, and answers
the caller for all; an error or a death is told by itself and never waits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..invoke import dump_error, dump_value
from ..messages import wire
from ..messages.attachment import load_body
from ..messages.payload import load
from .future import _run_apart
from .reduction import joiner

if TYPE_CHECKING:
    from ..messages.attachment import Incoming
    from ..proc import LocalProc


@dataclass(slots=True)
class _Partial:
    count: int
    operation: bytes
    values: dict[int, tuple[bytes | None, Incoming | None]] = field(default_factory=dict)


class Partials:
    """What this process has been chosen to join, by the call that it belongs to."""

    def __init__(self, proc: LocalProc) -> None:
        self._proc = proc
        self._partials: dict[tuple[str, int], _Partial] = {}

    def on_value(self, envelope: wire.Envelope) -> None:
        """Take one rank's value (I/O thread)."""
        _, caller, port, slot, count, operation, body, attachment = envelope
        incoming = attachment and self._proc.attachments.incoming(attachment)
        partial = self._partials.setdefault((caller, port), _Partial(count, operation))
        partial.values[slot] = body, incoming
        if len(partial.values) == count:
            del self._partials[caller, port]
            _run_apart(functools.partial(self._answer, caller, port, partial))

    def drop(self, caller: str, port: int | None = None) -> None:
        """A call was called off, or whoever made it is gone (I/O thread)."""
        for key in [key for key in self._partials if key[0] == caller and port in {None, key[1]}]:
            del self._partials[key]

    def _answer(self, caller: str, port: int, partial: _Partial) -> None:
        proc, slots = self._proc, sorted(partial.values)
        try:
            join = joiner(load(partial.operation))
            values = [load_body(*partial.values[slot]) for slot in slots]
            answer: Any = slots
            status, payload = wire.OK, dump_value(functools.reduce(join, values))
        except Exception as error:  # noqa: BLE001  told to whoever waits
            place = f"reduce= of ranks {slots[0]}-{slots[-1]} on host {proc.host}"
            answer, status, payload = slots[0], wire.ERROR, dump_error(place, error)
        out = proc.snapshot(payload, [caller])
        proc.reply(caller, port, answer, status, out, load=0, lazy=False, joined=status == wire.OK)
