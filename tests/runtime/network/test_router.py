"""Routers over a simulated network: whatever is cut, lost or killed, each message arrives once and in order."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.network.packets import PART_BYTES

from .simulated import Simulation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Shared machines are slow at times.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def make() -> Iterator[Callable[..., Simulation]]:
    """Make a simulation; several in one test each patch the clock."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda num_hosts, *, fan_out, seed=0: Simulation(patch, num_hosts, fan_out=fan_out, seed=seed)


def num_resent(job: Simulation) -> int:
    return sum(outbox.num_resent for agent in job.all_agents for outbox in agent.router._outboxes.values())


def test_every_host_reaches_every_other_and_nothing_is_sent_twice(make: Callable[..., Simulation]) -> None:
    job = make(12, fan_out=3)
    for agent in job.all_agents:
        for slot in range(12):
            agent.send([slot], 10)
    assert job.wait_delivered(5.0) < 0.1
    job.run(10.0)
    assert num_resent(job) == 0
    assert all(agent.router.is_idle for agent in job.all_agents)


def test_cast_passes_each_link_once(make: Callable[..., Simulation]) -> None:
    job = make(13, fan_out=3)
    job.run(0.5)
    before = {id(link): link for link in job.open_links()}
    sent = list[bytes]()
    transmit = job.transmit
    job.transmit = lambda link, source, frames: (  # pyright: ignore[reportAttributeAccessIssue]
        sent.append(frames[-1]) if len(frames[-1]) > 5000 else None,
        transmit(link, source, frames),
    )
    job.agents[0].send(range(1, 13), 6000)
    job.wait_delivered(5.0)
    assert len(sent) == len(before) == 12


def test_casts_and_single_messages_of_one_sender_keep_their_order(make: Callable[..., Simulation]) -> None:
    job = make(9, fan_out=2)
    for step in range(300):
        job.agents[4].send(range(9) if step % 3 else [7], 100)
    job.wait_delivered(5.0)
    assert job.agents[7].received[4, 0] == list(range(1, 301))


def test_answers_to_calls_of_many_arrive_once(make: Callable[..., Simulation]) -> None:
    job = make(13, fan_out=3)
    for _ in range(50):
        job.agents[2].send(range(13), 100, is_answered=True)
        job.agents[7].send(range(13), 100, is_answered=True)
        for agent in job.living():
            agent.send([2], 10)
        job.run(0.001)
    job.wait_delivered(5.0)
    assert sorted(job.agents[2].answers[9, 0]) == list(range(1, 51))
    assert num_resent(job) == 0


def test_window_that_is_full_delays_and_loses_nothing(make: Callable[..., Simulation]) -> None:
    job = make(4, fan_out=1)
    for _ in range(10_000):
        job.agents[0].send([3], 10)
    for _ in range(20):
        job.agents[3].send([0], PART_BYTES - 1000)
    job.wait_delivered(5.0)
    assert num_resent(job) == 0


def test_message_that_is_too_large_for_a_frame_goes_in_pieces(make: Callable[..., Simulation]) -> None:
    job = make(5, fan_out=1)
    job.agents[0].send([4], 3 * PART_BYTES + 17)
    job.agents[0].send([1, 2, 4], 2 * PART_BYTES)
    job.agents[0].send([4], 1)
    job.wait_delivered(10.0)
    assert job.agents[4].received[0, 0] == [1, 2, 3]


@pytest.mark.parametrize("cut_s", [0.1, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("is_lost", [False, True])
def test_cut_link_delays_and_loses_nothing(make: Callable[..., Simulation], cut_s: float, is_lost: bool) -> None:
    job = make(6, fan_out=2)
    link = next(link for link in job.open_links() if link.ends == ((0, 0), (1, 0)))
    job.at(0.05, lambda: job.cut(link))
    job.at(0.05 + cut_s, lambda: job.heal(link, is_lost=is_lost))
    for _ in range(200):
        for agent in job.all_agents:
            agent.send([job.random.randrange(6)], 1000)
        job.run((cut_s + 0.1) / 200)
    assert job.wait_delivered(10.0) < 3.0


def test_death_of_an_inner_agent_loses_nothing_between_the_others(make: Callable[..., Simulation]) -> None:
    job = make(13, fan_out=3)
    for step in range(200):
        for agent in job.living():
            agent.send([job.random.randrange(13)], 1000)
        if step == 50:
            job.kill(1)
        if step == 100:
            job.lose(1)
        job.run(0.01)
    assert job.wait_delivered(10.0) < 3.0
    assert all(agent.losses == [1] for agent in job.living())


def test_replaced_host_starts_anew(make: Callable[..., Simulation]) -> None:
    job = make(7, fan_out=2)
    for _ in range(5):
        job.agents[3].send([1], 10)
        job.agents[5].send([1], 10)
    job.kill(1)
    job.lose(1, may_return=True)
    job.run(1.0)
    job.replace(1)
    job.run(1.0)
    for _ in range(7):
        job.agents[3].send([1], 10)
        job.agents[1].send([3], 10)
    job.wait_delivered(10.0)
    assert job.agents[1].received[3, 0] == list(range(1, 8))


def test_late_packets_of_an_agent_are_not_taken_for_its_successors(make: Callable[..., Simulation]) -> None:
    job = make(4, fan_out=1)
    link = next(link for link in job.open_links() if link.ends == ((0, 0), (1, 0)))
    link.cut = {(1, 0)}
    job.agents[3].send([0], 10)
    job.run(0.1)
    job.kill(3)
    job.lose(3, may_return=True)
    job.replace(3)
    job.run(0.1)
    job.heal(link, is_lost=False)
    job.run(0.1)
    assert not job.agents[0].received
    job.agents[3].send([0], 10)
    job.wait_delivered(5.0)
    assert job.agents[0].received == {(3, 1): [1]}


def test_host_that_is_lost_though_it_lives_disturbs_nobody(make: Callable[..., Simulation]) -> None:
    job = make(7, fan_out=2)
    cut = [link for link in job.open_links() if (1, 0) in link.ends]
    for link in cut:
        job.cut(link)
    job.run(0.2)
    job.lose(1)
    for _ in range(50):
        for agent in job.living():
            agent.send([job.random.randrange(7)], 100)
        job.run(0.05)
    for link in cut:
        job.heal(link, is_lost=False)
    job.run(1.0)
    job.wait_delivered(10.0)
    assert not any(len(agent.received[1, 0]) for agent in job.living() if agent.end != (1, 0))


def storm(job: Simulation, *, num_steps: int = 150, passed_s: float = 0.05) -> None:
    """Everybody sends while links are cut and hosts die and return, one after the other and at once."""
    num_hosts, chance = len(job.agents), job.random
    dead: dict[int, bool] = {}
    for _ in range(num_steps):
        for agent in job.living():
            slots = chance.sample(range(num_hosts), chance.choice((1, 1, 1, num_hosts // 2)))
            for _ in range(chance.choice((0, 1, 5))):
                agent.send(slots, chance.choice((10, 1000, 50_000)), is_answered=chance.random() < 0.5)
        links = [link for link in job.open_links() if not link.cut]
        fault = chance.random()
        if fault < 0.1 and links:
            link, is_lost = chance.choice(links), chance.random() < 0.5
            job.cut(link, one_way=chance.random() < 0.3)
            job.at(
                chance.choice((0.05, 0.5, 2.0, 8.0)), lambda link=link, is_lost=is_lost: job.heal(link, is_lost=is_lost)
            )
        elif fault < 0.14 and links:
            job.reset(chance.choice(links))
        elif fault < 0.16 and len(dead) < num_hosts // 2:
            slot = chance.choice([slot for slot in range(1, num_hosts) if slot not in dead])
            may_return = dead[slot] = chance.random() < 0.5
            job.kill(slot)
            job.at(chance.choice((0.001, 0.3, 3.0)), lambda slot=slot, back=may_return: job.lose(slot, may_return=back))
        elif fault < 0.18:
            back = [slot for slot, may_return in dead.items() if may_return and slot in job.lost]
            if back:
                job.replace(back[0])
                del dead[back[0]]
        job.run(passed_s)
        job.check_order()
    for link in job.links:
        job.heal(link, is_lost=False)
    job.run(3.5)
    job.wait_delivered(30.0)
    assert all(agent.router.is_idle for agent in job.living() if agent.end[0] not in job.lost)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_each_message_arrives_once_and_in_order(make: Callable[..., Simulation], seed: int) -> None:
    storm(make(5 + seed, fan_out=1 + seed % 4, seed=seed), num_steps=80)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_storms_for_minutes(make: Callable[..., Simulation]) -> None:
    end_s = time.monotonic() + 60 * float(os.environ.get("DANAUS_CHAOS_MINUTES", "3"))
    seed = int(os.environ.get("DANAUS_CHAOS_SEED", "1000"))
    while time.monotonic() < end_s:
        print(f"seed {seed}", flush=True)
        storm(make(4 + seed % 13, fan_out=1 + seed % 5, seed=seed))
        seed += 1
