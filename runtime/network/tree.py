"""Decides which way packets go between the agents of a job: a tree of hosts with a bounded fan-out.

Pure logic: no socket, thread or clock in this file. The hosts make a heap in the order of their slots, slot 0 (the
controller's own host) at the root. Where a host is lost its children hang on its nearest living ancestor, so only the
routes that passed it change. A route is a function of its two ends and of the set of lost hosts, and the way back is
the way there, reversed. A tree never changes: a loss or a new host makes another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

FAN_OUT: Final = 8
"""Children of a host: what a cast costs there grows with it, the number of hops shrinks."""


class Tree:
    """The living hosts of a job.

    With a ``gateway`` the root has that one child and the heap goes on from there: the controller's machine reaches no
    other host.

    Args:
        slots: All hosts that the job ever had, 0 first. Appending one moves none of the others.
        fan_out: Children of a host while nothing is lost.
        lost: Hosts that are gone.
        gateway: The only host that the root talks to.

    Raises:
        ValueError: the slots make no tree, the root is lost, or the gateway is: then the controller reaches no host,
            and all of them are lost to it.
    """

    __slots__ = ("_children", "_hops", "_parents", "_subtrees", "gateway", "slots")

    def __init__(
        self,
        slots: Sequence[int],
        *,
        fan_out: int = FAN_OUT,
        lost: Collection[int] = (),
        gateway: int | None = None,
    ) -> None:
        _check(slots, fan_out=fan_out, lost=lost, gateway=gateway)
        order = list(slots)
        if gateway is not None:
            order.remove(gateway)
            order.insert(1, gateway)
        # Where the heap begins: below it each host has a single child.
        top = 0 if gateway is None else 1
        self.gateway = gateway
        parents: dict[int, int | None] = {order[0]: None}
        for position in range(1, len(order)):
            parent = order[0] if position <= top else order[top + (position - top - 1) // fan_out]
            parents[order[position]] = parents[parent] if parent in lost else parent
        self._parents = {slot: parent for slot, parent in parents.items() if slot not in lost}
        self.slots = tuple(self._parents)
        """The living hosts, every parent before its children."""
        children: dict[int, list[int]] = {slot: [] for slot in self.slots}
        for slot, parent in self._parents.items():
            if parent is not None:
                children[parent].append(slot)
        self._children = {slot: tuple(found) for slot, found in children.items()}
        self._hops: dict[tuple[int, int], int] = {}
        self._subtrees: dict[int, frozenset[int]] = {}

    def __contains__(self, slot: int) -> bool:
        """Whether the host of ``slot`` lives."""
        return slot in self._parents

    def parent(self, slot: int) -> int | None:
        """The host above ``slot``; None for the root."""
        self._check_lives(slot)
        return self._parents[slot]

    def children(self, slot: int) -> tuple[int, ...]:
        """The hosts right below ``slot``."""
        self._check_lives(slot)
        return self._children[slot]

    def neighbours(self, slot: int) -> tuple[int, ...]:
        """All hosts that ``slot`` has a link to: its parent, where it has one, then its children."""
        parent = self.parent(slot)
        return self._children[slot] if parent is None else (parent, *self._children[slot])

    def next_hop(self, here: int, dest: int) -> int:
        """The neighbour of ``here`` on the way to ``dest``."""
        hop = self._hops.get((here, dest))
        if hop is None:
            hop = self._hops[here, dest] = self._find_hop(here, dest)
        return hop

    def split(self, here: int, dests: Iterable[int]) -> dict[int, list[int]]:
        """Sort ``dests`` by the neighbour of ``here`` that leads to them, keeping their order."""
        hops: dict[int, list[int]] = {}
        for dest in dests:
            hops.setdefault(self.next_hop(here, dest), []).append(dest)
        return hops

    def subtree(self, slot: int) -> frozenset[int]:
        """``slot`` and all hosts below it."""
        found = self._subtrees.get(slot)
        if found is None:
            below = [slot]
            for each in below:
                below.extend(self.children(each))
            found = self._subtrees[slot] = frozenset(below)
        return found

    def _find_hop(self, here: int, dest: int) -> int:
        self._check_lives(here)
        self._check_lives(dest)
        if here == dest:
            raise ValueError(f"host {here} has no next hop to itself; deliver there what is for it")
        step, above = dest, self._parents[dest]
        while above is not None and above != here:
            step, above = above, self._parents[above]
        if above == here:
            return step
        # Not below, so the way goes up. Only the root has no parent, and everything is below the root.
        parent = self._parents[here]
        assert parent is not None
        return parent

    def _check_lives(self, slot: int) -> None:
        if slot not in self._parents:
            raise ValueError(f"host {slot} is lost or was never in the job; living are {_text(self.slots)}")


def _check(slots: Sequence[int], *, fan_out: int, lost: Collection[int], gateway: int | None) -> None:
    if not slots or slots[0] != 0:
        raise ValueError(f"slots are {_text(slots)}; the first must be 0, the controller's own host")
    if len(set(slots)) != len(slots):
        raise ValueError(f"slots are {_text(slots)}; each may occur once")
    if fan_out < 1:
        raise ValueError(f"fan_out is {fan_out}; it must be 1 or more")
    if 0 in lost:
        raise ValueError("host 0 is lost; without the controller's own host there is no tree")
    if gateway is not None and (gateway == 0 or gateway not in slots):
        raise ValueError(f"the gateway is {gateway}; it must be one of the slots but 0: {_text(slots[1:])}")
    if gateway is not None and gateway in lost:
        raise ValueError(f"the gateway, host {gateway}, is lost: the controller reaches no host without it")


def _text(slots: Sequence[int]) -> str:
    shown = ", ".join(map(str, slots[:20]))
    return f"{shown} and {len(slots) - 20} more" if len(slots) > 20 else shown or "none"
