"""Lends a message's large buffers to processes of other hosts, which fetch them over a stream.

The buffers lie in the same pool of shared segments, under the same leases, as those for this host: a lease ends when
its holder has fetched the bytes and says so, when the holder dies, or when the call is given up. So one cast serves
both, and nothing is copied twice. What a message carries is what a segment's reference is, with the way to the server
in front of it.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from ..address import host_of
from ..messages.buffers import warm
from .ends import Flat
from .handle import Endpoint
from .protocol import Op, Request
from .reference import pack
from .table import TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..messages.segment_memory import SegmentRef
    from ..messages.segments import Lent, SegmentPool
    from .client import Clients
    from .progress import Progress
    from .reference import Reference

_SERVER: Final = "bulk server"


class Lender:
    """The owner's side."""

    def __init__(self, pool: SegmentPool) -> None:
        self._pool = pool
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._refs: dict[int, SegmentRef] = {}

    def lend(self, owner: str, endpoint: Endpoint, ref: SegmentRef, holders: Iterable[str]) -> tuple[Any, ...]:
        """Return what goes into a message for ``holders`` of ``ref``, on other hosts and on this one."""
        with self._lock:
            self._refs = {lease: kept for lease, kept in self._refs.items() if self._pool.is_leased(lease)}
            self._refs[ref.lease_id] = ref
        num_holders = Counter(host_of(holder) for holder in holders if holder[0] != "@")
        sharers = {host: count for host, count in num_holders.items() if count > 1}
        return pack(owner, endpoint, self._token(ref.lease_id), sharers, ref)

    def enter(self, lease_id: int, token: bytes) -> Lent | None:
        """Return what is fetched under a lease, which lasts until :meth:`leave`; None where it has ended."""
        with self._lock:
            ref = self._refs.get(lease_id)
        if ref is None or not secrets.compare_digest(token, self._token(lease_id)):
            return None
        return self._pool.lend(ref.lease_id, size_of(ref), _SERVER)

    def leave(self, lease_id: int) -> None:
        """End what :meth:`enter` began."""
        self._pool.release(lease_id, _SERVER)

    def _token(self, lease_id: int) -> bytes:
        return hashlib.blake2b(lease_id.to_bytes(8, "big"), key=self._key, digest_size=TOKEN_BYTES).digest()


def fetch(clients: Clients, reference: Reference, progress: Progress) -> list[memoryview]:
    """Pull a lent payload's bytes into warm memory of this process alone; return its buffers, in order.

    Raises:
        DanausError: It did not come: the owner died, gave it up, or could not be reached in time.
    """
    whole = memoryview(warm(size_of(reference.segment))).cast("B")
    fetch_into(clients, reference, whole, progress)
    return split(whole, reference.segment)


def fetch_into(clients: Clients, reference: Reference, whole: memoryview, progress: Progress) -> None:
    """Pull a lent payload's bytes, as they lie in the segment; see :func:`fetch`."""
    assert reference.way is not None
    host, port, scheme, token = reference.way
    request = Request(Op.FETCH, token, reference.segment.lease_id, 0, 0, len(whole))
    clients.run(Endpoint("", host, port, scheme), request, progress, Flat(whole))


def split(whole: memoryview, segment: SegmentRef) -> list[memoryview]:
    """The buffers in what was fetched; gaps between them keep each aligned for any dtype."""
    return [whole[offset : offset + length] for offset, length in segment.extents]


def size_of(segment: SegmentRef) -> int:
    """How many bytes a payload is fetched as: its buffers and the gaps between them."""
    return max((offset + length for offset, length in segment.extents), default=0)
