"""Process groups and device meshes of actors: torch's collectives along the named dimensions of a mesh.

A group is known by its actor mesh, its dimensions and its ranks. Its members meet in a roll call (see store.py) and
connect through a store in the first member's proc. Each forming is a generation, whose number is part of the store's
name, so what one generation left behind never meets the next. record.py says what becomes of a group whose member dies.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..address import mesh_of, rank_of
from ..context import current_instance
from ..shapes.dimensions import unknown
from .registry import record_for, record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ..actor_mesh import ActorMesh
    from ..context import ActorInstance
    from ..shapes.shape import Region

FORM_LIMIT_S = 60.0
"""How long the members of a group wait for each other, unless told otherwise."""


def process_group(*dims: str, backend: str | None = None, timeout: float = FORM_LIMIT_S) -> ProcessGroup:
    """Return this actor's torch ProcessGroup along dimensions of its own mesh; all of them when none is named.

    The members are the ranks that share this rank's place in every other dimension; the order of ``dims`` orders them,
    the last varying fastest. All members have to call this, and it blocks until they have. The same call again returns
    the same object. The group ends with the actor.

    When a member dies, whoever is blocked in a collective of the group gets an error at once, and so does every later
    use, until the group has formed again with the dead member's next incarnation. This call does that: it waits for all
    current members to ask. An actor that is idle joins by itself once all the others are ready. Device meshes and
    whatever else holds the object go on with the new connections. What an endpoint raises because of the death reaches
    its caller as SupervisionError naming the dead rank.

    Within the group, ranks for ``src=`` and ``dst=`` are those of the procs in their mesh; ``group_src=`` and
    ``group_dst=`` count in the group.

    Args:
        *dims: Dimensions of the mesh.
        backend: ``"gloo"`` or ``"nccl"``; by default NCCL, with Gloo for CPU tensors, where this process sees a GPU,
            and Gloo elsewhere. All members have to agree.
        timeout: Seconds to wait for the other members to ask for the group.

    Raises:
        ValueError: A dimension does not exist or is named twice, or the backends are unknown or differ.
        RuntimeError: Called outside of an actor, or the members could not connect.
        TimeoutError: Some members did not ask for the group in time; the message names them.
        SupervisionError: A member's process is gone, and nothing follows it at its place.
        ImportError: torch is not installed.
    """
    what = _call_text("process_group", dims)
    return process_group_of(_own(what).mesh, dims, backend=backend, timeout=timeout)


def device_mesh(*dims: str, backend: str | None = None, timeout: float = FORM_LIMIT_S) -> DeviceMesh:
    """Return a torch DeviceMesh over dimensions of this actor's mesh, with their names; all when none is named.

    FSDP2, DTensor, DDP and distributed checkpoint take it as if torchrun had started the processes. Arguments, errors
    and blocking are those of :func:`process_group`, which gives the groups of its dimensions.
    """
    what = _call_text("device_mesh", dims)
    return device_mesh_of(_own(what).mesh, dims, backend=backend, timeout=timeout)


def generation(group: ProcessGroup) -> int:
    """Return the number of the generation that ``group`` has last formed, or tried to form, in this process."""
    return record_of(group).number


def break_group(group: ProcessGroup, reason: str) -> None:
    """End the generation of ``group`` in all members, though none has died; nothing where it has ended already.

    Whoever is blocked in one of its collectives gets an error; their callers hear of :class:`GroupBroken` with
    ``reason``. The next ``process_group()``, or the next moment in which all members are idle, forms the next one.
    """
    record_of(group).break_up(None, reason)


def on_reformed(group: ProcessGroup, callback: Callable[[int], object]) -> None:
    """Have ``callback`` told the number of each generation that this actor joins while idle.

    It runs on the actor's thread right after the joining, and may use the group. Not for a generation that the actor's
    own code has asked for. What it raises is only logged.
    """
    record_of(group).on_reformed = callback


def process_group_of(
    mesh: Any, dims: Sequence[str], *, backend: str | None = None, timeout: float = FORM_LIMIT_S
) -> ProcessGroup:
    """Same as :func:`process_group`, along dimensions of a slice that this actor is in."""
    what = _call_text("process_group", dims)
    line = _line(what, mesh, dims)
    return record_for(line, _backend(what, backend, timeout)).get(timeout)


def device_mesh_of(
    mesh: Any, dims: Sequence[str], *, backend: str | None = None, timeout: float = FORM_LIMIT_S
) -> DeviceMesh:
    """Same as :func:`device_mesh`, over dimensions of a slice that this actor is in."""
    what = _call_text("device_mesh", dims)
    plane = _line(what, mesh, dims)
    if not plane.dims:
        raise ValueError(f"{what}: {mesh!r} has no dimensions")
    resolved = _backend(what, backend, timeout)
    groups = [record_for(_line(what, mesh, (dim,)), resolved).get(timeout) for dim in plane.dims]
    if len(plane.dims) > 1 and len(plane.ranks) == plane.instance.proc_runtime.mesh_size:
        # It lends its connections to torch's default group, which checkpoints and others use unasked.
        record_for(plane, resolved).get(timeout)
    return _device_mesh(plane, resolved, groups)


@dataclass(frozen=True, slots=True)
class Line:
    """The members of one group, seen from one of them: a row of the mesh, a plane of it, or all of it."""

    instance: ActorInstance
    dims: tuple[str, ...]
    ranks: tuple[int, ...]
    """Proc ranks of the members, in group order."""
    sizes: tuple[int, ...]

    @property
    def address(self) -> str:
        """Equal for all members, and for no other group."""
        import hashlib

        digest = hashlib.blake2b(",".join(map(str, self.ranks)).encode(), digest_size=8).hexdigest()
        return f"{self.instance.key}/{'.'.join(self.dims)}/{digest}"

    @property
    def label(self) -> str:
        """The group in words."""
        return f"{_call_text('process_group', self.dims)} of {self.instance.name!r}"

    @property
    def mesh_id(self) -> str:
        """Address of the proc mesh."""
        return mesh_of(self.instance.proc_id)

    @property
    def own_rank(self) -> int:
        """This process's rank in its proc mesh."""
        return rank_of(self.instance.proc_id)

    def places(self) -> tuple[str, ...]:
        """Where the members' processes run, whatever their incarnation, in group order."""
        return tuple(f"{self.mesh_id}.{rank}" for rank in self.ranks)

    def member(self, place: int) -> str:
        """Name a member by its rank in the actor mesh."""
        region: Region = self.instance.mesh._region  # type: ignore[union-attr]
        point = region.point_of(self.ranks[place])
        return f"rank {point.rank} {dict(point)}"


def ranks_along(region: Region, own_rank: int, dims: Sequence[str]) -> tuple[int, ...]:
    """Return the base ranks that differ from ``own_rank`` in ``dims`` alone, row-major in the order of ``dims``."""
    strides = dict(zip(region.labels, region.strides, strict=True))
    sizes = dict(zip(region.labels, region.sizes, strict=True))
    point = region.point_of(own_rank)
    base = own_rank - sum(strides[dim] * point[dim] for dim in dims)
    steps = itertools.product(*([strides[dim] * index for index in range(sizes[dim])] for dim in dims))
    return tuple(base + sum(step) for step in steps)


_device_meshes: dict[tuple[str, str, str], tuple[list[Any], DeviceMesh]] = {}
_lock = threading.Lock()


def _device_mesh(plane: Line, backend: str, groups: list[Any]) -> DeviceMesh:
    from . import c10d

    key = plane.instance.key, plane.address, backend
    with _lock:
        known, mesh = _device_meshes.get(key, (None, None))
        if mesh is None or known != groups:
            device = "cuda" if "nccl" in backend else "cpu"
            mesh = c10d.make_device_mesh(groups, plane.ranks, plane.sizes, plane.dims, device)
            _device_meshes[key] = groups, mesh
        return mesh


def forget_device_meshes(actor_key: str) -> None:
    """The actor has ended."""
    with _lock:
        for key in [key for key in _device_meshes if key[0] == actor_key]:
            del _device_meshes[key]


def _own(what: str) -> Any:
    instance = current_instance()
    if instance.mesh is None:
        raise RuntimeError(
            f"{what}: this code runs outside of an actor; call it in an endpoint or in __init__ (a thread of your own "
            "belongs to no actor either, unless it runs in contextvars.copy_context())"
        )
    return instance


def _line(what: str, mesh: ActorMesh, dims: Sequence[str]) -> Line:
    instance = _own(what)
    region = mesh._region
    own_rank = rank_of(instance.proc_id)
    dims = tuple(dims) or region.labels
    if any(dim not in region.labels for dim in dims):
        raise ValueError(unknown(what, dims, region.labels, region.sizes))
    if len(set(dims)) < len(dims):
        raise ValueError(f"{what}: a dimension is named twice")
    if mesh._key != instance.key:
        raise ValueError(
            f"{what}: {mesh!r} is another mesh than this actor's, {instance.name!r}; an actor joins groups of its own "
            "mesh, context().mesh, and of slices of it"
        )
    if own_rank not in region:
        raise ValueError(f"{what}: this actor, rank {instance.rank.rank} {dict(instance.rank)}, is not in {mesh!r}")
    return Line(instance, dims, ranks_along(region, own_rank, dims), tuple(mesh.size(dim) for dim in dims))


def _backend(what: str, backend: str | None, timeout_s: float) -> str:
    if not timeout_s > 0:
        raise ValueError(f"{what}: timeout={timeout_s!r}; expected seconds above zero")
    try:
        from .c10d import resolve_backend
    except ImportError as error:
        raise ImportError(f"{what} needs torch ({error}): pip install 'danaus[torch]'") from error
    return resolve_backend(backend)


def _call_text(name: str, dims: Sequence[str]) -> str:
    return f"{name}({', '.join(map(repr, dims))})"
