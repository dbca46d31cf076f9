"""What a process owns: the meshes that it ordered, with what makes their ranks again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..actor_mesh import ActorMesh
    from ..failure import MeshFailure
    from ..messages.attachment import Outgoing
    from ..shapes.shape import Region
    from .elastic import Filling
    from .restart import Restart, RestartTracker

KEEPER: Final = "@spawner"
"""Holder of the arguments of actors that may have to be made again."""


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one rank of a mesh; see ``ProcMesh.on_change``.

    Attributes:
        rank: Base rank in the mesh.
        incarnation: Of the process that this is about.
        state: ``"lost"``, ``"up"`` (again), ``"given up"``, or ``"preempted"``: its host is about to be taken away.
        failure: How it was lost, where it is.
    """

    rank: int
    incarnation: int
    state: str
    failure: MeshFailure | None = None


@dataclass(slots=True)
class OwnedProcs:
    """A proc mesh that this process ordered."""

    order: dict[str, Any]
    boot: bytes
    """What its processes read when they start."""
    owner: str
    tracker: RestartTracker
    policy: Restart | None
    lost: dict[int, MeshFailure] = field(default_factory=dict)
    callbacks: list[Callable[[Change], object]] = field(default_factory=list)
    fillings: list[Filling] = field(default_factory=list)

    @property
    def mesh(self) -> str:
        """Id of the mesh."""
        return self.order["mesh"]

    def place(self, rank: int) -> str:
        """Place of a rank."""
        return f"{self.mesh}.{rank}"


@dataclass(slots=True)
class OwnedActors:
    """An actor mesh that this process spawned, and what makes its actors again."""

    mesh: ActorMesh
    owner: str
    out: Outgoing
    tracker: RestartTracker
    policy: Restart | None
    lost: dict[int, MeshFailure] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Where actors have written what they want to have back, by place."""

    @property
    def region(self) -> Region:
        """Its ranks, as ranks of the proc mesh."""
        return self.mesh._region
