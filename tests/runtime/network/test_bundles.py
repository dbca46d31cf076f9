"""What may travel with others waits a moment for them, and no longer."""

from __future__ import annotations

import pytest

from danaus.runtime.network.bundles import FULL, FULL_BYTES, HOLD_S, Bundles


def test_what_waits_goes_in_order_once_the_moment_is_over() -> None:
    bundles = Bundles()
    bundles.add(1, [b"a"], now_s=1.0)
    bundles.add(1, [b"b", b"body"], now_s=1.0 + HOLD_S / 2)

    assert bundles.due(now_s=1.0 + HOLD_S / 2) == []
    assert bundles.next_due_s() == 1.0 + HOLD_S
    assert bundles.due(now_s=1.0 + HOLD_S) == [(1, [[b"a"], [b"b", b"body"]])]
    assert bundles.due(now_s=9.0) == []
    assert bundles.next_due_s() is None


def test_the_moment_begins_anew_for_what_comes_later() -> None:
    bundles = Bundles()
    bundles.add(1, [b"a"], now_s=1.0)
    bundles.due(now_s=2.0)

    bundles.add(1, [b"b"], now_s=2.0)

    assert bundles.due(now_s=2.0) == []
    assert bundles.next_due_s() == 2.0 + HOLD_S


def test_neighbours_do_not_wait_for_one_another() -> None:
    bundles = Bundles()
    bundles.add(1, [b"a"], now_s=1.0)
    bundles.add(2, [b"b"], now_s=2.0)

    assert bundles.next_due_s() == 1.0 + HOLD_S
    assert bundles.due(now_s=1.5) == [(1, [[b"a"]])]
    assert bundles.next_due_s() == 2.0 + HOLD_S


def test_what_is_taken_along_by_another_message_waits_no_more() -> None:
    bundles = Bundles()
    bundles.add(1, [b"a"], now_s=1.0)
    bundles.add(2, [b"b"], now_s=1.0)

    assert bundles.take(1) == [[b"a"]]
    assert bundles.take(1) == []
    assert bundles.take(3) == []
    assert bundles.due(now_s=9.0) == [(2, [[b"b"]])]


@pytest.mark.parametrize(
    ("count", "size"),
    [(FULL, 1), (2, FULL_BYTES // 2), (1, FULL_BYTES)],
    ids=["many messages", "two large ones", "one that fills it"],
)
def test_what_is_full_is_due_at_once(count: int, size: int) -> None:
    bundles = Bundles()
    for _ in range(count - 1):
        bundles.add(1, [bytes(size)], now_s=1.0)
        assert bundles.due(now_s=1.0) == []

    bundles.add(1, [bytes(size)], now_s=1.0)

    assert bundles.next_due_s() == 1.0
    assert [len(held) for _, held in bundles.due(now_s=1.0)] == [count]


def test_sizes_are_those_of_all_frames_and_begin_anew() -> None:
    bundles = Bundles()
    bundles.add(1, [bytes(FULL_BYTES - 2), b"x"], now_s=1.0)
    assert bundles.due(now_s=1.0) == []
    bundles.take(1)

    bundles.add(1, [b"x", b"y"], now_s=2.0)

    assert bundles.due(now_s=2.0) == []
