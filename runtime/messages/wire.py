"""The envelope: what travels between processes, as msgpack arrays that can be laid end to end in one frame.

Pure: bytes in, lists out. A frame holds any number of envelopes; the frames after the first belong, in order, to the
envelopes that announce them. Bodies are opaque here: only the thread that uses a value unpickles it.

    CALL    kind, actor, method, sender, sender_actor, port, slot, shape, flags, body, attachment
    SPAWN   kind, actor, sender, life, body, attachment       life: incarnation, may it be made again, file of its
                                                              state, why the one before it is to end
    STOP    kind, actor, sender, port, slot
    PING    kind, actor, sender, port, slot                   answered once the actor (or the proc, with no actor) is up
    REPLY   kind, port, slot, status, load, body, attachment
    CANCEL  kind, actor, sender, port, overdue_s              the deadline that has passed, or 0: called off
    MORE    kind, actor, sender, port, count                  the caller of a generator has room for more items
    CREDIT  kind, from_proc, from_actor, to_actor, messages, size_bytes
    PROBE   kind, actor, origin_proc, origin_actor, wait_id   is there a cycle of senders waiting for room?
    WAITS   kind, actor, caller, port, probe                  is there a cycle of actors waiting for answers? (waits.py)
    LEASE   kind, holder, lease_ids                           shared memory handed back
    PARTIAL kind, caller, port, slot, count, operation, body, attachment     a rank's value, to who joins its host's
    EVENT   kind, name, fields                                agent to process
    REQUEST kind, name, sender, fields                        process to agent

The slot of a CALL is a list, [slot, process, count, operation], where that process joins the values of ``count`` ranks
of a host; the slot of its REPLY lists the slots that it is for. An attachment is None, the number of frames that
follow, or the packed reference of a shared memory segment. A body of None is the first buffer of the attachment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Envelope: TypeAlias = list[Any]

CALL: Final = 0
SPAWN: Final = 1
STOP: Final = 2
REPLY: Final = 3
CANCEL: Final = 4
MORE: Final = 5
CREDIT: Final = 6
PROBE: Final = 7
LEASE: Final = 8
EVENT: Final = 9
REQUEST: Final = 10
PING: Final = 11
WAITS: Final = 12
PARTIAL: Final = 13

_ATTACHMENT_AT: Final = {CALL: 10, SPAWN: 5, REPLY: 6, PARTIAL: 7}
_FIELDS: Final = {
    CALL: 11,
    SPAWN: 6,
    STOP: 5,
    REPLY: 7,
    CANCEL: 5,
    MORE: 5,
    CREDIT: 6,
    PROBE: 5,
    LEASE: 3,
    EVENT: 3,
    REQUEST: 4,
    PING: 5,
    WAITS: 5,
    PARTIAL: 8,
}

# Status of a REPLY.
OK: Final = 0
"""The value; the last reply of this slot."""
ERROR: Final = 1
"""An exception; the last reply of this slot."""
ITEM: Final = 2
"""One item of a generator; more may follow."""
END: Final = 3
"""The generator is exhausted."""
GONE: Final = 4
"""The target has failed or been stopped; the body is a pickled MeshFailure."""

# Bits of a CALL's flags.
RETURN_CREDIT: Final = 1
"""No single reply ends this message, so its credit is returned by a message of its own."""

UNDECORATED: Final = 2
"""``as_endpoint`` named the method at the call site."""
EXPLICIT_PORT: Final = 4
"""...and it answers on a port of its own."""

JOINED: Final = 8
"""The reply may wait a moment, on its way, for those of other ranks."""

_NIL: Final = msgpack.packb(None)

pack = msgpack.Packer(autoreset=True).pack
"""Pack one envelope. One shared packer: it never lets go of the GIL while it works."""


class WireError(ValueError):
    """A frame is not a sequence of well-formed envelopes."""


def unpack(frames: Sequence[Any]) -> Iterator[Envelope]:
    """Yield the envelopes of one ZeroMQ message, with the frames that belong to an envelope put in its place.

    Args:
        frames: The message's frames; the first holds the envelopes.

    Raises:
        WireError: If the first frame is malformed or cut off, or announces frames that are not there.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=0, strict_map_key=False)
    used = 1
    try:
        unpacker.feed(frames[0])
        for envelope in unpacker:
            at = _ATTACHMENT_AT.get(_check(envelope))
            if at is not None and type(envelope[at]) is int:
                count = envelope[at]
                if not 0 < count <= len(frames) - used:
                    raise WireError(f"envelope announces {count} frames, {len(frames) - used} are left")
                envelope[at] = frames[used : used + count]
                used += count
            yield envelope
        # What was cut off takes the nil for a part of itself.
        unpacker.feed(_NIL)
        if next(unpacker, _NIL) is not None:
            raise WireError("the last envelope is cut off")
    except (msgpack.UnpackException, ValueError, TypeError, MemoryError) as error:
        raise WireError(f"malformed frame: {error}") from error


def unpack_one(frame: bytes) -> Envelope | None:
    """Return the only envelope of a frame, or None where the frame needs :func:`unpack`; the fast path."""
    try:
        envelope = msgpack.unpackb(frame, strict_map_key=False)
    except (msgpack.UnpackException, ValueError, TypeError, MemoryError):
        return None
    at = _ATTACHMENT_AT.get(_check(envelope))
    return None if at is not None and type(envelope[at]) is int else envelope


def _check(envelope: object) -> int:
    try:
        if type(envelope) is list and len(envelope) == _FIELDS[envelope[0]]:
            return envelope[0]
    except (IndexError, KeyError, TypeError):
        pass
    raise WireError(f"not an envelope: {envelope!r:.80}")
