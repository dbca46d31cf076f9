"""Where an interrupt would leave a mess, it waits until the end of the block."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.interrupts import END_SIGNAL, InterruptsHeld
from danaus.runtime.messages import wire
from danaus.runtime.messages.link import MULTIPART, Link

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, END_SIGNAL)}
    yield
    after = {signum: signal.getsignal(signum) for signum in before}
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert after == before


def test_interrupt_is_raised_after_the_block() -> None:
    steps: list[int] = []

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  the point is what runs before it
        with InterruptsHeld():
            signal.raise_signal(signal.SIGINT)
            steps.append(1)
        steps.append(2)

    assert steps == [1]


def test_every_signal_that_came_is_handled_once() -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _frame: handled.append(signum))
    try:
        with InterruptsHeld(), InterruptsHeld():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert handled == []
        assert handled == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_error_of_the_block_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, InterruptsHeld():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the block")

    assert isinstance(caught.value.__context__, ValueError)


def test_default_actions_stay_as_they_are() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    with InterruptsHeld():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_hold_nothing() -> None:
    seen: list[Any] = []

    def run() -> None:
        with InterruptsHeld():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert seen == [signal.getsignal(signal.SIGINT)]


class InterruptedSocket:
    """Gets a Ctrl-C with every frame."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, data: bytes, *_flags: Any, **_options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        self.sent.append(data)


def test_message_of_several_frames_is_sent_whole() -> None:
    socket = InterruptedSocket()
    link = Link("mesh.0", lambda _link: None)
    link._socket = socket  # type: ignore[assignment]
    data = wire.pack([wire.LEASE, "me", [1]])

    with pytest.raises(KeyboardInterrupt):
        link.send(data, [b"one", b"two"])

    assert socket.sent == [MULTIPART + data, b"one", b"two"]


def test_batch_is_sent_once() -> None:
    socket = InterruptedSocket()
    link = Link("mesh.0", lambda _link: None)
    link._socket = socket  # type: ignore[assignment]
    data = wire.pack([wire.LEASE, "me", [1]])
    link.send(data, lazy=True)

    with pytest.raises(KeyboardInterrupt):
        link.flush()
    link.flush()

    assert socket.sent == [data]


def test_exit_after_an_interrupt_of_the_exit_itself_shows_as_one() -> None:
    body = (
        "import atexit, sys; from danaus.runtime.interrupts import end_as_interrupted; "
        "atexit.register(print, 'others run', flush=True); atexit.register(end_as_interrupted)"
    )
    ended = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=20, check=False)

    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "others run\n", "")


def test_holding_costs_little() -> None:
    count = 2000
    began_s = time.perf_counter()
    for _ in range(count):
        with InterruptsHeld():
            pass

    # Some 3 us; a message that is sent this way takes more than ten times as long.
    assert (time.perf_counter() - began_s) / count < 0.001
