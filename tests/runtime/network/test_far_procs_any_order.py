"""In whatever order processes and hosts come, end and return: all who wait hear of it, once and in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from danaus.runtime.address import address, host_of, incarnation_of, next_address, place_of
from danaus.runtime.failure import FailureKind
from danaus.runtime.host.proc_table import TellGone, TellReplaced, TellUp
from danaus.runtime.network.far_procs import Ask, FarProcs

from .far_losses import P0, Q0, A, B, failure, lose


@dataclass
class Place:
    """What is true of one rank, and what one watcher has been told of it."""

    proc: str
    state: str = "ordered"
    """ordered, held (its order waits for the host), up, awaited (it is to follow), lost (for good), stopped"""
    restartable: bool = False


class FarProcsMachine(RuleBasedStateMachine):
    """Two ranks on two hosts, an owner that has ordered them and a watcher that comes and asks at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.far = FarProcs()
        self.places = [Place(P0), Place(Q0)]
        self.returns = {1: True, 2: True}
        self.is_there = {1: True, 2: True}
        self.watched: set[str] = set()
        self.heard: dict[str, list[tuple[str, str]]] = {A: [], B: []}
        self.do(self.far.on_ordered([P0, Q0], A, restartable=False))
        self.far.on_order_sent([P0, Q0])

    def do(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, TellUp):
                self.heard[command.to].append(("up", command.proc))
            elif isinstance(command, TellGone):
                self.heard[command.to].append(("gone", command.proc))
            elif isinstance(command, TellReplaced):
                self.heard[command.to].append(("replaced", command.following))
            else:
                assert isinstance(command, Ask)
                assert self.is_there[host_of(command.proc)] or place_of(command.proc) in self.watched

    ranks = st.integers(0, 1)

    @rule(rank=ranks)
    def watch(self, rank: int) -> None:
        """Ask for the first process of the place, as who has an old address does."""
        first = place_of(self.places[rank].proc)
        if first not in self.watched:
            self.watched.add(first)
            self.do(self.far.on_watch(first, B))

    @rule(rank=ranks, restartable=st.booleans())
    def come_up(self, rank: int, restartable: bool) -> None:
        place = self.places[rank]
        if place.state in {"ordered", "awaited"} and self.is_there[host_of(place.proc)]:
            # Its agent starts what follows one that died there; what was lost with a host its owner has ordered.
            place.state, place.restartable = "up", restartable
            self.do(self.far.on_up(place.proc, restartable=restartable))

    @rule(rank=ranks)
    def die(self, rank: int) -> None:
        place = self.places[rank]
        if place.state == "up" and self.is_there[host_of(place.proc)]:
            following = next_address(place.proc) if place.restartable else None
            self.do(self.far.on_died(place.proc, failure(place.proc, restarts=place.restartable), following))
            self._ended(place, follows=place.restartable)

    @rule(rank=ranks)
    def stop(self, rank: int) -> None:
        place = self.places[rank]
        if place.state == "up" and self.is_there[host_of(place.proc)]:
            self.do(self.far.on_died(place.proc, failure(place.proc, FailureKind.STOPPED), None))
            place.state = "stopped"

    @rule(rank=ranks)
    def fill(self, rank: int) -> None:
        """The owner orders a rank again: it was lost for good, or is to follow and was with a host that is lost."""
        place = self.places[rank]
        slot = host_of(place.proc)
        if place.state not in {"lost", "awaited"} or not self.returns[slot]:
            return
        if place.state == "lost":
            place.proc, place.restartable = next_address(place.proc), False
        self.do(self.far.on_ordered([place.proc], A, restartable=place.restartable))
        place.state = "held"
        self._send_order(place)

    def _send_order(self, place: Place) -> None:
        if self.is_there[host_of(place.proc)]:
            place.state = "ordered"
            self.far.on_order_sent([place.proc])

    @rule(slot=st.integers(1, 2), may_return=st.booleans())
    def lose_host(self, slot: int, may_return: bool) -> None:
        if not self.returns[slot]:
            return
        self.is_there[slot], self.returns[slot] = False, may_return
        self.do(lose(self.far, slot, may_return=may_return))
        place = self.places[slot - 1]
        if place.state in {"awaited", "held"} and not may_return:
            place.state = "lost"
        elif place.state in {"ordered", "up"}:
            self._ended(place, follows=place.restartable and may_return)

    @precondition(lambda self: not all(self.is_there.values()))
    @rule()
    def return_hosts(self) -> None:
        for slot, is_there in self.is_there.items():
            if not is_there:
                self.is_there[slot] = self.returns[slot] = True
                self.do(self.far.on_host_back(slot))
                if self.places[slot - 1].state == "held":
                    self._send_order(self.places[slot - 1])

    @rule(rank=ranks)
    def abandon(self, rank: int) -> None:
        place = self.places[rank]
        if place.state == "awaited":
            self.do(self.far.on_abandoned(place.proc))
            place.state = "lost"

    def _ended(self, place: Place, *, follows: bool) -> None:
        if follows:
            place.proc, place.state = next_address(place.proc), "awaited"
        else:
            place.state = "lost"

    @invariant()
    def nobody_hears_a_thing_twice(self) -> None:
        for watcher, heard in self.heard.items():
            assert len(set(heard)) == len(heard), f"{watcher}: {heard}"

    @invariant()
    def all_hear_all_ends_in_order(self) -> None:
        for place in self.places:
            first, last = place_of(place.proc), incarnation_of(place.proc)
            num_gone = last + (place.state in {"lost", "stopped"})
            expected = [address(first, number) for number in range(num_gone)]
            for watcher in (A, *([B] if first in self.watched else [])):
                gone = [proc for what, proc in self.heard[watcher] if what == "gone" and place_of(proc) == first]
                assert gone == expected, f"{watcher}: {self.heard[watcher]}"

    @invariant()
    def all_hear_who_is_up(self) -> None:
        for place in self.places:
            for watcher in (A, *([B] if place_of(place.proc) in self.watched else [])):
                if place.state == "up":
                    assert ("up", place.proc) in self.heard[watcher], f"{watcher}: {self.heard[watcher]}"

    @invariant()
    def nobody_is_said_to_be_up_before_it_is_or_after_its_end(self) -> None:
        for watcher, heard in self.heard.items():
            for number, (what, proc) in enumerate(heard):
                if what == "up":
                    assert ("gone", proc) not in heard[:number], f"{watcher}: {heard}"


FarProcsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


class TestWhateverHappens(FarProcsMachine.TestCase):
    """See the machine."""
