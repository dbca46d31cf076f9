"""What is registered, until it is dropped: tokens, slots, and waiting for whoever still copies."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.bulk.memory import wrap
from danaus.runtime.bulk.registry import Registration, Registry
from danaus.runtime.bulk.table import ForeignTable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.close()


def opened(registry: Registry) -> ForeignTable:
    table = registry.table
    return ForeignTable(os.getpid(), table.fd, table.inode, table.token)


def add(registry: Registry) -> Registration:
    return registry.add(wrap(bytearray(100)))


def test_a_buffer_is_found_by_its_own_number_and_token_alone(registry: Registry) -> None:
    one, other = add(registry), add(registry)

    assert registry.find(one.slot, one.number, one.token) is one
    assert registry.find(one.slot, one.number, other.token) is None
    assert registry.find(one.slot, one.number + 2, one.token) is None
    assert registry.find(77, one.number, one.token) is None


def test_others_see_that_a_buffer_was_dropped_also_when_its_slot_serves_again(registry: Registry) -> None:
    table, first = opened(registry), add(registry)
    assert table.is_registered(first.slot, first.number)

    assert registry.close_to_others(first)
    assert not table.is_registered(first.slot, first.number)
    registry.let_go(first)
    again = add(registry)

    assert again.slot == first.slot
    assert not table.is_registered(first.slot, first.number)
    assert table.is_registered(again.slot, again.number)
    assert registry.find(first.slot, first.number, first.token) is None
    table.close()


def test_a_drop_waits_for_a_process_that_copies(registry: Registry) -> None:
    table, found = opened(registry), add(registry)
    table.enter(found.slot)
    registry.close_to_others(found)
    assert not registry.is_unused(found)

    waiting = threading.Thread(target=registry.let_go, args=(found,), name="danaus-test")
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    table.close()
    waiting.join(5)

    assert not waiting.is_alive()


def test_a_copy_of_one_buffer_does_not_hold_up_the_drop_of_another(registry: Registry) -> None:
    table, one, other = opened(registry), add(registry), add(registry)
    table.enter(one.slot)
    registry.close_to_others(other)

    assert registry.is_unused(other)
    table.close()


def test_two_readers_hold_a_buffer_each(registry: Registry) -> None:
    one, two, found = opened(registry), opened(registry), add(registry)
    one.enter(found.slot)
    two.enter(found.slot)
    registry.close_to_others(found)

    one.close()
    assert not registry.is_unused(found)
    two.close()
    assert registry.is_unused(found)


def test_a_user_in_this_process_is_called_off_and_waited_for(registry: Registry) -> None:
    found, called = add(registry), threading.Event()
    user = registry.enter(found, called.set)
    assert user is not None

    assert registry.close_to_others(found)
    assert called.is_set()
    assert not registry.is_unused(found)
    assert registry.enter(found) is None
    registry.leave(found, user)

    assert registry.is_unused(found)
    assert not registry.close_to_others(found)


def test_memory_is_kept_until_it_is_dropped(registry: Registry) -> None:
    data = bytearray(10)
    found = registry.add(wrap(data))
    with pytest.raises(BufferError, match="re-sized"):
        data.append(1)

    registry.close_to_others(found)
    registry.let_go(found)
    del found

    data.append(1)


def test_another_process_than_the_one_meant_is_noticed(registry: Registry) -> None:
    table = registry.table
    with pytest.raises(OSError, match="has gone"):
        ForeignTable(os.getpid(), table.fd, table.inode, bytes(16))
    with pytest.raises(OSError, match="has gone"):
        ForeignTable(os.getpid(), table.fd, table.inode + 1, table.token)
    with pytest.raises(OSError, match="No such"):
        ForeignTable(os.getpid(), 100_000, table.inode, table.token)
