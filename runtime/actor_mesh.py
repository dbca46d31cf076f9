"""A mesh of actors: one of a class on each proc of a mesh, addressed as an array."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from .actor import EndpointOptions, endpoints_of, spec_of
from .calls.adverbs import CallOptions, Endpoint
from .calls.replies import ask_all, gone_error
from .context import current_instance, current_key, local_proc
from .errors import MessageError
from .messages import wire
from .messages.payload import dump
from .shapes.mesh_trait import MeshTrait
from .supervision.elastic import Health, check_health
from .supervision.owned import KEEPER

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from .calls.future import Future
    from .mesh import ProcMesh
    from .messages.link import Lane
    from .proc import LocalProc
    from .shapes.shape import Region
    from .supervision.restart import Restart


class ActorMesh(MeshTrait):
    """A handle on a mesh of actors, or on a slice of one. Small and picklable; copies speak to the same actors.

    Each endpoint of the class is an attribute: ``mesh.method.call(...)``.

    Attributes:
        name: Name given at ``spawn``.
    """

    FIELDS: Final = frozenset(
        {"name", "_key", "_actor_class", "_procs", "_region", "_mailbox", "_specs", "_lane_cache"}
    )
    """Attributes of every handle, which an endpoint of that name would be hidden by."""

    def __init__(self, name: str, key: str, actor_class: type, procs: ProcMesh, region: Region, mailbox: int) -> None:
        self.name = name
        self._key, self._actor_class, self._procs, self._region, self._mailbox = (
            key,
            actor_class,
            procs,
            region,
            mailbox,
        )
        self._specs = endpoints_of(actor_class)
        self._lane_cache: tuple[LocalProc | None, str, int, list[Lane]] = (None, "", 0, [])

    def _with_region(self, region: Region) -> ActorMesh:
        return ActorMesh(self.name, self._key, self._actor_class, self._procs, region, self._mailbox)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_specs" not in self.__dict__:
            raise AttributeError(name)
        spec = self._specs.get(name)
        if spec is not None:
            found: Any = Endpoint(self, spec, CallOptions())
        elif callable(getattr(self._actor_class, name, None)):
            found = _PlainMethod(self, name)
        else:
            known = ", ".join(sorted(self._specs)) or "none"
            raise AttributeError(f"{self._actor_class.__qualname__} has no endpoint {name!r}; its endpoints: {known}")
        self.__dict__[name] = found
        return found

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._specs})

    def __len__(self) -> int:
        return self._region.nelements

    def _lanes(self, proc: LocalProc, sender: str) -> list[Lane]:
        cached_proc, cached_sender, cached_epoch, lanes = self._lane_cache
        if cached_proc is proc and cached_sender == sender and cached_epoch == proc.epoch:
            return lanes
        mesh_id, epoch = self._procs._mesh_id, proc.epoch
        lanes = [
            proc.lane(
                proc.resolve(f"{mesh_id}.{rank}"),
                self._key,
                sender=sender,
                name=f"{self.name} rank {rank}",
                bound=self._mailbox,
            )
            for rank in self._region.ranks()
        ]
        self._lane_cache = proc, sender, epoch, lanes
        return lanes

    @property
    def initialized(self) -> Future[None]:
        """A future that is there once every rank's ``__init__`` has returned; fails with the first that raised."""
        lanes = self._lanes(local_proc(), current_key())
        return ask_all(wire.PING, f"start of {self.name!r}", lanes, self._region, on_error="first")

    def stop(self, reason: str = "", *, timeout: float | None = None) -> Future[None]:
        """Stop these actors once they have handled what they were sent before; their procs live on.

        Args:
            reason: For a reader of the code.
            timeout: Seconds after which the returned future fails; the actors stop all the same.

        Returns:
            A future that is there when every ``__cleanup__`` has returned.
        """
        del reason
        lanes = self._lanes(local_proc(), current_key())
        future = ask_all(wire.STOP, f"stop of {self.name!r}", lanes, self._region, on_error="all", timeout_s=timeout)
        # Not before: an actor that is to stop has to be where it is asked.
        local_proc().supervisor.release_actors(self)
        current_instance().disown(self)
        return future

    def healthy(self) -> Health:
        """Say which of these actors' processes live; see :meth:`ProcMesh.healthy`."""
        return check_health(self, self._procs._mesh_id)

    def replace(self, *ranks: int, force: bool = False) -> Future[None]:
        """Start the processes of these ranks again, and with them their actors; see :meth:`ProcMesh.replace`."""
        base = self._region.ranks()
        return self._procs.replace(*(base[rank] for rank in ranks), force=force)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorMesh, (self.name, self._key, self._actor_class, self._procs, self._region, self._mailbox)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorMesh) and (self._key, self._region) == (other._key, other._region)

    def __hash__(self) -> int:
        return hash((self._key, self._region))

    def __repr__(self) -> str:
        return f"<ActorMesh {self.name!r} of {self._actor_class.__qualname__} {self.extent}>"

    def process_group(self, *dims: str, backend: str | None = None, timeout: float = 60.0) -> ProcessGroup:
        """Return this rank's torch ProcessGroup along ``dims`` of this mesh; see :func:`danaus.process_group`."""
        from .collectives.groups import process_group_of

        return process_group_of(self, dims, backend=backend, timeout=timeout)

    def device_mesh(self, *dims: str, backend: str | None = None, timeout: float = 60.0) -> DeviceMesh:
        """Return a torch DeviceMesh over ``dims`` of this mesh; see :func:`danaus.device_mesh`."""
        from .collectives.groups import device_mesh_of

        return device_mesh_of(self, dims, backend=backend, timeout=timeout)


class _PlainMethod:
    """A method without ``@endpoint``: only :func:`as_endpoint` can call it."""

    def __init__(self, mesh: ActorMesh, name: str) -> None:
        self._mesh, self._method = mesh, name

    def _refuse(self) -> Any:
        qualified = f"{self._mesh._actor_class.__qualname__}.{self._method}"
        raise RuntimeError(
            f"{qualified} is not an endpoint: decorate it, or call it with as_endpoint(mesh.{self._method})"
        )

    def __call__(self, *_args: object, **_kwargs: object) -> Any:
        return self._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()


def as_endpoint(method: Any, *, explicit_response_port: bool = False) -> Any:
    """Treat a method without ``@endpoint`` as an endpoint, at this call site: ``as_endpoint(mesh.method).call(...)``.

    Raises:
        TypeError: ``method`` is no method of an actor mesh.
    """
    if isinstance(method, Endpoint):
        return method
    if not isinstance(method, _PlainMethod):
        raise TypeError(f"as_endpoint: expected a method of an actor mesh, as in mesh.method, got {method!r}")
    mesh, name = method._mesh, method._method
    options = EndpointOptions(explicit_response_port=explicit_response_port)
    spec = spec_of(mesh._actor_class, name, getattr(mesh._actor_class, name), options)
    flags = wire.UNDECORATED | (wire.EXPLICIT_PORT if explicit_response_port else 0)
    return Endpoint(mesh, spec, CallOptions(), flags)


def spawn_actors(
    procs: ProcMesh,
    name: str,
    actor_class: type,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mailbox: int,
    restart: Restart | None,
) -> ActorMesh:
    """Send what makes one actor of ``actor_class`` on every proc of ``procs``; does not wait for them."""
    proc = local_proc()
    owner = current_instance()
    mesh = ActorMesh(name, f"{name}-{os.urandom(4).hex()}", actor_class, procs, procs._region, mailbox)
    try:
        payload = dump((mesh, args, kwargs, owner.actor_id))
    except Exception as error:
        reason = f"it or an argument of its __init__ cannot be pickled here ({type(error).__name__}: {error})"
        raise MessageError(f"spawn of {name!r} ({actor_class.__qualname__})", error, reason) from error
    known = procs._proc_ids()
    _refuse_gone(proc, known, name)
    out = proc.snapshot(payload, [*known, KEEPER])
    # Else a process that dies meanwhile could miss its actor, or the next one get it twice.
    with proc.places_lock:
        targets = procs._proc_ids()
        for old, new in zip(known, targets, strict=True):
            if old != new:
                proc.attachments.lend_again(out, new)
                proc.attachments.take_back(out, old)
        proc.supervisor.own_actors(mesh, owner.key, out, restart)
        life = [0, proc.supervisor.is_restartable(mesh), None, None]
        data = wire.pack([wire.SPAWN, mesh._key, proc.proc_id, life, out.body, out.attachment])
        for target in targets:
            proc.link(target).send(data, out.frames)
    owner.own(mesh)
    return mesh


def _refuse_gone(proc: LocalProc, targets: list[str], name: str) -> None:
    for target in targets:
        if target in proc.gone:
            what = f"spawn of {name!r}; slice the mesh to its living ranks, replace this one, or spawn new procs"
            raise gone_error(proc.gone[target], what)
