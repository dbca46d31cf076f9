"""Finds and ends what a job's processes have started, once nobody is left who is a parent of it.

The host agent inherits orphans and ends them itself. Where it was killed, they are known by the variable that it and
everything below it got with its environment.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

JOB_VARIABLE: Final = "DANAUS_JOB"
"""Names the job's directory in the environment of every process below the agent."""

_LIMIT_S: Final = 2.0


def end_descendants(directory: str) -> None:
    """Kill every process of this user that the job in ``directory`` has left, until none is found any more."""
    deadline_s = time.monotonic() + _LIMIT_S
    mark = f"{JOB_VARIABLE}={directory}".encode()
    while time.monotonic() < deadline_s:
        found = list(_marked(mark))
        if not found:
            return
        for pidfd in found:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except OSError:
                continue
            finally:
                os.close(pidfd)


def _marked(mark: bytes) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        # Read with the pidfd open: a later process of the same pid is not the one that is killed.
        if mark in _environment(name):
            yield pidfd
        else:
            os.close(pidfd)


def _environment(pid: str) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []
