"""Carries out one transfer, by the best way there is between its two ends.

same process     a copy
process_vm       a copy by the kernel, between processes of one host
cuda ipc         a copy on the GPU, between processes of one host
unix             through the owner, over a unix socket: strided memory of short runs, and where the kernel refuses
nixl             by RDMA, between hosts, where DANAUS_NIXL says so
tls              through the owner, over TLS 1.3, between hosts
tcp              the same without encryption, where DANAUS_PLAIN_BULK says so
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from . import near
from .ends import end_for
from .errors import BufferDropped, TransferError
from .memory import Memory
from .progress import Progress
from .protocol import Op, Request
from .serving import staging_for
from .vm import NotPermitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .handle import Handle
    from .layout import Layout
    from .state import Bulk

INLINE_BYTES: Final = 256 << 10
"""A copy by the kernel of up to this size is done at once, by the caller: it takes less than to wake a thread."""

WAYS: Final = ("same process", "process_vm", "cuda ipc", "unix", "nixl", "tls", "tcp")


def ways_to(bulk: Bulk, handle: Handle) -> list[str]:
    """The ways to a buffer's memory from here, best first."""
    if bulk.is_mine(handle):
        return ["same process"]
    if not bulk.is_near(handle.owner):
        has_rdma = handle.rdma is not None and bulk.rdma is not None
        return ["nixl", handle.endpoint.scheme] if has_rdma else [handle.endpoint.scheme]
    layout = handle.layout
    if handle.cuda is not None:
        from . import cuda

        return ["cuda ipc", "unix"] if cuda.is_reachable(handle.cuda) else ["unix"]
    if handle.pid in bulk.not_permitted or layout.run_bytes < min(near.MIN_RUN_BYTES, layout.size_bytes):
        return ["unix"]
    return ["process_vm", "unix"]


class Transfer:
    """A transfer between a buffer and this process's memory.

    Args:
        bulk: This process's part.
        handle: The buffer.
        at: Offset in it, and how many bytes.
        memory: This process's memory, of which the first bytes are used.
        is_read: Whether bytes come here.
        way: The only way to use; None for the best.
        timeout_s: Limit, from now on.
    """

    def __init__(
        self,
        bulk: Bulk,
        handle: Handle,
        at: tuple[int, int],
        memory: Memory,
        *,
        is_read: bool,
        way: str | None,
        timeout_s: float,
    ) -> None:
        self._bulk, self._handle, self._memory, self._is_read = bulk, handle, memory, is_read
        self._offset, size_bytes = at
        self._ways = [way] if way is not None else ways_to(bulk, handle)
        self.progress = Progress(handle.name, size_bytes, timeout_s, self._check_owner)

    @property
    def is_quick(self) -> bool:
        """Whether :meth:`run_quick` takes no longer than to wake a thread."""
        return self.progress.size_bytes <= INLINE_BYTES and self._ways[0] in {"same process", "process_vm"}

    def run_quick(self) -> bool:
        """Try the best way without ever waiting; return False where the rest is left to :meth:`run`."""
        try:
            return self._try(self._ways[0]) or not self._ways.pop(0)
        except near.OwnerGone:
            # How it died is waited for elsewhere.
            return False

    def run(self) -> None:
        """Carry it out.

        Raises:
            DanausError: It did not succeed.
            CalledOff: Nobody waits for it any more.
        """
        try:
            for way in self._ways:
                self.progress.check()
                if self._try(way):
                    return
        except near.OwnerGone as error:
            raise self._bulk.owner_died(self._handle.owner, self._handle.pid, self._handle.name) from error
        self._bulk.wait_death(self._handle.owner, self.progress.name)
        raise TransferError(self.progress.name, "this process cannot reach its owner's memory that way")

    def _try(self, way: str) -> bool:
        handle = self._handle
        if way == "same process":
            self._copy_here()
            return True
        self._bulk.watch(handle.owner)
        if way in {"unix", "tls", "tcp"}:
            self._check_owner()
            self._stream(way)
            return True
        try:
            if way == "nixl":
                self._copy_by_rdma()
            elif way == "cuda ipc":
                self._copy_on_gpu()
            else:
                near.transfer(handle, self._offset, self._memory, self.progress, is_read=self._is_read)
        except near.Unreachable as error:
            self._check_owner()
            if isinstance(error.__cause__, NotPermitted):
                self._bulk.not_permitted.add(handle.pid)
            return False
        return True

    def _check_owner(self) -> None:
        self._bulk.check_alive(self._handle.owner, self._handle.name)

    def _stream(self, way: str) -> None:
        progress, handle = self.progress, self._handle
        op = Op.READ if self._is_read else Op.WRITE
        request = Request(op, handle.token, handle.slot, handle.number, self._offset, progress.size_bytes)
        endpoint = self._bulk.endpoint if self._bulk.is_mine(handle) else handle.endpoint
        end = end_for(self._memory, progress.size_bytes)
        self._bulk.clients.run(endpoint, request, progress, end, pid=handle.pid if way == "unix" else 0)
        if self._memory.device is not None:
            _synchronise(self._memory.device)

    def _copy_by_rdma(self) -> None:
        handle, rdma = self._handle, self._bulk.rdma
        if handle.rdma is None or rdma is None:
            raise near.Unreachable("NIXL is not used by both ends")
        asked = Progress(handle.name, 0, self.progress.timeout_s, self._check_owner)
        request = Request(Op.READ, handle.token, handle.slot, handle.number, 0, 0)
        self._bulk.clients.run(handle.endpoint, request, asked, end_for(self._memory, 0))
        address = handle.layout.address + self._offset
        rdma.transfer(handle.rdma, address, self._memory, self.progress, is_read=self._is_read)

    def _copy_here(self) -> None:
        handle, registry = self._handle, self._bulk.registry
        found = registry.find(handle.slot, handle.number, handle.token)
        user = None if found is None else registry.enter(found)
        if found is None or user is None:
            raise BufferDropped(handle.name)
        try:
            theirs = (found.memory, self._offset)
            ours = (self._memory, 0)
            source, target = (theirs, ours) if self._is_read else (ours, theirs)
            _copy(source, target, self.progress.size_bytes)
            self.progress.on_moved(self.progress.size_bytes)
        finally:
            registry.leave(found, user)

    def _copy_on_gpu(self) -> None:
        from . import cuda

        handle = self._handle
        visit = near.Visit(handle, handle.name)
        try:
            try:
                array = cuda.open_array(handle, handle.layout)
            except (cuda.CudaError, OSError) as error:
                raise near.Unreachable(str(error)) from error
            theirs = (
                Memory(array, handle.layout, handle.dtype, is_writable=True, device=array.device.index),
                self._offset,
            )
            ours = (self._memory, 0)
            source, target = (theirs, ours) if self._is_read else (ours, theirs)
            _copy(source, target, self.progress.size_bytes)
            _synchronise(array.device.index)
            visit.check()
            self.progress.on_moved(self.progress.size_bytes)
        finally:
            visit.close()


def _copy(source: tuple[Memory, int], target: tuple[Memory, int], length: int) -> None:
    """Copy within this process, or between memory that it has mapped."""
    (giver, start), (taker, place) = source, target
    if _are_alike(giver, taker, length):
        taker._array().copy_(giver._array())
    elif giver.is_flat:
        taker.scatter(place, giver.flat(start, length))
    elif taker.is_flat:
        giver.gather(start, taker.flat(place, length))
    else:
        coarser = max((giver, taker), key=lambda memory: memory.layout.itemsize)
        staging = staging_for(coarser, length)
        for done in range(0, length, len(staging) or 1):
            part = staging[: length - done]
            giver.gather(start + done, part)
            taker.scatter(place + done, part)
    for memory in (giver, taker):
        if memory.device is not None:
            _synchronise(memory.device)


def _are_alike(giver: Memory, taker: Memory, length: int) -> bool:
    """Whether torch can copy the whole of one to the whole of the other, both on a GPU."""
    if giver.device is None or taker.device is None:
        return False
    return giver.layout.shape == taker.layout.shape and giver.size_bytes == taker.size_bytes == length


def _synchronise(device: int) -> None:
    import torch

    torch.cuda.current_stream(device).synchronize()


def check_fit(name: str, layout: Layout, dtype: str, shape: Sequence[int], memory: Memory, *, is_read: bool) -> int:
    """Return how many bytes a transfer moves.

    Equal shapes fit; of different ones, at least one has to be flat: a destination may then be larger than what is
    read, and a source smaller than what it is written to. Dtypes are equal, or one is plain bytes.

    Args:
        name: Of the buffer, for errors.
        layout: Of the whole buffer.
        dtype: Of the buffer.
        shape: Of the part that is meant.
        memory: The local end.
        is_read: Whether it is the destination.

    Raises:
        ValueError: The two do not fit; it names both.
    """
    local = f"{'destination' if is_read else 'source'} {memory.dtype} {list(memory.layout.shape)}"
    buffer = f"{name}, of which {list(shape)} are meant" if tuple(shape) != layout.shape else name
    if is_read and (not memory.is_writable or memory.layout.repeats):
        raise ValueError(
            f"{local} cannot be written to (read {buffer}): pass writable memory without repeated elements"
        )
    if memory.dtype != dtype and "uint8" not in {memory.dtype, dtype}:
        raise ValueError(f"{local} and {buffer} differ in dtype: use the same one, or a view as uint8")
    size_bytes = math.prod(shape) * layout.itemsize
    local_bytes = memory.size_bytes
    is_same = tuple(shape) == memory.layout.shape and memory.layout.itemsize == layout.itemsize
    is_flat = len(shape) == 1 or len(memory.layout.shape) == 1
    fits = local_bytes >= size_bytes if is_read else local_bytes <= size_bytes
    if not is_same and not (is_flat and fits):
        raise ValueError(
            f"{local} ({local_bytes} bytes) does not fit {buffer} ({size_bytes} bytes): use the same shape, or flat "
            f"memory that is {'at least' if is_read else 'at most'} as large"
        )
    moved = min(size_bytes, local_bytes)
    if moved % layout.itemsize or moved % memory.layout.itemsize:
        raise ValueError(f"{local} ({local_bytes} bytes) and {buffer}: {moved} bytes are no whole number of elements")
    return moved


def pack_place(layout: Layout) -> tuple[Any, ...]:
    """A layout as plain values, for a handle."""
    return layout.address, tuple(layout.shape), tuple(layout.strides), layout.itemsize
