"""A handle on memory of some process, which every process of the job can read and write without its owner's code."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..calls.future import Future
from ..context import local_proc
from .errors import BufferDropped, TransferError, TransferTimeoutError
from .handle import Endpoint, Handle
from .memory import wrap
from .progress import CalledOff, Progress
from .protocol import Op, Request
from .serving import CHUNK_BYTES
from .state import Bulk, bulk_of
from .transfer import WAYS, Transfer, check_fit, pack_place, ways_to

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S: Final = 60.0
MAX_LANES: Final = 4
"""How many threads a batch uses."""

__all__ = ["BufferDropped", "RemoteBuffer", "TransferBatch", "TransferError", "TransferTimeoutError"]


class RemoteBuffer:
    """Registered memory of a process; small, picklable, and good in every process of the job.

    The memory is kept alive until :meth:`drop`. Transfers are one-sided: the owner's actors take no part and may be
    busy. Nothing orders a transfer against what the owner does with the memory meanwhile, and work that the owner has
    queued on a GPU is not waited for: say by a message that the memory is ready.

    Args:
        memory: A tensor on a CPU or CUDA device, a numpy array, or anything with a buffer (bytearray, memoryview,
            mmap); contiguous or strided. What is read-only can be read by others, not written.

    Raises:
        TypeError: It has no plain memory.
    """

    __slots__ = ("_handle", "_shape", "_start", "_way")

    def __init__(self, memory: Any) -> None:
        wrapped = wrap(memory)
        bulk = bulk_of(local_proc())
        cuda = None
        if wrapped.device is not None:
            from .cuda import describe

            cuda = describe(memory)
        wrapped.is_writable = wrapped.is_writable and not wrapped.layout.repeats
        found = bulk.registry.add(wrapped)
        rdma = None if bulk.rdma is None else bulk.rdma.register(wrapped)
        if rdma is not None and bulk.rdma is not None:
            found.on_let_go = partial(bulk.rdma.deregister, rdma[0])
        table = bulk.registry.table
        self._handle = Handle(
            owner=bulk.local.proc_id,
            pid=bulk.local.pid,
            table=(table.fd, table.inode, table.token),
            slot=found.slot,
            number=found.number,
            token=found.token,
            place=pack_place(wrapped.layout),
            dtype=wrapped.dtype,
            is_writable=wrapped.is_writable,
            cuda=cuda,
            rdma=None if rdma is None else rdma[1],
            endpoint=Endpoint(),
        )
        self._start, self._shape = 0, self._handle.place[1]
        self._way: str | None = None

    @property
    def owner(self) -> str:
        """Address of the process whose memory this is."""
        return self._handle.owner

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self._shape

    @property
    def dtype(self) -> str:
        """Name of the elements' dtype, such as ``float32``; plain bytes are ``uint8``."""
        return self._handle.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self._shape) * self._handle.place[3]

    @property
    def is_writable(self) -> bool:
        """Whether :meth:`write_from` is possible."""
        return self._handle.is_writable

    @property
    def backend(self) -> str:
        """How a transfer from here would go.

        ``same process``, ``process_vm`` or ``cuda ipc`` on one host, ``unix`` through the owner there, ``tls`` between
        hosts (``tcp`` where encryption was switched off, ``nixl`` where that was switched on).
        """
        return self._way or ways_to(bulk_of(local_proc()), self._handle)[0]

    def read_into(self, destination: Any, *, timeout: float = TIMEOUT_S) -> Future[None]:
        """Copy this buffer's bytes into memory of this process.

        Args:
            destination: Writable memory of the same shape and dtype; or flat memory of at least the size, whose first
                bytes are filled. Plain bytes (uint8, bytearray) fit every dtype.
            timeout: Seconds until the transfer is given up.

        Returns:
            A future, done when the bytes are in place. Where it fails, is cancelled or times out, some of them may be.

        Raises:
            ValueError: The two do not fit.
            TypeError: The destination has no plain memory.
        """
        return start([self._transfer("read", destination, timeout)])

    def write_from(self, source: Any, *, timeout: float = TIMEOUT_S) -> Future[None]:
        """Copy memory of this process into this buffer.

        Args:
            source: Memory of the same shape and dtype; or flat memory of at most the size, for the buffer's first
                bytes. It must not change until the future is done.
            timeout: Seconds until the transfer is given up.

        Returns:
            A future, done when the bytes are in the owner's memory.

        Raises:
            ValueError: The two do not fit, or this buffer is read-only.
            TypeError: The source has no plain memory.
        """
        return start([self._transfer("write", source, timeout)])

    def drop(self, *, timeout: float = TIMEOUT_S) -> Future[None]:
        """End the registration, for all who have this handle or a slice of it; any process may do so.

        In the owner nobody begins a transfer any more once this returns, and once the future is done, no transfer
        touches the memory, nor is it kept alive. Dropping again does nothing.
        """
        bulk, handle = bulk_of(local_proc()), self._handle
        done: Future[None] = Future(f"drop of {handle.name}")
        if not bulk.is_mine(handle):
            bulk.workers.run(lambda: _settle(done, lambda: _drop_far(bulk, handle, self._way, timeout)))
            return done
        found = bulk.registry.find(handle.slot, handle.number, handle.token)
        if found is None or not bulk.registry.close_to_others(found):
            done._resolve(_nothing)
        elif bulk.registry.is_unused(found):
            bulk.registry.let_go(found)
            done._resolve(_nothing)
        else:
            bulk.workers.run(lambda: _settle(done, lambda: bulk.registry.let_go(found)))
        return done

    def via(self, backend: str) -> RemoteBuffer:
        """Return this buffer with one way of transfer fixed, for measuring and tests; see :attr:`backend`.

        Raises:
            ValueError: There is no such way.
        """
        if backend not in WAYS:
            raise ValueError(f"via({backend!r}): expected one of {', '.join(WAYS)}")
        return _rebuild(self._handle, self._start, self._shape, backend)

    @staticmethod
    def batch() -> TransferBatch:
        """Return an empty batch: several transfers, one future."""
        return TransferBatch()

    def __getitem__(self, rows: slice) -> RemoteBuffer:
        """Return a part of this buffer, by rows of its first dimension (of plain bytes: by bytes).

        Raises:
            TypeError: This is not a slice.
            ValueError: It has a step.
        """
        if not isinstance(rows, slice):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"RemoteBuffer[{rows!r}]: slice it by rows, as in buffer[2:5]")
        if rows.step not in {None, 1} or not self._shape:
            raise ValueError(f"RemoteBuffer[{rows!r}] of shape {list(self._shape)}: only rows without a step")
        first, last, _ = rows.indices(self._shape[0])
        row_bytes = math.prod(self._shape[1:]) * self._handle.place[3]
        shape = (max(0, last - first), *self._shape[1:])
        return _rebuild(self._handle, self._start + first * row_bytes, shape, self._way)

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of a RemoteBuffer without dimensions")
        return self._shape[0]

    def __repr__(self) -> str:
        device = "" if self._handle.cuda is None else "CUDA "
        return f"<RemoteBuffer of {self.owner}: {device}{self.dtype} {list(self._shape)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        bulk, handle = bulk_of(local_proc()), self._handle
        if bulk.is_mine(handle):
            handle = self._handle = handle._replace(endpoint=bulk.endpoint)
        return _rebuild, (handle, self._start, self._shape, self._way)

    def _transfer(self, op: str, thing: Any, timeout: float) -> Transfer:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout!r}: expected seconds above zero")
        memory, is_read = wrap(thing), op == "read"
        handle = self._handle
        if not is_read and not handle.is_writable:
            raise ValueError(f"{handle.name} is read-only: its owner registered read-only or repeated memory")
        size_bytes = check_fit(handle.name, handle.layout, handle.dtype, self._shape, memory, is_read=is_read)
        bulk = bulk_of(local_proc())
        at = (self._start, size_bytes)
        return Transfer(bulk, handle, at, memory, is_read=is_read, way=self._way, timeout_s=timeout)


class TransferBatch:
    """Several transfers with one future; made by :meth:`RemoteBuffer.batch`.

    They are checked as they are added, and start together; in no order, so they must not overlap.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, RemoteBuffer, Any]] = []

    def read_into(self, buffer: RemoteBuffer, destination: Any) -> TransferBatch:
        """Add a :meth:`RemoteBuffer.read_into`; return this batch."""
        return self._add("read", buffer, destination)

    def write_from(self, buffer: RemoteBuffer, source: Any) -> TransferBatch:
        """Add a :meth:`RemoteBuffer.write_from`; return this batch."""
        return self._add("write", buffer, source)

    def _add(self, op: str, buffer: RemoteBuffer, thing: Any) -> TransferBatch:
        buffer._transfer(op, thing, TIMEOUT_S)
        self._steps.append((op, buffer, thing))
        return self

    def submit(self, *, timeout: float = TIMEOUT_S) -> Future[None]:
        """Start what was added; the first error calls off the rest. The batch is empty afterwards."""
        steps, self._steps = self._steps, []
        return start([buffer._transfer(op, thing, timeout) for op, buffer, thing in steps])

    def __len__(self) -> int:
        return len(self._steps)


class _Started(Future[None]):
    """The future of transfers that run."""

    __slots__ = ("_left", "_transfers", "first_error")

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        super().__init__(_describe(transfers))
        self._transfers = transfers
        self._left = list[list[Transfer]]()
        self.first_error: BaseException | None = None

    def go(self, bulk: Bulk) -> None:
        """Spread the transfers over threads, the largest first."""
        lanes: list[list[Transfer]] = [[] for _ in range(min(MAX_LANES, len(self._transfers)))]
        if sum(transfer.progress.size_bytes for transfer in self._transfers) <= CHUNK_BYTES:
            lanes = lanes[:1]
        for transfer in sorted(self._transfers, key=lambda transfer: -transfer.progress.size_bytes):
            min(lanes, key=lambda lane: sum(other.progress.size_bytes for other in lane)).append(transfer)
        self._left = list(lanes)
        for lane in lanes:
            bulk.workers.run(lambda lane=lane: self._run(lane))

    def _run(self, lane: list[Transfer]) -> None:
        try:
            for transfer in lane:
                transfer.run()
        except CalledOff:
            pass
        except BaseException as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            if self.first_error is None:
                self.first_error = error
            self._on_cancelled()
        self._left.remove(lane)
        if not self._left:
            self.finish(self.first_error)

    def finish(self, error: BaseException | None) -> None:
        """Tell whoever waits, and let go of the memory."""
        self._transfers = ()
        _finish(self, error)

    def _on_cancelled(self) -> None:
        for transfer in self._transfers:
            transfer.progress.call_off()


def start(transfers: Sequence[Transfer]) -> Future[None]:
    """Start transfers that were checked; small ones between processes of one host are done when this returns."""
    done = _Started(transfers)
    if not transfers:
        done._resolve(_nothing)
        return done
    if len(transfers) == 1 and transfers[0].is_quick:
        try:
            is_over = transfers[0].run_quick()
        except Exception as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            done.finish(error)
            return done
        if is_over:
            done.finish(None)
            return done
    done.go(transfers[0]._bulk)
    return done


def _drop_far(bulk: Bulk, handle: Handle, way: str | None, timeout: float) -> None:
    """Ask the owner to drop a buffer; it is well where the owner has done so, or is gone."""
    bulk.watch(handle.owner)
    progress = Progress(handle.name, 0, timeout, lambda: bulk.check_alive(handle.owner, handle.name))
    request = Request(Op.DROP, handle.token, handle.slot, handle.number, 0, 0)
    is_near = way is None and bulk.is_near(handle.owner)
    from .ends import Flat
    from .errors import OwnerDied

    try:
        pid = handle.pid if is_near or way == "unix" else 0
        bulk.clients.run(handle.endpoint, request, progress, Flat(memoryview(bytearray())), pid=pid)
    except (BufferDropped, OwnerDied):
        return


def _settle(done: Future[None], task: Any) -> None:
    error: BaseException | None = None
    try:
        task()
    except BaseException as raised:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
        error = raised
    _finish(done, error)


def _finish(done: Future[None], error: BaseException | None) -> None:
    if error is None:
        done._resolve(_nothing)
    else:
        done._reject(error)


def _describe(transfers: Sequence[Transfer]) -> str:
    if len(transfers) == 1:
        return f"transfer with {transfers[0].progress.name}"
    return f"{len(transfers)} transfers"


def _nothing() -> None:
    """What a transfer's future holds."""


def _rebuild(handle: Handle, start_byte: int, shape: tuple[int, ...], way: str | None) -> RemoteBuffer:
    buffer = RemoteBuffer.__new__(RemoteBuffer)
    buffer._handle, buffer._start, buffer._shape, buffer._way = handle, start_byte, shape, way
    return buffer
