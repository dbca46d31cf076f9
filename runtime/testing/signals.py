"""Signals to a rank's process, at once and from outside: what it is doing does not matter."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..address import incarnation_of
from ..calls.replies import Call, OneReply, ask_all
from ..context import local_proc
from ..messages import wire
from ..proc import NONE
from .places import check_rank, lane_to, places_of, procs_of

if TYPE_CHECKING:
    from ..proc import LocalProc

_LIMIT_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.01


def kill(mesh: Any, rank: int = 0, *, timeout: float = _LIMIT_S) -> int:
    """Send SIGKILL to the process of a rank; a process that is starting gets it when it is up.

    Args:
        mesh: Procs or actors; may be a slice, whose ranks then count.
        rank: Which one.
        timeout: Seconds for the process to be up, and for its host agent to answer.

    Returns:
        Which incarnation of the rank it was sent to.

    Raises:
        ValueError: ``mesh`` has no such rank.
        SupervisionError: Its process is gone already; says how it ended.
        TimeoutError: No answer.
    """
    return _send(mesh, rank, signal.SIGKILL, "kill", timeout)


def stop(mesh: Any, rank: int = 0, *, timeout: float = _LIMIT_S) -> int:
    """Send SIGSTOP to the process of a rank, which then stands still until :func:`resume`; see :func:`kill`."""
    return _send(mesh, rank, signal.SIGSTOP, "stop", timeout)


def resume(mesh: Any, rank: int = 0, *, timeout: float = _LIMIT_S) -> int:
    """Send SIGCONT to the process of a rank; see :func:`kill`."""
    return _send(mesh, rank, signal.SIGCONT, "resume", timeout)


def _send(mesh: Any, rank: int, signum: int, verb: str, timeout: float) -> int:
    what = f"testing.{verb}"
    procs = procs_of(mesh, what)
    check_rank(rank, procs, what)
    local = local_proc()
    lane = lane_to(local, local.resolve(places_of(procs)[rank]), procs)
    if not lane.link.is_open:
        up = ask_all(wire.PING, f"{what} of {lane.name}", [lane], procs._region, on_error="first", timeout_s=timeout)
        up.get(timeout + 1.0)
    call = Call(local, f"{what} of {lane.name}", [lane], implied_credit=False)
    future: OneReply[None] = OneReply(call)
    local.ports[call.port] = future
    local.request("signal", {"proc": lane.proc, "signum": signum, "port": call.port, "token": NONE})
    if lane.proc in local.gone:
        call.tell_gone(future)
    future.get(timeout)
    return incarnation_of(lane.proc)


def resume_stopped(local: LocalProc, pid: int) -> None:
    """Let a process go on that stands still, or is about to (I/O thread)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return
    if state == "T":
        os.kill(pid, signal.SIGCONT)
    else:
        local.run_at(time.monotonic() + _LOOK_AGAIN_S, lambda: resume_stopped(local, pid))
