"""Flow control: the arithmetic of bounds, and that nobody is stuck for ever."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.messages.credits import DEFAULT_MAILBOX_BYTES, CreditAccount, CreditDebt

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SIZES = st.one_of(
    st.integers(0, 1 << 20),
    st.integers(DEFAULT_MAILBOX_BYTES // 5, DEFAULT_MAILBOX_BYTES // 3),
    st.integers(DEFAULT_MAILBOX_BYTES - 2, DEFAULT_MAILBOX_BYTES * 3),
)


def test_a_new_account_has_room_for_as_many_messages_as_its_bound() -> None:
    account = CreditAccount(3)
    num_sent = 0
    while account.has_room():
        account.spend(10)
        num_sent += 1

    assert num_sent == account.under_way == 3


def test_returned_credit_makes_room_for_just_as_many() -> None:
    account = CreditAccount(3)
    for _ in range(3):
        account.spend(10)

    account.give_back(2, 20)

    assert account.under_way == 1
    assert account.has_room()
    account.spend(10)
    account.spend(10)
    assert not account.has_room()


def test_bytes_bound_a_sender_of_few_large_messages() -> None:
    account = CreditAccount(100, 1000)
    account.spend(999)
    assert account.has_room()

    account.spend(5000)
    assert not account.has_room()

    account.give_back(1, 5000)
    assert account.has_room()


def test_one_message_may_be_larger_than_the_bound() -> None:
    account = CreditAccount(100, 1000)
    account.spend(1 << 40)
    assert not account.has_room()

    account.give_back(1, 1 << 40)

    assert account.under_way == 0
    assert account.has_room()


def test_with_nothing_under_way_a_message_may_be_sent_whatever_the_bytes_say() -> None:
    account = CreditAccount(1, 1000)
    account.spend(5000)
    account.give_back(1, 0)

    assert account.has_room()


def test_each_overdraft_at_least_doubles_what_may_be_over_the_bound() -> None:
    account = CreditAccount(1)
    rooms: list[int] = []
    for _ in range(4):
        account.grant_overdraft()
        while account.has_room():
            account.spend(0)
        rooms.append(account.under_way)

    assert rooms == [2, 3, 5, 9]


def test_an_overdraft_widens_the_bound_that_holds_the_sender_back() -> None:
    account = CreditAccount(8, bound_bytes=100)
    account.spend(60)
    account.spend(60)
    account.grant_overdraft()

    assert account.has_room()
    assert (account.overdraft, account.bound_bytes) == (0, 200)


@pytest.mark.parametrize(("bound", "messages_at"), [(1, 1), (2, 1), (3, 1), (4, 2), (1000, 500)])
def test_credit_is_returned_at_half_of_the_bound(bound: int, messages_at: int) -> None:
    debt = CreditDebt(bound)
    is_due = [debt.add(7) for _ in range(messages_at)]

    assert is_due == [False] * (messages_at - 1) + [True]
    assert debt.take() == (messages_at, 7 * messages_at)


def test_credit_is_returned_at_a_quarter_of_the_bytes() -> None:
    debt = CreditDebt(1000)

    assert not debt.add(DEFAULT_MAILBOX_BYTES // 4 - 1)
    assert debt.add(1)


def test_taken_credit_is_not_returned_again() -> None:
    debt = CreditDebt(2)
    debt.add(5)

    assert debt.take() == (1, 5)
    assert debt.take() == (0, 0)


@UNHURRIED
@given(
    bound=st.integers(1, 9),
    messages=st.lists(st.tuples(SIZES, st.booleans()), max_size=40),
    schedule=st.lists(st.sampled_from(["send", "handle", "deliver"]), max_size=120),
)
def test_a_sender_stuck_at_its_bound_always_gets_credit_back(
    bound: int, messages: list[tuple[int, bool]], schedule: list[str]
) -> None:
    """A model of one pair: messages that end with a reply return their credit with it, others through a debt."""
    account, debt = CreditAccount(bound), CreditDebt(bound)
    unsent, mailbox = deque(messages), deque[tuple[int, bool]]()
    on_the_way_back = deque[tuple[int, int]]()
    num_handled = 0

    def step(what: str) -> bool:
        nonlocal num_handled
        if what == "send" and unsent and account.has_room():
            mailbox.append(unsent.popleft())
            account.spend(mailbox[-1][0])
        elif what == "handle" and mailbox:
            size_bytes, is_replied = mailbox.popleft()
            num_handled += 1
            if is_replied:
                on_the_way_back.append((1, size_bytes))
            elif debt.add(size_bytes):
                on_the_way_back.append(debt.take())
        elif what == "deliver" and on_the_way_back:
            account.give_back(*on_the_way_back.popleft())
        else:
            return False
        return True

    for what in schedule:
        step(what)
        assert account.under_way <= bound
        assert account.under_way == len(mailbox) + debt.messages + sum(count for count, _ in on_the_way_back)
    # Everyone does what is left to do, until nobody can do any more.
    while any(step(what) for what in ("send", "handle", "deliver")):
        pass

    assert not unsent
    assert num_handled == len(messages)
    assert (account.spent - debt.messages, account.spent_bytes - debt.size_bytes) == (
        account.returned,
        account.returned_bytes,
    )


@UNHURRIED
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 60))
def test_two_actors_that_flood_each_other_come_through_by_overdrafts(
    left_bound: int, right_bound: int, num_messages: int
) -> None:
    """Each handles nothing until it has sent everything, as endpoints that broadcast in a loop do."""
    accounts = [CreditAccount(left_bound), CreditAccount(right_bound)]
    left = [num_messages, num_messages]
    num_overdrafts = 0
    while any(left):
        is_stuck = True
        for index, account in enumerate(accounts):
            while left[index] and account.has_room():
                account.spend(100)
                left[index] -= 1
                is_stuck = False
        if is_stuck:
            # The probe comes back to both, since each waits for the other.
            num_overdrafts += 1
            for account in accounts:
                account.grant_overdraft()

    assert num_overdrafts <= num_messages.bit_length() + 1
