"""What a piece of code leaves behind on this machine: processes, threads, files in shared places.

Take a :class:`Snapshot` before and one after, and compare. Processes count when they descend from this one or carry its
mark in their environment, by which they are known even after every process in between has died. Whatever other jobs of
the same user do meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MARK = "DANAUS_LEFTOVERS_MARK"
"""Environment variable that holds the marks of the processes which this one was started by, nearest last."""

_SHM = "/dev/shm"
_own_mark = secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from a later one with the same pid by its start time."""

    pid: int
    start_ticks: int
    parent: int = field(compare=False)
    name: str = field(compare=False)
    command: str = field(compare=False)

    @property
    def is_runtime(self) -> bool:
        """Whether it is a host agent or a zygote, which serve every mesh of a job and end with it."""
        if self.name.startswith("danaus-"):
            return True
        # Zygotes and procs are forked from the agent and share its command line, but have names of their own.
        program = os.path.basename(self.command.partition(" ")[0])
        return "danaus.runtime.host.agent" in self.command and program.startswith(self.name)

    def __str__(self) -> str:
        return f"process {self.pid} {self.name!r}, child of {self.parent}: {self.command or '(no command line)'}"


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread of this process: one of Python's, or one of ZeroMQ's own."""

    ident: int
    name: str

    @property
    def is_runtime(self) -> bool:
        """Whether it belongs to the runtime of this process, which all meshes share."""
        return self.name.startswith(("danaus-", "ZMQbg"))

    def __str__(self) -> str:
        return f"thread {self.name!r}"


@dataclass(frozen=True, slots=True)
class File:
    """A job's socket directory, or a named segment of shared memory."""

    path: str

    @property
    def is_runtime(self) -> bool:
        """Whether it is the directory of a job, which exists as long as the job."""
        return not self.path.startswith(_SHM)

    def __str__(self) -> str:
        return f"file {self.path}"


Leftover = Process | Thread | File


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is at one moment."""

    items: frozenset[Leftover]
    meshes: frozenset[str] = frozenset()
    """Ids of the meshes of processes that there are, or that have been asked for."""

    @property
    def has_runtime(self) -> bool:
        """Whether this process was a controller at that moment."""
        return any(isinstance(item, Thread) and item.name == "danaus-io" for item in self.items)

    def added_since(self, before: Snapshot, *, allow_runtime: bool = False) -> list[Leftover]:
        """Return what is new since ``before``, in a stable order.

        Args:
            before: The earlier snapshot.
            allow_runtime: Leave out what serves every mesh of a job, and the procs of meshes that were there before,
                since they come up late and may be restarted.
        """
        added = sorted(self.items - before.items, key=str)
        if not allow_runtime:
            return added
        return [item for item in added if not (item.is_runtime or _belongs_to(item, before.meshes))]


def mark_environment() -> None:
    """Mark what this process starts from now on, however it is started."""
    marks = os.environ.get(MARK, "").split(",")
    if _own_mark not in marks:
        os.environ[MARK] = ",".join([*filter(None, marks), _own_mark])


def take_snapshot(socket_dirs: Iterable[str | os.PathLike[str]] = ()) -> Snapshot:
    """Return what this process and what it started hold now.

    Args:
        socket_dirs: Where to look for the directories of jobs.
    """
    jobs = [path for root in socket_dirs for path in Path(root).glob("danaus-*")]
    items = [*_processes(), *_threads(), *(File(str(path)) for path in jobs), *_segments()]
    # A mesh has its boot file from the call of spawn_procs until its last process has ended.
    boot_files = [path.name for job in jobs for path in job.glob("*.boot@*")]
    return Snapshot(frozenset(items), frozenset(name.partition(".boot@")[0] for name in boot_files))


def kill(items: Iterable[Leftover]) -> None:
    """Kill the processes among ``items``, unless their pid belongs to another by now."""
    for item in items:
        stat = _read_stat(item.pid) if isinstance(item, Process) else None
        if isinstance(item, Process) and stat is not None and stat.start_ticks == item.start_ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(item.pid, signal.SIGKILL)


def _belongs_to(item: Leftover, meshes: frozenset[str]) -> bool:
    """Whether it is a proc of one of ``meshes``: its name is the mesh's id and its rank, cut after 15 characters."""
    return isinstance(item, Process) and any(item.name.startswith(f"{mesh}."[:15]) for mesh in meshes)


class _Stat(NamedTuple):
    name: str
    state: str
    parent: int
    start_ticks: int


def _read_stat(pid: int) -> _Stat | None:
    """Return None for a process that is gone."""
    text = _read(f"/proc/{pid}/stat").decode(errors="replace")
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return _Stat(head.partition("(")[2], fields[0], int(fields[1]), int(fields[19])) if fields else None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _processes() -> Iterator[Process]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    stats = {pid: stat for pid in pids if (stat := _read_stat(pid)) is not None}
    me = stats[os.getpid()]
    for pid, stat in stats.items():
        # What runs longer than this process was not started by it; that spares reading most environments.
        if pid == os.getpid() or stat.state == "X" or stat.start_ticks < me.start_ticks:
            continue
        if _descends(pid, os.getpid(), stats) or _has_mark(pid):
            command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            yield Process(pid, stat.start_ticks, stat.parent, stat.name, command[:200])


def _descends(pid: int, ancestor: int, stats: dict[int, _Stat]) -> bool:
    while pid in stats:
        pid = stats[pid].parent
        if pid == ancestor:
            return True
    return False


def _has_mark(pid: int) -> bool:
    for line in _read(f"/proc/{pid}/environ").decode(errors="replace").split("\0"):
        name, _, value = line.partition("=")
        if name == MARK:
            return _own_mark in value.split(",")
    return False


def _threads() -> Iterator[Thread]:
    known = {thread.native_id for thread in threading.enumerate()}
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            yield Thread(thread.ident or 0, thread.name)
    for tid in os.listdir("/proc/self/task"):
        name = _read(f"/proc/self/task/{tid}/comm").decode().strip()
        if name.startswith("ZMQbg") and int(tid) not in known:
            yield Thread(int(tid), name)


def _segments() -> Iterator[File]:
    for name in os.listdir(_SHM) if os.path.isdir(_SHM) else []:
        # torch names its segments after the process that made them; others belong to other programs.
        match = re.match(r"torch_(\d+)_", name)
        is_torchs = match is not None and (int(match[1]) == os.getpid() or _read_stat(int(match[1])) is None)
        if is_torchs or name.startswith("danaus"):
            yield File(f"{_SHM}/{name}")
