"""Who waits to hear of a process elsewhere hears of its start, its end and what follows it; each once, and in order."""

from __future__ import annotations

import pytest

from danaus.runtime.address import next_address
from danaus.runtime.failure import FailureKind
from danaus.runtime.host.proc_table import TellGone, TellReplaced, TellUp
from danaus.runtime.network.far_procs import Ask, FarProcs

from .far_losses import P0, P1, P2, Q0, A, B, failure, lose, lost

# watching:


def test_the_first_watcher_has_the_agent_there_asked_and_others_do_not() -> None:
    far = FarProcs()

    assert far.on_watch(P0, A) == [Ask(P0)]
    assert far.on_watch(P0, B) == []
    assert far.on_watch(Q0, A) == [Ask(Q0)]


def test_all_watchers_hear_that_it_is_up_and_a_later_one_at_once() -> None:
    far = FarProcs()
    far.on_watch(P0, B)
    far.on_watch(P0, A)

    assert far.on_up(P0, restartable=False) == [TellUp(A, P0), TellUp(B, P0)]
    assert far.on_watch(P0, "c.0") == [TellUp("c.0", P0)]


def test_a_start_and_an_end_that_nobody_waits_for_are_told_to_nobody() -> None:
    far = FarProcs()

    assert far.on_up(P0, restartable=True) == []
    assert far.on_died(P0, failure(P0), None) == []


def test_what_was_ordered_is_told_to_its_owner_unasked() -> None:
    far = FarProcs()

    assert far.on_ordered([P0, Q0], A, restartable=False) == []
    assert far.on_watch(P0, B) == []
    assert far.on_up(P0, restartable=False) == [TellUp(A, P0), TellUp(B, P0)]
    assert far.on_up(Q0, restartable=False) == [TellUp(A, Q0)]


# ends:


def test_watchers_hear_of_an_end_once_and_who_asks_later_at_once() -> None:
    far = FarProcs()
    for watcher in (B, A):
        far.on_watch(P0, watcher)
    why = failure(P0)

    assert far.on_died(P0, why, None) == [TellGone(A, P0, why), TellGone(B, P0, why)]
    assert far.on_died(P0, failure(P0, FailureKind.EXITED), None) == []
    assert far.on_watch(P0, "c.0") == [TellGone("c.0", P0, why)]


def test_an_end_is_told_before_it_was_ever_up() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    why = failure(P0, FailureKind.SPAWN_ERROR)

    assert far.on_died(P0, why, None) == [TellGone(A, P0, why)]
    assert far.on_up(P0, restartable=False) == []


def test_watchers_of_one_that_is_followed_watch_the_next() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_up(P0, restartable=True)
    first, second = failure(P0, restarts=True), failure(P1)

    assert far.on_died(P0, first, P1) == [TellGone(A, P0, first, P1)]
    assert far.on_up(P1, restartable=True) == [TellUp(A, P1)]
    assert far.on_died(P1, second, None) == [TellGone(A, P1, second)]


def test_who_asks_for_one_that_was_followed_hears_of_all_and_watches_the_last() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    first, second = failure(P0, restarts=True), failure(P1, restarts=True)
    far.on_died(P0, first, P1)
    far.on_up(P1, restartable=True)
    assert far.on_watch(P0, B) == [TellGone(B, P0, first, P1), TellUp(B, P1)]
    far.on_died(P1, second, P2)

    assert far.on_watch(P0, "c.0") == [TellGone("c.0", P0, first, P1), TellGone("c.0", P1, second, P2)]
    assert far.on_up(P2, restartable=True) == [TellUp(A, P2), TellUp(B, P2), TellUp("c.0", P2)]


def test_a_watcher_that_has_ended_hears_nothing_any_more() -> None:
    far = FarProcs()
    for watcher in (A, B):
        far.on_watch(P0, watcher)
        far.on_watch(Q0, watcher)
    far.on_died(Q0, failure(Q0), None)

    far.on_watcher_gone(A)

    assert far.on_died(P0, failure(P0), None) == [TellGone(B, P0, failure(P0))]
    assert far.on_replaced(Q0, next_address(Q0)) == [TellReplaced(B, Q0, next_address(Q0))]


# places that are filled again:


def test_watchers_of_one_that_was_lost_for_good_hear_who_takes_its_place() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_died(P0, failure(P0), None)
    far.on_watch(P0, B)

    assert far.on_replaced(P0, P1) == [TellReplaced(A, P0, P1), TellReplaced(B, P0, P1)]
    assert far.on_replaced(P0, P1) == []
    assert far.on_up(P1, restartable=False) == [TellUp(A, P1), TellUp(B, P1)]
    assert far.on_watch(P0, "c.0") == [TellGone("c.0", P0, failure(P0), P1), TellUp("c.0", P1)]


def test_one_that_is_up_before_it_is_said_whose_place_it_takes_is_told_of_once() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_died(P0, failure(P0), None)

    assert far.on_up(P1, restartable=False) == [TellReplaced(A, P0, P1), TellUp(A, P1)]
    assert far.on_replaced(P0, P1) == []


def test_who_watches_a_lost_process_hears_at_once_that_the_next_is_up_already() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_watch(P1, B)
    far.on_up(P1, restartable=False)
    far.on_died(P0, failure(P0), None)

    assert far.on_replaced(P0, P1) == [TellReplaced(A, P0, P1), TellUp(A, P1)]


def test_an_order_for_a_place_that_was_lost_for_good_tells_who_still_watches_it() -> None:
    far = FarProcs()
    far.on_ordered([P0], A, restartable=False)
    far.on_watch(P0, B)
    far.on_died(P0, failure(P0), None)

    assert far.on_ordered([P1], A, restartable=False) == [TellReplaced(A, P0, P1), TellReplaced(B, P0, P1)]
    assert far.on_up(P1, restartable=False) == [TellUp(A, P1), TellUp(B, P1)]


def test_nobody_waits_at_the_place_of_one_that_was_stopped() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    stopped = failure(P0, FailureKind.STOPPED)

    assert far.on_died(P0, stopped, None) == [TellGone(A, P0, stopped)]
    assert far.on_watch(P0, B) == [TellGone(B, P0, stopped)]
    assert far.on_replaced(P0, P1) == []


# hosts:


@pytest.mark.parametrize("restartable", [True, False])
def test_all_that_was_on_a_host_lost_for_good_is_gone_for_good(restartable: bool) -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_watch(Q0, A)
    far.on_up(P0, restartable=restartable)

    assert lose(far, 1, may_return=False) == [TellGone(A, P0, lost(P0))]
    # The other host is there.
    assert far.on_up(Q0, restartable=restartable) == [TellUp(A, Q0)]


def test_ranks_under_a_policy_are_followed_where_the_host_may_return() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_up(P0, restartable=True)

    assert lose(far, 1, may_return=True) == [TellGone(A, P0, lost(P0, restarts=True), P1)]
    assert far.on_host_back(1) == [Ask(P1)]
    assert far.on_up(P1, restartable=True) == [TellUp(A, P1)]


def test_ranks_without_a_policy_are_gone_even_where_the_host_may_return() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_up(P0, restartable=False)

    assert lose(far, 1, may_return=True) == [TellGone(A, P0, lost(P0))]


@pytest.mark.parametrize("is_ordered_first", [True, False])
def test_the_policy_of_a_mesh_that_was_ordered_here_holds_before_its_ranks_are_up(is_ordered_first: bool) -> None:
    far = FarProcs()
    if is_ordered_first:
        far.on_ordered([P0], A, restartable=False)
        far.on_order_sent([P0])
    far.on_policy("m-a1@1:2x1", restartable=True)
    far.on_policy("other@1x1", restartable=False)
    far.on_watch(P0, A)

    assert lose(far, 1, may_return=True) == [TellGone(A, P0, lost(P0, restarts=True), P1)]


def test_a_policy_that_is_taken_away_holds_at_once() -> None:
    far = FarProcs()
    far.on_ordered([P0], A, restartable=True)
    far.on_up(P0, restartable=True)

    far.on_policy("m-a1@1:2x1", restartable=False)

    assert lose(far, 1, may_return=True) == [TellGone(A, P0, lost(P0))]


def test_a_rank_that_is_to_follow_waits_through_further_losses_of_its_host() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_up(P0, restartable=True)
    lose(far, 1, may_return=True)

    assert lose(far, 1, may_return=True) == []
    assert far.on_host_back(1) == [Ask(P1)]
    assert far.on_up(P1, restartable=True) == [TellUp(A, P1)]
    assert lose(far, 1, may_return=True) == [TellGone(A, P1, lost(P1, restarts=True), P2)]


def test_a_rank_whose_order_was_lost_with_its_host_is_gone_and_followed() -> None:
    far = FarProcs()
    far.on_ordered([P0], A, restartable=True)
    far.on_order_sent([P0])
    far.on_up(P0, restartable=True)
    lose(far, 1, may_return=True)
    far.on_ordered([P1], A, restartable=True)
    far.on_order_sent([P1])

    # It was never up, and nobody would order it again.
    assert lose(far, 1, may_return=True) == [TellGone(A, P1, lost(P1, restarts=True), P2)]
    assert far.is_gone(P1)
    assert not far.is_gone(P2)


@pytest.mark.parametrize("restartable", [True, False])
def test_an_order_that_waits_for_a_host_is_not_lost_with_the_next(restartable: bool) -> None:
    far = FarProcs()
    far.on_ordered([P0], A, restartable=restartable)

    assert lose(far, 1, may_return=True) == []
    far.on_order_sent([P0])
    assert far.on_up(P0, restartable=restartable) == [TellUp(A, P0)]


def test_who_waits_for_one_that_was_lost_before_it_started_hears_what_follows() -> None:
    far = FarProcs()
    far.on_watch(P0, B)
    far.on_up(P0, restartable=True)
    lose(far, 1, may_return=True)
    # ~1 was ordered and lost with the next host; nobody but its owner's agent knows of that.
    assert lose(far, 1, may_return=True) == []
    assert far.on_host_back(1) == [Ask(P1)]

    assert far.on_replaced(P1, P2) == [TellGone(B, P1, lost(P1, restarts=True), P2)]
    assert far.on_up(P2, restartable=True) == [TellUp(B, P2)]


def test_who_hears_late_what_follows_hears_at_once_that_it_is_up() -> None:
    far = FarProcs()
    far.on_watch(P0, B)
    far.on_up(P0, restartable=True)
    lose(far, 1, may_return=True)
    far.on_watch(P2, A)
    far.on_up(P2, restartable=True)

    told = far.on_replaced(P1, P2)

    assert told[0] == TellGone(B, P1, lost(P1, restarts=True), P2)
    assert TellUp(B, P2) in told


def test_a_rank_that_is_to_follow_is_gone_when_its_host_is_given_up() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_up(P0, restartable=True)
    lose(far, 1, may_return=True)

    assert lose(far, 1, may_return=False) == [TellGone(A, P1, lost(P1))]
    assert lose(far, 1, may_return=False) == []


def test_why_a_host_is_gone_is_why_its_ranks_are() -> None:
    far = FarProcs()
    far.on_watch(P0, A)

    (told,) = lose(far, 1, may_return=False, kind=FailureKind.STOPPED)

    assert (told.failure.kind, told.failure.host, told.failure.detail) == (FailureKind.STOPPED, "host1", "cut off")
    # Stopped is no loss: nobody waits for another.
    assert far.on_host_back(1) == []


def test_the_next_agent_of_a_host_is_asked_for_what_was_lost_for_good_and_is_still_watched() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_watch(Q0, A)
    lose(far, 1, may_return=False)

    assert far.on_host_back(1) == [Ask(P1)]
    assert far.on_host_back(2) == [Ask(Q0)]
    assert far.on_up(P1, restartable=False) == [TellReplaced(A, P0, P1), TellUp(A, P1)]


def test_the_next_agent_is_not_asked_for_what_nobody_watches() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_watcher_gone(A)

    assert far.on_host_back(1) == []


# owners that give up:


def test_a_rank_that_its_owner_does_not_start_is_gone_as_the_one_before_it() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_up(P0, restartable=True)
    lose(far, 1, may_return=True)

    assert far.on_abandoned(P1) == [TellGone(A, P1, lost(P0))]
    assert far.on_abandoned(P1) == []
    assert far.on_watch(P0, B) == [TellGone(B, P0, lost(P0, restarts=True), P1), TellGone(B, P1, lost(P0))]


def test_only_what_is_to_follow_another_can_be_abandoned() -> None:
    far = FarProcs()
    far.on_watch(P0, A)
    far.on_watch(P2, A)

    assert far.on_abandoned(P0) == []
    assert far.on_abandoned(P2) == []
