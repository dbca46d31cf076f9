"""What became of a rank that is no longer there: the one record that errors, reports and policies share."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum

import msgpack


class FailureKind(StrEnum):
    """How a rank ended."""

    EXITED = "exited"
    KILLED = "killed"
    ACTOR_ERROR = "actor error"
    INIT_ERROR = "init error"
    BOOTSTRAP_ERROR = "bootstrap error"
    SPAWN_ERROR = "spawn error"
    HOST_LOST = "host lost"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshFailure:
    """One rank's end. Picklable; ``str`` fits a terminal, :meth:`report` is the long form.

    Attributes:
        kind: How it ended.
        mesh: Name of the proc or actor mesh.
        rank: Base rank in that mesh, or None when the whole mesh failed.
        host: Host name.
        pid: Process id, or None when no process had started.
        exit_code: Exit status, where the process exited.
        signum: Signal number, where a signal killed it.
        log_tail: The last lines that the process wrote.
        traceback: Remote traceback, where an exception was the reason.
        detail: One line more, where there is one.
    """

    kind: FailureKind
    mesh: str
    rank: int | None
    host: str
    pid: int | None = None
    exit_code: int | None = None
    signum: int | None = None
    log_tail: tuple[str, ...] = ()
    traceback: str = ""
    detail: str = ""

    @property
    def how(self) -> str:
        """The end in words: ``killed by SIGKILL``, ``exited with code 3``."""
        if self.kind is FailureKind.KILLED and self.signum is not None:
            try:
                name = signal.Signals(self.signum).name
            except ValueError:
                name = f"signal {self.signum}"
            return f"was killed by {name}"
        if self.kind is FailureKind.EXITED:
            return f"exited with code {self.exit_code}"
        if self.kind is FailureKind.STOPPED:
            return "has already been stopped; spawn a new one"
        error = self.traceback.strip().rsplit("\n", 1)[-1]
        return f"failed ({self.kind})" + (f": {error}" if error else "")

    @property
    def who(self) -> str:
        """The rank in words: ``mesh 'trainers' rank 3``."""
        return f"mesh {self.mesh!r}" + ("" if self.rank is None else f" rank {self.rank}")

    def __str__(self) -> str:
        place = f"host {self.host}" + (f", pid {self.pid}" if self.pid else "")
        lines = [f"{self.who} ({place}) {self.how}"]
        if self.detail:
            lines.append(self.detail)
        if self.log_tail:
            lines += ["its last lines:", *(f"  {line}" for line in self.log_tail[-5:])]
        return "\n".join(lines)

    def report(self) -> str:
        """Return everything known, for a log or a terminal: the short form, all kept lines, the traceback."""
        parts = [str(self)]
        if len(self.log_tail) > 5:
            parts += ["all kept lines:", *(f"  {line}" for line in self.log_tail)]
        if self.traceback:
            parts += ["remote traceback:", self.traceback.rstrip()]
        return "\n".join(parts)


def pack_failure(failure: MeshFailure) -> bytes:
    """A MeshFailure as msgpack, which agents may read too."""
    fields = {name: getattr(failure, name) for name in MeshFailure.__slots__}
    return msgpack.packb(fields | {"kind": failure.kind.value}) or b""


def unpack_failure(data: bytes) -> MeshFailure:
    """Rebuild what :func:`pack_failure` packed."""
    fields = msgpack.unpackb(data)
    fields["kind"] = FailureKind(fields["kind"])
    fields["log_tail"] = tuple(fields["log_tail"])
    return MeshFailure(**fields)
