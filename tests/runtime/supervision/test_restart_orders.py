"""What holds of restarts for any order of events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from danaus.runtime.supervision.restart import RankState, Restart, RestartTracker, StartRank, StopRank

if TYPE_CHECKING:
    from danaus.runtime.supervision.restart import Command

UP, STOPPING, WAITING = RankState.UP, RankState.STOPPING, RankState.WAITING
STARTING, HOLE, RELEASED = RankState.STARTING, RankState.HOLE, RankState.RELEASED

POLICIES = st.builds(
    Restart,
    scope=st.sampled_from(["rank", "mesh", "rest"]),
    max_restarts=st.integers(1, 4),
    within_s=st.sampled_from([8.0, 40.0]),
    backoff_s=st.sampled_from([0.0, 0.5]),
)
KINDS = st.sampled_from(["failed", "failed", "lost", "ended", "started", "released", "replace", "force", "check"])
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 3), st.sampled_from([0.0, 0.0, 0.3, 2.0])), max_size=60)


class World:
    """What the commands say about four ranks, and what may never be true of it."""

    def __init__(self, policy: Restart) -> None:
        self.policy = policy
        self.tracker = RestartTracker(policy, 4)
        self.alive = {0, 1, 2, 3}
        self.told_to_stop: set[int] = set()
        self.incarnations = [0] * 4

    def step(self, kind: str, rank: int, now_s: float) -> None:
        tracker = self.tracker
        if kind == "check":
            self.obey(tracker.check(now_s))
        elif kind in {"failed", "lost"} and rank in self.alive:
            self.alive.discard(rank)
            self.obey(tracker.on_failed(rank, now_s, may_restart=kind == "failed"))
        elif kind == "ended" and rank in self.told_to_stop & self.alive:
            self.alive.discard(rank)
            self.obey(tracker.on_ended(rank, now_s))
        elif kind == "started" and tracker.state(rank) is STARTING:
            tracker.on_started(rank)
        elif kind == "released":
            tracker.on_released(rank)
        elif kind in {"replace", "force"} and tracker.state(rank) not in {UP, RELEASED}:
            self.obey(tracker.on_replace(rank, now_s))
        elif kind == "force" and tracker.state(rank) is UP:
            self.obey(tracker.on_replace(rank, now_s, force=True))

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            rank = command.rank
            if isinstance(command, StartRank):
                assert rank not in self.alive, "started beside its own process"
                assert command.incarnation == self.incarnations[rank] + 1
                assert self.tracker.state(rank) is STARTING
                self.incarnations[rank] += 1
                self.alive.add(rank)
                self.told_to_stop.discard(rank)
            elif isinstance(command, StopRank):
                assert rank in self.alive - self.told_to_stop, "stopped twice, or without a process"
                self.told_to_stop.add(rank)
            else:
                assert self.tracker.state(rank) is HOLE

    def check(self, now_s: float) -> None:
        assert self.tracker.num_restarts(now_s) <= self.policy.max_restarts
        for rank in range(4):
            state = self.tracker.state(rank)
            assert self.tracker.incarnation(rank) == self.incarnations[rank]
            if state in {UP, STARTING}:
                assert rank in self.alive - self.told_to_stop
            elif state is STOPPING:
                assert rank in self.alive & self.told_to_stop
            elif state is WAITING:
                assert rank not in self.alive
            elif state is HOLE:
                assert rank not in self.alive - self.told_to_stop


@settings(deadline=None, max_examples=150)
@given(policy=POLICIES, steps=STEPS)
def test_no_order_of_events_starts_a_rank_twice_or_too_often(
    policy: Restart, steps: list[tuple[str, int, float]]
) -> None:
    world, now_s, counted_at = World(policy), 0.0, list[float]()
    for kind, rank, later_s in steps:
        now_s += later_s
        num_before = world.tracker.num_restarts(now_s)
        world.step(kind, rank, now_s)
        world.check(now_s)
        counted_at += [now_s] * (world.tracker.num_restarts(now_s) - num_before)

    for start_s in counted_at:
        assert sum(start_s <= at_s < start_s + policy.within_s for at_s in counted_at) <= policy.max_restarts
    # Whatever was stopped ends in the end, and then nothing waits for ever.
    for rank in sorted(world.told_to_stop & world.alive):
        world.step("ended", rank, now_s)
    world.obey(world.tracker.check(now_s + 1000.0))
    assert not world.tracker._incidents
    assert not {STOPPING, WAITING} & {world.tracker.state(rank) for rank in range(4)}
