"""Outbox and Inbox, alone and over a channel that loses, doubles, reorders and is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from danaus.runtime.network.streams import (
    ACK_DELAY_S,
    ACK_PACKETS,
    FIRST_TIMEOUT_S,
    LAST_TIMEOUT_S,
    RESENT_BYTES,
    RESENT_PACKETS,
    SLOWEST_BYTES_PER_S,
    Inbox,
    Outbox,
    Send,
)

# Shared machines are slow at times.
pytestmark = pytest.mark.timeout(60)

HALF_MIB = 1 << 19


def filled(count: int, *, size_bytes: int = 0, now_s: float = 0.0) -> Outbox:
    outbox = Outbox()
    for number in range(1, count + 1):
        outbox.add(number, size_bytes, now_s=now_s)
    return outbox


def numbers(sends: list[Send]) -> list[int]:
    assert all(send.seq == send.packet for send in sends)
    return [send.seq for send in sends]


def test_packets_are_numbered_from_one() -> None:
    outbox = Outbox()
    assert outbox.add("a", 1, now_s=0.0) == [Send(1, "a")]
    assert outbox.add("b", 1, now_s=0.0) == [Send(2, "b")]
    assert (outbox.num_unacked, outbox.num_waiting, outbox.size_bytes) == (2, 0, 2)


def test_full_window_of_messages_holds_back_until_acknowledged() -> None:
    outbox = Outbox(window_messages=2)
    sent = [outbox.add(number, 10, now_s=0.0) for number in range(1, 6)]
    assert list(map(numbers, sent)) == [[1], [2], [], [], []]
    assert (outbox.num_unacked, outbox.num_waiting, outbox.size_bytes) == (2, 3, 50)
    assert numbers(outbox.on_ack(1, now_s=0.1)) == [3]
    assert numbers(outbox.on_ack(3, now_s=0.2)) == [4, 5]
    assert (outbox.num_unacked, outbox.num_waiting, outbox.size_bytes) == (2, 0, 20)


def test_full_window_of_bytes_holds_back_until_acknowledged() -> None:
    outbox = Outbox(window_bytes=100)
    assert numbers(outbox.add(1, 60, now_s=0.0)) == [1]
    assert outbox.add(2, 60, now_s=0.0) == []
    assert numbers(outbox.on_ack(1, now_s=0.0)) == [2]


def test_packet_that_would_fit_does_not_overtake_one_that_waits() -> None:
    outbox = Outbox(window_bytes=100)
    outbox.add(1, 60, now_s=0.0)
    outbox.add(2, 60, now_s=0.0)
    assert outbox.add(3, 1, now_s=0.0) == []
    assert numbers(outbox.on_ack(1, now_s=0.0)) == [2, 3]


def test_packet_larger_than_the_window_goes_alone() -> None:
    outbox = Outbox(window_bytes=100)
    outbox.add(1, 1, now_s=0.0)
    assert outbox.add(2, 1000, now_s=0.0) == []
    assert outbox.add(3, 1, now_s=0.0) == []
    assert numbers(outbox.on_ack(1, now_s=0.0)) == [2]
    assert numbers(outbox.on_ack(2, now_s=0.0)) == [3]


def test_stale_acknowledgement_changes_nothing() -> None:
    outbox = filled(5)
    outbox.on_ack(3, now_s=1.0)
    due_s = outbox.next_check_s()
    assert outbox.on_ack(2, now_s=9.0) == outbox.on_ack(3, now_s=9.0) == []
    assert (outbox.num_unacked, outbox.next_check_s()) == (2, due_s)


def test_acknowledgement_of_what_was_never_sent_is_refused_and_changes_nothing() -> None:
    outbox = Outbox(window_messages=1)
    outbox.add(1, 1, now_s=0.0)
    outbox.add(2, 1, now_s=0.0)
    with pytest.raises(ValueError, match="packet 2 was acknowledged, but 1 is the last that was sent"):
        outbox.on_ack(2, now_s=0.0)
    assert (outbox.num_unacked, outbox.num_waiting) == (1, 1)


def test_restored_path_gets_all_that_is_unacknowledged_and_nothing_that_waits() -> None:
    outbox = Outbox(window_messages=3)
    for number in range(1, 6):
        outbox.add(number, 1, now_s=0.0)
    outbox.on_ack(1, now_s=0.0)
    assert numbers(outbox.on_path_restored(now_s=1.0)) == [2, 3, 4]
    assert outbox.num_resent == 3


def test_check_sends_again_after_the_timeout_and_backs_off_to_its_limit() -> None:
    outbox = filled(1)
    now_s, waits = 0.0, list[float]()
    for _ in range(4):
        due_s = outbox.next_check_s()
        assert due_s is not None
        assert outbox.check(now_s=due_s - 1e-6) == []
        assert numbers(outbox.check(now_s=due_s)) == [1]
        waits.append(due_s - now_s)
        now_s = due_s
    assert waits == [FIRST_TIMEOUT_S, 2 * FIRST_TIMEOUT_S, LAST_TIMEOUT_S, LAST_TIMEOUT_S]


def test_progress_starts_the_timeout_anew() -> None:
    outbox = filled(3)
    outbox.check(now_s=FIRST_TIMEOUT_S)
    outbox.on_ack(1, now_s=10.0)
    assert outbox.next_check_s() == 10.0 + FIRST_TIMEOUT_S


def test_timeout_begins_with_the_first_packet_under_way() -> None:
    outbox = filled(1)
    outbox.on_ack(1, now_s=1.0)
    assert outbox.next_check_s() is None
    assert outbox.check(now_s=100.0) == []
    outbox.add(2, 0, now_s=50.0)
    outbox.add(3, 0, now_s=50.2)
    assert outbox.next_check_s() == 50.0 + FIRST_TIMEOUT_S


def test_timeout_grows_with_the_bytes_under_way() -> None:
    outbox = filled(1, size_bytes=1 << 30)
    assert outbox.next_check_s() == pytest.approx(FIRST_TIMEOUT_S + (1 << 30) / SLOWEST_BYTES_PER_S)


@pytest.mark.parametrize(
    ("count", "size_bytes", "resent"),
    [(1000, 100, RESENT_PACKETS), (10, HALF_MIB, 2), (1, 4 * RESENT_BYTES, 1), (3, 0, 3)],
)
def test_check_sends_a_bounded_part_again_but_at_least_one_packet(count: int, size_bytes: int, resent: int) -> None:
    outbox = filled(count, size_bytes=size_bytes)
    assert numbers(outbox.check(now_s=100.0)) == list(range(1, resent + 1))


def test_after_one_timeout_a_lost_window_is_sent_again_as_fast_as_it_is_acknowledged() -> None:
    outbox = filled(200)
    assert numbers(outbox.check(now_s=1.0)) == list(range(1, 65))
    assert outbox.on_ack(10, now_s=1.1) == [], "the rest of what was sent again is still under way"
    assert numbers(outbox.on_ack(64, now_s=1.1)) == list(range(65, 129))
    assert numbers(outbox.on_ack(150, now_s=1.1)) == list(range(151, 201)), "the receiver had some of it"
    outbox.add(201, 0, now_s=1.1)
    assert outbox.on_ack(200, now_s=1.1) == [], "201 was sent after the timeout: it is not known to be lost"


def test_packets_after_a_timeout_that_lost_nothing_are_not_sent_twice() -> None:
    outbox = filled(200)
    outbox.check(now_s=1.0)
    assert outbox.on_ack(200, now_s=1.0) == []
    assert outbox.num_resent == RESENT_PACKETS


@pytest.mark.parametrize("window", [(0, 1), (1, 0)])
def test_window_that_lets_nothing_pass_is_refused(window: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="lets nothing pass"):
        Outbox(*window)


def test_inbox_delivers_in_order_and_keeps_what_comes_early() -> None:
    inbox = Inbox()
    assert inbox.on_packet(2, "b", now_s=0.0) == []
    assert inbox.on_packet(4, "d", now_s=0.0) == []
    assert inbox.num_ahead == 2
    assert inbox.on_packet(1, "a", now_s=0.0) == ["a", "b"]
    assert inbox.on_packet(3, "c", now_s=0.0) == ["c", "d"]
    assert (inbox.cumulative, inbox.num_ahead) == (4, 0)


def test_inbox_drops_and_counts_duplicates() -> None:
    inbox = Inbox()
    for seq in (1, 1, 3, 3, 1):
        inbox.on_packet(seq, seq, now_s=0.0)
    assert (inbox.cumulative, inbox.num_ahead, inbox.num_duplicates) == (1, 1, 3)


def test_none_is_a_packet_like_any_other() -> None:
    inbox = Inbox()
    inbox.on_packet(2, None, now_s=0.0)
    assert inbox.on_packet(1, None, now_s=0.0) == [None, None]


def test_inbox_bounds_what_it_keeps_by_count_and_by_bytes() -> None:
    inbox = Inbox(max_ahead=3, max_ahead_bytes=100)
    inbox.on_packet(2, "kept", 60, now_s=0.0)
    inbox.on_packet(3, "too many bytes", 60, now_s=0.0)
    inbox.on_packet(5, "too far ahead", 1, now_s=0.0)
    assert (inbox.num_ahead, inbox.num_dropped) == (1, 2)
    assert inbox.on_packet(1, "first", 10**9, now_s=0.0) == ["first", "kept"], "what is next is never too large"
    inbox.on_packet(4, "kept", 60, now_s=0.0)
    assert inbox.num_ahead == 1, "delivered bytes do not count any more"


def test_number_that_no_sender_gives_is_refused() -> None:
    with pytest.raises(ValueError, match="has the number 0"):
        Inbox().on_packet(0, "?", now_s=0.0)


def test_first_packet_makes_an_acknowledgement_due_after_a_short_wait() -> None:
    inbox = Inbox()
    assert (inbox.next_ack_s, inbox.take_ack()) == (None, None)
    inbox.on_packet(1, "a", now_s=10.0)
    inbox.on_packet(2, "b", now_s=10.001)
    assert inbox.next_ack_s == 10.0 + ACK_DELAY_S
    assert inbox.take_ack() == 2
    assert (inbox.next_ack_s, inbox.take_ack()) == (None, None)


def test_many_packets_make_an_acknowledgement_due_at_once() -> None:
    inbox = Inbox()
    for seq in range(1, ACK_PACKETS):
        inbox.on_packet(seq, seq, now_s=10.0)
    inbox.on_packet(ACK_PACKETS, "last", now_s=10.001)
    assert inbox.next_ack_s == 10.001


def test_gap_makes_no_acknowledgement_due() -> None:
    inbox = Inbox()
    inbox.on_packet(2, "b", now_s=0.0)
    assert inbox.take_ack() is None


def test_duplicates_are_acknowledged_at_once_but_not_each_of_a_whole_window() -> None:
    inbox = Inbox()
    for seq in range(1, 1001):
        inbox.on_packet(seq, seq, now_s=0.0)
    inbox.take_ack()
    times = list[float]()
    for seq in range(1, 1001):
        now_s = 1.0 + seq * 1e-5
        inbox.on_packet(seq, seq, now_s=now_s)
        if inbox.next_ack_s is not None and inbox.next_ack_s <= now_s:
            assert inbox.take_ack() == 1000
            times.append(now_s)
    assert times == pytest.approx([1.00001, 1.00501], abs=2e-5)


def test_acknowledgement_of_a_duplicate_that_had_to_wait_comes_in_the_end() -> None:
    inbox = Inbox()
    inbox.on_packet(1, "a", now_s=0.0)
    for now_s in (1.0, 1.001):
        inbox.take_ack()
        inbox.on_packet(1, "a", now_s=now_s)
    assert inbox.next_ack_s == 1.0 + ACK_DELAY_S


class Channel(RuleBasedStateMachine):
    """A sender and a receiver with all that a path through a network may do to what is between them."""

    WINDOW, WINDOW_BYTES = 5, 1000

    @initialize(max_ahead=st.integers(0, 6), max_ahead_bytes=st.integers(0, 2000))
    def start(self, max_ahead: int, max_ahead_bytes: int) -> None:
        self.outbox = Outbox(self.WINDOW, self.WINDOW_BYTES)
        self.inbox = Inbox(max_ahead, max_ahead_bytes)
        self.now_s = 0.0
        self.sizes: list[int] = []
        self.received: list[int] = []
        self.packets: list[Send] = []
        self.acks: list[int] = []

    @rule(size_bytes=st.one_of(st.integers(0, 400), st.just(5000)))
    def add(self, size_bytes: int) -> None:
        self.sizes.append(size_bytes)
        self.packets += self.outbox.add(len(self.sizes), size_bytes, now_s=self.now_s)

    @precondition(lambda self: self.packets)
    @rule(place=st.integers(0, 100), again=st.booleans())
    def arrive(self, place: int, again: bool) -> None:
        send = self.packets[place % len(self.packets)]
        if not again:
            self.packets.remove(send)
        self.take(send)

    @precondition(lambda self: self.acks)
    @rule(place=st.integers(0, 100), again=st.booleans())
    def arrive_ack(self, place: int, again: bool) -> None:
        cumulative = self.acks[place % len(self.acks)]
        if not again:
            self.acks.remove(cumulative)
        self.packets += self.outbox.on_ack(cumulative, now_s=self.now_s)

    @precondition(lambda self: self.packets or self.acks)
    @rule(place=st.integers(0, 100))
    def lose(self, place: int) -> None:
        on_the_way: list[Any] = self.packets if self.packets and (place % 2 or not self.acks) else self.acks
        del on_the_way[place % len(on_the_way)]

    @rule(told=st.booleans())
    def cut(self, told: bool) -> None:
        self.packets.clear()
        self.acks.clear()
        if told:
            self.packets += self.outbox.on_path_restored(now_s=self.now_s)

    @rule(passed_s=st.sampled_from([0.001, 0.01, 0.6, 3.0]))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.packets += self.outbox.check(now_s=self.now_s)
        self.acknowledge()

    def take(self, send: Send) -> None:
        self.received += self.inbox.on_packet(send.seq, send.packet, self.sizes[send.packet - 1], now_s=self.now_s)

    def acknowledge(self) -> None:
        due_s = self.inbox.next_ack_s
        if due_s is not None and due_s <= self.now_s:
            cumulative = self.inbox.take_ack()
            assert cumulative is not None
            assert cumulative == len(self.received)
            self.acks.append(cumulative)

    @invariant()
    def received_is_what_was_sent_in_order_and_once(self) -> None:
        if hasattr(self, "outbox"):
            assert self.received == list(range(1, len(self.received) + 1))
            assert len(self.received) <= len(self.sizes)

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "outbox"):
            assert self.outbox.num_unacked <= self.WINDOW
            assert self.outbox._unacked_bytes <= self.WINDOW_BYTES or self.outbox.num_unacked == 1
            assert self.outbox.size_bytes == sum(self.sizes[self.outbox._acked :])
            assert self.inbox.num_ahead <= self.inbox.max_ahead
            assert self.inbox._ahead_bytes <= self.inbox.max_ahead_bytes
            assert self.outbox.num_unacked or not self.outbox.num_waiting

    def teardown(self) -> None:
        """Once the path is good again everything arrives, within a number of timeouts that the window bounds."""
        if not hasattr(self, "outbox"):
            return
        for _ in range(4 * len(self.sizes) + 20):
            packets, self.packets = self.packets, []
            for send in packets:
                self.take(send)
            self.acknowledge()
            acks, self.acks = self.acks, []
            for cumulative in acks:
                self.packets += self.outbox.on_ack(cumulative, now_s=self.now_s)
            times = [at_s for at_s in (self.inbox.next_ack_s, self.outbox.next_check_s()) if at_s is not None]
            if not self.packets and times:
                self.now_s = max(self.now_s, min(times))
                self.packets += self.outbox.check(now_s=self.now_s)
        assert self.received == list(range(1, len(self.sizes) + 1))
        assert (self.outbox.num_unacked, self.outbox.num_waiting, self.outbox.size_bytes) == (0, 0, 0)
        assert self.outbox.next_check_s() is None


TestChannel = Channel.TestCase
TestChannel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
