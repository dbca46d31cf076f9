"""Replies to one call go on together, and none waits long, is lost or comes twice."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.network.joins import HOLD_S, MAX_CALLS, Joins

CALL = ("caller@1x1.0", 7)
OTHER = ("caller@1x1.0", 8)
ELSEWHERE = ("caller@2x1.0", 7)


def test_replies_go_on_as_one_when_the_last_is_there() -> None:
    joins = Joins()
    joins.expect(CALL, 3)

    assert joins.add(CALL, "a", now_s=1.0) == []
    assert joins.add(CALL, "b", now_s=1.0) == []
    assert joins.add(CALL, "c", now_s=1.0) == ["a", "b", "c"]
    assert joins.next_due_s() is None


def test_a_reply_that_nobody_expects_goes_on_alone() -> None:
    joins = Joins()
    joins.expect(CALL, 1)

    assert joins.add(CALL, "only", now_s=1.0) == ["only"]
    assert joins.add(OTHER, "unknown", now_s=1.0) == ["unknown"]
    assert joins.next_due_s() is None


def test_what_comes_after_the_last_goes_on_alone() -> None:
    joins = Joins()
    joins.expect(CALL, 2)
    joins.add(CALL, "a", now_s=1.0)
    joins.add(CALL, "b", now_s=1.0)

    assert joins.add(CALL, "one more", now_s=1.0) == ["one more"]


def test_the_first_reply_says_how_long_the_others_may_take() -> None:
    joins = Joins()
    joins.expect(CALL, 3)
    joins.add(CALL, "a", now_s=1.0)
    joins.add(CALL, "b", now_s=1.0 + HOLD_S / 2)

    assert joins.next_due_s() == 1.0 + HOLD_S
    assert joins.due(now_s=1.0 + HOLD_S / 2) == []
    assert joins.due(now_s=1.0 + HOLD_S) == [(CALL, ["a", "b"])]
    assert joins.next_due_s() is None


def test_those_that_are_late_wait_for_one_another_again() -> None:
    joins = Joins()
    joins.expect(CALL, 4)
    joins.add(CALL, "a", now_s=1.0)
    joins.due(now_s=2.0)

    assert joins.add(CALL, "b", now_s=3.0) == []
    assert joins.next_due_s() == 3.0 + HOLD_S
    assert joins.add(CALL, "c", now_s=3.0) == []
    assert joins.add(CALL, "d", now_s=3.0) == ["b", "c", "d"]


def test_calls_do_not_wait_for_one_another() -> None:
    joins = Joins()
    for key in (CALL, OTHER, ELSEWHERE):
        joins.expect(key, 2)
    joins.add(CALL, "a", now_s=1.0)
    joins.add(OTHER, "b", now_s=2.0)

    assert joins.add(ELSEWHERE, "c", now_s=3.0) == []
    assert joins.add(ELSEWHERE, "d", now_s=3.0) == ["c", "d"]
    assert joins.due(now_s=1.0 + HOLD_S) == [(CALL, ["a"])]
    assert joins.next_due_s() == 2.0 + HOLD_S


def test_what_waits_for_a_process_is_taken_at_once_and_for_no_other() -> None:
    joins = Joins()
    for key in (CALL, OTHER, ELSEWHERE):
        joins.expect(key, 2)
        joins.add(key, f"for {key}", now_s=1.0)

    assert joins.take("caller@1x1.0") == [(CALL, [f"for {CALL}"]), (OTHER, [f"for {OTHER}"])]
    assert joins.take("caller@1x1.0") == []
    assert joins.take("nobody.0") == []
    assert joins.due(now_s=9.0) == [(ELSEWHERE, [f"for {ELSEWHERE}"])]
    # The rest is still expected.
    assert joins.add(CALL, "last", now_s=9.0) == ["last"]


def test_a_call_that_is_passed_on_again_keeps_what_waits() -> None:
    joins = Joins()
    joins.expect(CALL, 3)
    joins.add(CALL, "a", now_s=1.0)

    joins.expect(CALL, 2)
    joins.add(CALL, "b", now_s=1.0)

    assert joins.add(CALL, "c", now_s=1.0) == ["a", "b", "c"]


def test_the_oldest_calls_are_forgotten_and_their_replies_go_on_alone() -> None:
    joins = Joins()
    for port in range(MAX_CALLS + 1):
        joins.expect(("caller.0", port), 2)

    assert joins.add(("caller.0", 0), "old", now_s=1.0) == ["old"]
    assert joins.add(("caller.0", 1), "kept", now_s=1.0) == []


def test_a_call_is_not_forgotten_while_a_reply_waits_and_is_afterwards() -> None:
    joins = Joins()
    oldest = ("caller.0", 0)
    joins.expect(oldest, 3)
    joins.add(oldest, "waits", now_s=1.0)
    for port in range(1, MAX_CALLS + 10):
        joins.expect(("caller.0", port), 2)
    assert joins.due(now_s=2.0) == [(oldest, ["waits"])]

    joins.expect(("caller.0", MAX_CALLS + 10), 2)

    forgotten = [port for port in range(12) if joins.add(("caller.0", port), "late", now_s=3.0)]
    assert forgotten == list(range(11))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("expect"), st.integers(0, 3), st.integers(0, 4)),
        st.tuples(st.just("add"), st.integers(0, 3), st.floats(0, 0.01)),
        st.tuples(st.just("take"), st.integers(0, 1), st.floats(0, 0.01)),
        st.tuples(st.just("due"), st.just(0), st.floats(0, 0.01)),
    ),
    max_size=60,
)


@given(STEPS)
def test_every_reply_goes_on_once_and_in_order_whatever_happens(steps: list[tuple[str, int, float]]) -> None:
    joins, now_s = Joins(), 0.0
    given_in: dict[tuple[str, int], list[int]] = {}
    came_out: dict[tuple[str, int], list[int]] = {}

    for number, (step, which, amount) in enumerate(steps):
        key = (f"caller.{which % 2}", which)
        if step == "expect":
            joins.expect(key, int(amount))
            continue
        now_s += amount
        if step == "add":
            given_in.setdefault(key, []).append(number)
            came_out.setdefault(key, []).extend(joins.add(key, number, now_s=now_s))
            continue
        for taken, items in joins.take(f"caller.{which}") if step == "take" else joins.due(now_s=now_s):
            came_out[taken].extend(items)
        assert step != "due" or (joins.next_due_s() or 1e9) > now_s
    for taken, items in joins.due(now_s=1e9):
        came_out[taken].extend(items)

    assert came_out == given_in
    assert all(count == 1 for items in came_out.values() for count in Counter(items).values())
