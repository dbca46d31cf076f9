"""Which processes a mesh given to the functions of this folder means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..address import rank_of
from ..mesh import ProcMesh
from ..proc import ROOT
from ..shapes.mesh_trait import MeshTrait

if TYPE_CHECKING:
    from ..messages.link import Lane
    from ..proc import LocalProc


def procs_of(mesh: Any, what: str) -> ProcMesh:
    """The processes beneath a proc or actor mesh, in the mesh's region.

    Raises:
        TypeError: It is neither.
    """
    procs = mesh if isinstance(mesh, ProcMesh) else getattr(mesh, "_procs", None)
    if not isinstance(mesh, MeshTrait) or not isinstance(procs, ProcMesh):
        raise TypeError(f"{what}: expected a mesh of procs or of actors, got {mesh!r}")
    return procs._with_region(mesh._region)


def places_of(procs: ProcMesh) -> list[str]:
    """The place of each rank, in rank order of the mesh given."""
    return [f"{procs._mesh_id}.{rank}" for rank in procs._region.ranks()]


def check_rank(rank: int, procs: ProcMesh, what: str) -> None:
    """Refuse a rank that the mesh does not have.

    Raises:
        ValueError: With the ranks that there are.
    """
    count = procs._region.nelements
    if not 0 <= rank < count:
        raise ValueError(f"{what}: rank {rank} of {procs!r}: its ranks are 0 to {count - 1}")


def lane_to(local: LocalProc, proc: str, procs: ProcMesh) -> Lane:
    """The way to a process of ``procs``."""
    return local.lane(proc, "", sender=ROOT, name=f"{procs.name} rank {rank_of(proc)}", bound=1)
