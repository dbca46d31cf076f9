"""Remote buffers on CUDA memory: between processes of one host by CUDA IPC, else through pinned host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from danaus import Actor, endpoint, this_host
from danaus.runtime.bulk import certificate
from danaus.runtime.bulk.errors import BufferDropped
from danaus.runtime.bulk.remote_buffer import RemoteBuffer
from danaus.runtime.context import local_proc

if TYPE_CHECKING:
    from collections.abc import Iterator

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gpu, pytest.mark.timeout(120)]

LIMIT_S = 60.0
WAYS = ["cuda ipc", "unix", "tls"]


class Holder(Actor):
    """Registers memory of a GPU."""

    def __init__(self) -> None:
        self.base: Any = None
        self.buffer: RemoteBuffer | None = None

    @endpoint
    def register(self, device: str, *, strided: bool) -> RemoteBuffer:
        self.base = source().to(device)
        self.buffer = RemoteBuffer(self.base[:, ::2] if strided else self.base)
        if device != "cpu":
            torch.cuda.synchronize()
        return self.buffer

    @endpoint
    def content(self) -> Any:
        return self.base.cpu()

    @endpoint
    def drop(self) -> None:
        if self.buffer is not None:
            self.buffer.drop().get(LIMIT_S)


def source() -> Any:
    return torch.arange(300 * 1000, dtype=torch.float32).reshape(300, 1000)


@pytest.fixture(scope="module")
def holder() -> Iterator[Any]:
    directory = local_proc().job_directory()
    if not certificate.exists(directory):
        certificate.write(directory, certificate.mint())
    procs = this_host().spawn_procs({"procs": 1})
    yield procs.spawn("holders", Holder).slice(procs=0)
    procs.stop().get(LIMIT_S)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("way", WAYS)
def test_cuda_memory_is_read_and_written(holder: Any, way: str, device: str, strided: bool) -> None:
    expected = source()[:, ::2] if strided else source()
    buffer = holder.register.call_one("cuda", strided=strided).get(LIMIT_S)
    assert buffer.backend == "cuda ipc"
    buffer, own = buffer.via(way), torch.zeros(expected.shape, device=device)

    buffer.read_into(own).get(LIMIT_S)
    assert own.cpu().equal(expected)

    buffer.write_from(own * 2).get(LIMIT_S)
    after = source()
    (after[:, ::2] if strided else after).mul_(2)
    assert holder.content.call_one().get(LIMIT_S).equal(after)
    holder.drop.call_one().get(LIMIT_S)
    with pytest.raises(BufferDropped):
        buffer.read_into(own).get(LIMIT_S)


@pytest.mark.parametrize("way", ["process_vm", "tls"])
def test_host_memory_is_read_into_cuda_memory(holder: Any, way: str) -> None:
    buffer = holder.register.call_one("cpu", strided=False).get(LIMIT_S).via(way)
    own = torch.zeros(300, 1000, device="cuda")

    buffer.read_into(own).get(LIMIT_S)
    assert own.cpu().equal(source())
    buffer.write_from(own + 1).get(LIMIT_S)
    assert holder.content.call_one().get(LIMIT_S).equal(source() + 1)
    holder.drop.call_one().get(LIMIT_S)


def test_a_process_reads_its_own_cuda_buffers() -> None:
    memory = source().cuda()
    buffer, own = RemoteBuffer(memory), torch.zeros(300, 1000, device="cuda")

    buffer.read_into(own).get(LIMIT_S)
    assert own.equal(memory)
    host = torch.zeros(300, 1000)
    buffer.read_into(host).get(LIMIT_S)
    assert host.equal(source())
    buffer.drop().get(LIMIT_S)
