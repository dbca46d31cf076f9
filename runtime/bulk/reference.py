"""What a message carries in the place of buffers that lie in a segment of its sender's.

(owner, *segment)                                  for processes of the owner's host
("bulk:" + owner, host, port, scheme, token, sharers, *segment)    for those of other hosts as well, who fetch it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..messages.segment_memory import SegmentRef
    from .handle import Endpoint

_MARK: Final = "bulk:"


class Reference(NamedTuple):
    """A reference's parts.

    Attributes:
        owner: Process whose segment it is.
        way: Host, port, scheme and token of its server, or nothing.
        sharers: How many processes of a host got it, by the host's slot, where these are several.
        segment: The segment, the lease, and where the buffers lie.
    """

    owner: str
    way: tuple[str, int, str, bytes] | None
    sharers: Mapping[int, int]
    segment: SegmentRef


def pack(
    owner: str, endpoint: Endpoint, token: bytes, sharers: Mapping[int, int], segment: SegmentRef
) -> tuple[Any, ...]:
    """Return a reference that other hosts can follow, for msgpack."""
    shared = tuple(sharers.items())
    return (_MARK + owner, endpoint.host, endpoint.port, endpoint.scheme, token, shared, *segment.pack())


def unpack(packed: Sequence[Any]) -> Reference:
    """Return the parts of a reference.

    Raises:
        ValueError: It is none.
    """
    from ..messages.segment_memory import SegmentRef

    if not packed[0].startswith(_MARK):
        return Reference(packed[0], None, {}, SegmentRef.unpack(packed[1:]))
    try:
        name, host, port, scheme, token, shared, *segment = packed
        sharers = {int(slot): int(count) for slot, count in shared}
        way = (str(host), int(port), str(scheme), bytes(token))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a reference to a lent payload: {packed!r:.200}") from error
    return Reference(name.removeprefix(_MARK), way, sharers, SegmentRef.unpack(segment))
