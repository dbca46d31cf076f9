"""Process groups over several hosts: each member listens where others reach its host, and a death releases all."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

torch: Any = pytest.importorskip("torch")
dist: Any = pytest.importorskip("torch.distributed")

import danaus  # noqa: E402
from danaus import (  # noqa: E402
    Actor,
    FailureKind,
    Restart,
    SupervisionError,
    attach_to_hosts,
    context,
    current_rank,
    endpoint,
    process_group,
    this_host,
)
from danaus.runtime.collectives.root_cause import news_limit_of  # noqa: E402
from danaus.runtime.collectives.sockets import numeric, unreachable  # noqa: E402

from .network.hosts import address_of, agent_of, daemons, end_daemons, start_daemon  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]

LIMIT_S = 30.0
RELEASE_S = 5.0


class Member(Actor):
    """On a "host" of its own: all of 127.0.0.0/8 is this machine."""

    def __init__(self) -> None:
        local = context().actor_instance.proc_runtime
        place = current_rank().rank // 2
        local.host, local.host_address = f"node{place}", f"127.0.0.{2 + place}"

    @endpoint
    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def spawn(size: int, *, restart: Restart | None = None) -> Any:
    return this_host().spawn_procs({"dp": size}, name="crew", preload=("torch",), restart=restart)


def do(actors: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    return list(actors.do.options(timeout=LIMIT_S).call(function, *args).get().values())


def total() -> float:
    ones = torch.ones(100_000)
    group = context().actor_instance.actor.group = process_group()
    dist.all_reduce(ones, group=group)
    return float(ones.mean())


def own_ends() -> set[str]:
    """IP addresses that the group's sockets of this process listen on."""
    from danaus.runtime.collectives.sockets import own_listeners

    return {host for host, _ in own_listeners(None)}


def wait_in_vain() -> float:
    """Use the group that was formed before, and return when that has failed."""
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1000), group=context().actor_instance.actor.group)
    return time.monotonic()


def test_members_on_several_hosts_compute_together_and_listen_each_on_its_own() -> None:
    with spawn(4) as procs:
        actors: Any = procs.spawn("crew@several #1", Member)

        assert do(actors, total) == [4.0] * 4
        assert do(actors, own_ends) == [{"127.0.0.2"}, {"127.0.0.2"}, {"127.0.0.3"}, {"127.0.0.3"}]


@pytest.mark.parametrize("victim", [0, 3])
def test_a_death_on_one_host_releases_the_members_on_all(victim: int) -> None:
    with spawn(4) as procs:
        actors: Any = procs.spawn("crew", Member)
        pids = do(actors, os.getpid)
        do(actors, total)
        others = [actors.slice(dp=rank) for rank in range(4) if rank != victim]
        waiting = [each.do.options(timeout=LIMIT_S).call_one(wait_in_vain) for each in others]
        do(actors.slice(dp=victim), os.getpid)
        killed_s = time.monotonic()

        os.kill(pids[victim], signal.SIGKILL)

        released_s = [future.get() - killed_s for future in waiting]
    assert max(released_s) < RELEASE_S, released_s


def test_the_group_forms_again_over_the_hosts_with_the_ranks_that_follow() -> None:
    with spawn(4, restart=Restart()) as procs:
        actors: Any = procs.spawn("crew", Member)
        do(actors, total)

        for rank in (2, 3):
            os.kill(do(actors.slice(dp=rank), os.getpid)[0], signal.SIGKILL)

        # Else some would be asked twice for what others are asked once.
        until_back(actors, os.getpid)
        assert do(actors, total) == [4.0] * 4


def until_back(actors: Any, function: Callable[..., Any]) -> list[Any]:
    limit_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return do(actors, function)
        except SupervisionError as error:
            if not error.failure.restarts or time.monotonic() > limit_s:
                raise


def test_a_lost_host_releases_the_others_and_the_group_forms_again_with_the_one_that_follows() -> None:
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        lost = threading.Event()
        hosts.on_host_lost(lambda _rank, _reason: lost.set())
        procs: Any = hosts.spawn_procs({"gpus": 2}, name="crew", preload=("torch",), restart=Restart())
        actors: Any = procs.spawn("crew", Member)
        assert do(actors, total) == [4.0] * 4
        assert do(actors, own_ends) == [{"127.0.0.2"}, {"127.0.0.2"}, {"127.0.0.3"}, {"127.0.0.3"}]
        survivors = actors.slice(hosts=0)
        pids = do(survivors, os.getpid)
        waiting = survivors.do.options(timeout=LIMIT_S).call(wait_in_vain)
        do(actors.slice(hosts=1), os.getpid)

        os.kill(found.processes[1].pid, signal.SIGKILL)

        # The peers' connections break with their processes, long before the host counts as lost.
        assert len(waiting.get()) == 2
        assert lost.wait(LIMIT_S)
        another = start_daemon(found.key, "another")
        try:
            hosts.replace_host(1, address_of(another))
            until_back(actors, os.getpid)
            assert do(actors, total) == [4.0] * 4
            assert do(survivors, os.getpid) == pids
            procs.stop().get(LIMIT_S)
            danaus.shutdown_context().get()
        finally:
            end_daemons([another])


def test_an_address_that_is_not_this_hosts_is_refused_with_what_to_do() -> None:
    from danaus.runtime.collectives.c10d import open_device

    with pytest.raises(RuntimeError, match=r"cannot listen on '203\.0\.113\.7'.*address of its own"):
        open_device("203.0.113.7")


def test_an_interface_that_the_user_names_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from danaus.runtime.collectives.c10d import open_device

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert open_device("203.0.113.7").listener[0] == "127.0.0.1"

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nic9")
    with pytest.raises(RuntimeError, match=r"nic9.*correct GLOO_SOCKET_IFNAME"):
        open_device("127.0.0.1")


def test_addresses_are_taken_as_they_are_and_names_are_looked_up() -> None:
    assert [numeric(host) for host in ("127.0.0.3", "::1", "fd00::0:2")] == ["127.0.0.3", "::1", "fd00::2"]
    assert numeric("localhost") in {"127.0.0.1", "::1"}


def test_members_that_others_cannot_reach_are_known_by_their_addresses() -> None:
    here, there = ("127.0.0.1", 5000), ("192.0.2.2", 5000)

    assert unreachable([here, ("127.0.0.2", 1)]) == unreachable([there, there]) == []
    assert unreachable([here, there, ("::1", 7)]) == [0, 2]
    assert unreachable([("fe80::1%eth0", 1), here]) == [1]


def test_only_connections_that_broke_between_hosts_wait_for_the_loss_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANAUS_GRACE_S", "3")
    near, far = ("crew-a1.0", "crew-a1.1"), ("crew-a1@1:2x1.0", "crew-a1@1:2x1.1")
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11694")
    too_long = RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes")
    outer = RuntimeError("step 5 failed")
    outer.__cause__ = closed

    assert news_limit_of(closed, far) == news_limit_of(outer, far) == pytest.approx(5.1)
    assert news_limit_of(closed, near) == news_limit_of(too_long, far) == pytest.approx(0.1)
    assert news_limit_of(ValueError("Connection closed by peer"), far) == 0.0


def test_a_host_whose_agent_is_killed_too_is_named_though_its_connections_broke_long_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    danaus.shutdown_context().get()
    monkeypatch.setenv("DANAUS_GRACE_S", "1")
    with (
        # What a killed agent leaves behind is in there.
        tempfile.TemporaryDirectory(prefix="dg-", dir="/tmp") as sockets,
        daemons(2, env={"DANAUS_SOCKET_DIR": sockets}) as found,
    ):
        hosts = attach_to_hosts(found.addresses, key=found.key)
        actors: Any = hosts.spawn_procs(name="crew", preload=("torch",)).spawn("crew", Member)
        assert do(actors, total) == [2.0, 2.0]
        call = actors.do.options(timeout=LIMIT_S).call(spin)
        agent = agent_of(found.processes[1].pid)
        for pid in (found.processes[1].pid, agent):
            os.kill(pid, signal.SIGKILL)

        with pytest.raises(SupervisionError) as caught:
            call.get()

        assert (caught.value.failure.kind, caught.value.failure.rank) == (FailureKind.HOST_LOST, 1)
        danaus.shutdown_context().get()


def spin() -> None:
    while True:
        total()
