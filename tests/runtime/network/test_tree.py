"""The tree of hosts and the routes in it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danaus.runtime.network.tree import Tree

# Shared machines are slow at times.
pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True)
class Case:
    """What a tree is made of."""

    slots: tuple[int, ...]
    fan_out: int
    gateway: int | None
    lost: frozenset[int]

    def tree(self, lost: frozenset[int] | None = None) -> Tree:
        return Tree(self.slots, fan_out=self.fan_out, lost=self.lost if lost is None else lost, gateway=self.gateway)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    others = draw(st.lists(st.integers(1, 60), unique=True, max_size=40))
    gateway = draw(st.sampled_from([None, *others]))
    may_be_lost = [slot for slot in others if slot != gateway]
    lost = draw(st.sets(st.sampled_from(may_be_lost), max_size=8)) if may_be_lost else set[int]()
    return Case((0, *others), draw(st.integers(1, 9)), gateway, frozenset(lost))


def route(tree: Tree, here: int, dest: int) -> list[int]:
    """The hosts that a packet is at, both ends included."""
    hosts = [here]
    while hosts[-1] != dest:
        hosts.append(tree.next_hop(hosts[-1], dest))
        assert len(hosts) <= len(tree.slots), f"a loop: {hosts}"
    return hosts


def test_heap_without_losses() -> None:
    tree = Tree(range(14), fan_out=3)
    assert tree.children(0) == (1, 2, 3)
    assert tree.children(1) == (4, 5, 6)
    assert tree.children(3) == (10, 11, 12)
    assert tree.children(4) == (13,)
    assert (tree.parent(0), tree.parent(13), tree.parent(4)) == (None, 4, 1)
    assert tree.subtree(1) == {1, 4, 5, 6, 13}
    assert route(tree, 13, 12) == [13, 4, 1, 0, 3, 12]
    assert tree.neighbours(1) == (0, 4, 5, 6)
    assert tree.neighbours(0) == (1, 2, 3)


def test_children_of_a_lost_host_hang_on_its_nearest_living_ancestor() -> None:
    tree = Tree(range(14), fan_out=3, lost={1, 4})
    assert tree.children(0) == (2, 3, 5, 6, 13)
    assert route(tree, 13, 12) == [13, 0, 3, 12]
    assert 4 not in tree
    assert 13 in tree


def test_gateway_is_the_only_child_of_the_root() -> None:
    tree = Tree(range(8), fan_out=2, gateway=5)
    assert tree.children(0) == (5,)
    assert tree.children(5) == (1, 2)
    assert tree.children(1) == (3, 4)
    assert tree.children(2) == (6, 7)
    assert route(tree, 0, 7) == [0, 5, 2, 7]


def test_split_sorts_destinations_by_next_hop_and_keeps_their_order() -> None:
    tree = Tree(range(14), fan_out=3)
    assert tree.split(0, [13, 2, 1, 12, 10, 4]) == {1: [13, 1, 4], 2: [2], 3: [12, 10]}
    assert tree.split(4, [13, 0, 5]) == {13: [13], 1: [0, 5]}
    assert tree.split(0, []) == {}


def test_thousand_hosts_are_a_few_hops_apart() -> None:
    tree = Tree(range(1000))
    assert len(route(tree, 0, 999)) - 1 == 4
    assert len(tree.split(0, range(1, 1000))) == 8


@given(cases())
@settings(deadline=None, max_examples=60)
def test_every_pair_has_a_route_without_loops_that_is_the_same_both_ways(case: Case) -> None:
    tree = case.tree()
    assert set(tree.slots) == set(case.slots) - case.lost
    for here in tree.slots:
        for dest in tree.slots:
            if here != dest:
                assert route(tree, here, dest) == route(tree, dest, here)[::-1]


@given(cases())
@settings(deadline=None)
def test_every_hop_is_a_neighbour_and_parents_and_children_agree(case: Case) -> None:
    tree = case.tree()
    for slot in tree.slots:
        assert all(tree.parent(child) == slot for child in tree.children(slot))
        parent = tree.parent(slot)
        assert parent is None if slot == 0 else parent is not None and slot in tree.children(parent)
        for dest in tree.slots:
            if dest != slot:
                assert tree.next_hop(slot, dest) in tree.neighbours(slot)


@given(cases())
@settings(deadline=None)
def test_fan_out_is_bounded_while_nothing_is_lost(case: Case) -> None:
    tree = case.tree(frozenset())
    assert all(len(tree.children(slot)) <= case.fan_out for slot in tree.slots)
    if case.gateway is not None:
        assert tree.children(0) == (case.gateway,)


@given(cases(), st.data())
@settings(deadline=None, max_examples=60)
def test_loss_changes_no_route_but_those_that_passed_the_lost_host(case: Case, data: st.DataObject) -> None:
    before = case.tree()
    may_be_lost = [slot for slot in before.slots if slot not in {0, case.gateway}]
    if not may_be_lost:
        return
    slot = data.draw(st.sampled_from(may_be_lost))
    after = case.tree(case.lost | {slot})
    for here in after.slots:
        for dest in after.slots:
            if here != dest:
                hosts = [before.parent(slot) if host == slot else host for host in route(before, here, dest)]
                # The one above the lost host may have been on the route already.
                assert route(after, here, dest) == [host for host, _ in groupby(hosts)]


@given(cases(), st.integers(61, 70))
@settings(deadline=None, max_examples=60)
def test_new_host_changes_no_route_between_the_others(case: Case, new: int) -> None:
    before = case.tree()
    after = Tree([*case.slots, new], fan_out=case.fan_out, lost=case.lost, gateway=case.gateway)
    for here in before.slots:
        for dest in before.slots:
            if here != dest:
                assert before.next_hop(here, dest) == after.next_hop(here, dest)


@given(cases())
@settings(deadline=None)
def test_split_sends_each_destination_over_one_subtree(case: Case) -> None:
    tree = case.tree()
    for here in tree.slots:
        dests = [slot for slot in tree.slots if slot != here]
        hops = tree.split(here, dests)
        assert sorted(dest for part in hops.values() for dest in part) == sorted(dests)
        assert len(hops) == len(tree.neighbours(here))
        for hop, part in hops.items():
            if hop == tree.parent(here):
                assert set(part) == set(tree.slots) - tree.subtree(here)
            else:
                assert set(part) == tree.subtree(hop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": ()}, "the first must be 0"),
        ({"slots": (1, 0)}, "slots are 1, 0; the first must be 0"),
        ({"slots": (0, 2, 2)}, "each may occur once"),
        ({"slots": (0, 1), "fan_out": 0}, "fan_out is 0"),
        ({"slots": (0, 1), "lost": (0,)}, "host 0 is lost"),
        ({"slots": (0, 1), "gateway": 2}, "the gateway is 2; it must be one of the slots but 0: 1"),
        ({"slots": (0, 1), "gateway": 0}, "the gateway is 0"),
        ({"slots": (0, 1, 2), "gateway": 1, "lost": (1,)}, "the gateway, host 1, is lost"),
    ],
)
def test_what_makes_no_tree_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree(**arguments)  # pyright: ignore[reportArgumentType]


def test_questions_about_hosts_that_are_not_there_are_refused() -> None:
    tree = Tree(range(4), lost={2})
    for ask in (tree.parent, tree.children, tree.subtree, tree.neighbours):
        with pytest.raises(ValueError, match="host 2 is lost or was never in the job; living are 0, 1, 3"):
            ask(2)
    with pytest.raises(ValueError, match="host 9 is lost"):
        tree.next_hop(0, 9)
    with pytest.raises(ValueError, match="host 2 is lost"):
        tree.next_hop(2, 1)
    with pytest.raises(ValueError, match="host 1 has no next hop to itself"):
        tree.split(1, [0, 1])
