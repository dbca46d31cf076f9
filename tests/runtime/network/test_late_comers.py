"""Who asks for a process only after its host was lost, or replaced, hears of its end and of what follows it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import danaus
from danaus import Actor, FailureKind, Restart, SupervisionError, attach_to_hosts, endpoint
from danaus.runtime.host.proc_table import MeshInfo, ProcTable, TellGone, TellUp

from .hosts import address_of, agent_of, daemons, end_daemons, start_daemon

pytestmark = pytest.mark.timeout(60)

MESH = "m-a1@1x2"
PLACE = f"{MESH}.0"
INFO = MeshInfo(MESH, "m", "controller.0", (("p", 2),), 2, restartable=True, watcher="agent@0x1.0")
LATE = "agent@2x1.0"


def started(*procs: str) -> ProcTable:
    table = ProcTable("here")
    table.on_spawn(INFO, procs)
    for proc in procs:
        table.on_up(proc)
    return table


def test_who_asks_for_what_was_lost_before_this_host_took_its_place_watches_what_follows() -> None:
    table = started(f"{PLACE}~2")

    first, second, up = table.on_watch(PLACE, LATE)

    assert isinstance(first, TellGone)
    assert isinstance(second, TellGone)
    assert [(each.to, each.proc, each.following) for each in (first, second)] == [
        (LATE, PLACE, f"{PLACE}~1"),
        (LATE, f"{PLACE}~1", f"{PLACE}~2"),
    ]
    assert (first.failure.kind, first.failure.rank, first.failure.restarts) == (FailureKind.HOST_LOST, 0, True)
    assert second.failure.incarnation == 1
    assert up == TellUp(LATE, f"{PLACE}~2")


def test_who_asks_for_what_is_still_to_be_started_here_waits() -> None:
    table = started(f"{PLACE}~2")

    assert table.on_watch(f"{PLACE}~3", LATE) == []
    assert table.on_watch(f"{MESH}.1", LATE) == []


def test_a_rank_that_was_started_again_here_was_on_no_other_host() -> None:
    table = started(PLACE)
    table.on_exit(PLACE, exit_code=1, signum=None, log_tail=(), now_s=0.0)
    table.on_spawn(INFO, [f"{PLACE}~1"])

    (gone,) = table.on_watch(PLACE, LATE)

    assert isinstance(gone, TellGone)
    assert gone.failure.kind is FailureKind.EXITED


class Worker(Actor):
    """Answers, and asks others."""

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def ask(self, other: Worker) -> int:
        return other.pid.call_one().get(timeout=10)


def test_a_rank_elsewhere_that_first_calls_after_the_host_was_replaced_reaches_the_next_process() -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        was_lost = threading.Event()
        hosts.on_host_lost(lambda _rank, _why: was_lost.set())
        late = hosts.slice(hosts=0).spawn_procs(name="late").spawn("late", Worker)
        workers = hosts.slice(hosts=1).spawn_procs(restart=Restart(max_restarts=3)).spawn("workers", Worker)
        before = workers.pid.call_one().get(timeout=20)
        os.kill(found.processes[1].pid, signal.SIGKILL)
        assert was_lost.wait(10)
        another = start_daemon(found.key, "another")
        try:
            hosts.replace_host(1, address_of(another))
            after = workers.pid.call_one().get(timeout=20)

            assert late.ask.call_one(workers).get(timeout=20) == after != before
            danaus.shutdown_context()
        finally:
            end_daemons([another])


def test_a_rank_elsewhere_that_first_calls_after_the_host_was_lost_hears_of_it() -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        late = hosts.slice(hosts=0).spawn_procs(name="late").spawn("late", Worker)
        workers = hosts.slice(hosts=1).spawn_procs().spawn("workers", Worker)
        workers.pid.call().get(timeout=20)
        os.kill(agent_of(found.processes[1].pid), signal.SIGKILL)
        with pytest.raises(SupervisionError):
            workers.pid.call_one().get(timeout=20)

        error = late.ask.call_one(workers).exception(timeout=20)

        assert "host lost" in str(error)
        danaus.shutdown_context()


@pytest.mark.parametrize("num_losses", [2, 3])
def test_a_host_that_is_lost_again_before_its_ranks_are_up_is_replaced_again(num_losses: int) -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        was_lost = threading.Event()
        hosts.on_host_lost(lambda _rank, _why: was_lost.set())
        late = hosts.slice(hosts=0).spawn_procs(name="late").spawn("late", Worker)
        workers = hosts.slice(hosts=1).spawn_procs(restart=Restart(max_restarts=9)).spawn("workers", Worker)
        late.ask.call_one(workers).get(timeout=20)
        daemon = found.processes[1]
        others = [daemon]
        try:
            for _ in range(num_losses):
                was_lost.clear()
                os.kill(agent_of(daemon.pid), signal.SIGKILL)
                assert was_lost.wait(10)
                daemon = start_daemon(found.key, "another")
                others.append(daemon)
                hosts.replace_host(1, address_of(daemon))

            assert workers.pid.call_one().get(timeout=20) == late.ask.call_one(workers).get(timeout=20)
            danaus.shutdown_context()
        finally:
            end_daemons(others[1:])
