"""What the benchmark's actors do, as functions: each runtime makes methods of them, so that all do the same.

Imports little: this is loaded in processes whose memory is measured.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Final

_HANG_S: Final = 600.0


def noop(_self: Any) -> None:
    """Do nothing."""


async def noop_async(_self: Any) -> None:
    """Do nothing, on a loop."""


def tick(self: Any) -> None:
    """Count this message."""
    self.num_ticks = getattr(self, "num_ticks", 0) + 1


def ticks(self: Any) -> int:
    """Return how many messages :func:`tick` has counted."""
    return getattr(self, "num_ticks", 0)


def pid(_self: Any) -> int:
    """Return the process."""
    return os.getpid()


def relay(_self: Any, peer: Any, count: int) -> list[float]:
    """Call the mesh ``peer`` from here; return the seconds of each call."""
    times: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        peer.noop.call_one().get(timeout=10)
        times.append(time.perf_counter() - start)
    return times


def ignore(_self: Any, _payload: object) -> None:
    """Take a payload and leave it unread."""


def total(_self: Any, payload: object) -> int:
    """Return the sum of a payload."""
    from . import payload as payloads

    return payloads.total(payload)


def borrowed_total(_self: Any, payload: object) -> int:
    """Return the sum of a payload that is read where its sender has it."""
    return total(_self, payload)


def sum_times(_self: Any, kind: str, size_bytes: int, count: int) -> list[float]:
    """Return the seconds that each of ``count`` sums of an own payload takes."""
    from . import payload as payloads

    own = payloads.make(kind, size_bytes)
    times: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        payloads.total(own)
        times.append(time.perf_counter() - start)
    return times


def produce(self: Any, kind: str, size_bytes: int) -> object:
    """Return a payload that is made once."""
    from . import payload as payloads

    name = f"{kind}_{size_bytes}"
    if not hasattr(self, name):
        setattr(self, name, payloads.make(kind, size_bytes))
    return getattr(self, name)


def hang(_self: Any) -> None:
    """Block for far longer than the benchmark waits."""
    threading.Event().wait(_HANG_S)


def spin(_self: Any, seconds: float) -> None:
    """Run Python code without a pause."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
