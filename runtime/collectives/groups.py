"""Process groups and device meshes of actors: torch's collectives along the named dimensions of a mesh.

A group is known by its actor mesh, its dimensions and its ranks. Its members meet in a roll call (see store.py) and
connect through a store in the first member's proc. Each forming is a generation, whose number is part of the store's
name, so what one generation left behind never meets the next.
"""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..context import current_instance
from ..errors import ActorError, CallTimeoutError, SupervisionError
from ..shapes.dimensions import unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ..actor_mesh import ActorMesh
    from ..context import ActorInstance
    from ..shapes.shape import Region
    from .store import Formed, NotFormed

_log = logging.getLogger("danaus")

FORM_LIMIT_S = 60.0
"""How long the members of a group wait for each other, unless told otherwise."""


def process_group(*dims: str, backend: str | None = None, timeout: float = FORM_LIMIT_S) -> ProcessGroup:
    """Return this actor's torch ProcessGroup along dimensions of its own mesh; all of them when none is named.

    The members are the ranks that share this rank's place in every other dimension; the order of ``dims`` orders them,
    the last varying fastest. All members have to call this, and it blocks until they have. The same call again returns
    the same object. The group ends with the actor.

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
        SupervisionError: A member's process is gone.
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


def process_group_of(
    mesh: Any, dims: Sequence[str], *, backend: str | None = None, timeout: float = FORM_LIMIT_S
) -> ProcessGroup:
    """Same as :func:`process_group`, along dimensions of a slice that this actor is in."""
    what = _call_text("process_group", dims)
    line = _line(what, mesh, dims)
    return _record(line, _backend(what, backend, timeout)).get(timeout)


def device_mesh_of(
    mesh: Any, dims: Sequence[str], *, backend: str | None = None, timeout: float = FORM_LIMIT_S
) -> DeviceMesh:
    """Same as :func:`device_mesh`, over dimensions of a slice that this actor is in."""
    what = _call_text("device_mesh", dims)
    plane = _line(what, mesh, dims)
    if not plane.dims:
        raise ValueError(f"{what}: {mesh!r} has no dimensions")
    resolved = _backend(what, backend, timeout)
    groups = [_record(_line(what, mesh, (dim,)), resolved).get(timeout) for dim in plane.dims]
    if len(plane.dims) > 1 and len(plane.ranks) == plane.instance.proc_runtime.mesh_size:
        # It lends its connections to torch's default group, which checkpoints and others use unasked.
        _record(plane, resolved).get(timeout)
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
        return self.instance.proc_id.rpartition(".")[0]

    @property
    def own_rank(self) -> int:
        """This process's rank in its proc mesh."""
        return int(self.instance.proc_id.rpartition(".")[2])

    def procs(self) -> tuple[str, ...]:
        """Addresses of the members' processes, in group order."""
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


class GroupRecord:
    """One group of one actor: which generation it is in, and the object that users hold, which stays the same."""

    def __init__(self, line: Line, backend: str) -> None:
        self.line, self.backend = line, backend
        self.generation = 0
        self.group: Any = None
        # Known to C++ alone, a store loses its Python methods.
        self._store: Any = None
        self._lock = threading.Lock()

    def get(self, timeout_s: float) -> Any:
        """Return the group, formed with the other members if it was not."""
        from . import c10d

        # Not one lock for the process: two actors may form their groups in one order here and in the other elsewhere,
        # and the two processes would wait for each other.
        with self._lock:
            if self.group is None or not c10d.is_entered(self.group):
                self.group = self._form(timeout_s)
            return self.group

    def _form(self, timeout_s: float) -> Any:
        from . import c10d
        from .store import space_name

        line = self.line
        c10d.ensure_default(line.mesh_id, line.own_rank, line.instance.proc_runtime.mesh_size)
        formed = self._join(timeout_s)
        self.generation = formed.generation
        space = space_name(line.address, formed.generation)
        store = c10d.RuntimeStore(line.procs()[0], space, timeout_s=timeout_s)
        place = line.ranks.index(line.own_rank)
        recipe = c10d.Recipe(f"{line.address}/{self.backend}", line.label, line.ranks, place, self.backend)
        try:
            group = c10d.make_group(recipe, store, formed.hosts)
        except RuntimeError as error:
            self._leave()
            raise RuntimeError(f"{line.label}: its members could not connect: {error}") from error
        store.limit_s = None
        self._store = store
        c10d.lend_to_default(group)
        return group

    def _join(self, timeout_s: float) -> Formed:
        from .c10d import wait_here
        from .store import Membership, NotFormed, store_in

        line = self.line
        member = Membership(
            group=line.address,
            rank=line.ranks.index(line.own_rank),
            procs=line.procs(),
            host=line.instance.proc_runtime.host,
            backend=self.backend,
            generation=self.generation,
        )
        try:
            # The store keeps the time; it is late only where its process is stuck.
            join = store_in(member.procs[0]).join.options(timeout=timeout_s + 10.0)
            outcome = wait_here(join.call_one(member, timeout_s))
        except SupervisionError as error:
            raise type(error)(error.failure, line.label) from None
        except CallTimeoutError:
            raise TimeoutError(f"{line.label}: {line.member(0)}, where the members meet, does not answer") from None
        except ActorError as error:
            raise RuntimeError(f"{line.label}: {error}") from error
        if isinstance(outcome, NotFormed):
            raise self._refusal(outcome, timeout_s)
        return outcome

    def _refusal(self, outcome: NotFormed, timeout_s: float) -> Exception:
        line = self.line
        if outcome.failure is not None:
            return SupervisionError(outcome.failure, line.label)
        if outcome.backends:
            asked = ", ".join(f"{line.member(place)} asks for {backend!r}" for place, backend in outcome.backends)
            return ValueError(f"{line.label}: the members differ in the backend: {asked}; name one with backend=")
        places = sorted(outcome.missing, key=lambda place: line.ranks[place])
        missing = ", ".join(map(line.member, places[:8]))
        more = f" and {len(outcome.missing) - 8} more" if len(outcome.missing) > 8 else ""
        return TimeoutError(
            f"{line.label}: {missing}{more} did not ask for it within {timeout_s:g} s. Every member has to make the "
            "same call, with the same dimensions in the same order; or raise timeout="
        )

    def end(self) -> None:
        """Close the group (the actor has ended)."""
        from . import c10d

        if self.group is not None:
            c10d.end_group(self.group)
            self.group = self._store = None
            self._leave()

    def _leave(self) -> None:
        from .store import space_name, store_in

        line = self.line
        space = space_name(line.address, self.generation)
        try:
            store_in(line.procs()[0]).leave.broadcast(space, line.instance.proc_id)
        except SupervisionError:
            # The store went with its process.
            return


_records: dict[tuple[str, str, str], GroupRecord] = {}
_device_meshes: dict[tuple[str, str, str], tuple[list[Any], DeviceMesh]] = {}
_lock = threading.Lock()


def _record(line: Line, backend: str) -> GroupRecord:
    key = line.instance.key, line.address, backend
    with _lock:
        record = _records.get(key)
        if record is None:
            record = _records[key] = GroupRecord(line, backend)
        return record


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


def end_groups(actor_key: str) -> None:
    """End all groups of an actor (on its thread, after its ``__cleanup__``)."""
    with _lock:
        ended = [_records.pop(key) for key in list(_records) if key[0] == actor_key]
        for key in [key for key in _device_meshes if key[0] == actor_key]:
            del _device_meshes[key]
        is_last = not _records
    for record in reversed(ended):
        try:
            record.end()
        except Exception:  # noqa: BLE001  the others have to be closed too
            _log.exception("%s could not be closed", record.line.label)
    if ended and is_last:
        from . import c10d

        c10d.drop_default()


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
    own_rank = int(instance.proc_id.rpartition(".")[2])
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
