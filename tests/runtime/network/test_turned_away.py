"""When a daemon says who was turned away."""

from __future__ import annotations

from danaus.runtime.network.turned_away import EVERY_S, SURE_S, Counts, TurnedAway


def test_nothing_happened_is_nothing_to_say() -> None:
    turned_away = TurnedAway()

    assert not turned_away.check(Counts(), now_s=100.0)
    assert turned_away.next_check_s() is None


def test_the_first_is_told_at_once_and_the_next_together() -> None:
    turned_away = TurnedAway()

    assert turned_away.check(Counts(garbage=1), now_s=100.0)
    assert not turned_away.check(Counts(garbage=2), now_s=101.0)
    assert not turned_away.check(Counts(garbage=3, refused=1), now_s=102.0)
    assert turned_away.next_check_s() == 100.0 + EVERY_S
    assert turned_away.check(Counts(garbage=3, refused=1), now_s=100.0 + EVERY_S)
    assert not turned_away.check(Counts(garbage=3, refused=1), now_s=200.0)
    assert turned_away.next_check_s() is None


def test_a_connection_that_gets_in_after_all_is_not_told() -> None:
    turned_away = TurnedAway()

    assert not turned_away.check(Counts(failed=1), now_s=100.0)
    assert turned_away.next_check_s() == 100.0 + SURE_S
    assert not turned_away.check(Counts(), now_s=100.1)
    assert turned_away.next_check_s() is None


def test_a_connection_that_came_to_nothing_is_told_once_that_is_sure() -> None:
    turned_away = TurnedAway()
    turned_away.check(Counts(failed=1), now_s=100.0)

    assert not turned_away.check(Counts(failed=2), now_s=100.0 + SURE_S - 0.1)
    assert turned_away.check(Counts(failed=2), now_s=100.0 + SURE_S)


def test_what_is_sure_does_not_wait_for_what_is_not() -> None:
    turned_away = TurnedAway()
    turned_away.check(Counts(failed=1), now_s=100.0)

    assert turned_away.check(Counts(refused=1, failed=1), now_s=100.1)
