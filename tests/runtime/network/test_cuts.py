"""Hosts in network namespaces, and cuts between them: messages are late, and none is lost, doubled or overtaken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from danaus import FailureKind, SupervisionError, attach_to_hosts

from .namespaces import Network, missing
from .traffic import LIMIT_S, Job, Traffic, daemons_on, kill_soon, pause, traffic_on

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from danaus import HostMesh

if lacking := missing():
    pytest.skip(lacking, allow_module_level=True)

pytestmark = [pytest.mark.root, pytest.mark.timeout(90)]

NUM_HOSTS = 3
LATE_S = 5.0
"""How long after a cut everything may take to arrive."""

GRACE_S = 3.0
ORPHANED_S = 5.0
SLOW_S = 3.0
"""What a machine that does much else may add."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(NUM_HOSTS) as made:
        yield made


@pytest.fixture(scope="module")
def job(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A tree of two levels: the third host is reached through the first."""
    with daemons_on(network, tmp_path_factory.mktemp("job"), grace_s=10.0, fan_out=2) as made:
        yield made


@pytest.fixture(scope="module")
def hosts(job: Job) -> HostMesh:
    return attach_to_hosts(job.addresses, key=job.key)


@pytest.fixture
def traffic(hosts: HostMesh, network: Network) -> Iterator[Traffic]:
    with traffic_on(hosts, range(NUM_HOSTS)) as made:
        yield made
        # Before the ranks are told to end.
        network.heal()


@pytest.mark.slow
@pytest.mark.parametrize(("index", "cut_s"), [(0, 0.1), (2, 1.0), (0, 4.0)])
def test_unplugged_host_loses_nothing(traffic: Traffic, network: Network, index: int, cut_s: float) -> None:
    def cut_and_heal() -> None:
        pause(0.2)
        network.cut(network.hosts[index])
        pause(cut_s)
        network.heal()

    assert traffic.run(1000, cut_s + 0.5, cut_and_heal) < LATE_S


@pytest.mark.parametrize("is_from_root", [False, True])
def test_drop_in_one_direction_loses_nothing(traffic: Traffic, network: Network, is_from_root: bool) -> None:
    def drop_and_heal() -> None:
        pause(0.2)
        ends = (network.here, network.hosts[0])
        network.drop(*(ends if is_from_root else ends[::-1]))
        pause(2.0)
        network.heal()

    assert traffic.run(1000, 2.5, drop_and_heal) < LATE_S


def test_killed_connections_lose_nothing(traffic: Traffic, network: Network) -> None:
    def kill_again_and_again() -> None:
        for step in range(12):
            network.kill_connections(network.hosts[step % NUM_HOSTS])
            pause(0.15)

    assert traffic.run(2000, 2.0, kill_again_and_again) < LATE_S


def test_packets_lost_at_random_lose_nothing(traffic: Traffic, network: Network) -> None:
    def lose_some() -> None:
        for host in network.hosts:
            network.lose(host, 0.02)
        pause(2.0)
        network.heal()

    assert traffic.run(1000, 2.0, lose_some) < LATE_S


def test_stopped_agent_loses_nothing(traffic: Traffic, job: Job) -> None:
    def stop_and_continue() -> None:
        pause(0.2)
        os.kill(job.agent(0), signal.SIGSTOP)
        pause(2.0)
        os.kill(job.agent(0), signal.SIGCONT)

    assert traffic.run(1000, 2.5, stop_and_continue) < LATE_S


def test_call_made_during_a_cut_is_answered_after_it(traffic: Traffic, network: Network) -> None:
    network.cut(network.hosts[2])
    calls = [traffic.receivers.slice(hosts=2).echo.call_one(number) for number in range(100)]
    pause(0.5)
    assert not any(call.done() for call in calls)
    assert traffic.receivers.slice(hosts=1).echo.call_one("other").get(timeout=LATE_S) == "other"
    network.heal()
    assert [call.get(timeout=LATE_S) for call in calls] == list(range(100))


@pytest.fixture
def chain(network: Network, tmp_path: Path) -> Iterator[Job]:
    """Each host is reached through the one before; a host is lost soon."""
    with daemons_on(network, tmp_path, grace_s=GRACE_S, fan_out=1) as made:
        yield made


def test_death_of_an_inner_agent_loses_nothing_between_the_others(chain: Job) -> None:
    hosts = attach_to_hosts(chain.addresses, key=chain.key)
    with traffic_on(hosts, [1, 2]) as traffic:
        waiting = traffic.receivers.slice(hosts=0).wait_for_ever.call_one()
        assert traffic.run(2000, 1.5, kill_soon(chain.agent(0))) < LATE_S
        with pytest.raises(SupervisionError) as caught:
            waiting.get(timeout=LATE_S)
        assert caught.value.failure.kind is FailureKind.HOST_LOST
        assert caught.value.failure.host == "ns0"


def test_death_of_an_end_agent_disturbs_nobody_else(chain: Job) -> None:
    hosts = attach_to_hosts(chain.addresses, key=chain.key)
    with traffic_on(hosts, [0, 1]) as traffic:
        waiting = traffic.receivers.slice(hosts=2).wait_for_ever.call_one()
        assert traffic.run(2000, 1.5, kill_soon(chain.agent(2))) < LATE_S
        with pytest.raises(SupervisionError) as caught:
            waiting.get(timeout=LATE_S)
        assert caught.value.failure.host == "ns2"


@pytest.mark.slow
def test_host_out_of_reach_is_lost_after_the_grace_period_with_those_behind_it_in_reach(chain: Job) -> None:
    hosts = attach_to_hosts(chain.addresses, key=chain.key)
    with traffic_on(hosts, [1, 2]) as traffic:
        waiting = traffic.receivers.slice(hosts=0).wait_for_ever.call_one()
        began_s = time.monotonic()
        chain.network.cut(chain.network.hosts[0])
        with pytest.raises(SupervisionError) as caught:
            waiting.get(timeout=LIMIT_S)
        assert GRACE_S - 0.5 < time.monotonic() - began_s < GRACE_S + LATE_S
        assert caught.value.failure.kind is FailureKind.HOST_LOST
        traffic.run(100, 0.1, lambda: None)


CONTROLLER = """
import os, sys, threading
import danaus

class Worker(danaus.Actor):
    @danaus.endpoint
    def pid(self):
        return os.getpid()

hosts = danaus.attach_to_hosts(sys.argv[2:], key=sys.argv[1])
print(*hosts.spawn_procs().spawn("workers", Worker).pid.call().get(timeout=60).values(), flush=True)
threading.Event().wait()
"""


@pytest.mark.slow
def test_controller_killed_during_a_cut_leaves_nothing_on_either_side(chain: Job) -> None:
    words = [sys.executable, "-c", CONTROLLER, chain.key, *chain.addresses]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as controller:
        assert controller.stdout is not None
        pids = [int(text) for text in controller.stdout.readline().split()]
        assert len(pids) == NUM_HOSTS
        in_reach = [*pids[:2], chain.agent(0), chain.agent(1)]
        cut_off = [pids[2], chain.agent(2)]
        chain.network.cut(chain.network.hosts[2])
        controller.kill()
    assert wait_ended(in_reach, 2.0 + SLOW_S) == []
    assert wait_ended(cut_off, GRACE_S + ORPHANED_S + SLOW_S) == []
    chain.network.heal()
    assert all(process.poll() is None for process in chain.processes), "the daemons wait for the next controller"
    hosts = attach_to_hosts(chain.addresses, key=chain.key)
    with traffic_on(hosts, range(NUM_HOSTS)) as traffic:
        traffic.run(10, 0.0, lambda: None)


def wait_ended(pids: list[int], limit_s: float) -> list[int]:
    """Wait until these processes are gone; return those that are not."""
    end_s = time.monotonic() + limit_s
    while (left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < end_s:
        time.sleep(0.02)
    return left
