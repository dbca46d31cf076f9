"""One loop waits for sockets, descriptors and signals, and calls whoever asked to hear of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from danaus.runtime.host.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

LIMIT_MS = 5000


@contextlib.contextmanager
def pipe() -> Generator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind("inproc://loop")
    push.connect("inproc://loop")
    yield pull, push
    pull.close(0)
    push.close(0)
    context.term()


def test_a_readable_descriptor_has_its_handler_called_and_no_other() -> None:
    loop, called = Loop(), []
    with pipe() as (reading, writing), pipe() as (quiet, _):
        loop.watch(reading, lambda: called.append(os.read(reading, 9)))
        loop.watch(quiet, lambda: called.append(b"quiet"))
        os.write(writing, b"news")

        loop.wait(LIMIT_MS)

    assert called == [b"news"]


def test_nothing_to_do_ends_with_the_time() -> None:
    loop, called = Loop(), []
    with pipe() as (reading, _):
        loop.watch(reading, lambda: called.append("never"))

        loop.wait(1)

    assert called == []


def test_sockets_and_descriptors_are_served_in_the_same_wait(sockets: tuple[Any, Any]) -> None:
    pull, push = sockets
    loop, called = Loop(), []
    with pipe() as (reading, writing):
        loop.watch_socket(pull, lambda: called.append(pull.recv()))
        loop.watch(reading, lambda: called.append(os.read(reading, 9)))
        push.send(b"message")
        os.write(writing, b"bytes")

        loop.wait(LIMIT_MS)

    assert sorted(called) == [b"bytes", b"message"]


def test_what_is_unwatched_is_not_called_and_may_be_unwatched_twice(sockets: tuple[Any, Any]) -> None:
    pull, push = sockets
    loop, called = Loop(), []
    with pipe() as (reading, writing):
        loop.watch_socket(pull, lambda: called.append("socket"))
        loop.watch(reading, lambda: called.append("descriptor"))
        push.send(b"message")
        os.write(writing, b"bytes")
        for _ in range(2):
            loop.unwatch_socket(pull)
            loop.unwatch(reading)

        loop.wait(1)

    assert called == []


def test_a_handler_may_end_the_watch_of_another_that_is_due(sockets: tuple[Any, Any]) -> None:
    pull, push = sockets
    loop, called = Loop(), []

    def end_all(name: str) -> None:
        called.append(name)
        loop.unwatch_socket(pull)
        for fd in (first, second):
            loop.unwatch(fd)

    with pipe() as (first, first_writing), pipe() as (second, second_writing):
        loop.watch_socket(pull, lambda: end_all("socket"))
        loop.watch(first, lambda: end_all("first"))
        loop.watch(second, lambda: end_all("second"))
        push.send(b"message")
        for fd in (first_writing, second_writing):
            os.write(fd, b"x")

        loop.wait(LIMIT_MS)
        loop.wait(1)

    assert len(called) == 1


def test_a_descriptor_that_is_closed_already_can_be_unwatched() -> None:
    loop, called = Loop(), []
    reading, writing = os.pipe()
    loop.watch(reading, lambda: called.append("never"))
    os.close(reading)

    loop.unwatch(reading)
    os.close(writing)
    loop.wait(1)

    assert called == []


@pytest.fixture
def signals() -> Iterator[None]:
    """Signal handlers as they were, and a wake-up descriptor that is closed with the test's loop."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGUSR2)}
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    yield
    writing = signal.set_wakeup_fd(fd)
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if writing >= 0:
        os.close(writing)


def watch_signals(loop: Loop) -> list[list[int]]:
    told: list[list[int]] = []
    loop.watch_signals((signal.SIGUSR1, signal.SIGUSR2), told.append)
    return told


def test_signals_are_told_of_between_other_calls(signals: None) -> None:
    loop = Loop()
    told = watch_signals(loop)

    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR2)
    assert told == []
    loop.wait(LIMIT_MS)

    assert told == [[signal.SIGUSR1, signal.SIGUSR2]]
    loop.wait(1)
    assert len(told) == 1
    close(loop)


def test_a_signal_ends_the_wait(signals: None) -> None:
    loop = Loop()
    told = watch_signals(loop)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()

    while not told:
        loop.wait(LIMIT_MS)

    timer.join()
    assert told == [[signal.SIGUSR1]]
    close(loop)


def close(loop: Loop) -> None:
    """Close what only the end of the process would close."""
    for fd in list(loop._descriptors):
        loop.unwatch(fd)
        os.close(fd)
