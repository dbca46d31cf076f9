"""What is told of an endpoint that runs past its call's deadline: where it is.

The caller's process calls the rest of the call off, and says that this is for the time; the I/O thread of the actor's
process looks for that very call, takes its stack, and sends it back. Calls that are answered in time cost nothing.
"""

from __future__ import annotations

import asyncio
import linecache
import sys
import time
from traceback import FrameSummary, StackSummary
from typing import TYPE_CHECKING, Any, Final

from .handler import CallHandler
from .invoke import _RUNTIME
from .messages import wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

    from .proc import LocalProc
    from .runner import ActorRunner

_GATHER_S: Final = 0.1
"""How long to wait for other ranks of a call that may be at the same place."""
_MAX_FRAMES: Final = 40
_SYNC: Final = CallHandler.run_sync.__code__
_ASYNC: Final = CallHandler.run_async.__code__


# Where the actor is:


def tell_overdue(runner: ActorRunner, envelope: wire.Envelope) -> None:
    """A caller gave up for the time: tell it where its call is, if that is under way (I/O thread)."""
    _, _, sender, port, deadline_s = envelope
    found = _find(runner, (sender, port))
    instance = runner.instance
    if found is None or instance is None:
        return
    method, frames = found
    fields = {
        "endpoint": f"{instance.name}.{method}",
        "mesh": instance.name,
        "rank": instance.rank.rank,
        "host": runner.proc.host,
        "pid": runner.proc.pid,
        "port": port,
        "deadline_s": deadline_s,
        "stack": _format(frames),
    }
    runner.proc.send(sender, [wire.EVENT, "overdue", fields])


def _find(runner: ActorRunner, key: tuple[str, int]) -> tuple[str, list[FrameType]] | None:
    """The endpoint and the frames of the call ``key``, outermost first; None where it is queued, or over."""
    handler = runner._handler
    if handler is None:
        return None
    call = handler.active.get(key)
    if call is not None and call.task is not None:
        return call.envelope[2], _task_frames(call.task, runner.thread_id)
    in_hand = handler.in_hand
    if in_hand is None or (in_hand[3], in_hand[5]) != key:
        return None
    frames = _thread_frames(runner.thread_id, _SYNC)
    return (in_hand[2], frames) if frames else None


def _task_frames(task: asyncio.Task[None], thread_id: int) -> list[FrameType]:
    if asyncio.current_task(task.get_loop()) is task:
        return _thread_frames(thread_id, _ASYNC)
    frames: list[FrameType] = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is None:
            break
        frames.append(frame)
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return frames


def _thread_frames(thread_id: int, within: CodeType) -> list[FrameType]:
    """What a thread runs inside its innermost call of ``within``; empty where it is not inside."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread_id)
    while frame is not None:
        if frame.f_code is within:
            return frames[::-1]
        frames.append(frame)
        frame = frame.f_back
    return []


def _format(frames: list[FrameType]) -> str:
    while len(frames) > 1 and frames[0].f_code.co_filename.startswith(_RUNTIME):
        frames = frames[1:]
    # Not by the traceback module's own way, which asks the modules' loaders: they may be the user's.
    summaries = [
        FrameSummary(
            frame.f_code.co_filename,
            frame.f_lineno,
            frame.f_code.co_name,
            lookup_line=False,
            line=linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip(),
        )
        for frame in frames[-_MAX_FRAMES:]
    ]
    return "".join(StackSummary.from_list(summaries).format())


# Where the caller is:


class OverdueNotes:
    """Says what comes in of calls past their deadlines: once per call and rank, ranks at the same place together.

    Args:
        proc: The caller's process.
        say: Takes the text.
    """

    def __init__(self, proc: LocalProc, say: Callable[[str], object]) -> None:
        self._proc, self._say = proc, say
        self._waiting: dict[tuple[int, str], list[dict[str, Any]]] = {}
        proc.on_event["overdue"] = self.on_overdue

    def on_overdue(self, fields: dict[str, Any]) -> None:
        """A rank says where its call is (I/O thread)."""
        if not self._waiting:
            self._proc.run_at(time.monotonic() + _GATHER_S, self._flush)
        self._waiting.setdefault((fields["port"], fields["stack"]), []).append(fields)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for same in waiting.values():
            self._say(describe(same))


def describe(same: list[dict[str, Any]]) -> str:
    """Tell of the ranks of one call that are at the same place."""
    same = sorted(same, key=lambda fields: fields["rank"])
    first = same[0]
    where = f"host {first['host']}, pid {first['pid']}"
    ranks = f"rank {first['rank']} ({where})" if len(same) == 1 else f"ranks {_spans(same)} (the first: {where})"
    title = f"{first['endpoint']} is past its deadline of {first['deadline_s']:g} s on {ranks}; it is at:"
    return f"{title}\n{first['stack'].rstrip()}"


def _spans(same: list[dict[str, Any]]) -> str:
    spans: list[list[int]] = []
    for fields in same:
        rank = fields["rank"]
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
