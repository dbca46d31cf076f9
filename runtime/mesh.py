"""Meshes of procs: where actors are put on processes."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any, TypeVar

from .actor import endpoints_of, signature_check
from .actor_mesh import spawn_actors
from .address import mesh_of, name_of, place_of, rank_of
from .calls.future import Future
from .calls.replies import ask_all
from .config import GRACE_AFTER_ERROR_S, GRACE_S
from .context import current_instance, local_proc
from .messages import wire
from .messages.credits import DEFAULT_MAILBOX
from .proc import ROOT, LocalProc
from .shapes.mesh_trait import MeshTrait
from .shapes.shape import Region
from .supervision.elastic import Filling, Health, check_health, holes_of, is_up
from .supervision.restart import Restart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .actor import Actor
    from .failure import MeshFailure
    from .supervision.owned import Change

    A = TypeVar("A", bound=Actor)
else:
    A = TypeVar("A")


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
        resolve = local_proc().resolve
        return [resolve(f"{self._mesh_id}.{rank}") for rank in self._region.ranks()]

    def spawn(self, name: str, actor_class: type[A], *args: Any, **kwargs: Any) -> A:
        """Put one actor of ``actor_class`` on every proc and return their mesh at once.

        ``__init__(*args, **kwargs)`` runs remotely, once per rank, and ends before the first endpoint runs there. What
        it raises fails that actor; ``mesh.initialized`` tells.

        Args:
            name: Name for reports and logs; names may repeat.
            actor_class: Derived from :class:`Actor`.
            *args: For ``__init__``.
            **kwargs: For ``__init__``; ``mailbox=`` (messages that one sender may have under way) and ``restart=`` (a
                :class:`Restart`: what to do when one of these actors fails or its process is lost; by default what the
                procs were spawned with) are ours unless ``__init__`` has a parameter of that name.

        Raises:
            TypeError: ``actor_class`` is no actor class, or the arguments do not fit its ``__init__``.
            SupervisionError: A proc of this mesh is gone.
        """
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"spawn: the first argument is the mesh's name, as text; got {name!r}")
        endpoints_of(actor_class)
        parameters = list(inspect.signature(actor_class.__init__).parameters.values())[1:]
        own = {parameter.name for parameter in parameters}
        mailbox = DEFAULT_MAILBOX if "mailbox" in own else kwargs.pop("mailbox", DEFAULT_MAILBOX)
        if not isinstance(mailbox, int) or mailbox < 1:
            raise ValueError(f"spawn(mailbox={mailbox!r}): expected a number of messages, 1 or more")
        restart = None if "restart" in own else kwargs.pop("restart", None)
        check_policy("spawn", restart)
        signature_check(actor_class.__qualname__, parameters)(*args, **kwargs)
        return spawn_actors(self, name, actor_class, args, kwargs, mailbox, restart)  # type: ignore[return-value]

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
        local.supervisor.release_procs(self._mesh_id, list(self._region.ranks()))
        wait = _Ends(local, f"stop of {self.name!r}", grace)
        places = [f"{self._mesh_id}.{rank}" for rank in self._region.ranks()]
        # Behind what was asked for before: a replacement that is under way is to be stopped, too.
        local.run_soon(lambda: wait.start(places))
        if timeout is not None:
            local.run_at(time.monotonic() + timeout, lambda: wait.on_timeout(timeout))
        current_instance().disown(self)
        return wait.future

    def healthy(self) -> Health[ProcMesh]:
        """Say which ranks live: the largest slice without a hole, and every rank; as this process has heard."""
        return check_health(self, self._mesh_id)

    def replace(self, *ranks: int, force: bool = False) -> Future[None]:
        """Start ranks of this mesh again: in each a new process, and in it the actors that were there.

        Only the process that spawned the mesh may ask. A restart by policy that waits is brought forward.

        Args:
            *ranks: Ranks of this mesh; none means all that are lost.
            force: Also end and replace ranks that are up.

        Returns:
            A future that is there once the new processes run.

        Raises:
            ValueError: A rank is up and ``force`` is not set, or it was stopped.
            IndexError: There is no such rank.
            RuntimeError: The mesh was spawned by another process, or has been stopped.
        """
        local = local_proc()
        base = self._region.ranks()
        for rank in ranks:
            if not 0 <= rank < len(base):
                raise IndexError(f"replace({rank}): this mesh has ranks 0 to {len(base) - 1}")
        wanted = [base[rank] for rank in ranks] or holes_of(local, self._mesh_id, base)
        filled: Future[None] = Future(f"replacement of {self.name!r} {wanted}")
        if self._mesh_id not in local.supervisor.procs:
            raise RuntimeError(f"replace: {self!r} was spawned by another process, or stopped; spawn a new one")
        for rank in wanted:
            if not force and is_up(local, self._mesh_id, rank):
                raise ValueError(f"replace({rank}): rank {rank} is up; replace({rank}, force=True) ends it first")
        local.run_soon(Filling(local, self._mesh_id, wanted, filled, force=force).start)
        return filled

    def on_change(self, callback: Callable[[Change], object]) -> None:
        """Have ``callback`` called when a rank of the whole mesh is lost, is up again, or is given up.

        Calls come in order, on a thread that runs callbacks alone. What one raises is logged.

        Raises:
            RuntimeError: The mesh was spawned by another process, or has been stopped.
        """
        owned = local_proc().supervisor.procs.get(self._mesh_id)
        if owned is None:
            raise RuntimeError(f"on_change: {self!r} was spawned by another process, or has been stopped")
        owned.callbacks.append(callback)

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
    """The sink that has processes end, and waits for that; all of it on the I/O thread."""

    def __init__(self, local: LocalProc, name: str, grace_s: float) -> None:
        self._local, self._grace_s = local, grace_s
        self.alive: set[str] = set()
        self.future: Future[None] = Future(name)

    def start(self, places: list[str]) -> None:
        self._stop({self._local.resolve(place) for place in places})
        if self.alive:
            self._local.ports[self._local.next_port()] = self
        else:
            self.future._resolve(lambda: None)

    def _stop(self, procs: set[str]) -> None:
        procs -= self._local.gone.keys()
        self.alive |= procs
        if procs:
            self._local.request("stop", {"procs": sorted(procs), "grace_s": self._grace_s})
        for proc in procs:
            self._local.link(proc)

    def on_reply(self, *_reply: object) -> bool:
        return False

    def on_gone(self, proc: str, failure: MeshFailure) -> bool:
        if proc in self.alive:
            self.alive.discard(proc)
            if failure.restarts:
                # It ended by itself, just before; the one that would follow is not to.
                self._stop({self._local.resolve(place_of(proc))})
        if not self.alive:
            self.future._resolve(lambda: None)
        return not self.alive

    def on_timeout(self, timeout_s: float) -> None:
        self.future._reject(
            TimeoutError(f"{self.future.describe()}: {sorted(self.alive)} still there after {timeout_s:g} s")
        )


def _rebuild_procs(mesh_id: str, name: str, region: Region, hosts: tuple[str, ...]) -> ProcMesh:
    return ProcMesh(mesh_id, name, region, hosts=hosts)


def own_proc(local: LocalProc) -> ProcMesh:
    """The calling process, as a mesh without dimensions."""
    proc = local.proc_id
    return ProcMesh(mesh_of(proc), name_of(proc), Region((), rank_of(proc), (), ()), hosts=(local.host,))


def this_proc() -> ProcMesh:
    """The process that this code runs in, as a mesh without dimensions; actors may be spawned on it."""
    return own_proc(local_proc())


def check_policy(what: str, restart: object) -> None:
    """Refuse what is no policy."""
    if restart is not None and not isinstance(restart, Restart):
        raise TypeError(f"{what}(restart={restart!r}): expected danaus.Restart(...), or None")
