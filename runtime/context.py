"""Who runs this code, and for which message: what an endpoint asks about its place in the job."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .address import rank_of
from .calls.future import Future
from .proc import ROOT
from .shapes.shape import Extent, Point

if TYPE_CHECKING:
    from .actor_mesh import ActorMesh
    from .mesh import ProcMesh
    from .messages import wire
    from .proc import LocalProc

_log = logging.getLogger("danaus")
_SCALAR = Extent((), ())


class ActorInstance:
    """What the runtime knows of one actor; the actor itself finds its own in ``context().actor_instance``.

    Attributes:
        name: Name given at ``spawn``.
        actor_id: Address of this actor: process and key.
        rank: Its point in the mesh it was spawned as.
        creator: Address of the actor that spawned it, or None for a process's root.
        incarnation: How many times it has been made again.
        actor: The Python object itself, while it lives.
    """

    def __init__(self, proc: LocalProc, mesh: ActorMesh | None, key: str, creator: str | None) -> None:
        self.proc_runtime, self.mesh, self.key, self.creator = proc, mesh, key, creator
        self.name = ROOT if mesh is None else mesh.name
        self.actor_id = f"{proc.proc_id}/{key}"
        self.actor: Any = None
        self.incarnation = 0
        self._owned: list[Any] = []
        if mesh is None:
            self.rank = Point(0, _SCALAR)
        else:
            region = mesh._region
            base_rank = rank_of(proc.proc_id)
            self.rank = Point(region.index_of(base_rank), region.extent)

    @property
    def class_name(self) -> str:
        """Name of the actor's class."""
        return "" if self.mesh is None else self.mesh._actor_class.__qualname__

    @property
    def proc_id(self) -> str:
        """Address of the process."""
        return self.proc_runtime.proc_id

    @property
    def proc_mesh(self) -> ProcMesh:
        """The proc mesh that the actor was spawned on."""
        if self.mesh is None:
            return self.proc
        return self.mesh._procs

    @property
    def proc(self) -> ProcMesh:
        """This process, as a mesh without dimensions."""
        from .mesh import own_proc

        return own_proc(self.proc_runtime)

    def own(self, mesh: Any) -> None:
        """Remember a mesh that ends with this actor."""
        self._owned.append(mesh)

    def disown(self, mesh: Any) -> None:
        """Forget a mesh that was stopped."""
        self._owned = [owned for owned in self._owned if owned is not mesh]

    def stop_owned(self) -> None:
        """Stop what the actor spawned, newest first."""
        owned, self._owned = self._owned, []
        for mesh in reversed(owned):
            try:
                mesh.stop(timeout=5.0).exception()
            except Exception:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
                _log.exception("could not stop %r", mesh)


class MessageContext:
    """The message that an endpoint is handling; points are made when asked for."""

    __slots__ = ("_shape", "_slot", "port", "sender")

    def __init__(self, envelope: wire.Envelope) -> None:
        self._slot, self._shape = envelope[6], envelope[7]
        self.sender, self.port = envelope[3], envelope[5]

    @property
    def rank(self) -> Point:
        """The receiver's point in the slice that the message was sent to."""
        if self._shape is None:
            return Point(0, _SCALAR)
        labels, sizes = self._shape
        return Point(self._slot, Extent(tuple(labels), tuple(sizes)))


_instance: ContextVar[ActorInstance | None] = ContextVar("danaus_actor", default=None)
current_message: ContextVar[wire.Envelope | None] = ContextVar("danaus_message", default=None)
_local: LocalProc | None = None
_root: ActorInstance | None = None


class Context:
    """Where this code runs. See :func:`context`."""

    __slots__ = ("actor_instance", "message")

    def __init__(self, instance: ActorInstance, message: MessageContext | None) -> None:
        self.actor_instance, self.message = instance, message

    @property
    def message_rank(self) -> Point:
        """This actor's point in the slice that the current message was sent to; ranks are those of the slice."""
        return self.actor_instance.rank if self.message is None else self.message.rank

    @property
    def mesh(self) -> ActorMesh:
        """The actor mesh that this actor is a member of.

        Raises:
            RuntimeError: Asked outside of an actor.
        """
        mesh = self.actor_instance.mesh
        if mesh is None:
            raise RuntimeError("context().mesh: this code runs outside of an actor; ask inside an endpoint")
        return mesh

    @property
    def proc(self) -> ProcMesh:
        """This process, as a mesh without dimensions."""
        return self.actor_instance.proc

    @property
    def owner(self) -> str | None:
        """Address of the actor that spawned this one."""
        return self.actor_instance.creator

    def __repr__(self) -> str:
        return f"<Context {self.actor_instance.actor_id} rank {self.actor_instance.rank}>"


def context() -> Context:
    """Return where this code runs: the actor, its rank, the message it handles. Starts the runtime where it was not."""
    envelope = current_message.get()
    return Context(current_instance(), None if envelope is None else MessageContext(envelope))


def current_rank() -> Point:
    """Return this actor's point in its mesh, a mapping from dimension to index with ``.rank``; ``{}`` elsewhere."""
    return current_instance().rank


def current_size() -> dict[str, int]:
    """Return the sizes of this actor's mesh by dimension."""
    extent = current_instance().rank.extent
    return dict(zip(extent.labels, extent.sizes, strict=True))


def current_actor_name() -> str:
    """Return the name that this actor was spawned with; ``root`` outside of actors."""
    return current_instance().name


def current_instance() -> ActorInstance:
    """The actor that runs this code, else the root of this process."""
    instance = _instance.get()
    if instance is not None:
        return instance
    local_proc()
    assert _root is not None
    return _root


def current_key() -> str:
    """Key of the actor that runs this code, without starting anything."""
    instance = _instance.get()
    return ROOT if instance is None else instance.key


def bind_instance(instance: ActorInstance) -> None:
    """Say which actor the calling thread belongs to."""
    _instance.set(instance)


def local_proc() -> LocalProc:
    """The runtime of this process; a script's first use of it makes the script the controller."""
    if _local is None:
        from .controller import start_controller

        start_controller()
    assert _local is not None
    return _local


def shutdown_context() -> Future[None]:
    """End everything that this script started: meshes, the host agent, the runtime's threads. Also done at exit.

    Returns:
        A future that is there already; the call blocks until all is gone. Using the runtime afterwards starts it anew.
    """
    if _local is not None:
        from .controller import stop_controller

        stop_controller()
    done: Future[None] = Future("shutdown")
    done._resolve(lambda: None)
    return done


def is_running(proc: LocalProc) -> bool:
    """Whether ``proc`` is this process's runtime still, without starting anything."""
    return _local is proc


def set_local_proc(proc: LocalProc | None) -> None:
    """Install (or remove) this process's runtime."""
    global _local, _root
    _local = proc
    _root = None if proc is None else ActorInstance(proc, None, ROOT, None)
