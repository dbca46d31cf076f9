"""Policies of restart: what is refused, and every step of a rank."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.supervision.restart import GiveUp, RankState, Restart, RestartTracker, StartRank, StopRank

if TYPE_CHECKING:
    from collections.abc import Callable

    from danaus.runtime.supervision.restart import Command

UP, STOPPING, WAITING = RankState.UP, RankState.STOPPING, RankState.WAITING
STARTING, HOLE, RELEASED = RankState.STARTING, RankState.HOLE, RankState.RELEASED


def states(tracker: RestartTracker) -> list[RankState]:
    return [tracker.state(rank) for rank in range(tracker.num_ranks)]


def restart_all(tracker: RestartTracker, now_s: float) -> list[Command]:
    """Fail rank 0 of a mesh under scope ``mesh`` and let every rank end and start."""
    tracker.on_failed(0, now_s)
    for rank in range(1, tracker.num_ranks):
        tracker.on_ended(rank, now_s)
    commands = tracker.check(now_s)
    for rank in range(tracker.num_ranks):
        if tracker.state(rank) is STARTING:
            tracker.on_started(rank)
    return commands


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"scope": "host"}, ValueError, r"scope='host'.*'rank', 'mesh', 'rest'"),
        ({"scope": ["rank"]}, ValueError, r"'rank', 'mesh', 'rest'"),
        ({"preempted": "ignore"}, ValueError, r"'move', 'shrink'"),
        ({"max_restarts": 0}, ValueError, r"at least 1.*leave restart= out"),
        ({"max_restarts": True}, TypeError, r"max_restarts=True.*whole number"),
        ({"max_restarts": 2.0}, TypeError, r"whole number"),
        ({"within_s": 0}, ValueError, r"within_s=0\).*above 0"),
        ({"within_s": math.nan}, ValueError, r"above 0"),
        ({"within_s": "60"}, TypeError, r"number of seconds"),
        ({"within_s": True}, TypeError, r"number of seconds"),
        ({"backoff_s": -1.0}, ValueError, r"backoff_s=-1.0.*0 or"),
        ({"backoff_s": math.inf}, ValueError, r"finite"),
        ({"backoff_s": math.nan}, ValueError, r"finite"),
        ({"stuck": 1}, TypeError, r"True or False"),
        ({"backoff_s": 60.0, "max_restarts": 1}, ValueError, r"waits alone take 60 s.*raise within_s"),
        ({"backoff_s": 10.0}, ValueError, r"waits alone take 70 s"),
        ({"backoff_s": 1e-3, "max_restarts": 10**12}, ValueError, r"for ever"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_with_the_fix(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Restart(**options)


def test_a_policy_may_hold_for_the_life_of_the_mesh() -> None:
    policy = Restart(max_restarts=2, within_s=math.inf, backoff_s=100.0)
    tracker = RestartTracker(policy, 1)
    for now_s in (0.0, 1e9):
        tracker.on_failed(0, now_s)
        tracker.check(now_s + 100.0)
        tracker.on_started(0)

    assert tracker.on_failed(0, 2e9) == [GiveUp(0, num_restarts=2)]


def test_the_wait_doubles_up_to_a_minute() -> None:
    policy = Restart(max_restarts=100, within_s=86_400, backoff_s=10.0)

    assert [policy.backoff_before_s(number) for number in (1, 2, 3, 4, 5, 99_999)] == [10, 20, 40, 60, 60, 60]


def test_a_longer_first_wait_stays_as_it_is() -> None:
    policy = Restart(within_s=3600, backoff_s=100.0)

    assert [policy.backoff_before_s(number) for number in (1, 2, 3)] == [100, 100, 100]


def test_without_a_policy_a_failure_leaves_a_hole() -> None:
    tracker = RestartTracker(None, 2)

    assert tracker.on_failed(1, 0.0) == [GiveUp(1, num_restarts=0)]
    assert states(tracker) == [UP, HOLE]
    assert tracker.next_check_s() is None


def test_a_failed_rank_starts_again_at_once_and_alone() -> None:
    tracker = RestartTracker(Restart(), 3)

    assert tracker.on_failed(1, 5.0) == [StartRank(1, incarnation=1)]
    assert states(tracker) == [UP, STARTING, UP]

    assert tracker.on_started(1) == []
    assert states(tracker) == [UP, UP, UP]
    assert tracker.incarnation(1) == 1
    assert tracker.num_restarts(5.0) == 1


def test_a_rank_waits_for_its_back_off() -> None:
    tracker = RestartTracker(Restart(backoff_s=2.0), 1)

    assert tracker.on_failed(0, 10.0) == []
    assert tracker.state(0) is WAITING
    assert tracker.next_check_s() == 12.0
    assert tracker.check(11.9) == []

    assert tracker.check(12.0) == [StartRank(0, incarnation=1)]
    assert tracker.next_check_s() is None


def test_a_rank_that_fails_while_it_starts_counts_again_and_waits_longer() -> None:
    tracker = RestartTracker(Restart(backoff_s=1.0), 1)
    tracker.on_failed(0, 0.0)
    tracker.check(1.0)

    assert tracker.on_failed(0, 1.5) == []
    assert tracker.next_check_s() == 3.5
    assert tracker.check(3.5) == [StartRank(0, incarnation=2)]
    assert tracker.num_restarts(3.5) == 2


def test_a_mesh_starts_again_together_once_all_have_ended() -> None:
    tracker = RestartTracker(Restart(scope="mesh"), 3)

    assert tracker.on_failed(1, 0.0) == [StopRank(0), StopRank(2)]
    assert states(tracker) == [STOPPING, WAITING, STOPPING]
    assert tracker.next_check_s() is None
    assert tracker.on_ended(0, 0.1) == []
    assert states(tracker) == [WAITING, WAITING, STOPPING]

    assert tracker.on_ended(2, 0.2) == [StartRank(0, 1), StartRank(1, 1), StartRank(2, 1)]
    assert tracker.num_restarts(0.2) == 1


def test_a_mesh_that_has_ended_still_waits_for_the_back_off() -> None:
    tracker = RestartTracker(Restart(scope="mesh", backoff_s=1.0), 2)
    tracker.on_failed(0, 0.0)

    assert tracker.on_ended(1, 0.5) == []
    assert tracker.next_check_s() == 1.0
    assert tracker.check(1.0) == [StartRank(0, 1), StartRank(1, 1)]


def test_the_rest_is_the_failed_rank_and_those_above() -> None:
    tracker = RestartTracker(Restart(scope="rest"), 4)

    assert tracker.on_failed(2, 0.0) == [StopRank(3)]
    assert tracker.on_ended(3, 0.1) == [StartRank(2, 1), StartRank(3, 1)]
    assert states(tracker) == [UP, UP, STARTING, STARTING]


def test_a_lower_rank_takes_over_the_restart_of_those_above() -> None:
    tracker = RestartTracker(Restart(scope="rest", backoff_s=1.0), 4)
    tracker.on_failed(2, 0.0)

    assert tracker.on_failed(1, 0.5) == []
    assert states(tracker) == [UP, WAITING, WAITING, STOPPING]
    assert tracker.num_restarts(0.5) == 2
    assert tracker.on_ended(3, 0.6) == []
    assert tracker.next_check_s() == 2.5
    assert tracker.check(2.5) == [StartRank(1, 1), StartRank(2, 1), StartRank(3, 1)]


def test_one_taken_over_waits_no_less_than_before() -> None:
    tracker = RestartTracker(Restart(scope="rest", within_s=60.0, backoff_s=5.0), 2)
    for now_s in (0.0, 0.5):
        tracker.on_failed(1, now_s)
        tracker.check(now_s + 10.0)
    tracker.on_failed(1, 59.0)
    assert tracker.next_check_s() == 79.0

    tracker.on_failed(0, 60.5)

    assert tracker.num_restarts(60.5) == 2
    assert tracker.next_check_s() == 79.0


def test_a_rank_that_starts_is_stopped_when_another_of_its_scope_fails() -> None:
    tracker = RestartTracker(Restart(scope="rest"), 3)
    tracker.on_failed(2, 0.0)

    assert tracker.on_failed(1, 0.1) == [StopRank(2)]
    assert tracker.on_started(2) == []
    assert tracker.state(2) is STOPPING
    assert tracker.on_ended(2, 0.2) == [StartRank(1, 1), StartRank(2, 2)]


@pytest.mark.parametrize("is_heard_as", ["on_failed", "on_ended"])
def test_one_that_fails_while_it_is_stopped_joins_the_restart(is_heard_as: str) -> None:
    tracker = RestartTracker(Restart(scope="mesh", max_restarts=1), 2)
    tracker.on_failed(0, 0.0)

    assert getattr(tracker, is_heard_as)(1, 0.1) == [StartRank(0, 1), StartRank(1, 1)]
    assert tracker.num_restarts(0.1) == 1


def test_one_that_fails_while_it_waits_joins_the_restart() -> None:
    tracker = RestartTracker(Restart(backoff_s=1.0), 1)
    tracker.on_failed(0, 0.0)

    assert tracker.on_failed(0, 0.5) == []
    assert tracker.num_restarts(0.5) == 1
    assert tracker.next_check_s() == 1.0


def test_past_the_limit_the_rank_is_given_up() -> None:
    tracker = RestartTracker(Restart(max_restarts=2, within_s=10.0), 2)
    for rank in (0, 1):
        tracker.on_failed(rank, 0.0)
        tracker.on_started(rank)

    assert tracker.on_failed(0, 9.9) == [GiveUp(0, num_restarts=2)]
    assert states(tracker) == [HOLE, UP]


def test_the_window_slides() -> None:
    tracker = RestartTracker(Restart(max_restarts=1, within_s=10.0), 1)
    tracker.on_failed(0, 0.0)
    tracker.on_started(0)

    assert tracker.on_failed(0, 10.0) == [StartRank(0, 2)]


def test_past_the_limit_of_a_mesh_those_that_are_up_stay_up() -> None:
    tracker = RestartTracker(Restart(scope="mesh", max_restarts=1), 3)
    restart_all(tracker, 0.0)

    assert tracker.on_failed(1, 1.0) == [GiveUp(1, num_restarts=1)]
    assert states(tracker) == [UP, HOLE, UP]


def test_past_the_limit_of_a_mesh_those_that_start_are_ended_and_given_up() -> None:
    tracker = RestartTracker(Restart(scope="mesh", max_restarts=1), 3)
    tracker.on_failed(0, 0.0)
    tracker.on_ended(1, 0.1)
    tracker.on_ended(2, 0.2)
    tracker.on_started(2)

    assert tracker.on_failed(0, 0.3) == [GiveUp(0, 1), StopRank(1), GiveUp(1, 1)]
    assert states(tracker) == [HOLE, HOLE, UP]
    assert tracker.next_check_s() is None


def test_past_the_limit_those_that_stop_or_wait_are_given_up_too() -> None:
    tracker = RestartTracker(Restart(scope="rest", max_restarts=1), 4)
    tracker.on_failed(2, 0.0)

    assert tracker.on_failed(1, 0.1) == [GiveUp(1, 1), GiveUp(2, 1), GiveUp(3, 1)]
    assert states(tracker) == [UP, HOLE, HOLE, HOLE]
    assert tracker.on_ended(3, 0.2) == []


def test_a_failure_that_may_not_be_mended_leaves_a_hole_and_others_alone() -> None:
    tracker = RestartTracker(Restart(scope="mesh"), 2)

    assert tracker.on_failed(0, 0.0, may_restart=False) == [GiveUp(0, num_restarts=0)]
    assert states(tracker) == [HOLE, UP]


def test_one_lost_for_good_no_longer_keeps_its_scope_waiting() -> None:
    tracker = RestartTracker(Restart(scope="mesh"), 3)
    tracker.on_failed(0, 0.0)
    tracker.on_ended(1, 0.1)

    assert tracker.on_failed(2, 0.2, may_restart=False) == [GiveUp(2, 1), StartRank(0, 1), StartRank(1, 1)]


def test_a_hole_has_nothing_more_to_lose() -> None:
    tracker = RestartTracker(None, 1)
    tracker.on_failed(0, 0.0)

    assert tracker.on_failed(0, 1.0) == []
    assert tracker.state(0) is HOLE


def test_a_hole_is_no_part_of_its_meshs_restart() -> None:
    tracker = RestartTracker(Restart(scope="mesh"), 3)
    tracker.on_failed(2, 0.0, may_restart=False)

    assert tracker.on_failed(0, 1.0) == [StopRank(1)]
    assert tracker.on_ended(1, 1.1) == [StartRank(0, 1), StartRank(1, 1)]


def test_a_hole_is_filled_by_hand_without_counting() -> None:
    tracker = RestartTracker(None, 1)
    tracker.on_failed(0, 0.0)

    assert tracker.on_replace(0, 1.0) == [StartRank(0, incarnation=1)]
    assert tracker.num_restarts(1.0) == 0
    tracker.on_started(0)
    assert tracker.state(0) is UP


def test_a_replacement_that_fails_without_a_policy_is_a_hole_again() -> None:
    tracker = RestartTracker(None, 1)
    tracker.on_failed(0, 0.0)
    tracker.on_replace(0, 1.0)

    assert tracker.on_failed(0, 2.0) == [GiveUp(0, 0)]
    assert tracker.on_replace(0, 3.0) == [StartRank(0, incarnation=2)]


def test_a_hole_is_filled_only_after_its_old_process_has_ended() -> None:
    tracker = RestartTracker(Restart(scope="mesh", max_restarts=1), 2)
    tracker.on_failed(0, 0.0)
    tracker.on_ended(1, 0.1)
    tracker.on_failed(0, 0.2)

    assert tracker.on_replace(1, 0.3) == []
    assert tracker.state(1) is STOPPING
    assert tracker.on_ended(1, 0.4) == [StartRank(1, incarnation=2)]


def test_a_hole_whose_process_ended_by_itself_is_filled_at_once() -> None:
    tracker = RestartTracker(None, 1)
    tracker.on_replace(0, 0.0, force=True)
    tracker.on_failed(0, 0.1)
    tracker.on_failed(0, 0.2)
    assert tracker.state(0) is HOLE

    assert tracker.on_replace(0, 0.3) == [StartRank(0, incarnation=2)]


def test_numbers_that_are_used_up_are_skipped_and_never_taken_back() -> None:
    tracker = RestartTracker(None, 1)
    tracker.on_failed(0, 0.0)
    tracker.skip_to(0, 3)
    tracker.skip_to(0, 2)

    assert tracker.on_replace(0, 1.0) == [StartRank(0, incarnation=4)]


def test_a_rank_that_is_up_is_replaced_only_by_force() -> None:
    tracker = RestartTracker(None, 2)

    with pytest.raises(ValueError, match=r"rank 1 is up.*force=True"):
        tracker.on_replace(1, 0.0)
    assert states(tracker) == [UP, UP]

    assert tracker.on_replace(1, 0.0, force=True) == [StopRank(1)]
    assert states(tracker) == [UP, STOPPING]
    assert tracker.on_ended(1, 0.1) == [StartRank(1, incarnation=1)]


def test_replacing_brings_a_waiting_restart_forward() -> None:
    tracker = RestartTracker(Restart(backoff_s=5.0), 1)
    tracker.on_failed(0, 0.0)

    assert tracker.on_replace(0, 1.0) == [StartRank(0, 1)]
    assert tracker.on_replace(0, 1.1) == []


def test_a_released_rank_never_starts_again() -> None:
    tracker = RestartTracker(Restart(), 1)
    tracker.on_released(0)

    assert tracker.on_failed(0, 0.0) == tracker.on_ended(0, 0.0) == tracker.on_started(0) == []
    assert tracker.on_released(0) == []
    assert tracker.state(0) is RELEASED
    with pytest.raises(ValueError, match="stopped by its owner"):
        tracker.on_replace(0, 1.0, force=True)


def test_releasing_the_last_that_was_waited_for_lets_the_others_start() -> None:
    tracker = RestartTracker(Restart(scope="mesh"), 2)
    tracker.on_failed(0, 1.0)

    tracker.on_released(1)

    assert tracker.next_check_s() == 1.0
    assert tracker.check(1.1) == [StartRank(0, 1)]


def test_releasing_a_mesh_that_waits_leaves_nothing_to_do() -> None:
    tracker = RestartTracker(Restart(backoff_s=1.0), 1)
    tracker.on_failed(0, 0.0)
    tracker.on_released(0)

    assert tracker.next_check_s() is None
    assert tracker.check(100.0) == []


def into(state: RankState) -> RestartTracker:
    """A tracker of two ranks whose rank 0 is in ``state``."""
    tracker = RestartTracker(Restart(backoff_s=1.0), 2)
    if state is STOPPING:
        tracker.on_replace(0, 0.0, force=True)
    elif state is HOLE:
        tracker.on_failed(0, 0.0, may_restart=False)
    elif state is RELEASED:
        tracker.on_released(0)
    elif state is not UP:
        tracker.on_failed(0, 0.0)
        tracker.check(1.0 if state is STARTING else 0.0)
    assert tracker.state(0) is state
    return tracker


EVENTS: dict[str, Callable[[RestartTracker], object]] = {
    "failed": lambda tracker: tracker.on_failed(0, 5.0),
    "lost": lambda tracker: tracker.on_failed(0, 5.0, may_restart=False),
    "ended": lambda tracker: tracker.on_ended(0, 5.0),
    "started": lambda tracker: tracker.on_started(0),
    "released": lambda tracker: tracker.on_released(0),
    "replace": lambda tracker: tracker.on_replace(0, 5.0),
    "force": lambda tracker: tracker.on_replace(0, 5.0, force=True),
}
NEXT = {
    UP: {"failed": WAITING, "lost": HOLE, "released": RELEASED, "force": STOPPING},
    STOPPING: {
        "failed": STARTING,
        "lost": HOLE,
        "ended": STARTING,
        "started": STOPPING,
        "released": RELEASED,
        "replace": STOPPING,
        "force": STOPPING,
    },
    WAITING: {"failed": STARTING, "lost": HOLE, "released": RELEASED, "replace": STARTING, "force": STARTING},
    STARTING: {
        "failed": WAITING,
        "lost": HOLE,
        "started": UP,
        "released": RELEASED,
        "replace": STARTING,
        "force": STARTING,
    },
    HOLE: {
        "failed": HOLE,
        "lost": HOLE,
        "ended": HOLE,
        "started": HOLE,
        "released": RELEASED,
        "replace": STARTING,
        "force": STARTING,
    },
    RELEASED: dict.fromkeys(["failed", "lost", "ended", "started", "released"], RELEASED),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", RankState)
def test_every_event_in_every_state_moves_the_rank_or_raises_and_changes_nothing(state: RankState, event: str) -> None:
    tracker = into(state)
    before = copy.deepcopy(vars(tracker))

    if event in NEXT[state]:
        EVENTS[event](tracker)
        assert tracker.state(0) is NEXT[state][event]
    else:
        with pytest.raises(ValueError if event in {"replace", "force"} else RuntimeError):
            EVENTS[event](tracker)
        assert vars(tracker) == before
    assert tracker.state(1) is UP


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_the_mesh_does_not_have_is_refused(rank: int) -> None:
    tracker = RestartTracker(Restart(), 2)

    for event in (tracker.on_failed, tracker.on_ended, tracker.on_replace):
        with pytest.raises(IndexError, match="ranks 0 to 1"):
            event(rank, 0.0)
    assert states(tracker) == [UP, UP]
