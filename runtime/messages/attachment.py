"""What accompanies an envelope: buffers in shared memory where both ends share a host, frames otherwise."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from ..address import host_of
from ..bulk.reference import unpack
from .payload import Payload, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..bulk.state import Bulk
    from ..proc import LocalProc
    from .segments import SegmentCache, SegmentPool, SegmentRef

SEGMENT_FROM_BYTES: Final = 64 << 10
"""Payloads from this size on go through shared memory."""

LEND_FROM_BYTES: Final = 256 << 10
"""Payloads for other hosts from this size on are fetched by their receivers, over a stream of their own."""

BODY_APART_BYTES: Final = 32 << 10
"""A pickle from this size on leaves the envelope and travels as the first buffer."""


_UNREACHABLE: Final = object()


class Outgoing:
    """One payload, ready for its envelopes: what goes into ``body``, ``attachment`` and the frames after it."""

    __slots__ = ("attachment", "body", "frames", "size_bytes")

    def __init__(self, body: bytes | None, attachment: Any = None, frames: Sequence[Any] = ()) -> None:
        self.body, self.attachment, self.frames = body, attachment, frames
        self.size_bytes = len(body) if body is not None else 0


class Attachments:
    """A process's two ends of shared memory: the pool that it sends from, the mappings that it received."""

    def __init__(self, proc: str, local: LocalProc | None = None) -> None:
        self._proc, self._local = proc, local
        self.bulk: Bulk | None = None
        """What this process has for transfers, once it has had any."""
        self._pool: SegmentPool | None = None
        self._cache: SegmentCache | None = None
        self._lock = threading.Lock()
        self._returns: deque[tuple[str, int]] = deque()
        self._owners: dict[int, str] = {}
        self._num_opened = self._num_returned = 0

    @property
    def has_returns(self) -> bool:
        """Whether leases wait to be given back."""
        return bool(self._returns)

    @property
    def num_open(self) -> int:
        """Leases of others that are still in use here."""
        return self._num_opened - self._num_returned

    def outgoing(self, payload: Payload, holders: Sequence[str]) -> Outgoing:
        """Snapshot ``payload`` for the processes in ``holders``, one entry for each message that will carry it."""
        body: bytes | None = payload.body
        if not payload.buffers and len(payload.body) < BODY_APART_BYTES:
            return Outgoing(body)
        views = list(payload.buffers)
        if len(payload.body) >= BODY_APART_BYTES:
            views.insert(0, memoryview(payload.body))
            body = None
        size_bytes = payload.size_bytes
        out = self._in_segment(body, views, holders) if size_bytes >= SEGMENT_FROM_BYTES else None
        if out is None:
            out = Outgoing(body, len(views), [bytes(view) for view in views])
        out.size_bytes = size_bytes
        return out

    def _in_segment(self, body: bytes | None, views: list[memoryview], holders: Sequence[str]) -> Outgoing | None:
        from .segments import SegmentPool, segments_available

        if not segments_available():
            return None
        bulk = self._bulk_for(holders, sum(view.nbytes for view in views))
        if bulk is _UNREACHABLE:
            return None
        with self._lock:
            if self._pool is None:
                self._pool = SegmentPool()
        ref = self._pool.copy_in(views, holders=holders)
        if ref is None:
            return None
        if bulk is not None:
            return Outgoing(body, bulk.lender_of(self._pool).lend(self._proc, bulk.endpoint, ref, holders))
        return Outgoing(body, (self._proc, *ref.pack()))

    def _bulk_for(self, holders: Sequence[str], size_bytes: int) -> Any:
        """What lends to holders on other hosts; None where all are on this one."""
        if self._local is None:
            return None
        own = host_of(self._proc)
        # Names of what is no process begin with "@".
        if all(holder[0] == "@" or host_of(holder) == own for holder in set(holders)):
            return None
        if size_bytes < LEND_FROM_BYTES:
            return _UNREACHABLE
        from ..bulk.state import bulk_of

        bulk = bulk_of(self._local)
        return bulk if bulk.reaches_hosts else _UNREACHABLE

    def incoming(self, attachment: Any) -> Incoming | None:
        """Wrap an envelope's attachment; buffers are opened by whoever loads the value."""
        return None if attachment is None else Incoming(self, attachment)

    def open(self, packed: Sequence[Any]) -> list[memoryview]:
        """Map a received segment; its lease goes back when the last view is gone."""
        from .segments import SegmentCache

        reference = unpack(packed)
        ref = reference.segment
        with self._lock:
            if self._cache is None:
                self._cache = SegmentCache(self._on_unused)
            self._owners[ref.pid] = reference.owner
            self._num_opened += 1
        try:
            return self._cache.open(ref)
        except OSError:
            self._on_unused(ref)
            raise

    def is_far(self, packed: Sequence[Any]) -> bool:
        """Whether the segment lies on another host, so that it has to be fetched."""
        reference = unpack(packed)
        return reference.way is not None and host_of(reference.owner) != host_of(self._proc)

    def fetch(self, packed: Sequence[Any]) -> tuple[list[memoryview], bool]:
        """Pull the bytes of another host's segment; its lease goes back at once.

        Returns:
            The buffers, and whether their memory is the caller's alone.

        Raises:
            DanausError: They did not come.
            OSError: The owner is gone.
        """
        from ..bulk.state import bulk_of

        assert self._local is not None
        reference = unpack(packed)
        with self._lock:
            self._num_opened += 1
        try:
            return bulk_of(self._local).fetch(reference)
        finally:
            self._returns.append((reference.owner, reference.segment.lease_id))

    def _on_unused(self, ref: SegmentRef) -> None:
        # Any thread, inside a garbage collection: no lock, only an append.
        self._returns.append((self._owners[ref.pid], ref.lease_id))

    def drop(self, packed: Sequence[Any]) -> None:
        """Give back a lease that nobody opened."""
        reference = unpack(packed)
        self._num_opened += 1
        self._returns.append((reference.owner, reference.segment.lease_id))

    def discard(self, attachment: Any) -> None:
        """Give back what came with an envelope that nobody will load."""
        if attachment is not None and isinstance(attachment[0], str):
            self.drop(attachment)

    def take_back(self, out: Outgoing, holder: str) -> None:
        """End ``holder``'s lease on a payload that was not sent to it."""
        if self._pool is not None and isinstance(out.attachment, tuple):
            self._pool.release(unpack(out.attachment).segment.lease_id, holder)

    def take_returns(self) -> dict[str, list[int]]:
        """Leases to give back since the last call, by owner (I/O thread)."""
        by_owner: dict[str, list[int]] = {}
        while self._returns:
            try:
                owner, lease = self._returns.popleft()
            except IndexError:
                break
            self._num_returned += 1
            by_owner.setdefault(owner, []).append(lease)
        return by_owner

    def on_lease_returned(self, holder: str, lease_ids: Sequence[int]) -> None:
        """A receiver has done with leases of ours."""
        if self._pool is not None:
            for lease_id in lease_ids:
                self._pool.release(lease_id, holder)

    def trim(self, *, now_s: float) -> bool:
        """Give long idle memory back to the system; return whether this is to be asked again."""
        if self._pool is None:
            return False
        self._pool.trim(now_s=now_s)
        return self._pool.stats().segments > 0

    def on_proc_gone(self, proc: str) -> None:
        """A receiver died: what it held is free."""
        if self._pool is not None:
            self._pool.release_holder(proc)
        if self._cache is not None:
            for pid in [pid for pid, owner in list(self._owners.items()) if owner == proc]:
                self._cache.forget(pid)

    def lend_again(self, out: Outgoing, holder: str) -> None:
        """Let ``holder`` have, too, what somebody holds already."""
        if self._pool is not None and isinstance(out.attachment, tuple):
            self._pool.add_holder(unpack(out.attachment).segment.lease_id, holder)

    def on_holder_renamed(self, old: str, new: str) -> None:
        """What was meant for ``old`` goes to ``new`` instead."""
        if self._pool is not None:
            self._pool.rename_holder(old, new)

    def rename(self, proc: str) -> None:
        """This process has another address from now on."""
        self._proc = proc

    def close(self) -> None:
        """Unmap everything."""
        if self.bulk is not None:
            self.bulk.close()
        if self._pool is not None:
            self._pool.close()
        if self._cache is not None:
            self._cache.close()


class Incoming:
    """A received attachment: frames, or a lease on the sender's segment, returned unopened if the value is dropped.

    Attributes:
        is_private: Whether :meth:`buffers` returned memory that belongs to the caller alone.
    """

    __slots__ = ("_attachments", "_content", "_opened", "is_private")

    def __init__(self, attachments: Attachments, content: Any) -> None:
        self._attachments, self._content = attachments, content
        self._opened = self.is_private = False

    @property
    def owner(self) -> str | None:
        """The process whose memory this is a lease on; None for frames."""
        return unpack(self._content).owner if isinstance(self._content[0], str) else None

    def buffers(self) -> Sequence[Any]:
        """The buffers, in order. To be called once."""
        self._opened = True
        if not isinstance(self._content[0], str):
            return self._content
        if self._attachments.is_far(self._content):
            buffers, self.is_private = self._attachments.fetch(self._content)
            return buffers
        return self._attachments.open(self._content)

    def __del__(self) -> None:
        if not self._opened and isinstance(self._content[0], str):
            try:
                self._attachments.drop(self._content)
            except ValueError:
                logging.getLogger("danaus").warning("dropped a malformed segment reference: %r", self._content)


def size_of(body: bytes | None, attachment: Any) -> int:
    """What the sender counted for an envelope: its body and its buffers, as in ``Outgoing.size_bytes``."""
    size_bytes = len(body) if body is not None else 0
    if attachment is None:
        return size_bytes
    if isinstance(attachment[0], str):
        return size_bytes + sum(length for _, length in attachment[-1])
    return size_bytes + sum(map(len, attachment))


def load_body(body: bytes | None, incoming: Incoming | None, *, borrow: bool = False) -> Any:
    """Unpickle an envelope's body with its attachment; runs user code."""
    if incoming is None:
        return load(body or b"")
    buffers = incoming.buffers()
    borrow = borrow or incoming.is_private
    if body is None:
        return load(buffers[0], buffers[1:], borrow=borrow)
    return load(body, buffers, borrow=borrow)
