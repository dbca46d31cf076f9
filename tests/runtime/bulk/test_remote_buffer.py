"""Remote buffers between real processes: every way of transfer, what fits, and what happens when the owner goes."""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from danaus import Actor, SupervisionError, endpoint, this_host
from danaus.runtime.bulk import certificate, near, vm
from danaus.runtime.bulk.errors import BufferDropped, OwnerDied, TransferError, TransferTimeoutError
from danaus.runtime.bulk.progress import Progress
from danaus.runtime.bulk.remote_buffer import RemoteBuffer
from danaus.runtime.bulk.state import bulk_of
from danaus.runtime.bulk.table import ForeignTable
from danaus.runtime.context import local_proc

from .stand_ins import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WAYS = ["process_vm", "unix", "tls"]
LIMIT_S = 10.0
MIB = 1 << 20
LAYOUTS = {
    "flat": lambda base: base.reshape(-1),
    "two dimensions": lambda base: base,
    "rows": lambda base: base[::3],
    "long rows": lambda base: base[:, 200:1200],
    "columns": lambda base: base[:, ::2],
    "one column": lambda base: base[:, 7],
    "turned": lambda base: base.T,
    "offset": lambda base: base[2:],
    "empty": lambda base: base[:, 5:5],
    "scalar": lambda base: base[3, 3],
}


class Holder(Actor):
    """Registers memory, and says what is in it."""

    def __init__(self) -> None:
        self.base: Any = None
        self.buffers = list[RemoteBuffer]()

    @endpoint
    def register(self, layout: str, rows: int = 60) -> RemoteBuffer:
        self.base = torch.arange(rows * 2000, dtype=torch.float32).reshape(rows, 2000)
        return self._keep(RemoteBuffer(LAYOUTS[layout](self.base)))

    @endpoint
    def register_bytes(self, data: bytes, *, read_only: bool = False) -> RemoteBuffer:
        self.base = data if read_only else bytearray(data)
        return self._keep(RemoteBuffer(self.base))

    def _keep(self, buffer: RemoteBuffer) -> RemoteBuffer:
        self.buffers.append(buffer)
        return buffer

    @endpoint
    def content(self) -> Any:
        return bytes(self.base) if isinstance(self.base, bytearray) else self.base.clone()

    @endpoint
    def drop(self) -> None:
        self.buffers.pop().drop().get(LIMIT_S)

    @endpoint
    def drop_all(self) -> None:
        while self.buffers:
            self.buffers.pop().drop().get(LIMIT_S)

    @endpoint
    def is_dropped(self, buffer: RemoteBuffer) -> bool:
        try:
            buffer.read_into(torch.empty(buffer.size_bytes, dtype=torch.uint8)).get(LIMIT_S)
        except BufferDropped:
            return True
        return False

    @endpoint
    async def copy_from(self, buffer: RemoteBuffer) -> tuple[Any, str]:
        own = torch.zeros(buffer.shape)
        await buffer.read_into(own)
        return own, buffer.backend

    @endpoint
    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def holders() -> Iterator[Any]:
    with_certificate()
    procs = this_host().spawn_procs({"procs": 2})
    yield procs.spawn("holders", Holder)
    procs.stop().get(LIMIT_S)


@pytest.fixture
def victim() -> Iterator[Any]:
    """A holder that the test kills."""
    with_certificate()
    procs = this_host().spawn_procs({"procs": 1})
    yield procs.spawn("victims", Holder)
    procs.stop().get(LIMIT_S)


@pytest.fixture
def holder(holders: Any) -> Iterator[Any]:
    yield holders.slice(procs=0)
    holders.slice(procs=0).drop_all.call_one().get(LIMIT_S)


def with_certificate() -> None:
    directory = local_proc().job_directory()
    if not certificate.exists(directory):
        certificate.write(directory, certificate.mint())


def base(rows: int = 60) -> Any:
    return torch.arange(rows * 2000, dtype=torch.float32).reshape(rows, 2000)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_every_layout_is_read_and_written(holder: Any, layout: str, way: str) -> None:
    expected = LAYOUTS[layout](base())
    buffer = holder.register.call_one(layout).get(LIMIT_S).via(way)
    assert (buffer.shape, buffer.dtype) == (tuple(expected.shape), "float32")
    assert buffer.size_bytes == expected.numel() * 4

    contiguous = torch.zeros(expected.shape)
    buffer.read_into(contiguous).get(LIMIT_S)
    assert contiguous.equal(expected)

    wide = torch.zeros([*expected.shape, 3])
    strided = wide[..., 1]
    buffer.read_into(strided).get(LIMIT_S)
    assert strided.equal(expected)
    assert wide[..., 0].abs().sum() == 0 == wide[..., 2].abs().sum()

    after = base()
    LAYOUTS[layout](after).copy_(-expected)
    strided.copy_(-expected)
    buffer.write_from(strided).get(LIMIT_S)
    assert holder.content.call_one().get(LIMIT_S).equal(after)


def test_the_best_way_is_chosen(holders: Any, holder: Any) -> None:
    whole, columns = (holder.register.call_one(layout).get(LIMIT_S) for layout in ("long rows", "columns"))

    assert (whole.backend, columns.backend) == ("process_vm", "unix")
    assert whole.owner.endswith(".0")
    assert len(pickle.dumps(whole)) < 600
    own = RemoteBuffer(bytearray(5))
    assert own.backend == "same process"
    own.drop().get(LIMIT_S)


def test_a_third_process_and_the_owner_itself_use_the_same_handle(holders: Any) -> None:
    owner, other = holders.slice(procs=0), holders.slice(procs=1)
    buffer = owner.register.call_one("long rows").get(LIMIT_S)

    assert owner.copy_from.call_one(buffer).get(LIMIT_S)[1] == "same process"
    got, way = other.copy_from.call_one(buffer).get(LIMIT_S)

    assert way == "process_vm"
    assert got.equal(base()[:, 200:1200])
    owner.drop.call_one().get(LIMIT_S)


@pytest.mark.parametrize("way", ["same process", "unix", "tls"])
def test_a_process_reads_and_writes_its_own_buffers(way: str) -> None:
    with_certificate()
    source, own = torch.zeros(60, 3000)[:, ::3], torch.zeros(60, 1000)
    buffer = RemoteBuffer(source).via(way)

    buffer.write_from(base()[:, ::2]).get(LIMIT_S)
    buffer.read_into(own).get(LIMIT_S)

    assert source.equal(base()[:, ::2])
    assert own.equal(source)
    buffer.drop().get(LIMIT_S)
    with pytest.raises(BufferDropped):
        buffer.read_into(own).get(LIMIT_S)


@pytest.mark.parametrize("way", WAYS)
def test_slices_are_parts_of_the_same_memory(holder: Any, way: str) -> None:
    buffer = holder.register.call_one("long rows").get(LIMIT_S).via(way)
    part = buffer[10:30][5:-5]
    own = torch.zeros(10, 1000)

    assert (part.shape, len(part), part.size_bytes) == ((10, 1000), 10, 40_000)
    part.read_into(own).get(LIMIT_S)
    assert own.equal(base()[15:25, 200:1200])

    part[:1].write_from(torch.ones(1, 1000)).get(LIMIT_S)
    after = base()
    after[15, 200:1200] = 1
    assert holder.content.call_one().get(LIMIT_S).equal(after)
    assert part[5:2].size_bytes == 0


def test_a_slice_has_no_steps_and_no_numbers(holder: Any) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S)

    with pytest.raises(ValueError, match="without a step"):
        buffer[::2]
    with pytest.raises(TypeError, match=r"slice it by rows"):
        buffer[3]
    with pytest.raises(ValueError, match="of shape "):
        holder.register.call_one("scalar").get(LIMIT_S)[:1]


@pytest.mark.parametrize("way", WAYS)
def test_bytes_fit_every_dtype_and_flat_memory_may_be_larger(holder: Any, way: str) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S).via(way)
    data = bytearray(buffer.size_bytes + 3)

    buffer.read_into(data).get(LIMIT_S)
    assert bytes(data[:-3]) == base()[::3].numpy().tobytes()
    assert data[-3:] == bytes(3)

    buffer.write_from(np.full(3, 9, "float32")).get(LIMIT_S)
    assert holder.content.call_one().get(LIMIT_S)[0, :4].tolist() == [9, 9, 9, 3]


@pytest.mark.parametrize(
    ("local", "reason"),
    [
        pytest.param(lambda: torch.zeros(20, 1999), r"float32 \[20, 1999\] .159920 bytes. does not fit", id="shape"),
        pytest.param(lambda: torch.zeros(39_999), r"159996 bytes. does not fit .*160000 bytes", id="too small"),
        pytest.param(lambda: torch.zeros(20, 2000, dtype=torch.int32), r"int32 \[20, 2000\] and .* dtype", id="dtype"),
        pytest.param(lambda: bytes(160_000), "cannot be written to", id="bytes"),
        pytest.param(lambda: memoryview(bytearray(160_000)).toreadonly(), "cannot be written to", id="read-only"),
        pytest.param(lambda: torch.zeros(2000).expand(20, 2000), "cannot be written to", id="repeated"),
    ],
)
def test_a_destination_that_does_not_fit_is_refused_at_the_call(holder: Any, local: Any, reason: str) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S)

    with pytest.raises(ValueError, match=reason) as caught:
        buffer.read_into(local())
    assert "RemoteBuffer of " in str(caught.value)
    assert "float32 [20, 2000]" in str(caught.value)


def test_a_source_that_does_not_fit_is_refused_at_the_call(holder: Any) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S)

    with pytest.raises(ValueError, match="does not fit"):
        buffer.write_from(torch.zeros(40_001))
    with pytest.raises(ValueError, match="whole number of elements"):
        buffer.write_from(bytes(7))
    with pytest.raises(ValueError, match="timeout=0"):
        buffer.write_from(torch.zeros(20, 2000), timeout=0)
    with pytest.raises(TypeError, match="has no memory to transfer"):
        buffer.write_from([1, 2, 3])
    with pytest.raises(ValueError, match="expected one of same process"):
        buffer.via("pigeon")


def test_read_only_memory_can_be_read_but_not_written(holder: Any) -> None:
    buffer = holder.register_bytes.call_one(b"constant", read_only=True).get(LIMIT_S)
    data = bytearray(8)

    buffer.read_into(data).get(LIMIT_S)

    assert data == b"constant"
    assert not buffer.is_writable
    with pytest.raises(ValueError, match="is read-only"):
        buffer.write_from(b"variable")


@pytest.mark.parametrize("way", WAYS)
def test_a_dropped_buffer_answers_with_an_error(holder: Any, way: str) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S).via(way)
    own = torch.zeros(20, 2000)
    buffer.read_into(own).get(LIMIT_S)
    own.zero_()

    holder.drop.call_one().get(LIMIT_S)
    # Its slot serves again.
    holder.register.call_one("rows").get(LIMIT_S)

    with pytest.raises(BufferDropped, match="register the memory again"):
        buffer.read_into(own).get(LIMIT_S)
    with pytest.raises(BufferDropped):
        buffer.write_from(own).get(LIMIT_S)
    assert own.abs().sum() == 0
    assert holder.content.call_one().get(LIMIT_S).equal(base())


@pytest.mark.parametrize("way", WAYS)
def test_any_process_may_drop_a_buffer_once(holder: Any, way: str) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S)

    buffer.via(way).drop().get(LIMIT_S)

    assert holder.is_dropped.call_one(buffer).get(LIMIT_S)
    buffer.via(way).drop().get(LIMIT_S)


@pytest.mark.parametrize("way", WAYS)
def test_a_drop_while_it_is_read_ends_the_read(holder: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "CHUNK_BYTES", MIB)
    buffer = holder.register.call_one("flat", rows=8000).get(LIMIT_S).via(way)
    at_progress(monkeypatch, MIB, lambda: begin_drop(holder, buffer))

    with pytest.raises(BufferDropped):
        buffer.read_into(torch.empty(8000 * 2000)).get(LIMIT_S)
    assert holder.is_dropped.call_one(buffer).get(LIMIT_S)


def begin_drop(holder: Any, buffer: RemoteBuffer) -> None:
    """Have the owner drop, which is done only once this process has let go; return once it has begun."""
    handle = buffer._handle
    table = ForeignTable(handle.pid, *handle.table)
    holder.drop.call_one()
    wait_until(lambda: not table.is_registered(handle.slot, handle.number))
    table.close()


def at_progress(monkeypatch: pytest.MonkeyPatch, at_bytes: int, event: Any) -> None:
    """Call ``event`` once, within a transfer of which ``at_bytes`` are done."""
    on_moved = Progress.on_moved
    pending = [event]

    def moved(self: Progress, size_bytes: int) -> None:
        on_moved(self, size_bytes)
        if self.done_bytes >= at_bytes and pending:
            pending.pop()()

    monkeypatch.setattr(Progress, "on_moved", moved)


@pytest.mark.parametrize("way", WAYS)
def test_a_dead_owner_answers_with_how_it_died(victim: Any, way: str) -> None:
    buffer = victim.register.call_one("rows").get(LIMIT_S).via(way)
    kill(victim.pid.call_one().get(LIMIT_S))

    with pytest.raises(SupervisionError, match="was killed by SIGKILL") as caught:
        buffer.read_into(torch.zeros(20, 2000)).get(LIMIT_S)
    assert isinstance(caught.value, OwnerDied)


def kill(pid: int) -> None:
    """Kill a process, and return once it has ended."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], LIMIT_S)[0]
    os.close(pidfd)


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("way", WAYS)
def test_the_owners_death_ends_a_transfer_under_way(
    victim: Any, way: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "CHUNK_BYTES", MIB)
    buffer = victim.register.call_one("flat", rows=8000).get(LIMIT_S).via(way)
    pid = victim.pid.call_one().get(LIMIT_S)
    at_progress(monkeypatch, 2 * MIB, lambda: kill(pid))
    own = torch.zeros(8000 * 2000)

    future = buffer.read_into(own) if op == "read" else buffer.write_from(own)

    with pytest.raises(OwnerDied, match="was killed by SIGKILL"):
        future.get(LIMIT_S)


def test_another_process_with_the_owners_pid_is_not_touched(holders: Any, holder: Any) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S)
    other = holders.slice(procs=1).pid.call_one().get(LIMIT_S)
    buffer._handle = buffer._handle._replace(pid=other)
    own = torch.zeros(20, 2000)

    with pytest.raises(TransferError, match="cannot reach"):
        buffer.via("process_vm").read_into(own).get(LIMIT_S)
    with pytest.raises(TransferTimeoutError, match="another process than"):
        buffer.read_into(own, timeout=1).get(LIMIT_S)
    assert own.abs().sum() == 0


def test_where_the_kernel_refuses_the_owner_copies(holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> int:
        raise vm.NotPermitted

    monkeypatch.setattr(vm, "copy", refuse)
    bulk = bulk_of(local_proc())
    buffer = holder.register.call_one("rows").get(LIMIT_S)
    own = torch.zeros(20, 2000)
    assert buffer.backend == "process_vm"

    buffer.read_into(own).get(LIMIT_S)

    assert own.equal(base()[::3])
    assert buffer.backend == "unix"
    bulk.not_permitted.clear()


def test_a_stopped_owner_holds_up_nobody_longer_than_the_limit(holder: Any) -> None:
    buffer = holder.register.call_one("rows").get(LIMIT_S)
    pid = holder.pid.call_one().get(LIMIT_S)
    own = torch.zeros(20, 2000)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(TransferTimeoutError, match=r"0 of 160000 bytes within 0.3 s"):
            buffer.via("tls").read_into(own, timeout=0.3).get(LIMIT_S)
        # This way needs nothing of the owner.
        buffer.via("process_vm").read_into(own).get(LIMIT_S)
    finally:
        os.kill(pid, signal.SIGCONT)

    assert own.equal(base()[::3])


def test_a_batch_is_one_future(holders: Any) -> None:
    buffers = [holders.slice(procs=rank).register.call_one("flat").get(LIMIT_S) for rank in (0, 1)]
    owns = [torch.zeros(30_000) for _ in range(8)]
    batch = RemoteBuffer.batch()
    for place, own in enumerate(owns):
        batch.read_into(buffers[place % 2][30_000 * (place // 2) :][:30_000], own)
    assert len(batch) == 8

    batch.submit().get(LIMIT_S)

    assert len(batch) == 0
    for place, own in enumerate(owns):
        assert own.equal(base().reshape(-1)[30_000 * (place // 2) :][:30_000])
    batch.write_from(buffers[0][:10], torch.ones(10)).write_from(buffers[1][:10], torch.ones(10))
    batch.submit().get(LIMIT_S)
    for rank in (0, 1):
        assert holders.slice(procs=rank).content.call_one().get(LIMIT_S).reshape(-1)[:11].tolist() == [1] * 10 + [10]
        holders.slice(procs=rank).drop.call_one().get(LIMIT_S)


def test_a_batch_fails_with_its_first_error(holder: Any) -> None:
    dropped = holder.register.call_one("flat", rows=2000).get(LIMIT_S)
    holder.drop.call_one().get(LIMIT_S)
    alive = holder.register.call_one("flat", rows=2000).get(LIMIT_S)
    batch = RemoteBuffer.batch().read_into(dropped, torch.empty(4_000_000)).read_into(alive, torch.empty(4_000_000))

    with pytest.raises(BufferDropped):
        batch.submit().get(LIMIT_S)
    with pytest.raises(ValueError, match="does not fit"):
        batch.read_into(alive, torch.empty(5))
    assert RemoteBuffer.batch().submit().get(LIMIT_S) is None


def test_transfers_are_awaited(holder: Any) -> None:
    buffer = holder.register.call_one("flat", rows=1000).get(LIMIT_S)
    owns = [torch.zeros(2_000_000) for _ in range(3)]

    async def read_all() -> None:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(buffer.via(way).read_into(own) for way, own in zip(WAYS, owns, strict=True)))

    asyncio.run(read_all())

    assert all(own.equal(base(1000).reshape(-1)) for own in owns)


def test_a_cancelled_transfer_stops(holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = holder.register.call_one("flat", rows=8000).get(LIMIT_S).via("tls")
    own = torch.zeros(8000 * 2000)
    futures = list[Any]()
    moved = list[int]()
    on_moved = Progress.on_moved

    def cancel_at_once(self: Progress, size_bytes: int) -> None:
        moved.append(size_bytes)
        if futures:
            futures.pop().cancel()
        on_moved(self, size_bytes)

    monkeypatch.setattr(Progress, "on_moved", cancel_at_once)
    future = buffer.read_into(own)
    futures.append(future)

    with pytest.raises(Exception, match="was cancelled"):
        future.get(LIMIT_S)
    buffer.via("process_vm")[:10].read_into(own[:10]).get(LIMIT_S)
    assert sum(moved) < 60 * MIB


def test_direct_copies_are_allowed_here_or_it_is_said_why() -> None:
    assert vm.process_vm_allowed() == (vm.process_vm_refusal() is None)
    assert vm.process_vm_allowed()


def test_many_transfers_at_once_do_not_mix(holder: Any) -> None:
    buffer = holder.register.call_one("flat", rows=2000).get(LIMIT_S)
    parts, size = 24, 4_000_000 // 24
    own = [torch.full((size,), -1.0 - place) for place in range(parts)]
    back = [torch.zeros(size) for _ in range(parts)]

    async def pass_through(place: int) -> None:
        part = buffer[place * size :][:size].via(WAYS[place % len(WAYS)])
        for _ in range(3):
            await part.write_from(own[place])
            await part.read_into(back[place])

    async def all_at_once() -> None:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*map(pass_through, range(parts)))

    asyncio.run(all_at_once())

    assert all(got.equal(sent) for got, sent in zip(back, own, strict=True))
    content = holder.content.call_one().get(LIMIT_S).reshape(-1)
    assert content[: parts * size].equal(torch.cat(own))
