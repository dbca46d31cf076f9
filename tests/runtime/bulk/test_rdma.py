"""Transfers by NIXL, between processes that both have it switched on."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from danaus import Actor, endpoint, this_host
from danaus.runtime.bulk import certificate
from danaus.runtime.bulk.errors import BufferDropped, OwnerDied, TransferError
from danaus.runtime.bulk.remote_buffer import RemoteBuffer
from danaus.runtime.context import local_proc, shutdown_context

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed"),
    pytest.mark.timeout(60),
]

LIMIT_S = 20.0
MIB = 1 << 20


class Holder(Actor):
    """Registers memory."""

    def __init__(self) -> None:
        self.memory: Any = None
        self.buffer: RemoteBuffer | None = None

    @endpoint
    def register(self, size: int, step: int = 1) -> RemoteBuffer:
        self.memory = np.arange(size, dtype="int64")[::step]
        self.buffer = RemoteBuffer(self.memory)
        return self.buffer

    @endpoint
    def content(self) -> Any:
        return self.memory.copy()

    @endpoint
    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def _switched_on() -> Iterator[None]:
    os.environ["DANAUS_NIXL"] = "1"
    shutdown_context().get(LIMIT_S)
    yield
    del os.environ["DANAUS_NIXL"]


@pytest.fixture
def holder(_switched_on: None) -> Iterator[Any]:
    directory = local_proc().job_directory()
    if not certificate.exists(directory):
        certificate.write(directory, certificate.mint())
    procs = this_host().spawn_procs({"procs": 1})
    yield procs.spawn("holders", Holder).slice(procs=0)
    procs.stop().get(LIMIT_S)


def test_memory_is_read_and_written(holder: Any) -> None:
    buffer = holder.register.call_one(3 * MIB).get(LIMIT_S).via("nixl")
    own = np.zeros(3 * MIB, "int64")

    buffer.read_into(own).get(LIMIT_S)
    assert (own == np.arange(3 * MIB)).all()
    buffer[MIB:][: MIB + 1].write_from(own[: MIB + 1]).get(LIMIT_S)

    own[MIB : 2 * MIB + 1] = np.arange(MIB + 1)
    assert (holder.content.call_one().get(LIMIT_S) == own).all()


def test_a_dropped_buffer_is_not_touched(holder: Any) -> None:
    buffer = holder.register.call_one(MIB).get(LIMIT_S).via("nixl")
    own = np.zeros(MIB, "int64")
    buffer.read_into(own).get(LIMIT_S)

    buffer.drop().get(LIMIT_S)

    with pytest.raises(BufferDropped):
        buffer.write_from(own).get(LIMIT_S)
    with pytest.raises(BufferDropped):
        buffer.read_into(own).get(LIMIT_S)


def test_memory_with_gaps_goes_another_way(holder: Any) -> None:
    buffer = holder.register.call_one(MIB, 2).get(LIMIT_S)
    own = np.zeros(MIB // 2, "int64")

    with pytest.raises(TransferError, match="that way"):
        buffer.via("nixl").read_into(own).get(LIMIT_S)
    buffer.via("tls").read_into(own).get(LIMIT_S)
    assert (own == np.arange(0, MIB, 2)).all()


def test_a_dead_owner_is_told(holder: Any) -> None:
    buffer = holder.register.call_one(MIB).get(LIMIT_S).via("nixl")
    own = np.zeros(MIB, "int64")
    buffer.read_into(own).get(LIMIT_S)
    pid = holder.pid.call_one().get(LIMIT_S)
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], LIMIT_S)[0]
    os.close(pidfd)

    with pytest.raises(OwnerDied, match="SIGKILL"):
        buffer.read_into(own).get(LIMIT_S)
