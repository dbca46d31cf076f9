"""Processes of other hosts for tests, and how they are lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danaus.runtime.address import host_of, incarnation_of, place_of
from danaus.runtime.failure import FailureKind, MeshFailure

if TYPE_CHECKING:
    from danaus.runtime.network.far_procs import FarProcs

P0 = "m-a1@1:2x1.0"
P1 = "m-a1@1:2x1.0~1"
P2 = "m-a1@1:2x1.0~2"
Q0 = "m-a1@1:2x1.1"
A, B = "a.0", "b.0"


def failure(proc: str, kind: FailureKind = FailureKind.KILLED, *, restarts: bool = False) -> MeshFailure:
    return MeshFailure(
        kind=kind, mesh="m", rank=int(place_of(proc)[-1]), host="h", incarnation=incarnation_of(proc), restarts=restarts
    )


def lose(far: FarProcs, slot: int, *, may_return: bool, kind: FailureKind = FailureKind.HOST_LOST) -> list[Any]:
    return far.on_host_lost(slot, f"host{slot}", "cut off", kind=kind, may_return=may_return)


def lost(proc: str, *, restarts: bool = False) -> MeshFailure:
    return MeshFailure(
        kind=FailureKind.HOST_LOST,
        mesh="m",
        rank=int(place_of(proc)[-1]),
        host=f"host{host_of(proc)}",
        incarnation=incarnation_of(proc),
        detail="cut off",
        restarts=restarts,
    )
