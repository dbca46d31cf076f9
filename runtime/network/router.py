"""An agent's way to other hosts: takes what its processes send there, and delivers what arrives.

    process --gate--> agent --tree of neighbours--> agent --link--> process

Bodies are never looked into. Replies to a call of many are laid end to end where they meet: on the host that they come
from, on hosts that they pass by, and on the caller's.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from ..address import host_of
from ..messages.frames import received
from ..messages.wire import WireError, pack
from . import packets
from .carrier import Carrier, Loss, Member, Packet, bundle
from .joins import Joins
from .packets import pack_data, unpack_meta

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import zmq

    from .joins import Key
    from .neighbours import Neighbours
    from .packets import Frames

__all__ = ["Loss", "Member", "Router", "receive_gate"]

_log = logging.getLogger("danaus.agent")
_AGENT_META: Final = pack([packets.AGENT])
_JOINED: Final = (pack([packets.CAST, 0, 0, 0, 0])[:2], pack([packets.REPLY, "", 0])[:2])
"""First bytes of the meta frames that agents in between look into."""
_BURST: Final = 256


class Router(Carrier):
    """What packets are to the processes at their ends.

    Args:
        slot: Of this agent.
        life: Of this agent.
        host: Name of its host.
        neighbours: Makes its sockets, given who takes what comes.
        deliver: Takes a message for a process here: its address, and the frames.
        on_agent_message: Takes an envelope for this agent: the sender's slot, and the bytes.
        on_lost: Hears of hosts that are lost: slot, and why.
        on_member: Hears of hosts that are new, or back.
    """

    def __init__(
        self,
        slot: int,
        life: int,
        host: str,
        neighbours: Callable[[Callable[[int, Frames], object]], Neighbours],
        *,
        deliver: Callable[[str, Frames], object],
        on_agent_message: Callable[[int, Any], object],
        on_lost: Callable[[int, Loss], object],
        on_member: Callable[[int], object],
    ) -> None:
        super().__init__(slot, life, host, neighbours, on_lost=on_lost, on_member=on_member)
        self._deliver, self._on_agent_message = deliver, on_agent_message
        self._pieces: dict[int, list[bytes]] = {}
        # Replies to calls of many: of ranks here, of hosts below, and to processes here.
        self._leaving, self._passing, self._arriving = Joins(), Joins(), Joins()

    # sending:

    def from_process(self, frames: Frames) -> None:
        """Take what a process here sends to others elsewhere.

        Raises:
            WireError: It is not what processes send.
        """
        meta, *body = frames
        kind, target, *rest = unpack_meta(meta)
        if kind == packets.CAST:
            for proc in _targets(target) if self._leaving.is_holding else ():
                self._send_on_leaving(proc)
            if rest[1]:
                self._arriving.expect((rest[0], rest[1]), len(target))
            self._post(list(target), Packet(meta, body))
        elif kind == packets.PLAIN:
            self._send_on_leaving(target)
            self._post([host_of(target)], Packet(meta, body))
        elif kind == packets.REPLY and len(body) == 1:
            key = (target, rest[0])
            self._post_replies(key, self._leaving.add(key, body[0], now_s=time.monotonic()))
        else:
            raise WireError("processes speak to other agents through their own")

    def _send_on_leaving(self, proc: str) -> None:
        """Something follows that must not overtake the replies to ``proc`` that wait here."""
        for key, held in self._leaving.take(proc):
            self._post_replies(key, held)

    def _post_replies(self, key: Key, replies: list[bytes]) -> None:
        """Send replies to one call as one packet: they are envelopes, which may be laid end to end."""
        if replies:
            meta = pack([packets.REPLY, *key])
            self._post([host_of(key[0])], Packet(meta, [b"".join(replies)]))

    def to_process(self, proc: str, frames: Frames) -> None:
        """Send something of this agent's own to a process of another host."""
        self._post([host_of(proc)], Packet(pack([packets.PLAIN, proc]), frames))

    def to_agent(self, slot: int, envelope: bytes) -> None:
        """Send an envelope to another agent."""
        self._post([slot], Packet(_AGENT_META, [envelope]))

    # on the way:

    def _pass_on(
        self, neighbour: int, origin: int, life: int, others: list[list[int]], frames: Frames, now_s: float
    ) -> None:
        meta = unpack_meta(frames[1]) if frames[1][:2] in _JOINED else None
        if meta is not None and meta[0] == packets.CAST and meta[3]:
            is_here = self.slot in meta[1]
            self._passing.expect((meta[2], meta[3]), len(others) + is_here)
        elif meta is not None and meta[0] == packets.REPLY and len(others) == 1:
            hop = self._next_hop(others[0][0])
            if hop is not None and hop != neighbour:
                header = pack_data(origin, life, others)
                self._pass_reply((meta[1], meta[2]), hop, [header, *frames[1:]], now_s)
            return
        self._carry(origin, life, others, frames[1], frames[2:], now_s, came_from=neighbour)

    def _pass_reply(self, key: Key, hop: int, frames: Frames, now_s: float) -> None:
        ready = self._passing.add(key, (hop, frames), now_s=now_s)
        self._send_together(ready, now_s)

    def _send_together(self, ready: list[tuple[int, Frames]], now_s: float) -> None:
        by_hop: dict[int, list[Frames]] = {}
        for hop, frames in ready:
            by_hop.setdefault(hop, []).append(frames)
        for hop, messages in by_hop.items():
            self.neighbours.send(hop, bundle([*self._bundles.take(hop), *messages]), now_s=now_s)

    # arriving:

    def _open(self, origin: int, meta: Any, body: Frames) -> None:
        kind, *rest = unpack_meta(meta)
        if not body:
            raise WireError("a packet without a body")
        if kind == packets.PLAIN:
            self._deliver_arriving(rest[0])
            self._deliver(rest[0], body)
        elif kind == packets.REPLY:
            self._deliver_together(rest[0], self._arriving.add((rest[0], rest[1]), body[0], now_s=time.monotonic()))
        elif kind == packets.CAST:
            self._open_cast(rest[0].get(self.slot, ()), (rest[1], rest[2]), rest[3], body)
        elif kind == packets.AGENT:
            self._on_agent_message(origin, body[0])
        else:
            self._open_piece(origin, body[0], is_last=rest[0])

    def _deliver_arriving(self, proc: str) -> None:
        for _, held in self._arriving.take(proc):
            self._deliver_together(proc, held)

    def _deliver_together(self, proc: str, replies: list[bytes]) -> None:
        if replies:
            self._deliver(proc, [b"".join(replies)])

    def _open_cast(self, calls: Iterable[tuple[str, int]], key: Key, reduce: bytes, body: Frames) -> None:
        if len(body) < 2:
            raise WireError("a cast without its two parts")
        head, tail, *frames = body
        calls = list(calls)
        for proc, _ in calls if self._arriving.is_holding else ():
            self._deliver_arriving(proc)
        slots = [slot for _, slot in calls]
        # Only neighbours in rank order: who folds them must not change the order of the whole.
        if reduce and len(calls) > 1 and slots == list(range(slots[0], slots[0] + len(slots))):
            for proc, slot in calls:
                elected = [slot, calls[0][0], len(calls), reduce]
                self._deliver(proc, packets.join_call(head, elected, tail, frames))
            return
        if key[1]:
            self._leaving.expect(key, len(calls))
        for proc, slot in calls:
            self._deliver(proc, packets.join_call(head, slot, tail, frames))

    def _open_piece(self, origin: int, piece: bytes, *, is_last: bool) -> None:
        pieces = self._pieces.setdefault(origin, [])
        pieces.append(piece)
        if is_last:
            meta, *body = packets.join_packet(self._pieces.pop(origin))
            if unpack_meta(meta)[0] == packets.PART:
                raise WireError("a piece of a piece")
            self._open(origin, meta, body)

    def _start_anew(self, slot: int) -> None:
        super()._start_anew(slot)
        self._pieces.pop(slot, None)

    # time:

    def check(self, *, now_s: float) -> None:
        """Do what is due: acknowledge, send again, ping, send on what has waited."""
        super().check(now_s=now_s)
        for key, held in self._leaving.due(now_s=now_s):
            self._post_replies(key, held)
        for _, held in self._passing.due(now_s=now_s):
            self._send_together(held, now_s)
        for (proc, _), held in self._arriving.due(now_s=now_s):
            self._deliver_together(proc, held)

    def next_check_s(self) -> float:
        """When :meth:`check` has something to do."""
        joins = (self._leaving, self._passing, self._arriving)
        return min([super().next_check_s(), *(due_s for each in joins if (due_s := each.next_due_s()) is not None)])


def _targets(shares: dict[int, list[tuple[str, int]]]) -> Iterable[str]:
    return (proc for share in shares.values() for proc, _ in share)


def receive_gate(gate: zmq.Socket[bytes], router: Router) -> None:
    """Take what processes have handed in."""
    for frames in received(gate, _BURST):
        try:
            router.from_process(frames)
        except (WireError, ValueError) as error:
            router.num_dropped += 1
            _log.warning("dropped a malformed message of a process: %s", error)
