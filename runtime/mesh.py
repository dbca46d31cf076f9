"""Meshes of hosts and of procs: where processes are asked for, and where actors are put on them."""

from __future__ import annotations

import inspect
import os
import re
import time
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .actor import endpoints_of, signature_check
from .actor_mesh import spawn_actors
from .calls.future import Future
from .calls.replies import ask_all
from .config import GRACE_AFTER_ERROR_S, GRACE_S
from .context import current_instance, local_proc
from .messages import wire
from .messages.credits import DEFAULT_MAILBOX
from .proc import ROOT, LocalProc
from .shapes.mesh_trait import MeshTrait
from .shapes.shape import Extent, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .actor import Actor
    from .failure import MeshFailure

    A = TypeVar("A", bound=Actor)
else:
    A = TypeVar("A")


class HostMesh(MeshTrait):
    """Hosts that processes can be spawned on. :func:`this_host` is the one that this code runs on."""

    def __init__(self, hosts: Sequence[str], region: Region) -> None:
        self._hosts, self._region = tuple(hosts), region

    def _with_region(self, region: Region) -> HostMesh:
        return HostMesh(self._hosts, region)

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

        Raises:
            ValueError: A dimension exists twice or is negative, or ``proc_bind`` has the wrong length.
            AdmissionError: The host's memory, cgroup, process or file limits do not allow so many.
        """
        per_host = dict(per_host or {})
        extent = Extent((*self.extent.labels, *per_host), (*self.extent.sizes, *per_host.values()))
        local = local_proc()
        mesh_id = f"{_slug(name)}-{os.urandom(3).hex()}"
        procs = ProcMesh(mesh_id, name, extent.region, hosts=self._hosts)
        from .host.boot import make_plan

        plan = make_plan(
            local,
            mesh_id=mesh_id,
            name=name,
            count=extent.nelements,
            bootstrap=bootstrap,
            env=dict(env or {}),
            preload=preload,
            proc_bind=proc_bind,
            gpus=gpus,
        )
        plan.submit(local)
        current_instance().own(procs)
        return procs

    def __reduce__(self) -> tuple[Any, ...]:
        return HostMesh, (self._hosts, self._region)

    def __repr__(self) -> str:
        return f"<HostMesh {', '.join(self._hosts)} {self.extent}>"


class ProcMesh(MeshTrait):
    """A handle on a mesh of processes, or on a slice of one. Small and picklable.

    Attributes:
        name: Name given at ``spawn_procs``.
    """

    def __init__(self, mesh_id: str, name: str, region: Region, *, hosts: Sequence[str] = ()) -> None:
        self.name = name
        self._mesh_id, self._region, self._hosts = mesh_id, region, tuple(hosts)

    def _with_region(self, region: Region) -> ProcMesh:
        return ProcMesh(self._mesh_id, self.name, region, hosts=self._hosts)

    def _proc_ids(self) -> list[str]:
        return [f"{self._mesh_id}.{rank}" for rank in self._region.ranks()]

    def spawn(self, name: str, actor_class: type[A], *args: Any, **kwargs: Any) -> A:
        """Put one actor of ``actor_class`` on every proc and return their mesh at once.

        ``__init__(*args, **kwargs)`` runs remotely, once per rank, and ends before the first endpoint runs there. What
        it raises fails that actor; ``mesh.initialized`` tells.

        Args:
            name: Name for reports and logs; names may repeat.
            actor_class: Derived from :class:`Actor`.
            *args: For ``__init__``.
            **kwargs: For ``__init__``; ``mailbox=`` (messages that one sender may have under way) is ours unless
                ``__init__`` has a parameter of that name.

        Raises:
            TypeError: ``actor_class`` is no actor class, or the arguments do not fit its ``__init__``.
            SupervisionError: A proc of this mesh is gone.
        """
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"spawn: the first argument is the mesh's name, as text; got {name!r}")
        endpoints_of(actor_class)
        parameters = list(inspect.signature(actor_class.__init__).parameters.values())[1:]
        mailbox = DEFAULT_MAILBOX
        if "mailbox" in kwargs and all(parameter.name != "mailbox" for parameter in parameters):
            mailbox = kwargs.pop("mailbox")
            if not isinstance(mailbox, int) or mailbox < 1:
                raise ValueError(f"spawn(mailbox={mailbox!r}): expected a number of messages, 1 or more")
        signature_check(actor_class.__qualname__, parameters)(*args, **kwargs)
        return spawn_actors(self, name, actor_class, args, kwargs, mailbox)  # type: ignore[return-value]

    @property
    def initialized(self) -> Future[None]:
        """A future that is there once every process runs and its bootstrap has returned."""
        lanes = [
            local_proc().lane(proc, "", sender=ROOT, name=f"{self.name} rank {rank}", bound=1)
            for proc, rank in zip(self._proc_ids(), self._region.ranks(), strict=True)
        ]
        return ask_all(wire.PING, f"start of {self.name!r}", lanes, self._region, on_error="first")

    def stop(self, reason: str = "", *, timeout: float | None = None, grace: float = GRACE_S) -> Future[None]:
        """Stop these processes: actors are cleaned up, newest first, then the processes end.

        Args:
            reason: For a reader of the code.
            timeout: Seconds after which the returned future fails; the host agent goes on ending the processes.
            grace: Seconds for what the actors are busy with and for their cleanup, before the processes are killed.

        Returns:
            A future that is there when all of them are gone.
        """
        del reason
        local = local_proc()
        wait = _Ends(set(self._proc_ids()) - set(local.gone), f"stop of {self.name!r}")
        port = local.next_port()
        if wait.alive:
            local.ports[port] = wait
            local.request("stop", {"procs": sorted(wait.alive), "grace_s": grace})
            for proc in list(wait.alive):
                local.link(proc)
                if proc in local.gone:
                    wait.on_gone(proc, local.gone[proc])
        else:
            wait.finish()
        if timeout is not None:
            local.run_at(time.monotonic() + timeout, lambda: wait.on_timeout(timeout))
        current_instance().disown(self)
        return wait.future

    def __enter__(self) -> ProcMesh:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_exc: object) -> None:
        self.stop(grace=GRACE_S if error_type is None else GRACE_AFTER_ERROR_S).get()

    async def __aenter__(self) -> ProcMesh:
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, *_exc: object) -> None:
        await self.stop(grace=GRACE_S if error_type is None else GRACE_AFTER_ERROR_S)

    def logging_option(
        self, *, stream_to_client: bool = True, aggregate_window_sec: float | None = 0.2, level: int | str | None = None
    ) -> None:
        """Change, at any time, what of these processes' output reaches the controller's terminal.

        Args:
            stream_to_client: Whether lines are printed at all; the per-rank files on the host keep them anyway.
            aggregate_window_sec: Equal lines of several ranks within this time become one; None prints each.
            level: Least level of ``logging`` records that the processes write.
        """
        from .logging_control import apply_logging_option

        apply_logging_option(self, stream_to_client, aggregate_window_sec, level)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_procs, (self._mesh_id, self.name, self._region, self._hosts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcMesh) and (self._mesh_id, self._region) == (other._mesh_id, other._region)

    def __hash__(self) -> int:
        return hash((self._mesh_id, self._region))

    def __repr__(self) -> str:
        return f"<ProcMesh {self.name!r} {self.extent}>"


class _Ends:
    """The sink that waits for processes to be gone."""

    def __init__(self, alive: set[str], name: str) -> None:
        self.alive = alive
        self.future: Future[None] = Future(name)

    def on_reply(self, *_reply: object) -> bool:
        return False

    def on_gone(self, proc: str, _failure: MeshFailure) -> bool:
        self.alive.discard(proc)
        if not self.alive:
            self.finish()
        return not self.alive

    def finish(self) -> None:
        self.future._resolve(lambda: None)

    def on_timeout(self, timeout_s: float) -> None:
        self.future._reject(
            TimeoutError(f"{self.future.describe()}: {sorted(self.alive)} still there after {timeout_s:g} s")
        )


def _rebuild_procs(mesh_id: str, name: str, region: Region, hosts: tuple[str, ...]) -> ProcMesh:
    return ProcMesh(mesh_id, name, region, hosts=hosts)


def own_proc(local: LocalProc) -> ProcMesh:
    """The calling process, as a mesh without dimensions."""
    mesh_id, _, rank = local.proc_id.rpartition(".")
    return ProcMesh(mesh_id, mesh_id.rsplit("-", 1)[0], Region((), int(rank), (), ()), hosts=(local.host,))


def this_host() -> HostMesh:
    """The host that this code runs on, as a mesh without dimensions."""
    return HostMesh((local_proc().host,), Region((), 0, (), ()))


def this_proc() -> ProcMesh:
    """The process that this code runs in, as a mesh without dimensions; actors may be spawned on it."""
    return own_proc(local_proc())


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", name)[:16] or "procs"
