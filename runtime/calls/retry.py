"""Sends a call again whose rank was lost and is started again: for endpoints that may run twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..address import place_of
from ..failure import unpack_failure
from ..messages import wire
from ..messages.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..failure import MeshFailure
    from ..messages.wire import Envelope
    from .replies import Call


class Retry:
    """What it takes to send a call's messages once more, and how often that may be done.

    Args:
        method: Name of the endpoint.
        shape: Shape of the slice that is called, as it is in the envelope.
        flags: Flags of the envelope.
        payloads: The arguments; one for all ranks, or one each. Their buffers are copied: the caller may change them.
        retries: How often one rank may be asked again.
        num_slots: Number of ranks.
    """

    __slots__ = ("_flags", "_left", "_method", "_payloads", "_shape")

    def __init__(
        self, method: str, shape: object, flags: int, payloads: Sequence[Payload], retries: int, num_slots: int
    ) -> None:
        self._method, self._shape, self._flags = method, shape, flags
        self._payloads = [
            Payload(each.body, tuple(memoryview(bytes(view)) for view in each.buffers)) for each in payloads
        ]
        self._left = [retries] * num_slots

    def after_loss(self, call: Call, slot: int, failure: MeshFailure) -> bool:
        """Send the message of ``slot`` again, if its rank returns; return whether that was done (I/O thread)."""
        proc, old = call.proc, call.lanes[slot]
        address = proc.resolve(place_of(old.proc))
        if not failure.restarts or not self._left[slot] or address in proc.gone:
            return False
        self._left[slot] -= 1
        lane = proc.lane(address, old.actor, sender=old.sender, name=old.name, bound=old.account.bound)
        # The list may be shared with other calls.
        call.lanes = [*call.lanes[:slot], lane, *call.lanes[slot + 1 :]]
        payload = self._payloads[slot if len(self._payloads) > 1 else 0]
        out = proc.snapshot(payload, [address])
        head = [wire.CALL, lane.actor, self._method, proc.proc_id, lane.sender, call.port, slot, self._shape]
        envelope: Envelope = [*head, self._flags, out.body, out.attachment]
        # Behind what waits for room: this thread never does.
        lane.post_later(call.port, wire.pack(envelope), out)
        return True

    def after_reply(self, call: Call, slot: int, body: bytes | None) -> bool:
        """Same as :meth:`after_loss`, for an actor that has answered that it is gone."""
        lane, spent = call.lanes[slot], call.size_bytes if call.slot_sizes is None else call.slot_sizes[slot]
        is_sent = self.after_loss(call, slot, unpack_failure(body or b""))
        if is_sent and call.implied_credit:
            lane.give_back(1, spent)
        return is_sent
