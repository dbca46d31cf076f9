"""What a process has for its transfers: registered memory, its server, its connections, its threads."""

from __future__ import annotations

import errno
import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from ..address import host_of, incarnation_of, name_of, rank_of
from ..config import bulk_ports, plain_bulk, use_nixl
from ..failure import FailureKind, MeshFailure
from . import certificate
from .client import Clients
from .errors import OwnerDied
from .handle import Endpoint
from .progress import Progress
from .rdma import Rdma
from .registry import Registry
from .server import Server
from .workers import Workers

if TYPE_CHECKING:
    from ..messages.segments import SegmentPool
    from ..proc import LocalProc
    from .handle import Handle
    from .lending import Lender
    from .reference import Reference

FETCH_S: Final = 60.0
"""How long a message's payload may make no progress: more than the grace period of a host that is cut off."""

_UNREACHABLE_S: Final = 0.5
_DEATH_S: Final = 2.0
"""How long the news of an owner's death may take that the kernel has told of already."""


class Bulk:
    """One process's part in transfers; made at the first use, closed with the process's runtime."""

    def __init__(self, local: LocalProc) -> None:
        self.local = local
        self.is_plain = plain_bulk()
        self.registry = Registry()
        self.workers = Workers()
        self.clients = Clients(local.job_directory, is_plain=self.is_plain, run_at=local.run_at)
        self.lender: Lender | None = None
        self.not_permitted: set[int] = set()
        """Processes whose memory the kernel did not let us touch."""
        self._servers: list[Server] = []
        self._lock = threading.Lock()
        self._is_closed = False
        self._may_rdma, self._rdma = use_nixl(), None

    @property
    def endpoint(self) -> Endpoint:
        """Where this process serves streams; it does so from the first asking on."""
        return self.server().endpoint

    @property
    def reaches_hosts(self) -> bool:
        """Whether others hosts can fetch from this one: the job has a certificate, or encryption is switched off."""
        return bool(self.endpoint.port)

    def server(self) -> Server:
        """This process's server, started if it was not.

        There is another one once the host has another address, or the job a certificate: a script may have begun
        before it attached to hosts.
        """
        directory, host = self.local.job_directory(), self.local.host_address
        with self._lock:
            endpoint = self._servers[-1].endpoint if self._servers else Endpoint()
            if endpoint.host != host or not (endpoint.port or not certificate.exists(directory)):
                if self._is_closed:
                    raise RuntimeError("the runtime of this process has ended")
                lender, plain, ports = self._find_lender, self.is_plain, bulk_ports()
                server = Server(directory, host, self.registry, lender, is_plain=plain, ports=ports)
                self._servers.append(server)
            return self._servers[-1]

    @property
    def rdma(self) -> Rdma | None:
        """This process's NIXL agent, where that is installed and switched on."""
        with self._lock:
            if self._may_rdma and self._rdma is None:
                try:
                    self._rdma = Rdma(self.local.proc_id)
                except Exception as error:  # noqa: BLE001  its errors have no common class
                    _log.warning("DANAUS_NIXL is set, but NIXL cannot be used: %s", error)
                    self._may_rdma = False
            return self._rdma

    def lender_of(self, pool: SegmentPool) -> Lender:
        """What lends payloads from ``pool``, of which a process has one."""
        with self._lock:
            if self.lender is None:
                from .lending import Lender

                self.lender = Lender(pool)
            return self.lender

    def _find_lender(self) -> Lender | None:
        return self.lender

    def is_mine(self, handle: Handle) -> bool:
        """Whether the memory is this process's own."""
        return handle.table[2] == self.registry.table.token

    def is_near(self, owner: str) -> bool:
        """Whether ``owner`` is a process of this host."""
        return host_of(owner) == host_of(self.local.proc_id)

    def watch(self, owner: str) -> None:
        """Have this process hear of the death of ``owner``."""
        self.local.link(owner)

    def fetch(self, reference: Reference) -> tuple[list[memoryview], bool]:
        """Return the buffers of a payload that a process of another host has lent.

        Returns:
            The buffers, and whether they are this process's alone; else they are read-only.

        Raises:
            DanausError: They did not come.
            OSError: The owner is gone.
        """
        from .lending import fetch, size_of

        owner, name = reference.owner, f"payload of {reference.owner}"
        size_bytes = size_of(reference.segment)
        progress = Progress(name, size_bytes, FETCH_S, lambda: self.check_alive(owner, name), is_for_rests=True)
        num_sharers = reference.sharers.get(host_of(self.local.proc_id), 1)
        try:
            if num_sharers > 1:
                from .sharing import fetch_shared

                return fetch_shared(self.clients, reference, num_sharers, progress), False
            return fetch(self.clients, reference, progress), True
        except OwnerDied as error:
            # As where a segment of this host is gone with its owner.
            raise OSError(errno.ESTALE, str(error)) from error

    def check_alive(self, owner: str, name: str) -> None:
        """Raise OwnerDied where ``owner`` is known to be dead."""
        failure = self.local.gone.get(owner)
        if failure is not None:
            raise OwnerDied(name, failure)

    def wait_death(self, owner: str, name: str) -> None:
        """Raise OwnerDied where ``owner``, which cannot be reached, turns out to be dead."""
        failure = self.local.wait_gone(owner, _UNREACHABLE_S)
        if failure is not None:
            raise OwnerDied(name, failure)

    def owner_died(self, owner: str, pid: int, name: str) -> OwnerDied:
        """The error for a process that the kernel says is gone; waits a moment for the agent's account of it."""
        failure = self.local.wait_gone(owner, _DEATH_S)
        if failure is None:
            failure = MeshFailure(
                kind=FailureKind.EXITED,
                mesh=name_of(owner),
                rank=rank_of(owner),
                host=self.local.host,
                pid=pid,
                incarnation=incarnation_of(owner),
                detail="its process is gone; the host agent has not said how it ended",
            )
        return OwnerDied(name, failure)

    def close(self) -> None:
        """End everything; transfers under way fail (I/O thread)."""
        with self._lock:
            self._is_closed = True
        for server in self._servers:
            server.close()
        self.clients.close()
        self.registry.close()
        self._rdma = None


_log = logging.getLogger("danaus")
_lock = threading.Lock()


def bulk_of(local: LocalProc) -> Bulk:
    """The transfers' part of ``local``."""
    attachments: Any = local.attachments
    with _lock:
        if attachments.bulk is None:
            attachments.bulk = Bulk(local)
        return attachments.bulk
