"""The items of a generator endpoint, fed by hand: order, end, window, closing; on one rank and in lockstep on many."""

from __future__ import annotations

import asyncio
import gc
import operator
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.calls.item_stream import ItemStream, open_stream
from danaus.runtime.calls.lockstep import LockstepStream
from danaus.runtime.calls.value_mesh import ValueMesh
from danaus.runtime.errors import ActorError, CallTimeoutError, MessageError, SupervisionError
from danaus.runtime.invoke import ITEM_WINDOW
from danaus.runtime.messages import wire
from danaus.runtime.shapes.shape import Extent

from .fakes import Fed

if TYPE_CHECKING:
    from collections.abc import Callable

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMIT_S = 10.0
"""Longest that a test waits for another thread; nothing takes so long unless it fails."""


def iterating() -> tuple[Fed, ItemStream[Any]]:
    fed = Fed(["w.0"], implied_credit=False)
    sink, stream = open_stream(fed.call)
    fed.listen(sink)
    return fed, stream


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run ``work`` on a thread of its own; return what waits for its outcome."""
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(work()), daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(LIMIT_S)
        return outcome[0]

    return wait


def wait_blocked(stream: ItemStream[Any]) -> None:
    """Wait until a thread waits for an item."""
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.001)):
        if stream._items.changed._waiters:  # type: ignore[attr-defined]
            return
        pause.wait(0.001)
    raise AssertionError("nobody waits")


def test_items_come_in_order_until_the_end() -> None:
    fed, stream = iterating()
    for item in "abc":
        fed.item(item)
    fed.end()

    assert list(stream) == ["a", "b", "c"]
    assert list(stream) == []
    assert not fed.is_listening
    assert fed.proc.sent == []


def test_iterating_waits_for_the_next_item() -> None:
    fed, stream = iterating()
    got = in_thread(lambda: list(stream))
    wait_blocked(stream)
    fed.item("a")
    wait_blocked(stream)
    fed.end()

    assert got() == ["a"]


def test_an_error_comes_after_the_items_before_it_and_ends_the_stream() -> None:
    fed, stream = iterating()
    fed.item("a")
    fed.fail(0, ValueError("no"))

    assert next(stream) == "a"
    with pytest.raises(ActorError, match="no"):
        next(stream)
    assert list(stream) == []


def test_a_death_comes_after_the_items_before_it_and_ends_the_stream() -> None:
    fed, stream = iterating()
    fed.item("a")
    fed.proc.die("w.5")
    fed.proc.die("w.0")

    assert next(stream) == "a"
    with pytest.raises(SupervisionError):
        next(stream)
    assert list(stream) == []
    assert not fed.is_listening


def test_the_caller_makes_room_for_half_a_window_each_time_it_has_taken_one() -> None:
    fed, stream = iterating()
    half = ITEM_WINDOW // 2
    for item in range(ITEM_WINDOW):
        fed.item(item)
    more = ("w.0", [wire.MORE, "actor", "me.0", fed.call.port, half])

    taken = [next(stream) for _ in range(half - 1)]
    assert fed.proc.sent == []
    taken.append(next(stream))
    assert fed.proc.sent == [more]
    taken += [next(stream) for _ in range(half)]
    assert fed.proc.sent == [more, more]
    assert taken == list(range(ITEM_WINDOW))


@UNHURRIED
@given(st.integers(0, 5 * ITEM_WINDOW), st.lists(st.booleans(), max_size=400))
def test_a_generator_in_its_window_is_never_stuck_and_never_further_ahead(num_items: int, schedule: list[bool]) -> None:
    fed, stream = iterating()
    window, num_made, taken = ITEM_WINDOW, 0, []

    def make() -> bool:
        nonlocal window, num_made
        window += sum(envelope[4] for _, envelope in fed.proc.sent)
        fed.proc.sent.clear()
        if num_made >= num_items or not window:
            return False
        fed.item(num_made)
        num_made, window = num_made + 1, window - 1
        return True

    def take() -> bool:
        if not stream._items.arrived:
            return False
        taken.append(next(stream))
        return True

    for is_making in schedule:
        (make if is_making else take)()
        assert num_made - len(taken) <= ITEM_WINDOW
    while make() or take():
        pass
    fed.end()

    assert taken == list(range(num_items))
    assert list(stream) == []


def test_a_stream_that_times_out_gives_what_came_then_says_so_and_closes_the_generator() -> None:
    fed, stream = iterating()
    fed.item("a")
    stream._items.on_timeout(0.5)
    fed.item("late")

    assert next(stream) == "a"
    with pytest.raises(CallTimeoutError, match="m rank 0"):
        next(stream)
    assert list(stream) == []
    assert fed.proc.cancelled() == ["w.0"]


def test_a_timeout_after_the_end_of_a_stream_changes_nothing() -> None:
    fed, stream = iterating()
    fed.item("a")
    fed.end()
    stream._items.on_timeout(0.5)

    assert list(stream) == ["a"]
    assert fed.proc.sent == []


def test_closing_a_stream_closes_the_generator_once_and_drops_what_came() -> None:
    fed, stream = iterating()
    fed.item("a")
    with stream:
        pass
    stream.close()

    assert list(stream) == []
    assert fed.proc.cancelled() == ["w.0"]
    assert not fed.is_listening


def test_closing_a_stream_wakes_a_thread_that_waits_for_an_item() -> None:
    _, stream = iterating()
    got = in_thread(lambda: list(stream))
    wait_blocked(stream)

    stream.close()

    assert got() == []


def test_a_stream_that_is_dropped_closes_the_generator_from_the_io_thread() -> None:
    fed, stream = iterating()
    fed.item("a")
    assert fed.proc.num_droppable == 1

    del stream
    gc.collect()
    assert fed.proc.sent == []
    fed.proc.run_tasks()

    assert fed.proc.cancelled() == ["w.0"]
    assert fed.proc.num_droppable == 0
    assert not fed.is_listening


def test_a_stream_that_ended_is_dropped_without_a_word() -> None:
    fed, stream = iterating()
    fed.end()
    del stream
    gc.collect()
    fed.proc.run_tasks()

    assert fed.proc.sent == []


def test_an_item_that_cannot_be_loaded_fails_alone() -> None:
    fed, stream = iterating()
    fed.proc.feed(fed.call.port, 0, wire.ITEM, b"no pickle")
    fed.item("b")
    fed.end()

    with pytest.raises(MessageError):
        next(stream)
    assert list(stream) == ["b"]


def test_a_stream_is_iterated_on_an_event_loop() -> None:
    fed, stream = iterating()

    async def main() -> list[Any]:
        with pytest.raises(RuntimeError, match="async for"):
            next(stream)
        taking = asyncio.create_task(take())
        for item in range(3):
            await asyncio.sleep(0)
            in_thread(lambda item=item: fed.item(item))()
        in_thread(fed.end)()
        return await taking

    async def take() -> list[Any]:
        return [item async for item in stream]

    assert asyncio.run(main()) == [0, 1, 2]


def test_an_error_of_a_stream_is_raised_on_an_event_loop() -> None:
    fed, stream = iterating()

    async def main() -> None:
        async for _ in stream:
            pass

    fed.item("a")
    fed.fail(0, ValueError("no"))
    with pytest.raises(ActorError, match="no"):
        asyncio.run(main())


# on many ranks


def test_lockstep_gives_one_item_of_each_rank_until_the_first_ends_and_closes_the_others() -> None:
    (fed_0, stream_0), (fed_1, stream_1) = iterating(), iterating()
    for item in range(3):
        fed_0.item(item)
        fed_1.item(item * 10)
    fed_1.end()

    lockstep: LockstepStream[int] = LockstepStream(Extent.of(dp=2), [stream_0, stream_1])
    fed_0.item(3)

    assert list(lockstep) == [ValueMesh(Extent.of(dp=2), [item, item * 10]) for item in range(3)]
    assert fed_0.proc.cancelled() == ["w.0"]
    assert fed_1.proc.sent == []


def test_an_error_of_one_rank_ends_the_lockstep_and_closes_the_others() -> None:
    (fed_0, stream_0), (fed_1, stream_1) = iterating(), iterating()
    fed_0.item(0)
    fed_1.fail(0, ValueError("no"))

    with pytest.raises(ActorError, match="no"):
        next(LockstepStream(Extent.of(dp=2), [stream_0, stream_1]))
    assert fed_0.proc.cancelled() == ["w.0"]


def test_lockstep_over_no_ranks_is_empty() -> None:
    assert list(LockstepStream(Extent.of(dp=0), [])) == []


def test_lockstep_is_iterated_on_an_event_loop() -> None:
    feds_streams = [iterating() for _ in range(2)]
    for fed, _ in feds_streams:
        fed.item(5)
        fed.end()

    async def main() -> list[int]:
        lockstep = LockstepStream(Extent.of(dp=2), [stream for _, stream in feds_streams])
        return [operator.add(*values) async for values in lockstep]

    assert asyncio.run(main()) == [10]
