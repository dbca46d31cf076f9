"""Processes of this machine that are known by pid and start time, whoever started them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

AFTER_KILL_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Known:
    """A process, told apart from a later one with the same pid."""

    pid: int
    start_ticks: int

    def is_alive(self) -> bool:
        """Whether it runs still: neither gone nor a zombie."""
        state, start_ticks = _stat(self.pid)
        return state not in {"", "Z", "X"} and start_ticks == self.start_ticks


def known(pid: int) -> Known:
    """Return the process that has ``pid`` now; one that is gone is never alive."""
    return Known(pid, _stat(pid)[1])


def end_all(processes: Iterable[Known], *, grace_s: float) -> list[Known]:
    """Send SIGTERM to each, SIGKILL to those still there after ``grace_s``; return those that outlived even that."""
    descriptors = {process: handle for process in processes if (handle := _open(process)) is not None}
    try:
        _signal(descriptors, signal.SIGTERM)
        left = _wait(descriptors, grace_s)
        _signal({process: descriptors[process] for process in left}, signal.SIGKILL)
        return _wait({process: descriptors[process] for process in left}, AFTER_KILL_S)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _open(process: Known) -> int | None:
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    # Looked at once it is held: the pid cannot pass to another process any more.
    if process.is_alive():
        return descriptor
    os.close(descriptor)
    return None


def _signal(descriptors: dict[Known, int], number: signal.Signals) -> None:
    for descriptor in descriptors.values():
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)


def _wait(descriptors: dict[Known, int], limit_s: float) -> list[Known]:
    """Return those that have not ended within the limit."""
    left = {descriptor: process for process, descriptor in descriptors.items()}
    poller = select.poll()
    for descriptor in left:
        poller.register(descriptor, select.POLLIN)
    deadline_s = time.monotonic() + limit_s
    while left and (remaining_s := deadline_s - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(remaining_s * 1000):
            poller.unregister(descriptor)
            del left[descriptor]
    return list(left.values())


def _stat(pid: int) -> tuple[str, int]:
    """Return the state and the start time of a process, ("", 0) for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
