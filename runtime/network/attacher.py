"""Asks the daemons of hosts for agents of this job, and hears from them when one ends."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack
import zmq

from ..messages.frames import received
from ..messages.wire import pack
from .door import connect
from .keys import derive

if TYPE_CHECKING:
    from collections.abc import Callable

    from .neighbours import Unwatch, Watch

MAX_ANSWER_BYTES: Final = 1 << 16


@dataclass(slots=True)
class _Daemon:
    address: str
    life: int
    socket: zmq.Socket[bytes]
    token: int
    deadline_s: float
    is_attached: bool = False


class Attacher:
    """The connections of one agent to the daemons that it has attached.

    Args:
        context: ZeroMQ's.
        job: Name of the job.
        secret: The job's.
        certificate: The job's certificate with its key.
        watch: Has a socket polled.
        unwatch: Ends that.
        on_attached: Hears that an agent runs: its slot, and what the daemon says of it.
        on_refused: Hears that none does: the slot, and why.
        on_exited: Hears that one has ended: its slot, its life, and its exit code.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        *,
        job: str,
        secret: bytes,
        certificate: bytes,
        watch: Watch,
        unwatch: Unwatch,
        on_attached: Callable[[int, dict[str, Any]], object],
        on_refused: Callable[[int, str], object],
        on_exited: Callable[[int, int, int], object],
    ) -> None:
        self._context, self._job, self._secret, self._certificate = context, job, secret, certificate
        self._watch, self._unwatch = watch, unwatch
        self._on_attached, self._on_refused, self._on_exited = on_attached, on_refused, on_exited
        self._daemons: dict[int, _Daemon] = {}
        self._next_token = 0

    def attach(self, slot: int, life: int, address: str, host_secret: bytes, *, deadline_s: float) -> None:
        """Ask the daemon at ``address`` for an agent; the answer is heard of until ``deadline_s``.

        Raises:
            ValueError: The address is malformed or cannot be found.
        """
        self.leave(slot)
        self._next_token += 1
        socket = connect(
            self._context,
            zmq.DEALER,
            address,
            derive(host_secret, "caller", "host"),
            derive(host_secret, "listener", "host").public,
            max_message_bytes=MAX_ANSWER_BYTES,
            options={zmq.ROUTING_ID: f"{self._job}.{slot}.{os.urandom(4).hex()}".encode()},
        )
        daemon = self._daemons[slot] = _Daemon(address, life, socket, self._next_token, deadline_s)
        self._watch(socket, lambda: self._receive(slot, daemon))
        fields = {
            "job": self._job,
            "slot": slot,
            "incarnation": life,
            "secret": self._secret,
            "certificate": self._certificate,
        }
        socket.send(pack(["attach", daemon.token, fields]))
        self._receive(slot, daemon)

    def detach(self, slot: int) -> None:
        """Have the daemon end its agent of this job."""
        self._tell(slot, "detach", {"job": self._job})

    def shut_down(self, slot: int) -> None:
        """End the daemon."""
        self._tell(slot, "shutdown")

    def _tell(self, slot: int, name: str, *fields: dict[str, Any]) -> None:
        daemon = self._daemons.get(slot)
        if daemon is not None:
            self._next_token += 1
            daemon.socket.send(pack([name, self._next_token, *fields]))
            self._receive(slot, daemon)

    def _receive(self, slot: int, daemon: _Daemon) -> None:
        for frames in received(daemon.socket, sys.maxsize):
            self._on_answer(slot, daemon, msgpack.unpackb(frames[0]))

    def _on_answer(self, slot: int, daemon: _Daemon, answer: list[Any]) -> None:
        name, *rest = answer
        if name == "exited":
            fields = rest[0]
            if fields["slot"] == slot and fields["incarnation"] == daemon.life:
                self._on_exited(slot, daemon.life, fields["code"])
        elif name == "attached" and rest[0] == daemon.token:
            daemon.is_attached = True
            self._on_attached(slot, rest[1])
        elif name == "refused" and rest[0] == daemon.token:
            self._refuse(slot, str(rest[1].get("reason", "it gave no reason")))

    def _refuse(self, slot: int, reason: str) -> None:
        self.leave(slot)
        self._on_refused(slot, reason)

    def check(self, *, now_s: float) -> None:
        """Give up on daemons that do not answer."""
        late = [slot for slot, each in self._daemons.items() if not each.is_attached and now_s >= each.deadline_s]
        for slot in late:
            self._refuse(slot, "no answer: is `danaus host` running there, reachable, and with the same key?")

    def next_check_s(self) -> float | None:
        """When :meth:`check` may have something to do."""
        return min((each.deadline_s for each in self._daemons.values() if not each.is_attached), default=None)

    def leave(self, slot: int) -> None:
        """Have no more to do with a daemon."""
        daemon = self._daemons.pop(slot, None)
        if daemon is not None:
            self._unwatch(daemon.socket)
            daemon.socket.close(500)

    def close(self) -> None:
        """Leave all of them."""
        for slot in list(self._daemons):
            self.leave(slot)
