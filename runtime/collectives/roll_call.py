"""Who has asked for a process group's next generation, and what comes of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..address import incarnation_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..failure import MeshFailure
    from .sockets import Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One member's wish to form a group."""

    group: str
    """Address of the group: the same for all members, different for any other group."""
    rank: int
    places: tuple[str, ...]
    """Places of all members, in group order."""
    proc: str
    """Address of this member's process."""
    host: str
    backend: str
    generation: int
    """The last generation that this member has been in; 0 before the first."""
    listener: Address | None = None
    """Where this member's Gloo accepts connections."""


@dataclass(frozen=True, slots=True)
class Formed:
    """All members are here."""

    generation: int
    members: tuple[Membership, ...]
    """In group order."""


@dataclass(frozen=True, slots=True)
class NotFormed:
    """The group did not come about: some members never asked, asked for other backends, or died."""

    missing: tuple[int, ...] = ()
    backends: tuple[tuple[int, str], ...] = ()
    failure: MeshFailure | None = None


class RollCall:
    """Who has asked for a group's next generation."""

    def __init__(self, places: Sequence[str], *, last_generation: int = 0) -> None:
        self.places, self.last_generation = tuple(places), last_generation
        self.arrived: dict[int, Membership] = {}

    def arrive(self, member: Membership) -> Formed | NotFormed | None:
        """Note one member; return the outcome once it is known."""
        before = self.arrived.get(member.rank)
        if before is None or incarnation_of(before.proc) <= incarnation_of(member.proc):
            self.arrived[member.rank] = member
        backends = {rank: other.backend for rank, other in sorted(self.arrived.items())}
        if len(set(backends.values())) > 1:
            return NotFormed(backends=tuple(backends.items()))
        if self.missing():
            return None
        members = tuple(self.arrived[rank] for rank in range(len(self.places)))
        last = max(self.last_generation, *(each.generation for each in members))
        return Formed(last + 1, members)

    def withdraw(self, proc: str) -> None:
        """A process has died: what it asked for does not count any more."""
        self.arrived = {rank: member for rank, member in self.arrived.items() if member.proc != proc}

    def missing(self) -> tuple[int, ...]:
        """Group ranks that have not asked."""
        return tuple(rank for rank in range(len(self.places)) if rank not in self.arrived)
