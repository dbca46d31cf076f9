"""Sends one message for all ranks of a call that are on other hosts: the agents' tree makes one for each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..messages import wire
from ..messages.far_link import CAST, FarLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..messages.attachment import Outgoing
    from ..messages.link import Lane
    from ..proc import LocalProc


def cast(
    proc: LocalProc,
    lanes: Sequence[Lane],
    before: Sequence[Any],
    after: Sequence[Any],
    out: Outgoing,
    joined: int,
    reduce: bytes = b"",
) -> set[int]:
    """Send a call to those of ``lanes`` that lead to other hosts and have room; return their slots.

    Args:
        proc: This process's runtime.
        lanes: Of the call, in the order of its slots.
        before: The fields of the CALL before its slot, the same for all.
        after: Those behind it, up to the body.
        out: The arguments.
        joined: Port whose replies may be joined on their way; 0 for none.
        reduce: The packed operation by which hosts join their ranks' values; empty for none.
    """
    sent: set[int] = set()
    if not any(isinstance(lane.link, FarLink) for lane in lanes):
        return sent
    shares: dict[int, list[tuple[str, int]]] = {}
    with proc.gate.lock:
        ready = [slot for slot, lane in enumerate(lanes) if _has_room(lane)]
        if len(ready) < 2:
            return sent
        for slot in ready:
            lane = lanes[slot]
            lane.account.spend(out.size_bytes)
            shares.setdefault(lane.host, []).append((lane.proc, slot))
            sent.add(slot)
        flags = after[1] | wire.JOINED if joined else after[1]
        # Laid end to end, with the slot between them, they are one envelope of eleven fields.
        head = b"\x9b" + b"".join(map(wire.pack, before))
        tail = b"".join(map(wire.pack, (after[0], flags, out.body, out.attachment)))
        meta = wire.pack([CAST, shares, proc.proc_id, joined, reduce])
        proc.gate.send_locked(meta, [head, tail, *out.frames])
    return sent


def _has_room(lane: Lane) -> bool:
    return isinstance(lane.link, FarLink) and lane.link.is_open and not lane.backlog and lane.account.has_room()
