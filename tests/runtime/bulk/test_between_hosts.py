"""Large arguments, replies and remote buffers between hosts: real daemons on loopback, each a host of its own."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from danaus import Actor, SupervisionError, endpoint
from danaus.runtime.bulk.errors import OwnerDied
from danaus.runtime.bulk.remote_buffer import RemoteBuffer
from danaus.runtime.bulk.state import bulk_of
from danaus.runtime.context import local_proc
from danaus.runtime.network.attach import attach_to_hosts

from ..network.hosts import daemons

if TYPE_CHECKING:
    from collections.abc import Iterator

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]

LIMIT_S = 20.0
MIB = 1 << 20


class Peer(Actor):
    """Takes, gives and registers large values."""

    def __init__(self) -> None:
        self.memory: Any = None
        self.buffer: RemoteBuffer | None = None

    @endpoint
    def total(self, values: dict[str, Any]) -> tuple[int, bool]:
        return int(sum(value.sum() for value in values.values())), bool(values["array"].flags.writeable)

    @endpoint
    def give(self, size: int) -> Any:
        return torch.arange(size)

    @endpoint
    def register(self, size: int) -> RemoteBuffer:
        self.memory = torch.arange(size, dtype=torch.int64)
        self.buffer = RemoteBuffer(self.memory)
        return self.buffer

    @endpoint
    def read(self, buffer: RemoteBuffer) -> tuple[str, int]:
        own = torch.zeros(buffer.shape, dtype=torch.int64)
        buffer.read_into(own).get(LIMIT_S)
        return buffer.backend, int(own.sum())

    @endpoint
    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Any]:
    with daemons(2) as running:
        hosts = attach_to_hosts(running.addresses, key=running.key, timeout=LIMIT_S)
        yield hosts
        hosts.stop()


@pytest.fixture
def peers(hosts: Any) -> Iterator[Any]:
    procs = hosts.spawn_procs({"procs": 2})
    yield procs.spawn("peers", Peer)
    procs.stop().get(LIMIT_S)


def values() -> dict[str, Any]:
    return {"array": np.ones(3 * MIB, "int64"), "tensor": torch.ones(100_001), "small": np.ones(3)}


def leases() -> int:
    pool = local_proc().attachments._pool
    return 0 if pool is None else pool.stats().leases


def test_large_arguments_reach_every_rank_of_other_hosts(peers: Any) -> None:
    expected = 3 * MIB + 100_001 + 3

    assert set(peers.total.call(values()).get(LIMIT_S).values()) == {(expected, False)}
    assert peers.slice(hosts=1, procs=0).total.call_one(values()).get(LIMIT_S) == (expected, False)
    assert bulk_of(local_proc()).server().num_refused == 0


def test_a_cast_is_fetched_once_by_each_host(peers: Any) -> None:
    server = bulk_of(local_proc()).server()
    before = server.num_accepted

    peers.total.call(values()).get(LIMIT_S)

    assert server.num_accepted - before == 2


def test_a_lease_ends_when_its_payload_was_fetched(peers: Any) -> None:
    peers.total.call(values()).get(LIMIT_S)

    # A call that follows on the same links comes after the leases.
    peers.pid.call().get(LIMIT_S)
    assert leases() == 0


def test_large_replies_come_from_other_hosts(peers: Any) -> None:
    for reply in peers.give.call(MIB).get(LIMIT_S).values():
        assert reply.equal(torch.arange(MIB))


def test_buffers_are_read_across_hosts_and_directly_within_one(peers: Any) -> None:
    buffer = peers.slice(hosts=0, procs=0).register.call_one(MIB).get(LIMIT_S)
    total = MIB * (MIB - 1) // 2

    read = peers.read.call(buffer).get(LIMIT_S)

    assert list(read.values()) == [("same process", total), ("process_vm", total), ("tls", total), ("tls", total)]
    assert buffer.backend == "tls"


def test_a_buffer_on_another_host_is_written_and_dropped_from_here(peers: Any) -> None:
    peer = peers.slice(hosts=1, procs=1)
    buffer = peer.register.call_one(MIB).get(LIMIT_S)

    buffer.write_from(torch.ones(MIB, dtype=torch.int64)).get(LIMIT_S)

    assert peer.read.call_one(buffer).get(LIMIT_S) == ("same process", MIB)
    buffer.drop().get(LIMIT_S)
    with pytest.raises(Exception, match="it was dropped"):
        peer.read.call_one(buffer).get(LIMIT_S)


def test_the_death_of_a_far_owner_is_told(peers: Any) -> None:
    peer = peers.slice(hosts=1, procs=0)
    buffer = peer.register.call_one(MIB).get(LIMIT_S)
    os.kill(peer.pid.call_one().get(LIMIT_S), signal.SIGKILL)
    with pytest.raises(SupervisionError):
        peer.pid.call_one().get(LIMIT_S)

    with pytest.raises(OwnerDied, match="was killed by SIGKILL"):
        buffer.read_into(torch.zeros(MIB, dtype=torch.int64)).get(LIMIT_S)
