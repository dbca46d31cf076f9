"""What became of a rank that is no longer there: the one record that errors, reports and policies share."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .shapes.shape import Point, Region


class FailureKind(StrEnum):
    """How a rank ended, or what is wrong with it."""

    EXITED = "exited"
    KILLED = "killed"
    OUT_OF_MEMORY = "out of memory"
    ACTOR_ERROR = "actor error"
    INIT_ERROR = "init error"
    RESTORE_ERROR = "restore error"
    BOOTSTRAP_ERROR = "bootstrap error"
    SPAWN_ERROR = "spawn error"
    HOST_LOST = "host lost"
    PREEMPTED = "preempted"
    RESTARTED = "restarted"
    """Ended on purpose, to be started again with others of its mesh."""
    STUCK = "stuck"
    """Alive, and does not answer: stopped, or something holds its interpreter lock."""
    STOPPED = "stopped"
    """Ended on purpose, by its owner."""

    @property
    def is_death(self) -> bool:
        """Whether the rank is gone; a stuck one is not."""
        return self is not FailureKind.STUCK


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshFailure:
    """One rank's end. Picklable; ``str`` fits a terminal, :meth:`report` is the long form.

    Attributes:
        kind: How it ended.
        mesh: Name of the proc or actor mesh.
        rank: Base rank in that mesh, or None when the whole mesh failed.
        dims: Dimensions of the whole mesh, as (label, size); empty where they are not known.
        host: Host name.
        pid: Process id, or None when no process had started.
        incarnation: How many times this rank had been restarted before.
        exit_code: Exit status, where the process exited.
        signum: Signal number, where a signal killed it.
        log_tail: The last lines that the process wrote.
        traceback: Remote traceback, where an exception was the reason; the stacks of its threads, where it is stuck.
        detail: One line more, where there is one.
        cause: The failure that this one followed from.
        restarts: Whether a policy may start the rank again: a call to the same handle then waits for it.
        at_s: ``time.time()`` at which it was seen.
    """

    kind: FailureKind
    mesh: str
    rank: int | None
    dims: tuple[tuple[str, int], ...] = ()
    host: str
    pid: int | None = None
    incarnation: int = 0
    exit_code: int | None = None
    signum: int | None = None
    log_tail: tuple[str, ...] = ()
    traceback: str = ""
    detail: str = ""
    cause: MeshFailure | None = None
    restarts: bool = False
    at_s: float = field(default_factory=time.time, compare=False)

    @property
    def how(self) -> str:
        """The end in words: ``was killed by SIGKILL``, ``exited with code 3``."""
        kind = self.kind
        if kind is FailureKind.KILLED and self.signum is not None:
            return f"was killed by {_signal_name(self.signum)}"
        if kind is FailureKind.EXITED:
            return f"exited with code {self.exit_code}"
        if kind in _WORDS:
            return _WORDS[kind]
        error = _last_error(self.traceback)
        return f"failed ({kind})" + (f": {error}" if error else "")

    @property
    def who(self) -> str:
        """The rank in words: ``mesh 'trainers' rank 3``, with its incarnation where it was restarted before."""
        if self.rank is None:
            return f"mesh {self.mesh!r}"
        again = f" (incarnation {self.incarnation})" if self.incarnation else ""
        return f"mesh {self.mesh!r} rank {self.rank}{again}"

    @property
    def region(self) -> Region | None:
        """The failed ranks as a region of the mesh: one rank, or all; None where the dimensions are not known."""
        from .shapes.shape import Extent, Region

        if self.rank is not None:
            return Region((), self.rank, (), ())
        if not self.dims:
            return None
        labels, sizes = zip(*self.dims, strict=True)
        return Extent(labels, sizes).region

    @property
    def point(self) -> Point | None:
        """The failed rank's coordinates, where the mesh's dimensions are known."""
        from .shapes.shape import Extent

        if self.rank is None or not self.dims:
            return None
        labels, sizes = zip(*self.dims, strict=True)
        return Extent(labels, sizes).region.point_of(self.rank)

    @property
    def root(self) -> MeshFailure:
        """The failure that this one follows from in the end; itself, where it has no cause."""
        failure = self
        while failure.cause is not None:
            failure = failure.cause
        return failure

    def chain(self) -> Iterator[MeshFailure]:
        """This failure, its cause, the cause of that, and so on."""
        failure: MeshFailure | None = self
        while failure is not None:
            yield failure
            failure = failure.cause

    def __str__(self) -> str:
        place = f"host {self.host}" + (f", pid {self.pid}" if self.pid else "")
        lines = [f"{self.who} ({place}) {self.how}"]
        if self.detail:
            lines.append(self.detail)
        if self.log_tail:
            lines += ["its last lines:", *(f"  {line}" for line in self.log_tail[-5:])]
        if self.cause is not None:
            lines.append(f"it follows from: {self.cause.who} {self.cause.how}")
        return "\n".join(lines)

    def report(self) -> str:
        """Return everything known, for a log or a terminal: the short form, all kept lines, tracebacks, causes."""
        parts = [str(self)]
        if len(self.log_tail) > 5:
            parts += ["all kept lines:", *(f"  {line}" for line in self.log_tail)]
        if self.traceback:
            title = "stacks of its threads:" if self.kind is FailureKind.STUCK else "remote traceback:"
            parts += [title, self.traceback.rstrip()]
        if self.cause is not None:
            parts += ["", self.cause.report()]
        return "\n".join(parts)


_WORDS = {
    FailureKind.OUT_OF_MEMORY: "was killed by the kernel: out of memory (OOM)",
    FailureKind.STOPPED: "has already been stopped; spawn a new one",
    FailureKind.PREEMPTED: "was preempted: its host was told to end",
    FailureKind.RESTARTED: "was stopped to be restarted with its mesh",
    FailureKind.STUCK: "is stuck: alive, but it does not answer",
}


def _last_error(traceback: str) -> str:
    """The line that names what was raised at last; a message of several lines follows it."""
    lines = traceback.strip().rpartition("\nTraceback (most recent call last):\n")[2].split("\n")
    first = next((at for at, line in enumerate(lines) if line.startswith("  File ")), None)
    if first is None:
        return lines[-1]
    return next((line for line in lines[first:] if not line.startswith(" ")), lines[-1])


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def pack_failure(failure: MeshFailure) -> bytes:
    """A MeshFailure as msgpack, which agents may read too."""
    return msgpack.packb(_as_dict(failure)) or b""


def unpack_failure(data: bytes) -> MeshFailure:
    """Rebuild what :func:`pack_failure` packed."""
    return _from_dict(msgpack.unpackb(data))


def _as_dict(failure: MeshFailure) -> dict[str, Any]:
    values = {each.name: getattr(failure, each.name) for each in fields(failure)}
    cause = None if failure.cause is None else _as_dict(failure.cause)
    return values | {"kind": failure.kind.value, "cause": cause}


def _from_dict(values: dict[str, Any]) -> MeshFailure:
    cause = values["cause"]
    values["kind"] = FailureKind(values["kind"])
    values["log_tail"] = tuple(values["log_tail"])
    values["dims"] = tuple((label, size) for label, size in values["dims"])
    values["cause"] = None if cause is None else _from_dict(cause)
    return MeshFailure(**values)
