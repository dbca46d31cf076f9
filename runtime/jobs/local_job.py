"""Hosts on this machine, each a daemon of its own on 127.0.0.1: a cluster on a laptop."""

from __future__ import annotations

import atexit
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ..host.descendants import JOB_VARIABLE
from .errors import SHOWN_LINES, Attempt, JobError, LaunchError
from .job import Job
from .launch import host_arguments, read_ready, tail
from .processes import Known, end_all, known
from .spec import HostRecord, JobSpec

if TYPE_CHECKING:
    from .state import Record

LISTEN: Final = "tcp://127.0.0.1:0"
END_GRACE_S: Final = 15.0
"""Time for a daemon to end its agents after SIGTERM: more than actors have to drain by default."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Daemons that this process started: read here so that none stays a zombie, and to know their exit codes."""


@dataclass(frozen=True, kw_only=True)
class LocalSpec(JobSpec):
    """What a :class:`LocalJob` starts."""

    kind: ClassVar[str] = "local"

    hosts: int = 1
    """How many daemons, each a host of its own."""
    detached: bool = False
    """Whether they outlive the process that started them, until ``kill``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.hosts, int) or self.hosts < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"LocalJob(hosts={self.hosts!r}): expected a number of hosts, 1 or more")


class LocalJob(Job[LocalSpec]):
    """``hosts`` daemons on this machine, each a host of its own.

    They end with the process that started them, even if that is killed, unless they are ``detached``.

    Args:
        hosts: How many.
        detached: Whether they outlive the process that started them, until :meth:`kill`.
        name: By which other scripts find the job.
        replace_lost: How many lost hosts are replaced.
    """

    default_timeout_s: ClassVar[float] = 30.0
    poll_s: ClassVar[float] = 0.01

    def __init__(self, *, hosts: int = 1, detached: bool = False, name: str = "", replace_lost: int = 0) -> None:
        super().__init__(LocalSpec(name=name, replace_lost=replace_lost, hosts=hosts, detached=detached))

    def render(self) -> str:
        directory = self._file.directory()
        return (
            "\n".join(
                shlex.join(self._command(directory, directory / "key", index, 0)) for index in range(self.spec.hosts)
            )
            + "\n"
        )

    def logs(self, host: int, *, lines: int = 200) -> str:
        record = self._record()
        return tail(_log_file(Path(record.directory), host, record.launched["hosts"][host]["turn"]), lines)

    def _launch(self, directory: Path, key_file: Path) -> dict[str, Any]:
        notes: list[dict[str, int]] = []
        try:
            notes.extend(self._start_host(directory, key_file, index, 0) for index in range(self.spec.hosts))
        except BaseException:
            _end_noted(notes)
            raise
        if not self.spec.detached:
            _end_at_exit(self)
        return {"hosts": notes}

    def _observe(self, record: Record) -> tuple[list[HostRecord], str]:
        directory = Path(record.directory)
        return [self._observe_host(directory, index, notes) for index, notes in enumerate(record.launched["hosts"])], ""

    def _replace(self, record: Record, index: int) -> dict[str, Any]:
        hosts = list(record.launched["hosts"])
        _end_noted([hosts[index]])
        hosts[index] = self._start_host(Path(record.directory), Path(record.key_file), index, hosts[index]["turn"] + 1)
        return {**record.launched, "hosts": hosts}

    def _end(self, record: Record) -> None:
        left = _end_noted(record.launched["hosts"])
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise JobError(f"job {self.name!r}: processes {pids} outlived SIGKILL, so they wait for a device or a disk")

    def _command(self, directory: Path, key_file: Path, index: int, turn: int) -> list[str]:
        arguments = host_arguments(
            listen=LISTEN,
            key=str(key_file),
            name=f"{self.name}-{index}",
            ready_file=str(_ready_file(directory, index, turn)),
            follow=None if self.spec.detached else os.getpid(),
        )
        return [sys.executable, *arguments]

    def _start_host(self, directory: Path, key_file: Path, index: int, turn: int) -> dict[str, int]:
        command = self._command(directory, key_file, index, turn)
        # An actor's own job ends what carries its mark.
        env = {name: value for name, value in os.environ.items() if name != JOB_VARIABLE}
        log_file = _log_file(directory, index, turn)
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            child = subprocess.Popen(  # noqa: S603  our own interpreter and module
                command, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, env=env, start_new_session=True
            )
        except OSError as error:
            attempt = Attempt(f"host {index}", shlex.join(command), None, str(error))
            raise LaunchError(self.name, (attempt,)) from error
        finally:
            os.close(descriptor)
        _children[child.pid] = child
        return {"pid": child.pid, "start_ticks": known(child.pid).start_ticks, "turn": turn}

    def _observe_host(self, directory: Path, index: int, notes: dict[str, int]) -> HostRecord:
        name = f"{self.name}-{index}"
        address = read_ready(_ready_file(directory, index, notes["turn"]))
        if _process(notes).is_alive():
            return HostRecord(index, name, address, "running" if address else "pending")
        code = _exit_code(notes["pid"])
        why = "it ended" if code is None else f"it ended with code {code}"
        lines = tail(_log_file(directory, index, notes["turn"]), SHOWN_LINES)
        return HostRecord(index, name, address, "ended", f"{why}\n{lines}" if lines else why)


def _process(notes: dict[str, int]) -> Known:
    return Known(notes["pid"], notes["start_ticks"])


def _ready_file(directory: Path, index: int, turn: int) -> Path:
    return directory / f"host-{index}.{turn}.ready"


def _log_file(directory: Path, index: int, turn: int) -> Path:
    return directory / f"host-{index}.{turn}.log"


def _exit_code(pid: int) -> int | None:
    return _children[pid].poll() if pid in _children else None


def _end_noted(hosts: list[dict[str, int]]) -> list[Known]:
    """End these daemons; return those that could not be."""
    left = end_all([_process(notes) for notes in hosts], grace_s=END_GRACE_S)
    for notes in hosts:
        child = _children.get(notes["pid"])
        if child is not None and child.poll() is not None:
            del _children[notes["pid"]]
    return left


def _end_at_exit(job: LocalJob) -> None:
    """End ``job`` with this process, after the controller, which would report its hosts as lost."""
    maker = os.getpid()

    def end() -> None:
        # A process forked by the user's script runs these too.
        record = job._file.load() if os.getpid() == maker else None
        if record is not None and any(notes["pid"] in _children for notes in record.launched.get("hosts", ())):
            from ..controller import stop_controller

            stop_controller()
            job.kill()

    atexit.register(end)
