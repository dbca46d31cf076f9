"""Which actors wait in a circle: found, confirmed, ended at the youngest wait, and never seen where there is none."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.supervision import waits
from danaus.runtime.supervision.waits import Break, ConfirmLater, Edge, Overdraft, Probe, SendProbe, Wait, Waiting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
GRAPHS = st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, 7), max_size=4), max_size=8)
"""Who waits for whom; who is no key waits for nobody."""


def waiting(name: int, targets: Sequence[int], *, since_s: float | None = None, for_room: bool = False) -> Waiting:
    began_s = float(name) if since_s is None else since_s
    wait = Wait(f"p.{name}", "a", 1, began_s, f"a rank {name}", "step", "h", 10 + name, "a.step", for_room)
    return Waiting(wait, tuple(Edge(f"p.{target}", "a", 5) for target in targets))


@dataclass
class Net:
    """Delivers probes one at a time, in any order, to those that wait; carries out nothing else."""

    waiting: dict[str, Waiting]
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    num_sent: int = 0

    @staticmethod
    def of(graph: Mapping[int, Sequence[int]], *, rooms: Sequence[int] = ()) -> Net:
        return Net({f"p.{n}": waiting(n, sorted(targets), for_room=n in rooms) for n, targets in graph.items()})

    def search(self, number: int = 1) -> list[object]:
        """All that wait for an answer search at once."""
        starts = [each for each in self.waiting.values() if not each.wait.is_for_room]
        return self.deliver([send for each in starts for send in waits.search(each, number)])

    def confirm(self, cycle: tuple[Wait, ...]) -> list[object]:
        first = self.waiting.get(cycle[0].proc)
        return [] if first is None else self.deliver(waits.confirm(first, cycle))

    def deliver(self, sends: Sequence[SendProbe]) -> list[object]:
        """Return what was commanded in the end."""
        under_way, commands = list(sends), list[object]()
        while under_way:
            self.num_sent += 1
            send = under_way.pop(self.chance.randrange(len(under_way)))
            target = self.waiting.get(send.edge.proc)
            if target is None:
                continue
            for command in waits.follow(send.probe, target):
                if isinstance(command, SendProbe):
                    under_way.append(command)
                else:
                    commands.append(command)
        return commands

    def on_cycles(self) -> set[str]:
        """Every wait that lies on some cycle, found the plain way."""
        return {start for start in self.waiting if start in self.reached_from(start)}

    def reached_from(self, start: str) -> set[str]:
        reached: set[str] = set()
        open_ = [edge.proc for edge in self.waiting[start].edges]
        while open_:
            name = open_.pop()
            if name in self.waiting and name not in reached:
                reached.add(name)
                open_ += [edge.proc for edge in self.waiting[name].edges]
        return reached


def test_the_youngest_of_a_cycle_finds_it_and_fails_once_it_is_confirmed() -> None:
    net = Net.of({0: [1], 1: [2], 2: [0]})

    [found] = net.search()

    assert isinstance(found, ConfirmLater)
    assert [wait.proc for wait in found.cycle] == ["p.2", "p.0", "p.1"]
    assert net.confirm(found.cycle) == [Break(found.cycle)]


def test_an_actor_that_calls_itself_is_a_cycle_of_one() -> None:
    net = Net.of({3: [3]})

    [found] = net.search()

    assert isinstance(found, ConfirmLater)
    assert net.confirm(found.cycle) == [Break((net.waiting["p.3"].wait,))]


def test_a_call_to_many_is_a_wait_for_each_of_them() -> None:
    net = Net.of({0: [1, 2, 3], 3: [0, 4]})

    [found] = net.search()

    assert isinstance(found, ConfirmLater)
    assert [wait.proc for wait in found.cycle] == ["p.3", "p.0"]


def test_a_chain_and_a_fan_out_are_no_cycles() -> None:
    assert Net.of({0: [1, 2, 3], 1: [3], 2: [3], 3: [4]}).search() == []


def test_a_wait_beside_a_cycle_leaves_it_to_its_members() -> None:
    net = Net.of({7: [0], 0: [1], 1: [0]})

    assert net.deliver(waits.search(net.waiting["p.7"], 1)) == []


def test_a_cycle_is_not_confirmed_where_one_wait_is_another_by_then() -> None:
    net = Net.of({0: [1], 1: [2], 2: [0]})
    [found] = net.search()
    assert isinstance(found, ConfirmLater)
    net.waiting["p.1"].wait = replace(net.waiting["p.1"].wait, number=2)

    assert net.confirm(found.cycle) == []


def test_a_cycle_is_not_confirmed_where_an_answer_has_come() -> None:
    net = Net.of({0: [1, 3], 1: [0]})
    [found] = net.search()
    assert isinstance(found, ConfirmLater)
    net.waiting["p.0"].edges = net.waiting["p.0"].edges[1:]

    assert net.confirm(found.cycle) == []


@pytest.mark.parametrize("gone", ["p.0", "p.1", "p.2"])
def test_a_cycle_is_not_confirmed_where_a_wait_is_over(gone: str) -> None:
    net = Net.of({0: [1], 1: [2], 2: [0]})
    [found] = net.search()
    assert isinstance(found, ConfirmLater)
    del net.waiting[gone]

    assert net.confirm(found.cycle) == []


def test_an_old_probe_of_a_wait_that_is_over_finds_nothing() -> None:
    net = Net.of({0: [1], 1: [0]})
    sends = waits.search(net.waiting["p.1"], 1)
    net.waiting["p.1"].wait = replace(net.waiting["p.1"].wait, number=2)

    assert net.deliver(sends) == []


def test_where_one_waits_for_room_its_bound_gives_way_and_no_call_fails() -> None:
    net = Net.of({0: [1], 1: [2], 2: [0]}, rooms=[2])

    assert net.search() == [Overdraft(net.waiting["p.2"].wait)]


def test_senders_that_wait_for_each_others_room_are_left_to_their_own_probe() -> None:
    assert Net.of({0: [1], 1: [0]}, rooms=[0, 1]).search() == []


def test_of_equally_old_waits_one_finds_the_cycle() -> None:
    net = Net({f"p.{name}": waiting(name, [(name + 1) % 3], since_s=1.0) for name in range(3)})

    [found] = net.search()

    assert isinstance(found, ConfirmLater)
    assert found.cycle[0].proc == "p.2"


def test_a_cycle_is_told_from_the_wait_that_the_youngest_waits_for() -> None:
    cycle = tuple(waiting(name, []).wait for name in (2, 0, 1))

    assert [wait.proc for wait in waits.in_order(cycle)] == ["p.0", "p.1", "p.2"]


def test_searches_become_rarer_the_longer_a_wait_lasts() -> None:
    pauses_s = [waits.pause_s(waited_s) for waited_s in (-60.0, 0.25, 1.0, 2.0, 3600.0)]

    assert pauses_s == [0.1, 0.125, 0.5, 1.0, 1.0]


def test_a_search_passes_every_wait_once_however_many_ways_lead_to_it() -> None:
    below = {layer: [(layer - 1) * 10 + member for member in range(10)] for layer in range(6)}
    net = Net.of({layer * 10 + member: below[layer] for layer in range(6) for member in range(10)})

    assert net.deliver(waits.search(net.waiting["p.59"], 1)) == []
    assert net.num_sent == 10 + 4 * 100 + 100


def test_a_chain_of_calls_costs_one_probe_each() -> None:
    net = Net.of({name: [name + 1] for name in range(100)})

    assert net.search() == []
    assert net.num_sent == 100


def test_the_next_search_passes_where_the_last_one_did() -> None:
    net = Net.of({2: [1], 1: [0]})
    first, second = waits.search(net.waiting["p.2"], 1), waits.search(net.waiting["p.2"], 2)

    net.deliver([*first, *first])
    assert net.num_sent == 3
    net.deliver(second)
    assert net.num_sent == 5


@given(
    st.integers(0, 1 << 40),
    st.integers(0, 5),
    st.lists(st.tuples(st.text(max_size=5), st.floats(0, 1e10)), min_size=1, max_size=4),
)
def test_a_probe_comes_out_of_the_wire_as_it_went_in(search: int, at: int, hops: list[tuple[str, float]]) -> None:
    path = tuple(Wait(name, name, 3, since_s, name, name, name, 7, name, bool(at % 2)) for name, since_s in hops)
    probe = Probe(search, at, path)

    assert Probe.unpack(msgpack.unpackb(msgpack.packb(probe.pack()))) == probe


@pytest.mark.parametrize("values", [None, [], [1, 0], [1, 0, []], [1, 0, [[1]]], [1, 0, 3]])
def test_what_is_no_probe_is_refused(values: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Probe.unpack(values)  # type: ignore[arg-type]


@UNHURRIED
@given(GRAPHS, st.randoms(use_true_random=False))
def test_an_alarm_is_given_if_and_only_if_there_is_a_cycle(graph: dict[int, set[int]], chance: random.Random) -> None:
    net = Net.of({name: sorted(targets) for name, targets in graph.items()})
    net.chance = chance
    for number in range(1, len(graph) + 2):
        on_cycles = net.on_cycles()
        found = net.search(number)
        broken = [end for each in found if isinstance(each, ConfirmLater) for end in net.confirm(each.cycle)]
        assert all(isinstance(end, Break) for end in broken)
        victims = {end.cycle[0].proc for end in broken if isinstance(end, Break)}

        # At least one as long as there is a cycle, and never one beside the cycles.
        assert bool(victims) == bool(on_cycles)
        assert victims <= on_cycles
        for victim in victims:
            del net.waiting[victim]

    assert net.on_cycles() == set()


@UNHURRIED
@given(GRAPHS, st.sets(st.integers(0, 7)), st.randoms(use_true_random=False))
def test_waits_that_end_between_the_rounds_end_no_others(
    graph: dict[int, set[int]], renewed: set[int], chance: random.Random
) -> None:
    net = Net.of({name: sorted(targets) for name, targets in graph.items()})
    net.chance = chance
    found = [each for each in net.search() if isinstance(each, ConfirmLater)]
    for name in renewed & set(graph):
        net.waiting[f"p.{name}"].wait = replace(net.waiting[f"p.{name}"].wait, number=2)

    for each in found:
        is_whole = not any(int(wait.proc[2:]) in renewed for wait in each.cycle)
        assert bool(net.confirm(each.cycle)) == is_whole
