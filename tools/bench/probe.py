"""The actors that the benchmark calls in Danaus. Imports nothing else: it is loaded in processes whose memory is measured."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from ...runtime import Actor, endpoint


class Probe(Actor):
    """Answers, counts, sums and hangs on request."""

    def __init__(self) -> None:
        self._ticks = 0
        self._payloads: dict[tuple[str, int], Any] = {}

    @endpoint
    def noop(self) -> None:
        """Do nothing."""

    @endpoint
    def tick(self) -> None:
        """Count this message."""
        self._ticks += 1

    @endpoint
    def ticks(self) -> int:
        """Return how many messages :meth:`tick` has counted."""
        return self._ticks

    @endpoint
    def pid(self) -> int:
        """Return the process."""
        return os.getpid()

    @endpoint
    def relay(self, peer: Any, count: int) -> list[float]:
        """Call ``peer`` from here; return the seconds of each call."""
        times: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            peer.noop.call_one().get(timeout=10)
            times.append(time.perf_counter() - start)
        return times

    @endpoint
    def ignore(self, payload: Any) -> None:
        """Take ``payload`` and leave it unread."""

    @endpoint
    def total(self, payload: Any) -> int:
        """Return the sum of ``payload``."""
        from . import payload as payloads

        return payloads.total(payload)

    @endpoint(borrow=True)
    def borrowed_total(self, payload: Any) -> int:
        """Return the sum of ``payload``, a tensor read where its sender has it."""
        from . import payload as payloads

        return payloads.total(payload)

    @endpoint
    def sum_times(self, kind: str, size_bytes: int, count: int) -> list[float]:
        """Return the seconds that each of ``count`` sums of an own payload takes."""
        from . import payload as payloads

        own = payloads.make(kind, size_bytes)
        times: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            payloads.total(own)
            times.append(time.perf_counter() - start)
        return times

    @endpoint
    def produce(self, kind: str, size_bytes: int) -> Any:
        """Return a payload that is made once."""
        from . import payload as payloads

        key = (kind, size_bytes)
        if key not in self._payloads:
            self._payloads[key] = payloads.make(kind, size_bytes)
        return self._payloads[key]

    @endpoint
    def hang(self) -> None:
        """Block for far longer than the benchmark waits."""
        threading.Event().wait(600)

    @endpoint
    def spin(self, seconds: float) -> None:
        """Run Python code without a pause."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


class AsyncProbe(Actor):
    """The async endpoint, on an actor of its own: a running loop must not slow the sync one."""

    @endpoint
    async def noop(self) -> None:
        """Do nothing."""
