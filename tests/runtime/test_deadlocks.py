"""Actors that wait for each other in a circle: one call fails with the circle written out, and everyone lives on.

Where nobody waits in a circle, nobody hears anything, however long, wide or tangled the calls are.
"""

# Endpoints here take and return anything.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import (
    Accumulator,
    Actor,
    ActorError,
    Channel,
    DeadlockError,
    Port,
    ProcMesh,
    ValueMesh,
    concurrent_endpoint,
    context,
    current_rank,
    endpoint,
    this_host,
    this_proc,
)
from danaus.runtime.context import local_proc

if TYPE_CHECKING:
    from collections.abc import Iterator

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 10
"""Far more than anything here takes, and less than for ever."""
LONG_S = 0.8
"""Long enough for waits to be noted, searched from twice and, if they lay on a cycle, failed."""

HOLD, AWAIT, CONCURRENT = "hold", "hold_async", "hold_concurrently"


class Member(Actor):
    """Calls the actors that it is told to, one after the other down a route of (member, endpoint)."""

    def __init__(self) -> None:
        self.peers: dict[str, Any] = {}

    @endpoint
    def meet(self, peers: dict[str, Any]) -> None:
        self.peers = peers

    @endpoint
    def value(self) -> int:
        return current_rank().rank

    def _call(self, route: list[tuple[str, str]]) -> Any:
        (name, how), *rest = route
        return getattr(self.peers[name], how).call(rest)

    @endpoint
    def hold(self, route: list[tuple[str, str]]) -> int:
        """The number of calls down the route."""
        return 1 + next(iter(self._call(route).get().values())) if route else 0

    @endpoint
    async def hold_async(self, route: list[tuple[str, str]]) -> int:
        return 1 + next(iter((await self._call(route)).values())) if route else 0

    @concurrent_endpoint
    async def hold_concurrently(self, route: list[tuple[str, str]]) -> int:
        return 1 + next(iter((await self._call(route)).values())) if route else 0

    @endpoint
    def hold_streaming(self, route: list[tuple[str, str]]) -> int:
        (name, how), *rest = route
        return 1 + max(future.get() for future in getattr(self.peers[name], how).stream(rest))

    @endpoint
    def hold_folding(self, route: list[tuple[str, str]]) -> int:
        (name, how), *rest = route
        return 1 + Accumulator(getattr(self.peers[name], how), 0, max).accumulate(rest).get()

    @endpoint
    def hold_items(self, route: list[tuple[str, str]]) -> int:
        (name, _), *rest = route
        return 1 + sum(self.peers[name].items.call_one(rest))

    @endpoint
    async def hold_items_async(self, route: list[tuple[str, str]]) -> int:
        (name, _), *rest = route
        return 1 + sum([item async for item in self.peers[name].items.call_one(rest)])

    @endpoint
    def items(self, route: list[tuple[str, str]]) -> Iterator[int]:
        yield 1
        yield next(iter(self._call(route).get().values())) if route else 0

    @endpoint
    def hold_briefly(self, route: list[tuple[str, str]]) -> str:
        """Wait with a limit of its own, then answer."""
        try:
            return str(self._call(route).get(timeout=0.3))
        except TimeoutError:
            return "gave up"

    @endpoint
    def flood(self, name: str, count: int, note: str) -> int:
        """Send more than a mailbox holds to an actor that waits for this one."""
        for number in range(count):
            self.peers[name].take.broadcast(number)
        return len(note)

    @endpoint
    def take(self, number: int) -> None:
        self.taken = getattr(self, "taken", 0) + 1

    @endpoint
    def num_taken(self) -> int:
        return getattr(self, "taken", 0)

    @endpoint
    def ask_for_flood(self, name: str, count: int) -> int:
        return self.peers[name].flood.call_one(context().actor_instance.name, count, "note").get()

    @endpoint
    def sleep(self, seconds: float) -> int:
        threading.Event().wait(seconds)
        return 0

    @concurrent_endpoint
    async def sleep_beside(self, port: Port[None], seconds: float) -> int:
        port.send(None)
        await asyncio.sleep(seconds)
        return 7

    @endpoint
    def await_beside(self, name: str, port: Port[None], seconds: float) -> int:
        return self.peers[name].sleep_beside.call_one(port, seconds).get()

    @endpoint
    async def gather_from(self, names: list[str], seconds: float) -> int:
        calls = [self.peers[name].sleep.call(seconds) for name in names]
        done, _ = await asyncio.wait([call.as_asyncio() for call in calls])
        values: list[ValueMesh[int]] = list(await asyncio.gather(*calls))
        return len(done) + len(values)

    @endpoint
    async def call_beside(self, route: list[tuple[str, str]], seconds: float) -> int:
        """How many of one call have answered in time, while something else is waited for."""
        done, _ = await asyncio.wait([self._call(route).as_asyncio()], timeout=seconds)
        return len(done)

    @endpoint
    def first_of(self, name: str, route: list[tuple[str, str]], seconds: float) -> int:
        return next(self.peers[name].call_or_sleep.stream(route, seconds)).get()

    @endpoint
    def call_or_sleep(self, route: list[tuple[str, str]], seconds: float) -> int:
        """Rank 0 calls, the others take their time."""
        if current_rank().rank == 0:
            return self.hold_now(route)
        threading.Event().wait(seconds)
        return 7

    def hold_now(self, route: list[tuple[str, str]]) -> int:
        return next(iter(self._call(route).get().values()))

    @endpoint(explicit_response_port=True)
    def answer_elsewhere(self, port: Port[int], name: str, seconds: float) -> None:
        """Have another thread answer, and call the caller meanwhile."""

        def answer() -> None:
            threading.Event().wait(seconds)
            port.send(7)

        threading.Thread(target=answer).start()
        self.peers[name].value.call_one().get()

    @endpoint
    def ask_for_answer_elsewhere(self, name: str, me: str, seconds: float) -> int:
        return self.peers[name].answer_elsewhere.call_one(me, seconds).get()

    @endpoint
    def fan_out(self, names: list[str], seconds: float) -> int:
        calls = [self.peers[name].sleep.call(seconds) for name in names]
        return len([call.get() for call in calls])

    @endpoint
    def counts(self) -> tuple[int, int]:
        """Probes sent, and waits failed, by this actor's process."""
        return local_proc().waits.num_probes, local_proc().waits.num_broken


class CallsBackAtStart(Actor):
    def __init__(self, owner: Any) -> None:
        self.value = owner.value.call_one().get()

    @endpoint
    def ready(self) -> int:
        return self.value


class Owner(Actor):
    @endpoint
    def value(self) -> int:
        return 3

    @endpoint
    def spawn_one_that_calls_back(self, me: Any) -> int:
        mesh = this_proc().spawn("child", CallsBackAtStart, me)
        try:
            mesh.initialized.get()
            return mesh.ready.call_one().get()
        finally:
            mesh.stop().exception()


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"rank": 3}, name="circle") as mesh:
        yield mesh


def meet(where: list[tuple[str, Any]], *, mailbox: int | None = None) -> dict[str, Any]:
    """Spawn one mesh of members per name, which all know all."""
    options = {} if mailbox is None else {"mailbox": mailbox}
    members = {name: place.spawn(name, Member, **options) for name, place in where}
    for mesh in members.values():
        mesh.meet.call(members).get(timeout=LIMIT_S)
    return members


def apart(procs: ProcMesh, names: str) -> dict[str, Any]:
    return meet([(name, procs.slice(rank=rank)) for rank, name in enumerate(names)])


def together(procs: ProcMesh, names: str) -> dict[str, Any]:
    return meet([(name, procs.slice(rank=0)) for name in names])


def deadlock_of(future: Any) -> DeadlockError:
    """The DeadlockError at the root of what a call fails with."""
    error: BaseException | None = future.exception(timeout=LIMIT_S)
    while isinstance(error, ActorError):
        error = error.exception
    assert isinstance(error, DeadlockError), error
    return error


def waiters(error: DeadlockError) -> list[str]:
    """Who waits, from the first by name on: which wait is the youngest is decided by fractions of a millisecond."""
    names = [wait.who for wait in error.cycle]
    first = names.index(min(names))
    return [*names[first:], *names[:first]]


def num_broken(members: dict[str, Any]) -> int:
    return sum(broken for mesh in members.values() for _, broken in mesh.counts.call().get(timeout=LIMIT_S).values())


@pytest.mark.parametrize("place", [apart, together])
@pytest.mark.parametrize("how", [HOLD, AWAIT, "hold_streaming"])
def test_a_ring_of_calls_fails_with_every_edge_written_out(procs: ProcMesh, place: Any, how: str) -> None:
    members = place(procs, "abc")

    error = deadlock_of(getattr(members["a"], how).call_one([("b", how), ("c", how), ("a", how), ("b", how)]))

    assert waiters(error) == ["a rank 0", "b rank 0", "c rank 0"]
    for name, following in zip("abc", "bca", strict=True):
        [pid] = {wait.pid for wait in error.cycle if wait.who == f"{name} rank 0"}
        told = (
            f"{name} rank 0 in {how} (host {error.cycle[0].host}, pid {pid}) waits for {following}.{how} on {following}"
        )
        assert told in str(error)
    assert "concurrent_endpoint" in str(error)


def test_the_ring_fails_soon_and_its_actors_live_on(procs: ProcMesh) -> None:
    members = apart(procs, "abc")
    began_s = time.monotonic()

    deadlock_of(members["a"].hold.call_one([(name, HOLD) for name in "bcab"]))

    # 0.36 s where nothing else runs.
    assert time.monotonic() - began_s < 2.0
    assert [members[name].value.call_one().get(timeout=LIMIT_S) for name in "abc"] == [0, 0, 0]
    assert members["a"].hold.call_one([("b", HOLD), ("c", HOLD)]).get(timeout=LIMIT_S) == 2


def test_of_two_actors_that_call_each_other_the_youngest_call_fails(procs: ProcMesh) -> None:
    members = apart(procs, "ab")

    error = deadlock_of(members["a"].hold.call_one([("b", HOLD), ("a", HOLD)]))

    assert sorted((wait.who, wait.awaited) for wait in error.cycle) == [("a rank 0", "b.hold"), ("b rank 0", "a.hold")]
    assert error.endpoint == error.cycle[-1].awaited


@pytest.mark.parametrize("how", [HOLD, AWAIT])
def test_an_actor_that_calls_itself_waits_for_ever_and_is_told(procs: ProcMesh, how: str) -> None:
    members = together(procs, "a")

    error = deadlock_of(getattr(members["a"], how).call_one([("a", how)]))

    assert [wait.who for wait in error.cycle] == ["a rank 0"]
    assert members["a"].value.call_one().get(timeout=LIMIT_S) == 0


def test_a_call_to_a_mesh_that_the_caller_belongs_to_is_told_which_rank(procs: ProcMesh) -> None:
    members = meet([("all", procs)])

    error = deadlock_of(members["all"].slice(rank=1).hold.call_one([("all", HOLD)]))

    assert [wait.who for wait in error.cycle] == ["all rank 1"]
    assert list(members["all"].value.call().get(timeout=LIMIT_S)) == [0, 1, 2]


def test_sync_and_async_endpoints_share_a_circle_with_actors_of_the_controllers_process(procs: ProcMesh) -> None:
    members = meet([("a", procs.slice(rank=0)), ("b", this_proc()), ("c", procs.slice(rank=1))])

    error = deadlock_of(members["a"].hold.call_one([("b", AWAIT), ("c", HOLD), ("a", AWAIT)]))

    assert waiters(error) == ["a rank 0", "b rank 0", "c rank 0"]
    assert {wait.who[0]: wait.endpoint for wait in error.cycle} == {"a": HOLD, "b": AWAIT, "c": HOLD}
    assert [wait.pid == os.getpid() for wait in error.cycle if wait.who == "b rank 0"] == [True]
    for mesh in members.values():
        mesh.stop().get(timeout=LIMIT_S)


def test_who_folds_what_arrives_waits_for_the_last_of_it(procs: ProcMesh) -> None:
    members = apart(procs, "ab")

    error = deadlock_of(members["a"].hold_folding.call_one([("b", HOLD), ("a", HOLD)]))

    assert waiters(error) == ["a rank 0", "b rank 0"]
    assert members["a"].hold_folding.call_one([("b", HOLD)]).get(timeout=LIMIT_S) == 1


@pytest.mark.parametrize("how", ["hold_items", "hold_items_async"])
def test_who_iterates_over_a_generator_waits_for_its_actor(procs: ProcMesh, how: str) -> None:
    members = apart(procs, "ab")

    error = deadlock_of(getattr(members["a"], how).call_one([("b", ""), ("a", HOLD)]))

    # Which of them is younger is decided by the way of the first item.
    assert {wait.awaited for wait in error.cycle} == {"an item of b.items", "a.hold"}
    assert getattr(members["a"], how).call_one([("b", "")]).get(timeout=LIMIT_S) == 2


def test_an_actor_that_is_called_back_while_it_waits_for_the_start_of_another(procs: ProcMesh) -> None:
    owner = procs.slice(rank=0).spawn("owner", Owner)

    future = owner.spawn_one_that_calls_back.call_one(owner)

    error: Any = future.exception(timeout=LIMIT_S)
    assert "child rank 0 in __init__" in error.exception.failure.traceback
    assert owner.value.call_one().get(timeout=LIMIT_S) == 3


def test_two_circles_at_once_are_both_ended(procs: ProcMesh) -> None:
    first, second = apart(procs, "ab"), apart(procs, "ab")

    futures = [members["a"].hold.call_one([("b", HOLD), ("a", HOLD)]) for members in (first, second)]

    assert [len(deadlock_of(future).cycle) for future in futures] == [2, 2]


def test_a_mailbox_gives_way_where_its_sender_and_its_receiver_wait_for_each_other(procs: ProcMesh) -> None:
    members = meet([(name, procs.slice(rank=rank)) for rank, name in enumerate("ab")], mailbox=2)
    before = num_broken(members)

    assert members["a"].ask_for_flood.call_one("b", 12).get(timeout=LIMIT_S) == 4

    assert members["a"].num_taken.call_one().get(timeout=LIMIT_S) == 12
    assert num_broken(members) == before


# No circle:


def test_a_concurrent_endpoint_in_the_ring_waits_without_holding_its_actor(procs: ProcMesh) -> None:
    members = apart(procs, "abc")
    before = num_broken(members)
    route = [("b", HOLD), ("c", AWAIT), ("a", CONCURRENT), ("d", "slow")]

    members["d"] = procs.slice(rank=2).spawn("d", Slow)
    for name in "abc":
        members[name].meet.call_one(members).get(timeout=LIMIT_S)

    assert members["a"].hold_concurrently.call_one(route).get(timeout=LIMIT_S) == 4
    del members["d"]
    assert num_broken(members) == before


class Slow(Actor):
    @endpoint
    def slow(self, _route: list[tuple[str, str]]) -> int:
        threading.Event().wait(LONG_S)
        return 0


def test_a_call_that_runs_beside_the_endpoint_that_waits_is_no_edge(procs: ProcMesh) -> None:
    """A waits for an endpoint of B that overlaps; B's slot waits for A meanwhile, and gets its turn after."""
    members = apart(procs, "ab")
    before = num_broken(members)
    began, receiver = Channel[None].open()

    first = members["a"].await_beside.call_one("b", began, LONG_S)
    receiver.recv().get(timeout=LIMIT_S)
    second = members["b"].hold_async.call_one([("a", HOLD)])

    assert (first.get(timeout=LIMIT_S), second.get(timeout=LIMIT_S)) == (7, 1)
    assert num_broken(members) == before


def test_chains_fans_and_gathers_that_take_long_give_no_alarm(procs: ProcMesh) -> None:
    members = apart(procs, "abc")
    members["d"] = procs.spawn("d", Member)
    for name in "abc":
        members[name].meet.call_one(members).get(timeout=LIMIT_S)
    before = num_broken(members)

    answers = [
        members["a"].fan_out.call_one(["b", "c", "d"], LONG_S),
        members["b"].fan_out.call_one(["c", "d"], LONG_S / 2),
        members["a"].gather_from.call_one(["b", "c", "d"], LONG_S / 4),
    ]

    assert [answer.get(timeout=LIMIT_S) for answer in answers] == [3, 2, 6]
    assert num_broken(members) == before


def test_a_task_beside_the_endpoint_may_wait_in_a_circle_that_ends_with_the_endpoint(procs: ProcMesh) -> None:
    members = apart(procs, "ab")
    before = num_broken(members)

    assert members["a"].call_beside.call_one([("b", HOLD), ("a", HOLD)], LONG_S).get(timeout=LIMIT_S) == 0
    assert num_broken(members) == before


def test_a_call_that_somebody_else_may_answer_is_no_edge(procs: ProcMesh) -> None:
    members = apart(procs, "ab")
    before = num_broken(members)

    assert members["a"].ask_for_answer_elsewhere.call_one("b", "a", LONG_S).get(timeout=LIMIT_S) == 7
    assert num_broken(members) == before


def test_who_waits_for_any_of_several_is_in_no_circle_with_one(procs: ProcMesh) -> None:
    members = meet([("a", procs.slice(rank=0)), ("both", procs.slice(rank=slice(1, 3)))])
    before = num_broken(members)

    assert members["a"].first_of.call_one("both", [("a", HOLD)], LONG_S).get(timeout=LIMIT_S) == 7
    assert num_broken(members) == before


def test_a_wait_that_gives_up_by_itself_in_time_is_left_alone(procs: ProcMesh) -> None:
    members = apart(procs, "ab")

    answer = members["a"].hold_briefly.call_one([("b", HOLD), ("a", HOLD)])

    assert answer.get(timeout=LIMIT_S) == "gave up"
