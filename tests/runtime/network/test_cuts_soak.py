"""Cuts between hosts in network namespaces, for minutes: a hundred thousand messages, each once and in order."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

from danaus import attach_to_hosts

from .namespaces import Network, missing
from .traffic import Job, daemons_on, kill_soon, pause, traffic_on

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

if lacking := missing():
    pytest.skip(lacking, allow_module_level=True)

pytestmark = [pytest.mark.root, pytest.mark.soak, pytest.mark.timeout(900)]

NUM_HOSTS = 3
NUM_MESSAGES = 100_000


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(NUM_HOSTS) as made:
        yield made


@pytest.fixture
def chain(network: Network, tmp_path: Path) -> Iterator[Job]:
    """Each host is reached through the one before; a host may be out of reach for long."""
    with daemons_on(network, tmp_path, grace_s=60.0, fan_out=1) as made:
        yield made


def cut_at_random(network: Network, over_s: float, longest_s: float) -> None:
    """Break something again and again."""
    chance = random.Random(int(os.environ.get("DANAUS_CHAOS_SEED", "1")))
    end_s = time.monotonic() + over_s
    while time.monotonic() < end_s:
        host = chance.choice(network.hosts)
        kind = chance.choice(("cut", "drop", "back", "kill", "lose"))
        if kind == "cut":
            network.cut(host)
        elif kind == "drop":
            network.drop(chance.choice([network.here, *(each for each in network.hosts if each != host)]), host)
        elif kind == "back":
            network.drop(host, network.here)
        elif kind == "kill":
            network.kill_connections(host)
        else:
            network.lose(host, 0.05)
        pause(chance.choice((0.1, 1.0, longest_s)))
        network.heal()
        pause(chance.choice((0.1, 1.0)))


@pytest.mark.parametrize("cut_s", [0.1, 1.0, 20.0])
def test_hundred_thousand_messages_over_cuts(chain: Job, cut_s: float) -> None:
    def cut_again_and_again() -> None:
        for step in range(9):
            chain.network.cut(chain.network.hosts[step % NUM_HOSTS])
            pause(cut_s)
            chain.network.heal()
            pause(1.0)

    with traffic_on(attach_to_hosts(chain.addresses, key=chain.key), range(NUM_HOSTS)) as traffic:
        traffic.run(NUM_MESSAGES // (NUM_HOSTS * (NUM_HOSTS + 1)), 9 * (cut_s + 1.0), cut_again_and_again)


def test_minutes_of_random_faults(chain: Job) -> None:
    over_s = 60 * float(os.environ.get("DANAUS_CHAOS_MINUTES", "3"))
    with traffic_on(attach_to_hosts(chain.addresses, key=chain.key), range(NUM_HOSTS)) as traffic:
        traffic.run(int(200 * over_s), over_s, lambda: cut_at_random(chain.network, over_s, 20.0))


@pytest.mark.parametrize(("victim", "others"), [(0, [1, 2]), (2, [0, 1])], ids=["inner", "end"])
def test_hundred_thousand_messages_over_the_death_of_an_agent(chain: Job, victim: int, others: list[int]) -> None:
    with traffic_on(attach_to_hosts(chain.addresses, key=chain.key), others) as traffic:
        traffic.run(NUM_MESSAGES // (2 * 3), 20.0, kill_soon(chain.agent(victim)))
