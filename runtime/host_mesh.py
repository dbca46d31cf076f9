"""Meshes of hosts: where processes are asked for."""

from __future__ import annotations

import os
import re
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .address import mesh_id as new_mesh_id
from .context import current_instance, local_proc
from .mesh import ProcMesh, check_policy
from .shapes.mesh_trait import MeshTrait
from .shapes.shape import Extent, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .supervision.restart import Restart
    from .workspace.progress import Progress
    from .workspace.sync import SyncReport


class Host(NamedTuple):
    """One host of a job.

    Attributes:
        slot: Its number in the job; the controller's is 0.
        name: Its name.
    """

    slot: int
    name: str


class HostMesh(MeshTrait):
    """Hosts that processes can be spawned on: :func:`this_host`, or what :func:`attach_to_hosts` or a job gives."""

    def __init__(self, hosts: Sequence[Host], region: Region) -> None:
        self._hosts, self._region = tuple(hosts), region

    def _with_region(self, region: Region) -> HostMesh:
        return HostMesh(self._hosts, region)

    def _here(self) -> list[Host]:
        """The hosts of this slice, in its order."""
        return [self._hosts[index] for index in self._region.ranks()]

    @property
    def names(self) -> list[str]:
        """Names of the hosts, in rank order."""
        return [host.name for host in self._here()]

    def spawn_procs(
        self,
        per_host: Mapping[str, int] | None = None,
        *,
        name: str = "procs",
        bootstrap: Callable[[], object] | None = None,
        env: Mapping[str, str] | None = None,
        preload: Sequence[str] | None = None,
        proc_bind: Sequence[Mapping[str, str]] | None = None,
        gpus: Literal["own", "shared", "none"] = "own",
        restart: Restart | None = None,
        spares: int = 0,
    ) -> ProcMesh:
        """Start processes and return their mesh at once; its dimensions are the hosts' and those of ``per_host``.

        Args:
            per_host: Dimensions on each host, as ``{"gpus": 8}``; none gives one process per host.
            name: Name for reports and logs.
            bootstrap: Runs in every process before any actor; sync or async. If it raises, the mesh fails with it.
            env: Environment variables for the processes, set before anything there looks at them.
            preload: Modules that the processes find imported, shared copy-on-write through the host's zygote. By
                default torch and numpy, where the caller has imported them.
            proc_bind: One mapping per process of a host with ``cpus``, ``physcpubind``, ``cpunodebind`` or ``membind``.
            gpus: On a host with GPUs: ``"own"`` leases one to each process, which sees it as ``cuda:0`` and the others
                after it; ``"shared"`` lets several processes use one; ``"none"`` hides them.
            restart: What to do when a rank is lost; by default it stays a hole. Its actors are made again with it.
            spares: Further processes on each host that wait, started and bootstrapped, to take the place of a rank that
                is lost there.

        Raises:
            ValueError: A dimension exists twice or is negative, or ``proc_bind`` has the wrong length.
            AdmissionError: The host's memory, cgroup, process or file limits do not allow so many.
        """
        check_policy("spawn_procs", restart)
        if not isinstance(spares, int) or spares < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"spawn_procs(spares={spares!r}): expected a number of processes, 0 or more")
        per_host = dict(per_host or {})
        extent = Extent((*self.extent.labels, *per_host), (*self.extent.sizes, *per_host.values()))
        local = local_proc()
        hosts = self._here()
        num_per_host = prod(per_host.values())
        mesh_id = new_mesh_id(_slug(name), os.urandom(3).hex(), [host.slot for host in hosts], num_per_host)
        procs = ProcMesh(mesh_id, name, extent.region, hosts=[host.name for host in hosts])
        from .host.boot import make_plan

        plan = make_plan(
            local,
            mesh_id=mesh_id,
            name=name,
            count=extent.nelements,
            dims=tuple(zip(extent.labels, extent.sizes, strict=True)),
            spares=spares,
            restartable=restart is not None,
            bootstrap=bootstrap,
            env=dict(env or {}),
            preload=preload,
            proc_bind=proc_bind,
            gpus=gpus,
        )
        owner = current_instance()
        local.supervisor.own_procs(plan.fields, plan.boot, owner.key, restart)
        plan.submit(local)
        owner.own(procs)
        return procs

    def stop(self) -> None:
        """End what this script's job runs on these hosts; the daemons stay, for whoever attaches next.

        Blocks until that has ended; a second call does nothing.

        Raises:
            RuntimeError: This process is not the controller.
        """
        self._release(shut_down=False)

    def shutdown(self) -> None:
        """End the daemons of these hosts, and with them whatever they run.

        Raises:
            RuntimeError: This process is not the controller, or this is a slice, or a host of somebody else.
        """
        if self._region.nelements != len(self._hosts):
            raise RuntimeError(f"shutdown of {self!r}: only whole meshes; stop() ends this job's part of a slice")
        self._release(shut_down=True)

    def _release(self, *, shut_down: bool) -> None:
        from .network.attach import attached_hosts

        hosts = attached_hosts()
        slots = [host.slot for host in self._here() if hosts.is_attached(host.slot)]
        if slots:
            hosts.release(slots, shut_down=shut_down)

    def sync_workspace(
        self,
        directory: str | os.PathLike[str] = ".",
        *,
        ignore: Sequence[str] = (),
        max_bytes: int = 1 << 30,
        max_files: int = 50_000,
        timeout: float = 300.0,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> SyncReport:
        """Send the changed files of ``directory`` to every host; processes spawned from now on run its code there.

        Their search path and working directory lead to the host's copy where those of this process lead into
        ``directory``. Processes that run already go on with what they have imported. Blocks until all hosts are done;
        on an event loop, ``await asyncio.to_thread(hosts.sync_workspace)``.

        Args:
            directory: What to send. Its ``.danausignore`` files, or else its ``.gitignore`` files, say what not,
                besides version control, caches and virtual environments.
            ignore: Further rules, as lines of those files.
            max_bytes: Refuse to send a directory that holds more.
            max_files: Refuse to send a directory with more files.
            timeout: Seconds for all of it.
            on_progress: Called after each step, in place of the bar that a terminal shows.

        Raises:
            WorkspaceTooLarge: The directory holds more than the limits; the message names what takes the most.
            WorkspaceError: It cannot be read here, or not be written there.
            TimeoutError: The time passed.
        """
        from .workspace.sync import sync

        return sync(
            self,
            directory,
            ignore=ignore,
            max_bytes=max_bytes,
            max_files=max_files,
            timeout=timeout,
            on_progress=on_progress,
        )

    def on_host_lost(self, callback: Callable[[int, str], object]) -> None:
        """Have ``callback(rank, reason)`` called when a host of this mesh is lost, on a thread for callbacks.

        It has to see to another host, by :meth:`replace_host`, or :meth:`give_up_host`: until then the ranks that were
        there, and are to be started again by their policy, wait.

        Raises:
            RuntimeError: This process is not the controller.
        """
        from .network.attach import attached_hosts

        for rank, host in enumerate(self._here()):
            attached_hosts().watch(host.slot, partial(callback, rank))

    def replace_host(self, rank: int, address: str, *, timeout: float = 60.0) -> None:
        """Put another host in the place of a lost one, and start its ranks there; blocks until the host has joined.

        Args:
            rank: The lost host, as a rank of this mesh.
            address: Where ``danaus host`` listens on the other one, with the same key.
            timeout: Seconds that it may take.

        Raises:
            AttachError: It did not answer in time, or refused.
            ValueError: The host is not lost.
        """
        from .network.attach import attached_hosts

        attached_hosts().replace(self._here()[rank].slot, address, timeout_s=timeout)

    def give_up_host(self, rank: int) -> None:
        """No other host will take the place of a lost one: what waits for its ranks fails."""
        from .network.attach import attached_hosts

        attached_hosts().give_up(self._here()[rank].slot)

    def __reduce__(self) -> tuple[Any, ...]:
        return HostMesh, (self._hosts, self._region)

    def __repr__(self) -> str:
        return f"<HostMesh {', '.join(self.names)} {self.extent}>"


def this_host() -> HostMesh:
    """The host that this code runs on, as a mesh without dimensions."""
    local = local_proc()
    return HostMesh((Host(local.slot, local.host),), Region((), 0, (), ()))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", name)[:16] or "procs"
