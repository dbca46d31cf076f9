"""What every kind of job has in common: hosts are started once, found again by later scripts, and ended.

What is asked for is its spec, a frozen dataclass; what runs is in a record on disk (``state.py``). A kind of job says
how to launch hosts, how to look at them, how to replace one and how to end them, and leaves the rest to :class:`Job`.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Self, TypeVar

from ..context import local_proc
from .errors import Attempt, JobError, JobSpecError, JobTimeoutError, LaunchError
from .kinds import job_of
from .spec import HostRecord, JobSpec, JobState, differences, status_of
from .state import Record, StateFile, saved_jobs

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from ..host_mesh import HostMesh
    from ..proc import LocalProc

JOIN_S: Final = 5.0
MIN_PAUSE_S: Final = 0.01
MIN_ATTACH_S: Final = 5.0
"""Time to attach, even if the hosts came up at the last moment."""
MAX_ATTACH_S: Final = 60.0
"""Time to attach, even if there was time to wait in a queue."""

_log = logging.getLogger("danaus")


@dataclass(slots=True)
class _Use:
    """What this process does with a job."""

    attached: list[tuple[LocalProc, HostMesh]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    """Of the hosts of that mesh, by rank."""
    ending: threading.Event = field(default_factory=threading.Event)
    workers: list[threading.Thread] = field(default_factory=list)


S = TypeVar("S", bound=JobSpec)


class Job(ABC, Generic[S]):
    """Hosts from one place, by one interface. As a context manager it ends them.

    Kinds differ in their constructor only, which takes the fields of the spec: ``with LocalJob(hosts=2) as job:
    procs = job.hosts().spawn_procs({"gpus": 2})``.

    Attributes:
        spec: What was asked for.
    """

    default_timeout_s: ClassVar[float] = 60.0
    """How long :meth:`hosts` waits unless told."""
    poll_s: ClassVar[float] = 0.5
    """How often a host that takes long to start is looked at; more often at first."""

    def __init__(self, spec: S) -> None:
        self.spec = spec
        self._use = _Use()

    # What a kind of job supplies.

    @abstractmethod
    def render(self) -> str:
        """Return what would be run or submitted, as text that a person can check; starts nothing."""

    @abstractmethod
    def logs(self, host: int, *, lines: int = 200) -> str:
        """Return the last ``lines`` lines that the daemon of host ``host`` wrote.

        Raises:
            JobError: The job was not started, or its output cannot be reached.
        """

    @abstractmethod
    def _launch(self, directory: Path, key_file: Path) -> dict[str, Any]:
        """Start every host, without waiting until they listen; return what must be noted of them, as JSON.

        Args:
            directory: The job's own empty folder of mode 0700.
            key_file: Its key; no other way may the key take than a private file, a pipe or the scheduler's own secret.

        Raises:
            LaunchError: Some could not be started; those that were have been ended.
        """

    @abstractmethod
    def _observe(self, record: Record) -> tuple[list[HostRecord], str]:
        """Look at every host, within seconds; return them in order, and what the scheduler says of the job."""

    @abstractmethod
    def _replace(self, record: Record, index: int) -> dict[str, Any]:
        """End what is left of host ``index`` and start another in its place; return the new notes."""

    @abstractmethod
    def _end(self, record: Record) -> None:
        """End every host, and wait within a limit until they have ended. Those that are gone already are no error."""

    def _directory(self) -> str | None:
        """A folder, seen by all hosts, in which the job's own is made; None for the private one of this machine."""
        return None

    # What all kinds of jobs share.

    @property
    def name(self) -> str:
        """By which other scripts find this job."""
        return self.spec.name

    @property
    def kind(self) -> str:
        """What kind of job it is, as ``slurm``."""
        return self.spec.kind

    @property
    def _file(self) -> StateFile:
        return StateFile(self.name)

    def apply(self) -> None:
        """Start the job, unless it runs already; returns without waiting until its hosts listen.

        Raises:
            JobSpecError: A job with other fields runs under this name.
            LaunchError: Hosts could not be started.
        """
        with self._file.lock():
            self._use.ending.clear()
            before = self._file.load()
            if before is not None:
                if self._is_running(before):
                    return
                self._owner_of(before)._end(before)
                self._file.remove(before)
            self._file.save(self._start())

    def _is_running(self, before: Record) -> bool:
        """Whether ``before`` is this job, running; an error if it is another one that runs."""
        owner = self._owner_of(before)
        if all(host.status == "ended" for host in owner._observe(before)[0]):
            return False
        self._check_ours(before)
        return True

    def _check_ours(self, record: Record) -> None:
        found = differences(record, self.spec)
        if found:
            raise JobSpecError(self.name, found)

    def _start(self) -> Record:
        from ..network.keys import create_key_file

        directory = self._file.make_directory(self._directory())
        key_file = directory / "key"
        record = Record(self.kind, self.name, self.spec.as_json(), str(directory), str(key_file), {}, time.time())
        try:
            create_key_file(key_file)
            return dataclasses.replace(record, launched=self._launch(directory, key_file))
        except BaseException:
            self._file.remove(record)
            raise

    def _owner_of(self, record: Record) -> Job[Any]:
        """This job, or the one of other fields that ``record`` is of."""
        return self if not differences(record, self.spec) else job_of(record)

    def state(self) -> JobState:
        """Look at the job and its hosts, whichever script started them; takes as long as its scheduler to answer."""
        record = self._file.load()
        if record is None:
            return JobState(self.name, self.kind, "ended", (), "not started")
        hosts, detail = self._owner_of(record)._observe(record)
        return JobState(self.name, record.kind, status_of(hosts), tuple(hosts), detail)

    def hosts(self, *, timeout: float | None = None, gateway: int | None = None) -> HostMesh:
        """Start the job if it does not run, wait until every host listens, and attach to them; again, the same mesh.

        Hosts that are lost later are replaced, as often as ``replace_lost`` says: their ranks come back where the mesh
        of processes has a ``restart`` policy.

        Args:
            timeout: Limit in seconds; by default that of the kind of job.
            gateway: Index of the host through which the others are reached, where only that one can be from here.

        Returns:
            A mesh of dimension ``hosts``.

        Raises:
            JobSpecError: A job with other fields runs under this name.
            LaunchError: Hosts could not be started, or ended by themselves.
            JobTimeoutError: Not every host listened in time; the job goes on.
        """
        from ..network.attach import attach_to_hosts

        for runtime, mesh in self._use.attached:
            if runtime is _runtime():
                return mesh
        limit_s = self.default_timeout_s if timeout is None else timeout
        deadline_s = time.monotonic() + limit_s
        self.apply()
        record, addresses = self._wait_listening(limit_s, deadline_s)
        remaining_s = min(max(MIN_ATTACH_S, deadline_s - time.monotonic()), MAX_ATTACH_S)
        via = None if gateway is None else addresses[gateway]
        mesh = attach_to_hosts(addresses, key=record.key_file, timeout=remaining_s, gateway=via)
        self._use.addresses = addresses
        self._use.attached.append((local_proc(), mesh))
        if self.spec.replace_lost:
            mesh.on_host_lost(lambda rank, reason: self._on_host_lost(mesh, rank, reason))
        return mesh

    def key_file(self) -> str:
        """Return the path of the running job's key file, for ``attach_to_hosts`` and ``danaus`` commands."""
        return self._record().key_file

    def kill(self) -> None:
        """End every host of the job and forget it, whichever script started it. A job that does not run is no error.

        Raises:
            JobSpecError: A job with other fields runs under this name; ``load_job(name).kill()`` would end it.
            JobError: Some hosts could not be ended.
        """
        self._use.ending.set()
        try:
            self._let_go()
        finally:
            with self._file.lock():
                record = self._file.load()
                if record is not None:
                    self._check_ours(record)
                    self._owner_of(record)._end(record)
                    self._file.remove(record)
            while self._use.workers:
                self._use.workers.pop().join(JOIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        record = self._file.load()
        # One of another spec is not what this block has started.
        if record is None or not differences(record, self.spec):
            self.kill()

    def _let_go(self) -> None:
        """End what this script runs on the hosts: their end is none of its losses."""
        while self._use.attached:
            runtime, mesh = self._use.attached.pop()
            # With the end of the runtime that attached them, they were released.
            if runtime is _runtime():
                mesh.stop()

    def _record(self) -> Record:
        record = self._file.load()
        if record is None:
            raise JobError(f"job {self.name!r} does not run: start it with apply() or hosts()")
        return record

    def _wait_listening(self, limit_s: float, deadline_s: float, only: int | None = None) -> tuple[Record, list[str]]:
        """Wait until all hosts listen, or host ``only``; return the addresses."""
        pause_s = MIN_PAUSE_S
        while True:
            record = self._record()
            hosts, detail = self._observe(record)
            ended = [host for host in hosts if host.status == "ended" and only in {None, host.index}]
            if ended and not (only is None and self._may_replace(record)):
                raise self._launch_error(ended)
            if ended:
                self._put_another(ended[0].index, ended[0].address)
                continue
            missing = [host for host in hosts if not host.address and only in {None, host.index}]
            if not missing:
                return record, [host.address for host in hosts]
            if time.monotonic() > deadline_s:
                raise JobTimeoutError(self.name, limit_s, tuple(str(host) for host in missing), detail)
            if self._use.ending.wait(pause_s):
                raise JobError(f"job {self.name!r} was ended meanwhile")
            pause_s = min(self.poll_s, pause_s * 1.5)

    def _launch_error(self, ended: list[HostRecord]) -> LaunchError:
        attempts = tuple(Attempt(f"host {host.index} ({host.name})", "", None, host.detail) for host in ended)
        return LaunchError(self.name, attempts, "end the job with kill() and start it again, or use replace_lost=")

    def _may_replace(self, record: Record) -> bool:
        return record.replaced < self.spec.replace_lost

    def _put_another(self, index: int, lost_address: str) -> None:
        """Replace host ``index``, unless another script has done so since it was lost."""
        with self._file.lock():
            record = self._record()
            host = self._observe(record)[0][index]
            if host.status == "pending" or (host.status == "running" and host.address != lost_address):
                return
            if not self._may_replace(record):
                raise JobError(
                    f"job {self.name!r}: host {index} is not replaced, replace_lost={self.spec.replace_lost}"
                )
            launched = self._replace(record, index)
            self._file.save(dataclasses.replace(record, launched=launched, replaced=record.replaced + 1))

    def _on_host_lost(self, mesh: HostMesh, rank: int, reason: str) -> None:
        """Supply another host; others' callbacks do not wait for that."""
        if not self._use.ending.is_set():
            name = f"danaus-replace-{self.name}"
            worker = threading.Thread(target=self._replace_lost, args=(mesh, rank, reason), name=name, daemon=True)
            self._use.workers.append(worker)
            worker.start()

    def _replace_lost(self, mesh: HostMesh, rank: int, reason: str) -> None:
        deadline_s = time.monotonic() + self.default_timeout_s
        try:
            self._put_another(rank, self._use.addresses[rank])
            _, addresses = self._wait_listening(self.default_timeout_s, deadline_s, only=rank)
            self._use.addresses[rank] = addresses[rank]
            mesh.replace_host(rank, addresses[rank])
        # There is nobody to raise to, and whatever a scheduler's tools did must be told.
        except Exception as error:  # noqa: BLE001
            if not self._use.ending.is_set():
                _log.error("job %r: host %d was lost (%s) and is not replaced: %s", self.name, rank, reason, error)
                mesh.give_up_host(rank)


def load_job(name: str) -> Job[Any]:
    """Return the job of which there is a record under ``name``, to look at it, attach to it or end it.

    Raises:
        JobError: There is none.
    """
    record = StateFile(name).load()
    if record is None:
        known = ", ".join(saved_jobs()) or "none"
        raise JobError(f"no job {name!r} was started from this machine by this user; there are: {known}")
    return job_of(record)


def _runtime() -> LocalProc | None:
    """This process's runtime, which is not started by being asked for."""
    # It brings asyncio, which a script that only names its jobs has no use for.
    from .. import controller

    current = controller._controller
    return None if current is None else current.local
