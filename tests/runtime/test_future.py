"""Futures: asked by blocking, by awaiting, by callback; from many threads and loops; resolved once, loaded once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.calls.future import Future
from danaus.runtime.errors import CallCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 10.0
"""Longest that a test waits for another thread; nothing takes so long unless it fails."""


def resolved(value: Any) -> Future[Any]:
    future: Future[Any] = Future("sum")
    future._resolve(lambda: value)
    return future


def in_thread(work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Run ``work`` on a thread of its own."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  handed to the test
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def wait_asked(future: Future[Any], count: int = 1) -> None:
    """Wait until ``count`` threads or loops wait for ``future``."""
    deadline = threading.Event()
    for _ in range(int(LIMIT_S / 0.001)):
        if len(future._callbacks or ()) >= count:
            return
        deadline.wait(0.001)
    raise AssertionError(f"nobody waits for {future!r}")


class Cancellable(Future[Any]):
    __slots__ = ("num_told",)

    def __init__(self) -> None:
        super().__init__("m.f")
        self.num_told = 0

    def _on_cancelled(self) -> None:
        self.num_told += 1


# blocking


def test_a_value_can_be_got_many_times() -> None:
    future = resolved(7)

    assert [future.get(), future.result(), future.get(timeout=0), future.get(timeout=5)] == [7, 7, 7, 7]
    assert future.exception() is None


def test_an_error_is_raised_at_each_ask() -> None:
    future: Future[int] = Future()
    error = ValueError("no")
    assert future._reject(error)

    for _ in range(2):
        with pytest.raises(ValueError, match="no") as told:
            future.get()
        assert told.value is error
    assert future.exception() is error


def test_get_waits_for_the_value() -> None:
    future: Future[int] = Future()
    got = in_thread(future.get)
    wait_asked(future)

    future._resolve(lambda: 7)

    assert got.result(LIMIT_S) == 7


def test_many_threads_get_one_value_that_is_loaded_once() -> None:
    future: Future[object] = Future()
    loads: list[int] = []
    is_loaded_twice = threading.Event()

    def load() -> object:
        loads.append(threading.get_ident())
        if len(loads) > 1:
            is_loaded_twice.set()
        # Long enough for every other thread to come here, if any could.
        is_loaded_twice.wait(0.2)
        return object()

    askers = [in_thread(lambda: future.get(timeout=LIMIT_S)) for _ in range(8)]
    wait_asked(future, 8)
    future._resolve(load)
    values = {id(asker.result(LIMIT_S)) for asker in askers}

    assert len(values) == len(loads) == 1


def test_a_value_is_loaded_by_the_asker_and_not_by_whoever_resolves() -> None:
    future: Future[int] = Future()
    in_thread(lambda: future._resolve(threading.get_ident)).result(LIMIT_S)

    assert future.done()
    assert future.get() == threading.get_ident()


def test_a_load_that_raises_is_not_tried_again() -> None:
    attempts: list[int] = []

    def load() -> int:
        attempts.append(1)
        raise ZeroDivisionError

    future: Future[int] = Future()
    future._resolve(load)

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            future.get()
    assert len(attempts) == 1


def test_a_future_may_be_asked_while_another_is_loaded() -> None:
    inner = resolved(3)
    outer: Future[int] = Future()
    outer._resolve(lambda: inner.get() + 1)

    assert outer.get() == 4


def test_the_first_outcome_stays() -> None:
    future = resolved(7)

    assert not future._resolve(lambda: 8)
    assert not future._reject(ValueError())
    assert not future.cancel()
    assert future.get() == 7


def test_of_many_threads_that_resolve_one_wins() -> None:
    future: Future[int] = Future()
    start = threading.Barrier(8)

    def resolve(number: int) -> bool:
        start.wait(LIMIT_S)
        return future._resolve(lambda: number)

    outcomes = [in_thread(lambda number=number: resolve(number)) for number in range(8)]
    winners = [number for number, outcome in enumerate(outcomes) if outcome.result(LIMIT_S)]

    assert winners == [future.get()]


# time


@pytest.mark.parametrize("timeout", [0, 0.001])
def test_a_timeout_names_what_was_awaited_and_cancels_nothing(timeout: float) -> None:
    future = Cancellable()

    with pytest.raises(TimeoutError, match=rf"m\.f: nothing after {timeout:g} s"):
        future.get(timeout=timeout)
    assert not future.done()
    assert future.num_told == 0

    future._resolve(lambda: 7)
    assert future.get() == 7


def test_exception_obeys_the_timeout_too() -> None:
    with pytest.raises(TimeoutError):
        Future[int]().exception(timeout=0)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout="):
        Future[int]().get(timeout=timeout)


def test_a_timeout_may_be_longer_than_the_system_can_wait() -> None:
    future: Future[int] = Future()
    got = in_thread(lambda: future.get(timeout=1e300))
    wait_asked(future)
    future._resolve(lambda: 7)

    assert got.result(LIMIT_S) == 7


# awaiting


def test_a_future_can_be_awaited_many_times_and_from_several_loops() -> None:
    future: Future[int] = Future()

    async def twice() -> list[int]:
        return [await future, await future]

    loops = [in_thread(lambda: asyncio.run(twice())) for _ in range(4)]
    wait_asked(future, 4)
    future._resolve(lambda: 7)

    assert [loop.result(LIMIT_S) for loop in loops] == [[7, 7]] * 4
    assert asyncio.run(twice()) == [7, 7]
    assert future.get() == 7


def test_many_tasks_of_one_loop_await_one_future() -> None:
    future: Future[int] = Future()

    async def main() -> list[int]:
        async def ask() -> int:
            return await future

        tasks = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.sleep(0)
        in_thread(lambda: future._resolve(lambda: 7))
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [7] * 5


def test_an_awaited_error_is_raised() -> None:
    future: Future[int] = Future()
    future._reject(ValueError("no"))

    async def main() -> None:
        await future

    with pytest.raises(ValueError, match="no"):
        asyncio.run(main())


def test_futures_work_with_gather_and_as_asyncio() -> None:
    async def main() -> tuple[list[Any], Any, Any]:
        as_task = resolved(3).as_asyncio()
        waited, _ = await asyncio.wait([resolved(4).as_asyncio()])
        return list(await asyncio.gather(resolved(1), resolved(2))), await as_task, waited.pop().result()

    assert asyncio.run(main()) == ([1, 2], 3, 4)


def test_a_blocking_ask_inside_a_running_loop_is_refused_and_names_await() -> None:
    future = Cancellable()

    async def main() -> None:
        for ask in (future.get, future.result, future.exception, lambda: future.get(timeout=0)):
            with pytest.raises(RuntimeError, match="use `await`"):
                ask()

    asyncio.run(main())
    assert not future.done()


def test_what_is_there_already_may_be_got_inside_a_running_loop() -> None:
    async def main() -> int:
        return resolved(7).get()

    assert asyncio.run(main()) == 7


def test_a_thread_beside_a_running_loop_may_block() -> None:
    future: Future[int] = Future()

    async def main() -> int:
        asking = asyncio.create_task(asyncio.to_thread(future.get, LIMIT_S))
        await asyncio.to_thread(wait_asked, future)
        future._resolve(lambda: 7)
        return await asking

    assert asyncio.run(main()) == 7


def test_a_loop_that_was_closed_in_the_meantime_harms_nobody() -> None:
    class Stubborn(Future[int]):
        """Its cancellation is ignored, so that a wake-up outlives the loop."""

        def cancel(self) -> bool:
            return False

    future = Stubborn()

    async def main() -> None:
        waiting = asyncio.ensure_future(future._await())
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(main())

    assert future._resolve(lambda: 7)
    assert future.get() == 7


# cancelling


def test_cancelling_tells_the_actor_once_and_raises_at_the_askers() -> None:
    future = Cancellable()

    assert [future.cancel(), future.cancel()] == [True, False]

    assert future.num_told == 1
    assert future.done()
    with pytest.raises(CallCancelledError, match=r"m\.f: the call was cancelled"):
        future.get()
    assert isinstance(future.exception(), concurrent.futures.CancelledError)


def test_cancelling_wakes_who_waits() -> None:
    future = Cancellable()
    got = in_thread(future.get)
    wait_asked(future)

    future.cancel()

    assert isinstance(got.exception(LIMIT_S), CallCancelledError)


def test_a_reply_after_the_cancellation_is_dropped() -> None:
    future = Cancellable()
    future.cancel()

    assert not future._resolve(lambda: 7)
    assert isinstance(future.exception(), CallCancelledError)


def test_a_cancelled_await_cancels_the_call() -> None:
    future = Cancellable()

    async def main() -> None:
        waiting = asyncio.ensure_future(future._await())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())

    assert future.num_told == 1
    assert future.done()


def test_a_timeout_around_an_await_cancels_the_call() -> None:
    future = Cancellable()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.001)

    asyncio.run(main())

    assert future.num_told == 1


def test_an_await_cancelled_once_the_value_is_there_leaves_it() -> None:
    future = Cancellable()

    async def main() -> None:
        waiting = asyncio.ensure_future(future._await())
        await asyncio.sleep(0)
        future._resolve(lambda: 7)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())

    assert future.num_told == 0
    assert future.get() == 7


# callbacks


def called(future: Future[Any]) -> SimpleRecord:
    record = SimpleRecord()
    future.add_done_callback(record)
    return record


class SimpleRecord:
    """A callback that keeps what it was called with, and on which thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[Future[Any], int]] = []
        self.was_called = threading.Event()

    def __call__(self, future: Future[Any]) -> None:
        self.calls.append((future, threading.get_ident()))
        self.was_called.set()


def test_callbacks_run_once_with_the_future_on_a_thread_of_their_own() -> None:
    future: Future[int] = Future()
    record = called(future)
    assert record.calls == []

    future._resolve(lambda: 7)

    assert record.was_called.wait(LIMIT_S)
    [(told, thread)] = record.calls
    assert told is future
    assert thread != threading.get_ident()


def test_a_callback_added_late_runs_too() -> None:
    record = called(resolved(7))

    assert record.was_called.wait(LIMIT_S)


def test_callbacks_run_in_order_of_their_futures_ends() -> None:
    futures = [Future[int]() for _ in range(3)]
    order: list[int] = []
    for number, future in enumerate(futures):
        future.add_done_callback(lambda _, number=number: order.append(number))
    for future in reversed(futures):
        future._resolve(lambda: 0)

    assert called(futures[0]).was_called.wait(LIMIT_S)
    assert order == [2, 1, 0]


def test_a_callback_may_ask_the_future_and_others() -> None:
    future, other, sums = resolved(3), resolved(4), []
    future.add_done_callback(lambda done: sums.append(done.get() + other.get()))

    assert called(future).was_called.wait(LIMIT_S)
    assert sums == [7]


def test_a_callback_that_raises_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    future = resolved(7)
    with caplog.at_level(logging.ERROR, logger="danaus"):
        future.add_done_callback(lambda _: 1 // 0)
        record = called(future)
        assert record.was_called.wait(LIMIT_S)

    assert "callback" in caplog.text
    assert "ZeroDivisionError" in caplog.text


# text


def test_a_future_says_what_it_waits_for_and_whether_it_is_there() -> None:
    future: Future[int] = Future("counters.add")
    assert (repr(future), future.done()) == ("<Future counters.add pending>", False)

    future._resolve(lambda: 7)
    assert (repr(future), future.done()) == ("<Future counters.add done>", True)


def test_a_description_that_takes_work_is_made_when_it_is_asked_for() -> None:
    asked: list[int] = []
    future: Future[int] = Future(lambda: f"asked {len(asked)} times {asked.append(1)}")

    assert asked == []
    assert future.describe().startswith("asked 0")
