"""Several hosts as one: meshes over them, calls between them, what happens when one is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import danaus
from danaus import Actor, AttachError, FailureKind, Restart, SupervisionError, attach_to_hosts, current_rank, endpoint

from .hosts import address_of, agent_of, daemons, end_daemons, start_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from danaus import HostMesh

    from .hosts import Daemons

pytestmark = pytest.mark.timeout(60)


class Worker(Actor):
    """Says where it is, and asks others."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.bad = -1

    @endpoint
    def where(self) -> tuple[int, int, str]:
        return current_rank().rank, os.getpid(), danaus.this_host().names[0]

    @endpoint
    def echo(self, value: object) -> object:
        return value

    @endpoint
    def note(self, number: int) -> None:
        self.seen.append(number)

    @endpoint
    def noted(self) -> list[int]:
        return self.seen

    @endpoint
    def tell(self, peer: Worker, count: int) -> None:
        for number in range(count):
            peer.note.broadcast(number)

    @endpoint
    def spawn_below(self) -> tuple[int, str]:
        with danaus.this_host().spawn_procs(name="below") as procs:
            (answer,) = procs.spawn("worker", Worker).where.call().get(timeout=10).values()
        return answer[1], answer[2]

    @endpoint
    def own(self) -> Worker:
        self.procs = danaus.this_host().spawn_procs(name="owned")
        return self.procs.spawn("worker", Worker)

    @endpoint
    def letter(self) -> str:
        return "abcdef"[current_rank().rank]

    @endpoint
    def number(self) -> int:
        if current_rank().rank == self.bad:
            raise ValueError("it did not work")
        return current_rank().rank + 1

    @endpoint
    def break_rank(self, rank: int) -> int:
        self.bad = rank
        return rank

    @endpoint
    def wait_for_ever(self) -> int:
        threading.Event().wait()
        return 0

    @endpoint
    def raises(self) -> int:
        raise ValueError("it did not work")


def noted_by(worker: Any, count: int) -> list[int]:
    """What has arrived at an actor, once it is as many: nothing orders this script's calls after those of others."""
    limit_s = time.monotonic() + 20
    while True:
        seen = worker.noted.call_one().get(timeout=20)
        if len(seen) >= count or time.monotonic() > limit_s:
            return seen


@pytest.fixture(scope="module")
def two() -> Iterator[Daemons]:
    with daemons(2) as found:
        yield found


@pytest.fixture(scope="module")
def hosts(two: Daemons) -> Iterator[HostMesh]:
    mesh = attach_to_hosts(two.addresses, key=two.key)
    yield mesh
    danaus.shutdown_context()


def test_dimensions_of_hosts_come_first_and_ranks_are_where_they_belong(hosts: HostMesh) -> None:
    with hosts.spawn_procs({"gpus": 2}) as procs:
        workers = procs.spawn("workers", Worker)
        values = workers.where.call().get(timeout=20)

        assert procs.extent.sizes == (2, 2)
        assert procs.extent.labels == ("hosts", "gpus")
        assert [rank for rank, _, _ in values.values()] == [0, 1, 2, 3]
        assert [name for _, _, name in values.values()] == ["host0", "host0", "host1", "host1"]
        assert workers.slice(hosts=1, gpus=0).where.call_one().get(timeout=10)[0] == 2


def test_a_slice_of_hosts_spawns_on_these_alone(hosts: HostMesh) -> None:
    with hosts.slice(hosts=1).spawn_procs({"gpus": 2}) as procs:
        names = [name for _, _, name in procs.spawn("w", Worker).where.call().get(timeout=20).values()]

    assert names == ["host1", "host1"]


def test_messages_between_hosts_arrive_once_in_order(hosts: HostMesh) -> None:
    with hosts.spawn_procs() as procs:
        workers = procs.spawn("workers", Worker)
        one, other = workers.slice(hosts=0), workers.slice(hosts=1)
        one.tell.call_one(other, 2000).get(timeout=30)

        assert noted_by(other, 2000) == list(range(2000))


def test_values_of_any_size_come_through(hosts: HostMesh) -> None:
    with hosts.spawn_procs() as procs:
        workers = procs.spawn("workers", Worker)
        for size in (0, 10, 5_000, 300_000, 2_000_000):
            array = np.arange(size)
            for value in workers.echo.call(array).get(timeout=20).values():
                np.testing.assert_array_equal(value, array)


def test_values_are_joined_on_their_hosts_in_rank_order(hosts: HostMesh) -> None:
    with hosts.spawn_procs({"gpus": 3}) as procs:
        workers: Any = procs.spawn("workers", Worker)

        assert workers.letter.call(reduce="concat").get(timeout=20) == "abcdef"
        assert workers.letter.call(reduce=lambda left, right: f"({left}{right})").get(timeout=20) == "(((ab)c)((de)f))"
        assert workers.slice(gpus=slice(0, 3, 2)).letter.call(reduce="concat").get(timeout=20) == "acdf"
        assert workers.number.call(reduce="sum").get(timeout=20) == 21
        assert workers.number.call(reduce="mean").get(timeout=20) == 3.5
        with pytest.raises(danaus.ActorError, match="reduce= of ranks"):
            workers.number.call(reduce=lambda _left, _right: 1 // 0).get(timeout=20)
        workers.break_rank.call(4).get(timeout=20)
        with pytest.raises(danaus.ActorError, match="it did not work"):
            workers.number.call(reduce="sum").get(timeout=20)


def test_an_error_reads_as_on_one_host(hosts: HostMesh) -> None:
    with hosts.spawn_procs() as procs, pytest.raises(danaus.ActorError, match="it did not work") as caught:
        procs.spawn("workers", Worker).slice(hosts=1).raises.call_one().get(timeout=20)

    assert "host1" in str(caught.value)


def test_a_killed_rank_is_told_of_and_others_go_on(hosts: HostMesh) -> None:
    with hosts.spawn_procs() as procs:
        workers = procs.spawn("workers", Worker)
        _, pid, _ = workers.slice(hosts=1).where.call_one().get(timeout=20)
        waiting = workers.slice(hosts=1).wait_for_ever.call_one()
        os.kill(pid, signal.SIGKILL)

        with pytest.raises(SupervisionError, match="SIGKILL") as caught:
            waiting.get(timeout=10)

        assert caught.value.failure.host == "host1"
        assert workers.slice(hosts=0).echo.call_one(1).get(timeout=10) == 1


def test_a_rank_is_started_again_on_its_host(hosts: HostMesh) -> None:
    with hosts.spawn_procs(restart=Restart(max_restarts=3)) as procs:
        workers = procs.spawn("workers", Worker)
        other = workers.slice(hosts=1)
        _, pid, _ = other.where.call_one().get(timeout=20)
        watching = workers.slice(hosts=0)
        watching.tell.call_one(other, 1).get(timeout=10)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SupervisionError):
            other.wait_for_ever.call_one().get(timeout=10)

        _, again, name = other.where.call_one().get(timeout=20)
        assert again != pid
        assert name == "host1"
        # Who knew the one before, on another host, finds the next.
        watching.tell.call_one(other, 3).get(timeout=10)
        assert noted_by(other, 3) == [0, 1, 2]


def test_a_rank_spawns_on_its_own_host(hosts: HostMesh, two: Daemons) -> None:
    with hosts.spawn_procs() as procs:
        _, name = procs.spawn("workers", Worker).slice(hosts=1).spawn_below.call_one().get(timeout=20)

    assert name == "host1"


def test_what_a_rank_owns_ends_with_it_also_for_those_elsewhere(hosts: HostMesh) -> None:
    with hosts.spawn_procs() as procs:
        workers = procs.spawn("workers", Worker)
        owner = workers.slice(hosts=1)
        owned = owner.own.call_one().get(timeout=20)
        assert owned.echo.call_one(3).get(timeout=10) == 3
        _, pid, _ = owner.where.call_one().get(timeout=10)
        waiting = owned.wait_for_ever.call_one()
        os.kill(pid, signal.SIGKILL)

        with pytest.raises(SupervisionError):
            waiting.get(timeout=10)


def test_hosts_that_do_not_answer_are_named_and_none_is_attached(two: Daemons) -> None:
    nobody = "tcp://127.0.0.1:9"

    with pytest.raises(AttachError) as caught:
        attach_to_hosts([two.addresses[0], nobody], key=two.key, timeout=2)

    assert list(caught.value.failed) == [nobody]
    assert nobody in str(caught.value)


def test_a_wrong_key_is_no_answer(two: Daemons) -> None:
    with pytest.raises(AttachError, match="same key"):
        attach_to_hosts(two.addresses[:1], key=b"k" * 32, timeout=2)


@pytest.mark.parametrize("addresses", ["tcp://127.0.0.1:1", [], ["127.0.0.1:1"], ["tcp://a:1", "tcp://a:1"]])
def test_what_is_no_list_of_addresses_is_refused(addresses: Any) -> None:
    with pytest.raises(ValueError, match=r"attach_to_hosts|address"):
        attach_to_hosts(addresses, key=b"k" * 32)


def test_daemons_outlive_a_controller_and_serve_the_next() -> None:
    with daemons(1) as found:
        for _ in range(2):
            hosts = attach_to_hosts(found.addresses, key=found.key)
            procs = hosts.spawn_procs()
            assert procs.spawn("w", Worker).where.call().get(timeout=20)
            danaus.shutdown_context()
        assert found.processes[0].poll() is None


def test_shutdown_ends_the_daemons() -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        with pytest.raises(RuntimeError, match="whole"):
            hosts.slice(hosts=0).shutdown()
        hosts.shutdown()

        assert [process.wait(15) for process in found.processes] == [0, 0]
        danaus.shutdown_context()


def test_a_lost_host_fails_every_call_to_it() -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        workers = hosts.spawn_procs({"gpus": 2}).spawn("workers", Worker)
        workers.where.call().get(timeout=20)
        waiting = [workers.slice(hosts=1, gpus=gpu).wait_for_ever.call_one() for gpu in range(2)]
        os.kill(agent_of(found.processes[1].pid), signal.SIGKILL)

        for call in waiting:
            with pytest.raises(SupervisionError) as caught:
                call.get(timeout=10)
            assert caught.value.failure.kind is FailureKind.HOST_LOST
            assert caught.value.failure.host == "host1"
        with pytest.raises(SupervisionError):
            workers.slice(hosts=1, gpus=0).echo.call_one(1).get(timeout=10)
        assert workers.slice(hosts=0, gpus=0).echo.call_one(1).get(timeout=10) == 1
        danaus.shutdown_context()


def test_a_replaced_host_has_the_ranks_of_the_lost_one() -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        lost: list[tuple[int, str]] = []
        was_lost = threading.Event()
        hosts.on_host_lost(lambda rank, why: (lost.append((rank, why)), was_lost.set()))
        procs = hosts.spawn_procs({"gpus": 2}, restart=Restart(max_restarts=3))
        workers = procs.spawn("workers", Worker)
        before = workers.where.call().get(timeout=20)
        os.kill(found.processes[1].pid, signal.SIGKILL)
        assert was_lost.wait(10)
        assert lost[0][0] == 1

        another = start_daemon(found.key, "another")
        try:
            hosts.replace_host(1, address_of(another))
            after = workers.where.call().get(timeout=30)

            assert [name for _, _, name in after.values()] == ["host0", "host0", "another", "another"]
            assert list(after.values())[:2] == list(before.values())[:2]
            danaus.shutdown_context()
        finally:
            end_daemons([another])


def test_a_host_that_nobody_replaces_fails_what_waits_for_it() -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        was_lost = threading.Event()
        hosts.on_host_lost(lambda _rank, _why: was_lost.set())
        workers = hosts.spawn_procs(restart=Restart(max_restarts=3)).spawn("workers", Worker)
        workers.where.call().get(timeout=20)
        os.kill(found.processes[1].pid, signal.SIGKILL)
        assert was_lost.wait(10)
        hosts.give_up_host(1)

        # The first may be told of the loss, while it is not given up yet.
        with contextlib.suppress(SupervisionError):
            workers.slice(hosts=1).echo.call_one(1).get(timeout=10)
        with pytest.raises(SupervisionError) as caught:
            workers.slice(hosts=1).echo.call_one(1).get(timeout=10)
        assert caught.value.failure.kind is FailureKind.HOST_LOST
        danaus.shutdown_context()


def test_through_a_gateway() -> None:
    with daemons(3) as found:
        hosts = attach_to_hosts(found.addresses[1:], key=found.key, gateway=found.addresses[0])
        workers = hosts.spawn_procs().spawn("workers", Worker)

        assert [name for _, _, name in workers.where.call().get(timeout=20).values()] == ["host1", "host2"]
        workers.slice(hosts=0).tell.call_one(workers.slice(hosts=1), 100).get(timeout=20)
        assert noted_by(workers.slice(hosts=1), 100) == list(range(100))
        os.kill(agent_of(found.processes[2].pid), signal.SIGKILL)
        with pytest.raises(SupervisionError):
            workers.slice(hosts=1).wait_for_ever.call_one().get(timeout=15)
        danaus.shutdown_context()
