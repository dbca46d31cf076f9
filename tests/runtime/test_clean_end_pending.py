"""What still waits when the runtime of its process is shut down: it fails with an error that says so; nobody hangs."""

# Endpoints here take and return anything.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import (
    Actor,
    Channel,
    Future,
    Port,
    StoppedError,
    SupervisionError,
    endpoint,
    shutdown_context,
    this_host,
    this_proc,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SHUT_DOWN = "the runtime was shut down"
SOON_S = 5.0


class Sleeper(Actor):
    @endpoint
    def nap(self) -> None:
        return None

    @endpoint
    def sleep(self, seconds: float, begins: Port[None] | None = None) -> None:
        if begins is not None:
            begins.send(None)
        time.sleep(seconds)

    @endpoint
    def numbers(self) -> Iterator[int]:
        yield 0
        time.sleep(60)


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    shutdown_context()
    yield
    shutdown_context()


def shut_down_while(wait: Callable[[], object]) -> tuple[object, float]:
    """Shut down while a thread is in ``wait``; return what that raised (or returned), and after how long."""
    outcomes: list[object] = []
    starts = threading.Event()

    def run() -> None:
        starts.set()
        try:
            outcomes.append(wait())
        except Exception as error:  # noqa: BLE001  what this is about
            outcomes.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    starts.wait(SOON_S)
    began_s = time.monotonic()
    shutdown_context()
    thread.join(SOON_S)
    assert not thread.is_alive()
    return outcomes[0], time.monotonic() - began_s


def waits_of_a_mesh() -> dict[str, Callable[[], Any]]:
    procs = this_host().spawn_procs({"rank": 2}, name="crew")
    sleepers = procs.spawn("sleepers", Sleeper)
    one = sleepers.slice(rank=0)
    sleepers.nap.call().get(timeout=20)
    items = sleepers.slice(rank=1).numbers.call_one()
    assert next(items) == 0
    return {
        "call": sleepers.sleep.call(60).get,
        "call_one": one.sleep.call_one(60).get,
        "choose": one.sleep.choose(60).get,
        "stream": next(iter(one.sleep.stream(60))).get,
        "items": lambda: next(items),
        "initialized": this_host().spawn_procs(name="late", bootstrap=lambda: time.sleep(60)).initialized.get,
    }


def test_calls_and_streams_fail_and_say_so() -> None:
    waits = waits_of_a_mesh()
    outcomes: dict[str, object] = {}

    def run(name: str) -> None:
        try:
            outcomes[name] = waits[name]()
        except Exception as error:  # noqa: BLE001  what this is about
            outcomes[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in waits]
    for thread in threads:
        thread.start()
    shutdown_context()
    for thread in threads:
        thread.join(SOON_S)

    assert set(outcomes) == set(waits)
    for name, outcome in outcomes.items():
        assert isinstance(outcome, StoppedError), (name, outcome)
        assert SHUT_DOWN in str(outcome), (name, outcome)


def test_receiver_fails_and_says_so() -> None:
    _, receiver = Channel[int].open()

    outcome, seconds = shut_down_while(receiver.recv().get)

    assert isinstance(outcome, StoppedError)
    assert SHUT_DOWN in str(outcome)
    assert seconds < SOON_S
    with pytest.raises(StoppedError, match=SHUT_DOWN):
        receiver.recv().get(timeout=SOON_S)


def test_value_that_had_arrived_before_is_still_received() -> None:
    port, receiver = Channel[int].open()
    port.send(3)
    other, other_receiver = Channel[int].open()
    other.send(4)
    assert other_receiver.recv().get(timeout=SOON_S) == 4

    shutdown_context()

    assert receiver.recv().get(timeout=SOON_S) == 3


def test_call_to_a_blocked_actor_of_this_process_fails_and_says_so() -> None:
    port, receiver = Channel[None].open()
    # Longer than a shutdown waits for an actor; its thread ends with it.
    call = this_proc().spawn("blocked", Sleeper).sleep.call_one(2.0, port)
    receiver.recv().get(timeout=SOON_S)

    outcome, seconds = shut_down_while(call.get)

    assert isinstance(outcome, StoppedError)
    assert SHUT_DOWN in str(outcome)
    assert seconds < SOON_S


def test_sender_that_waits_for_room_fails() -> None:
    procs = this_host().spawn_procs(name="crew")
    sleeper = procs.spawn("sleeper", Sleeper, mailbox=1)
    first = sleeper.sleep.call_one(60)

    def flood() -> None:
        futures = [sleeper.nap.call_one() for _ in range(100)]
        futures[-1].get()

    outcome, _ = shut_down_while(flood)

    assert isinstance(outcome, SupervisionError)
    assert isinstance(first.exception(timeout=SOON_S), SupervisionError)


def test_awaits_in_the_loop_of_another_thread_fail() -> None:
    procs = this_host().spawn_procs(name="crew")
    sleeper = procs.spawn("sleeper", Sleeper)
    _, receiver = Channel[int].open()
    begins = threading.Event()
    outcomes: list[object] = []

    async def main() -> list[object]:
        calls = asyncio.gather(sleeper.sleep.call_one(60), receiver.recv(), return_exceptions=True)
        asyncio.get_running_loop().call_later(0.05, begins.set)
        return list(await calls)

    thread = threading.Thread(target=lambda: outcomes.extend(asyncio.run(main())))
    thread.start()
    assert begins.wait(SOON_S)
    shutdown_context()
    thread.join(SOON_S)

    assert [type(outcome) for outcome in outcomes] == [StoppedError, StoppedError]


def test_handle_of_a_job_that_has_ended_fails_at_once() -> None:
    procs = this_host().spawn_procs({"rank": 2}, name="crew")
    sleepers = procs.spawn("sleepers", Sleeper)
    sleepers.nap.call().get(timeout=20)
    shutdown_context()

    with pytest.raises(StoppedError, match=SHUT_DOWN):
        sleepers.nap.call().get(timeout=SOON_S)
    with pytest.raises(StoppedError, match=SHUT_DOWN):
        procs.spawn("more", Sleeper).nap.call().get(timeout=SOON_S)
    procs.stop().get(timeout=SOON_S)


def test_interrupted_get_cancels_the_call() -> None:
    future: Future[int] = Future("answer")
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            future.get(timeout=SOON_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert future.done()


def test_interrupted_call_frees_its_actor() -> None:
    procs = this_host().spawn_procs(name="crew")
    sleeper = procs.spawn("sleeper", Waiter)
    sleeper.nap.call_one().get(timeout=20)
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            sleeper.wait.call_one().get()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert sleeper.nap.call_one().get(timeout=SOON_S) is None


class Waiter(Actor):
    @endpoint
    async def nap(self) -> None:
        return None

    @endpoint
    async def wait(self) -> None:
        await asyncio.sleep(60)
