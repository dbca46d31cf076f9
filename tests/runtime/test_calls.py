"""How endpoints are called: adverbs, order, errors, time limits, cancellation, overlap, generators.

One mesh of two processes serves all tests; each test spawns actors of its own on it. A test that needs an actor to be
busy has it wait for a value on a port (`Worker.hold`), and knows from another port that it does.
"""

# Endpoints here take and return anything, and some calls are wrong on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import (
    Accumulator,
    Actor,
    ActorError,
    CallCancelledError,
    CallTimeoutError,
    Channel,
    Future,
    MailboxFull,
    MessageError,
    Port,
    ProcMesh,
    StoppedError,
    SupervisionError,
    ValueMesh,
    as_endpoint,
    concurrent_endpoint,
    current_rank,
    endpoint,
    scatter,
    send,
    this_host,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 10
"""Far more than anything here takes."""


class Worker(Actor):
    """Notes what it is asked to do."""

    def __init__(self, started: Port[Port[None]] | None = None) -> None:
        self.notes: list[Any] = []
        self.most_inside = self.inside = 0
        if started is not None:
            wait_on(started)

    @endpoint
    def rank(self) -> int:
        return current_rank().rank

    @endpoint
    def note(self, item: Any) -> Any:
        self.notes.append(item)
        return item

    @endpoint
    async def note_async(self, item: Any) -> Any:
        self.notes.append(item)
        return item

    @endpoint
    def noted(self) -> list[Any]:
        return self.notes

    @endpoint
    def most(self) -> int:
        return self.most_inside

    @endpoint
    def hold(self, inside: Port[Port[Any]]) -> Any:
        return wait_on(inside)

    @endpoint
    async def hold_async(self, inside: Port[Port[Any]]) -> Any:
        return await self._wait_async(inside)

    @concurrent_endpoint
    async def overlap(self, inside: Port[Port[Any]]) -> Any:
        return await self._wait_async(inside)

    @endpoint(concurrency=2)
    async def pair(self, inside: Port[Port[Any]]) -> Any:
        return await self._wait_async(inside)

    async def _wait_async(self, inside: Port[Port[Any]]) -> Any:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        port, receiver = Channel.open()
        inside.send(port)
        try:
            return outcome(await receiver.recv())
        except asyncio.CancelledError:
            self.notes.append("cancelled")
            raise
        finally:
            self.inside -= 1

    @endpoint
    async def cancel_itself(self) -> None:
        raise asyncio.CancelledError

    @endpoint
    def fail(self, text: str) -> None:
        raise ValueError(text)

    @endpoint
    async def fail_async(self, text: str) -> None:
        raise ValueError(text)

    @endpoint
    def count(self, stop: int, fail_at: int = -1) -> Iterator[int]:
        for number in range(stop):
            if number == fail_at:
                raise ValueError(f"at {number}")
            yield number

    @endpoint
    async def count_async(self, stop: int, fail_at: int = -1):
        for number in range(stop):
            if number == fail_at:
                raise ValueError(f"at {number}")
            await asyncio.sleep(0)
            yield number

    @endpoint
    def produce(self) -> Iterator[int]:
        """Yields for ever, and notes how far it came and that it was closed."""
        produced = 0
        try:
            while True:
                produced += 1
                yield produced
        finally:
            self.notes += [produced, "closed"]

    @endpoint
    async def produce_async(self):
        produced = 0
        try:
            while True:
                produced += 1
                yield produced
        finally:
            self.notes += [produced, "closed"]

    @endpoint
    def produce_slowly(self, inside: Port[Port[Any]]) -> Iterator[Any]:
        try:
            yield 0
            yield wait_on(inside)
        finally:
            self.notes.append("closed")

    @endpoint
    def produce_lock(self) -> Iterator[Any]:
        yield 1
        for _ in range(1000):
            yield threading.Lock()

    @endpoint(explicit_response_port=True)
    def answer_later(self, port: Port[int], value: int) -> None:
        threading.Thread(target=port.send, args=(value,)).start()

    @endpoint(explicit_response_port=True)
    async def answer_async(self, port: Port[int], value: int) -> str:
        port.send(value)
        return "dropped"

    @endpoint(explicit_response_port=True)
    def answer_error(self, port: Port[int]) -> None:
        port.exception(KeyError("by port"))

    @endpoint(explicit_response_port=True)
    def answer_never(self, port: Port[int]) -> None:
        raise ValueError("no port for this")

    def plain(self, item: Any) -> Any:
        return ("plain", item)

    async def plain_async(self, item: Any) -> Any:
        return ("plain", item)

    def plain_port(self, port: Port[Any], item: Any) -> None:
        port.send(("port", item))

    @endpoint
    def reduce_it(self, reduce: str) -> str:
        return f"argument {reduce}"


def wait_on(inside: Port[Port[Any]]) -> Any:
    """Tell the test that we are here, and return what it sends to let us go."""
    port, receiver = Channel.open()
    inside.send(port)
    return outcome(receiver.recv().get(timeout=30))


def outcome(told: Any) -> Any:
    """Return what the test sent, or raise if that is an exception."""
    if isinstance(told, BaseException):
        raise told
    return told


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"rank": 2}, name="calls") as procs:
        yield procs


@pytest.fixture
def workers(procs: ProcMesh) -> Iterator[Worker]:
    workers = procs.spawn("workers", Worker)
    yield workers
    workers.stop()


@pytest.fixture
def one(workers: Worker) -> Worker:
    return workers.slice(rank=0)


def held(call: Callable[[Port[Any]], Any]) -> tuple[Any, Port[Any]]:
    """Make a call that waits inside the actor; return its future, and the port that lets it go."""
    port, receiver = Channel.open()
    future = call(port)
    return future, receiver.recv().get(timeout=LIMIT_S)


def test_call_returns_a_value_of_every_rank_in_rank_order(workers: Worker) -> None:
    values = workers.rank.call().get(timeout=LIMIT_S)

    assert isinstance(values, ValueMesh)
    assert list(values) == [0, 1]
    assert values.item(rank=1) == 1
    assert [(dict(point), value) for point, value in values.items()] == [({"rank": 0}, 0), ({"rank": 1}, 1)]
    assert list(values.slice(rank=slice(1, 2))) == [1]


def test_call_on_a_slice_reaches_its_ranks_alone(workers: Worker) -> None:
    assert list(workers.slice(rank=slice(1, 2)).note.call("x").get(timeout=LIMIT_S)) == ["x"]
    assert list(workers.noted.call().get(timeout=LIMIT_S)) == [[], ["x"]]


def test_call_one_on_many_ranks_suggests_a_slice(workers: Worker) -> None:
    with pytest.raises(ValueError, match=r"2 ranks.*slice\(rank=0\)\.rank\.call_one"):
        workers.rank.call_one()


def test_choose_takes_the_rank_with_less_under_way(workers: Worker) -> None:
    future, release = held(workers.slice(rank=0).hold.call_one)

    # Of two ranks both are always compared, so the busy one is never taken.
    assert {workers.rank.choose().get(timeout=LIMIT_S) for _ in range(20)} == {1}

    release.send(None)
    future.get(timeout=LIMIT_S)
    assert {workers.rank.choose().get(timeout=LIMIT_S) for _ in range(100)} == {0, 1}


def test_choose_keeps_a_session_on_its_rank_and_spreads_sessions(workers: Worker) -> None:
    future, release = held(workers.slice(rank=0).hold_async.call_one)
    chosen = {session: [workers.rank.choose(session=session) for _ in range(3)] for session in range(40)}
    release.send(None)
    future.get(timeout=LIMIT_S)

    ranks = {session: {future.get(timeout=LIMIT_S) for future in futures} for session, futures in chosen.items()}
    assert all(len(found) == 1 for found in ranks.values())
    assert set.union(*ranks.values()) == {0, 1}


def test_stream_yields_in_the_order_of_arrival(workers: Worker) -> None:
    future, release = held(workers.slice(rank=0).hold.call_one)

    stream = iter(workers.rank.stream())
    assert next(stream).get(timeout=LIMIT_S) == 1
    late = next(stream)
    assert not late.done()
    release.send(None)
    future.get(timeout=LIMIT_S)
    assert late.get(timeout=LIMIT_S) == 0
    assert list(stream) == []


def test_broadcast_reaches_every_rank_and_returns_nothing(workers: Worker) -> None:
    assert workers.note.broadcast("b") is None
    assert list(workers.noted.call().get(timeout=LIMIT_S)) == [["b"], ["b"]]


def test_messages_of_one_sender_arrive_in_order_whatever_the_adverb_the_slice_and_the_kind(workers: Worker) -> None:
    one = workers.slice(rank=0)
    pairs = workers.slice(rank=slice(0, 1))
    sends: list[Callable[[int], object]] = [
        workers.note.broadcast,
        one.note_async.call_one,
        pairs.note.call,
        one.note.broadcast,
        pairs.note_async.choose,
        lambda n: list(pairs.note.stream(n)),
        lambda n: workers.note.call(scatter([n, None])),
        lambda n: as_endpoint(one.plain).call_one(n),
        lambda n: one.note.call_one(n if n % 2 else (n, "x" * 200_000)),
    ]

    for number in range(900):
        sends[number % len(sends)](number)

    noted = one.noted.call_one().get(timeout=LIMIT_S)
    numbers = [item[0] if isinstance(item, tuple) else item for item in noted]
    assert numbers == [number for number in range(900) if number % len(sends) != 7]


def test_send_is_the_primitive_beneath_the_adverbs(workers: Worker) -> None:
    port, receiver = Channel.open()

    send(workers.rank, (), {}, port=port)
    send(workers.fail, ("sent",), {}, port=port, selection=workers.slice(rank=0))
    send(workers.note, ("n",), {})

    outcomes = [receiver.recv() for _ in range(3)]
    errors = [future.exception(timeout=LIMIT_S) for future in outcomes]
    assert sorted(future.get() for future, error in zip(outcomes, errors, strict=True) if error is None) == [0, 1]
    assert ["sent" in str(error) for error in errors if error is not None] == [True]
    assert list(workers.noted.call().get(timeout=LIMIT_S)) == [["n"], ["n"]]


def test_accumulator_folds_every_value_and_fails_with_the_first_error(workers: Worker) -> None:
    total = Accumulator(workers.rank, 10, lambda so_far, value: so_far + value).accumulate()
    assert total.get(timeout=LIMIT_S) == 11

    failed = Accumulator(workers.fail, 0, lambda so_far, value: so_far + value).accumulate("a")
    assert isinstance(failed.exception(timeout=LIMIT_S), ActorError)

    empty = workers.slice(rank=slice(0, 0))
    assert Accumulator(empty.rank, 7, lambda so_far, value: so_far + value).accumulate().get(timeout=LIMIT_S) == 7


def test_misuse_is_an_error_at_the_call_that_says_what_is_right(workers: Worker) -> None:
    with pytest.raises(TypeError, match=r"not called directly.*\.call\("):
        workers.note(1)  # type: ignore[operator]
    with pytest.raises(AttributeError, match=r"no endpoint 'nota'.*note_async"):
        workers.nota.call(1)
    with pytest.raises(RuntimeError, match=r"not an endpoint.*as_endpoint"):
        workers.plain.call(1)
    with pytest.raises(RuntimeError, match=r"not an endpoint.*as_endpoint"):
        workers.plain(1)
    with pytest.raises(TypeError, match=r"note\(\).*missing.*item"):
        workers.note.call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'itam'"):
        workers.note.broadcast(itam=1)
    with pytest.raises(TypeError, match="as_endpoint"):
        as_endpoint(len)
    with pytest.raises(TypeError, match="distributed tensors"):
        workers.note.rref(1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timeout": 0}, "above zero"),
        ({"timeout": -1}, "above zero"),
        ({"timeout": float("nan")}, "above zero"),
        ({"on_error": "some"}, '"first" or "all"'),
        ({"reduce": "median"}, "sum"),
        ({"reduce": "sum", "on_error": "all"}, "one of the two"),
    ],
)
def test_options_that_make_no_sense_are_refused(workers: Worker, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        workers.rank.options(**options)


def test_as_endpoint_calls_methods_without_the_decorator(one: Worker) -> None:
    assert as_endpoint(one.plain).call_one(1).get(timeout=LIMIT_S) == ("plain", 1)
    assert as_endpoint(one.plain_async).call_one(2).get(timeout=LIMIT_S) == ("plain", 2)
    assert as_endpoint(one.plain_port, explicit_response_port=True).call_one(3).get(timeout=LIMIT_S) == ("port", 3)
    assert as_endpoint(one.rank).call_one().get(timeout=LIMIT_S) == 0


def test_scatter_gives_each_rank_its_own_element(workers: Worker) -> None:
    ranks = workers.rank.call().get(timeout=LIMIT_S)

    assert list(workers.note.call(scatter(["a", "b"])).get(timeout=LIMIT_S)) == ["a", "b"]
    assert list(workers.note.call(item=scatter(ranks)).get(timeout=LIMIT_S)) == [0, 1]
    assert list(workers.slice(rank=slice(1, 2)).note.call(scatter([5])).get(timeout=LIMIT_S)) == [5]
    workers.note.broadcast(scatter([8, 9]))
    assert list(workers.noted.call().get(timeout=LIMIT_S)) == [["a", 0, 8], ["b", 1, 5, 9]]


def test_scatter_of_the_wrong_length_is_refused_and_sends_nothing(workers: Worker) -> None:
    with pytest.raises(ValueError, match="3 elements for 2 ranks"):
        workers.note.call(scatter([1, 2, 3]))
    assert list(workers.noted.call().get(timeout=LIMIT_S)) == [[], []]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("sum", 5),
        ("prod", 6),
        ("min", 2),
        ("max", 3),
        ("mean", 2.5),
        ("and", 2),
        ("or", 3),
        (lambda a, b: (a, b), (2, 3)),
    ],
)
def test_reduce_joins_the_values_in_rank_order(workers: Worker, operation: Any, expected: object) -> None:
    assert workers.note.call(scatter([2, 3]), reduce=operation).get(timeout=LIMIT_S) == expected
    assert workers.note.options(reduce=operation).call(scatter([2, 3])).get(timeout=LIMIT_S) == expected


def test_reduce_of_arrays_is_elementwise(workers: Worker) -> None:
    np = pytest.importorskip("numpy")
    arrays = [np.array([1, 5]), np.array([4, 2])]

    assert workers.note.call(scatter(arrays), reduce="max").get(timeout=LIMIT_S).tolist() == [4, 5]
    assert workers.note.call(scatter(arrays), reduce="sum").get(timeout=LIMIT_S).tolist() == [5, 7]


def test_reduce_stays_the_endpoints_own_where_it_has_such_a_parameter(one: Worker) -> None:
    assert list(one.reduce_it.call(reduce="x").get(timeout=LIMIT_S)) == ["argument x"]


@pytest.mark.parametrize("method", ["fail", "fail_async"])
def test_exception_reaches_the_caller_with_its_place_and_the_actor_lives_on(one: Worker, method: str) -> None:
    error = getattr(one, method).call_one("the text").exception(timeout=LIMIT_S)

    assert isinstance(error, ActorError)
    assert isinstance(error.exception, ValueError)
    assert error.exception.args == ("the text",)
    assert error.__cause__ is error.exception
    assert f"in {method}" in error.remote_traceback
    assert "raise ValueError(text)" in error.remote_traceback
    assert "runner.py" not in error.remote_traceback
    for part in (f"workers.{method}", "rank 0", socket.gethostname(), "pid ", "ValueError: the text"):
        assert part in str(error)
    assert one.note.call_one(1).get(timeout=LIMIT_S) == 1


def test_exceptions_cause_is_shown_in_the_remote_traceback(procs: ProcMesh) -> None:
    class Chained(Actor):
        @endpoint
        def fail(self) -> None:
            try:
                {}["missing"]
            except KeyError as error:
                raise RuntimeError("outer") from error

    error = procs.slice(rank=0).spawn("chained", Chained).fail.call_one().exception(timeout=LIMIT_S)

    assert isinstance(error, ActorError)
    assert "KeyError: 'missing'" in error.remote_traceback
    assert "direct cause" in error.remote_traceback


@pytest.mark.parametrize("method", ["hold", "hold_async"])
def test_call_fails_with_the_first_error_and_not_after_the_slowest_rank(workers: Worker, method: str) -> None:
    port, receiver = Channel.open()
    future = getattr(workers, method).call(port)
    first, second = [receiver.recv().get(timeout=LIMIT_S) for _ in range(2)]

    first.send(ValueError("first"))

    error = future.exception(timeout=LIMIT_S)
    assert isinstance(error, ActorError)
    assert str(error.exception) == "first"
    # The other rank is still inside until it is let go, or was cancelled.
    if method != "hold_async":
        second.send(None)
    notes = workers.noted.call(reduce="concat").get(timeout=LIMIT_S)
    assert notes == (["cancelled"] if method == "hold_async" else [])


def test_on_error_all_returns_values_and_errors_side_by_side(workers: Worker) -> None:
    port, receiver = Channel.open()
    future = workers.hold.options(on_error="all").call(port)
    first, second = [receiver.recv().get(timeout=LIMIT_S) for _ in range(2)]
    first.send(ValueError("first"))
    second.send("value")

    outcomes = list(future.get(timeout=LIMIT_S))

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ActorError", "str"]


def test_endpoint_that_raises_cancelled_error_by_itself_is_an_error_like_any_other(one: Worker) -> None:
    error = one.cancel_itself.call_one().exception(timeout=LIMIT_S)

    assert isinstance(error, ActorError)
    assert "CancelledError" in str(error)
    assert one.note.call_one(1).get(timeout=LIMIT_S) == 1


@pytest.mark.parametrize("method", ["hold", "hold_async"])
def test_time_limit_names_the_endpoint_and_the_ranks_that_are_missing(workers: Worker, method: str) -> None:
    port, receiver = Channel.open()
    # Rank 0 answers at once, rank 1 only when it is let go.
    future = getattr(workers, method).options(timeout=0.3).call(port)
    releases = [receiver.recv().get(timeout=LIMIT_S) for _ in range(2)]
    releases[0].send(None)
    started_s = time.monotonic()

    error = future.exception(timeout=LIMIT_S)

    assert isinstance(error, CallTimeoutError)
    assert isinstance(error, TimeoutError)
    assert time.monotonic() - started_s < 2
    assert len(error.missing) == 1
    assert f"workers.{method}: no reply within 0.3 s from workers rank" in str(error)
    if method != "hold_async":
        releases[1].send(None)
    notes = workers.noted.call(reduce="concat").get(timeout=LIMIT_S)
    assert notes == (["cancelled"] if method == "hold_async" else [])


def test_time_limit_removes_a_call_that_is_still_queued(one: Worker) -> None:
    future, release = held(one.hold.call_one)
    error = one.note.options(timeout=0.05).call_one("late").exception(timeout=LIMIT_S)
    assert isinstance(error, CallTimeoutError)

    release.send("held")

    assert future.get(timeout=LIMIT_S) == "held"
    assert one.noted.call_one().get(timeout=LIMIT_S) == []


def test_time_limit_that_is_kept_changes_nothing_and_keeps_nothing(one: Worker) -> None:
    from danaus.runtime.context import local_proc

    before = set(local_proc().ports)

    values = [one.note.options(timeout=600).call_one(number).get(timeout=LIMIT_S) for number in range(20)]

    assert values == list(range(20))
    assert set(local_proc().ports) <= before


def test_get_with_a_timeout_cancels_nothing(one: Worker) -> None:
    future, release = held(one.hold.call_one)
    with pytest.raises(TimeoutError, match=r"workers\.hold"):
        future.get(timeout=0.01)
    assert not future.done()

    release.send("there")

    assert future.get(timeout=LIMIT_S) == "there"


def test_cancelled_call_that_is_queued_never_runs(one: Worker) -> None:
    future, release = held(one.hold.call_one)
    queued = [one.note.call_one(number) for number in range(3)]

    assert queued[1].cancel()
    release.send(None)

    future.get(timeout=LIMIT_S)
    assert one.noted.call_one().get(timeout=LIMIT_S) == [0, 2]
    with pytest.raises(CallCancelledError, match=r"workers\.note"):
        queued[1].get(timeout=LIMIT_S)
    assert queued[1].done()


def test_cancelled_async_endpoint_gets_cancelled_error(one: Worker) -> None:
    future, _ = held(one.hold_async.call_one)

    assert future.cancel()

    assert one.noted.call_one().get(timeout=LIMIT_S) == ["cancelled"]


@pytest.mark.parametrize("method", ["overlap", "pair"])
def test_cancelled_concurrent_endpoint_gets_cancelled_error_and_its_neighbour_goes_on(one: Worker, method: str) -> None:
    first, _ = held(getattr(one, method).call_one)
    second, release = held(getattr(one, method).call_one)

    assert first.cancel()
    release.send("went on")

    assert second.get(timeout=LIMIT_S) == "went on"
    assert one.noted.call_one().get(timeout=LIMIT_S) == ["cancelled"]


def test_cancelled_sync_endpoint_runs_on_and_its_reply_is_dropped(one: Worker) -> None:
    future, release = held(one.hold.call_one)

    assert future.cancel()
    assert not future.cancel()
    release.send("dropped")

    assert one.note.call_one("next").get(timeout=LIMIT_S) == "next"
    assert isinstance(future.exception(timeout=0), CallCancelledError)


def test_cancel_after_the_reply_changes_nothing(one: Worker) -> None:
    future = one.note.call_one(1)
    assert future.get(timeout=LIMIT_S) == 1

    assert not future.cancel()
    assert future.get(timeout=0) == 1


def test_cancel_of_a_call_to_many_ranks_reaches_those_that_have_not_answered(workers: Worker) -> None:
    port, receiver = Channel.open()
    future = workers.hold_async.call(port)
    releases = [receiver.recv().get(timeout=LIMIT_S) for _ in range(2)]
    assert len(releases) == 2

    assert future.cancel()

    assert list(workers.noted.call().get(timeout=LIMIT_S)) == [["cancelled"], ["cancelled"]]


def test_cancelled_await_reaches_the_actor(one: Worker) -> None:
    async def main() -> None:
        port, receiver = Channel.open()
        task = asyncio.ensure_future(one.hold_async.call_one(port).as_asyncio())
        await receiver.recv()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())

    assert one.noted.call_one().get(timeout=LIMIT_S) == ["cancelled"]


def test_asyncio_timeout_reaches_the_actor(one: Worker) -> None:
    async def main() -> None:
        port, _ = Channel.open()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.hold_async.call_one(port).as_asyncio(), 0.05)

    asyncio.run(main())

    assert one.noted.call_one().get(timeout=LIMIT_S) == ["cancelled"]


def test_cancelled_call_that_waits_at_the_sender_is_never_sent(procs: ProcMesh) -> None:
    one = procs.slice(rank=0).spawn("small", Worker, mailbox=1)

    async def main() -> list[Any]:
        port, receiver = Channel.open()
        future = one.hold.call_one(port)
        release = await receiver.recv()
        waiting = [one.note.call_one(number) for number in range(5)]
        assert waiting[2].cancel()
        release.send(None)
        await future
        await asyncio.gather(*(waiting[number].as_asyncio() for number in (0, 1, 3, 4)))
        return await one.noted.call_one()

    assert asyncio.run(main()) == [0, 1, 3, 4]


def test_call_cancelled_while_the_actor_is_still_being_made_never_runs(procs: ProcMesh) -> None:
    port, receiver = Channel.open()
    one = procs.slice(rank=0).spawn("slow", Worker, port)
    release = receiver.recv().get(timeout=LIMIT_S)
    futures = [one.note.call_one(number) for number in range(3)]

    assert futures[0].cancel()
    # The cancellation is on its way before anything that is sent later.
    last = one.noted.call_one()
    release.send(None)

    assert last.get(timeout=LIMIT_S) == [1, 2]


def test_calls_behind_cancelled_ones_at_a_full_concurrent_endpoint_run(one: Worker) -> None:
    first, release_first = held(one.pair.call_one)
    second, release_second = held(one.pair.call_one)
    port, receiver = Channel.open()
    waiting = [one.pair.call_one(port) for _ in range(5)]
    for future in waiting[:4]:
        assert future.cancel()
    # Handled after the cancellations, on a mailbox that is empty then.
    assert one.noted.call_one().get(timeout=LIMIT_S) == []

    release_first.send(1)
    receiver.recv().get(timeout=LIMIT_S).send("ran")

    assert waiting[4].get(timeout=LIMIT_S) == "ran"
    release_second.send(2)
    assert [first.get(timeout=LIMIT_S), second.get(timeout=LIMIT_S)] == [1, 2]
    assert one.noted.call_one().get(timeout=LIMIT_S) == []


def test_async_endpoints_do_not_overlap_unless_asked_to(one: Worker) -> None:
    first, release = held(one.hold_async.call_one)
    port, receiver = Channel.open()
    second = one.hold_async.call_one(port)
    arrival = receiver.recv()

    release.send(1)
    assert first.get(timeout=LIMIT_S) == 1
    arrival.get(timeout=LIMIT_S).send(2)
    assert second.get(timeout=LIMIT_S) == 2
    assert one.most.call_one().get(timeout=LIMIT_S) == 1


def test_concurrent_endpoint_overlaps_without_a_limit_and_lets_others_pass(one: Worker) -> None:
    pairs = [held(one.overlap.call_one) for _ in range(20)]

    assert one.most.call_one().get(timeout=LIMIT_S) == 20
    assert one.note_async.call_one("passed").get(timeout=LIMIT_S) == "passed"
    for number, (_, release) in reversed(list(enumerate(pairs))):
        release.send(number)
    assert [future.get(timeout=LIMIT_S) for future, _ in pairs] == list(range(20))


def test_concurrency_limit_holds_and_what_waits_for_it_blocks_nobody_else(one: Worker) -> None:
    pairs = [held(one.pair.call_one) for _ in range(2)]
    port, receiver = Channel.open()
    third = one.pair.call_one(port)

    # The actor serves its other endpoints although the third call has no place yet.
    assert one.note.call_one("served").get(timeout=LIMIT_S) == "served"
    assert one.most.call_one().get(timeout=LIMIT_S) == 2
    arrival = receiver.recv()
    assert not arrival.done()

    pairs[0][1].send(0)
    arrival.get(timeout=LIMIT_S).send("third")
    assert third.get(timeout=LIMIT_S) == "third"
    pairs[1][1].send(1)
    assert [future.get(timeout=LIMIT_S) for future, _ in pairs] == [0, 1]
    assert one.most.call_one().get(timeout=LIMIT_S) == 2


def test_sync_and_async_endpoints_mix_in_one_actor(one: Worker) -> None:
    calls = [(one.note_async if number % 3 == 0 else one.note).call_one(number) for number in range(30)]
    calls.append(one.overlap.call_one(Channel.open()[0]))

    assert [future.get(timeout=LIMIT_S) for future in calls[:-1]] == list(range(30))
    assert one.noted.call_one().get(timeout=LIMIT_S) == list(range(30))
    calls[-1].cancel()


def test_stop_cancels_concurrent_calls_and_tells_their_callers(one: Worker) -> None:
    under_way, _ = held(one.overlap.call_one)
    port, receiver = Channel.open()
    one.overlap.broadcast(port)
    receiver.recv().get(timeout=LIMIT_S)

    one.stop().get(timeout=LIMIT_S)

    assert isinstance(under_way.exception(timeout=LIMIT_S), StoppedError)
    assert isinstance(one.rank.call_one().exception(timeout=LIMIT_S), StoppedError)


def test_explicit_port_answers_when_it_likes(one: Worker) -> None:
    assert one.answer_later.call_one(5).get(timeout=LIMIT_S) == 5
    assert one.answer_async.call_one(6).get(timeout=LIMIT_S) == 6
    error = one.answer_error.call_one().exception(timeout=LIMIT_S)
    assert isinstance(error, ActorError)
    assert isinstance(error.exception, KeyError)


def test_exception_in_an_explicit_port_endpoint_fails_the_actor(one: Worker) -> None:
    error = one.answer_never.call_one().exception(timeout=LIMIT_S)

    assert isinstance(error, SupervisionError)
    assert "no port for this" in str(error)
    assert isinstance(one.rank.call_one().exception(timeout=LIMIT_S), SupervisionError)


@pytest.mark.parametrize("method", ["count", "count_async"])
@pytest.mark.parametrize("num_items", [0, 1, 63, 64, 65, 500])
def test_generator_yields_every_item_in_order(one: Worker, method: str, num_items: int) -> None:
    assert list(getattr(one, method).call_one(num_items)) == list(range(num_items))


@pytest.mark.parametrize("method", ["count", "count_async"])
def test_generators_error_comes_after_the_items_before_it(one: Worker, method: str) -> None:
    items = getattr(one, method).call_one(10, fail_at=3)

    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ActorError, match="at 3"):
        next(items)
    assert list(items) == []
    assert one.note.call_one(1).get(timeout=LIMIT_S) == 1


@pytest.mark.parametrize("method", ["count", "count_async"])
def test_generator_can_be_iterated_in_async_code(one: Worker, method: str) -> None:
    async def main() -> list[int]:
        return [item async for item in getattr(one, method).call_one(200)]

    assert asyncio.run(main()) == list(range(200))


@pytest.mark.parametrize("method", ["produce", "produce_async"])
@pytest.mark.parametrize("ending", ["close", "with", "drop"])
def test_generator_is_closed_when_its_caller_ends_early(one: Worker, method: str, ending: str) -> None:
    items = getattr(one, method).call_one()
    taken = [next(items) for _ in range(100)]
    if ending == "close":
        items.close()
    elif ending == "with":
        with items:
            pass
    del items

    notes = one.noted.call_one().get(timeout=LIMIT_S)

    assert taken == list(range(1, 101))
    assert notes[1] == "closed"
    # A window of 64 items, of which half is asked for again at a time.
    assert 100 <= notes[0] <= 100 + 64 + 1


def test_generator_is_closed_when_its_time_limit_passes(one: Worker) -> None:
    port, receiver = Channel.open()
    items = one.produce_slowly.options(timeout=0.2).call_one(port)
    assert next(items) == 0
    release = receiver.recv().get(timeout=LIMIT_S)

    with pytest.raises(CallTimeoutError):
        next(items)

    release.send("unwanted")
    assert one.noted.call_one().get(timeout=LIMIT_S) == ["closed"]


def test_generator_that_yields_what_cannot_be_pickled_ends_with_that_error(one: Worker) -> None:
    items = one.produce_lock.call_one()

    assert next(items) == 1
    with pytest.raises(ActorError, match="cannot be pickled"):
        next(items)
    assert one.note.call_one("alive").get(timeout=LIMIT_S) == "alive"


def test_generators_of_many_ranks_advance_in_lockstep(workers: Worker) -> None:
    steps = list(workers.count.call(scatter([3, 5])))

    assert [list(step) for step in steps] == [[0, 0], [1, 1], [2, 2]]
    assert sorted(workers.count.stream(3)) == [0, 0, 1, 1, 2, 2]
    assert list(workers.count.choose(3)) == [0, 1, 2]


def test_broadcast_of_a_generator_runs_it_to_its_end(one: Worker) -> None:
    one.count.broadcast(200)
    one.count_async.broadcast(200)

    assert one.note.call_one("after").get(timeout=LIMIT_S) == "after"


def test_future_can_be_asked_in_every_way_and_many_times(one: Worker) -> None:
    future = one.note.call_one([1])

    assert future.get(timeout=LIMIT_S) is future.result(timeout=0) is future.get()
    assert future.exception() is None
    assert future.done()

    async def ask() -> list[int]:
        first, second = await asyncio.gather(future.as_asyncio(), future.as_asyncio())
        assert first is second
        return await future

    # Two loops, one after the other and side by side.
    assert asyncio.run(ask()) == asyncio.run(ask()) == [1]


def test_pending_future_can_be_awaited_by_several_loops_at_once(one: Worker) -> None:
    future, release = held(one.hold.call_one)
    results: list[Any] = []

    async def ask() -> None:
        results.append(await future)

    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    release.send("value")
    for thread in threads:
        thread.join(LIMIT_S)

    assert results == ["value"] * 3


def test_error_is_raised_each_time_it_is_asked_for(one: Worker) -> None:
    future = one.fail.call_one("again")

    for _ in range(2):
        with pytest.raises(ActorError, match="again"):
            future.get(timeout=LIMIT_S)


@pytest.mark.parametrize("is_resolved", [False, True])
def test_done_callback_runs_once_with_the_future_whenever_it_is_added(one: Worker, is_resolved: bool) -> None:
    called: list[Future[Any]] = []
    event = threading.Event()

    def callback(done: Future[Any]) -> None:
        called.append(done)
        event.set()

    future, release = held(one.hold.call_one)
    if is_resolved:
        release.send(1)
        future.get(timeout=LIMIT_S)
    future.add_done_callback(callback)
    if not is_resolved:
        assert called == []
        release.send(1)

    assert event.wait(LIMIT_S)
    assert called == [future]
    assert called[0].get(timeout=0) == 1


def test_blocking_inside_a_running_loop_is_refused_and_names_await(one: Worker) -> None:
    async def main() -> None:
        port, receiver = Channel.open()
        future = one.hold.call_one(port)
        release = await receiver.recv()
        with pytest.raises(RuntimeError, match="await"):
            future.get()
        release.send(None)
        await future

    asyncio.run(main())


def test_invalid_timeout_of_get_is_refused(one: Worker) -> None:
    future, release = held(one.hold.call_one)
    with pytest.raises(ValueError, match="timeout"):
        future.get(timeout=-1)
    release.send(None)
    future.get(timeout=LIMIT_S)


def test_call_leaves_although_its_future_is_dropped(one: Worker) -> None:
    one.note.call_one("kept")

    assert one.noted.call_one().get(timeout=LIMIT_S) == ["kept"]


def test_full_mailbox_blocks_a_sync_caller_no_longer_than_its_limit_and_keeps_nothing(procs: ProcMesh) -> None:
    from danaus.runtime.context import local_proc

    one = procs.slice(rank=0).spawn("small", Worker, mailbox=1)
    future, release = held(one.hold.call_one)
    before = set(local_proc().ports)

    with pytest.raises(CallTimeoutError, match="mailbox is full"):
        one.note.options(timeout=0.05).call_one("x" * 200_000).get(timeout=LIMIT_S)

    pool = local_proc().attachments._pool
    assert set(local_proc().ports) <= before
    assert pool is None or pool.stats().leases == 0
    release.send(None)
    future.get(timeout=LIMIT_S)
    assert one.noted.call_one().get(timeout=LIMIT_S) == []


def test_full_mailbox_refuses_a_broadcast_on_an_event_loop(procs: ProcMesh) -> None:
    one = procs.slice(rank=0).spawn("small", Worker, mailbox=1)

    async def main() -> None:
        port, receiver = Channel.open()
        future = one.hold.call_one(port)
        release = await receiver.recv()
        with pytest.raises(MailboxFull, match="mailbox of 1"):
            one.note.broadcast("refused")
        waiting = [one.note.call_one(number) for number in range(10)]
        release.send(None)
        await future
        assert [await each for each in waiting] == list(range(10))
        assert await one.noted.call_one() == list(range(10))

    asyncio.run(main())


def test_sync_sender_waits_for_room_and_goes_on(procs: ProcMesh) -> None:
    one = procs.slice(rank=0).spawn("small", Worker, mailbox=2)

    futures = [one.note.call_one(number) for number in range(300)]
    for number in range(300):
        one.note.broadcast(number)

    assert [future.get(timeout=LIMIT_S) for future in futures] == list(range(300))
    assert one.noted.call_one().get(timeout=LIMIT_S) == [*range(300), *range(300)]


def test_threads_of_the_controller_call_side_by_side(workers: Worker) -> None:
    def call(thread: int) -> None:
        for number in range(200):
            assert list(workers.note.call((thread, number)).get(timeout=LIMIT_S)) == [(thread, number)] * 2

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)

    noted = workers.slice(rank=1).noted.call_one().get(timeout=LIMIT_S)
    assert Counter(thread for thread, _ in noted) == {number: 200 for number in range(4)}
    for thread in range(4):
        assert [number for sender, number in noted if sender == thread] == list(range(200))


def test_unknown_endpoint_on_the_other_side_is_an_error_of_that_call(one: Worker) -> None:
    from danaus.runtime.calls.adverbs import Endpoint

    forged = Endpoint(one, replace(one.note._spec, name="gone"), one.note._options)

    error = forged.call_one(1).exception(timeout=LIMIT_S)

    assert isinstance(error, MessageError)
    assert "no endpoint 'gone'" in str(error)
    assert os.getpid() != one.rank.call_one().get(timeout=LIMIT_S)
