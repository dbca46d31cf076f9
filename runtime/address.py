"""Names of processes: which rank of which mesh, and which time that rank was started.

Pure text. A mesh's id and a rank make a *place*, which stays the same for as long as the mesh lives; place and
incarnation make the address of one process. What is sent to an address reaches that one process or fails.

    place      trainers-a1b2c3.3
    address    trainers-a1b2c3.3  (incarnation 0),  trainers-a1b2c3.3~2  (incarnation 2)
"""

from __future__ import annotations

from typing import Final

AGENT: Final = "agent"
"""Address of the host agent."""


def place_of(proc: str) -> str:
    """The place that ``proc`` is or was started at."""
    return proc.partition("~")[0]


def incarnation_of(proc: str) -> int:
    """How many times the place had been started before ``proc`` was."""
    return int(proc.partition("~")[2] or 0)


def address(place: str, incarnation: int) -> str:
    """The address of one incarnation of a place."""
    return f"{place}~{incarnation}" if incarnation else place


def next_address(proc: str) -> str:
    """The address of the process that follows ``proc`` at its place."""
    return address(place_of(proc), incarnation_of(proc) + 1)


def mesh_of(proc: str) -> str:
    """Id of the mesh that ``proc`` belongs to."""
    return proc.rpartition(".")[0]


def rank_of(proc: str) -> int:
    """Rank of ``proc`` in its mesh."""
    return int(place_of(proc).rpartition(".")[2])


def name_of(proc: str) -> str:
    """Name that the mesh of ``proc`` was given, as far as its id tells."""
    return mesh_of(proc).rpartition("-")[0] or mesh_of(proc)
