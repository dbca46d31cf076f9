"""Names of processes: which rank of which mesh, on which host, and which time that rank was started.

Pure text. A mesh's id and a rank make a *place*, which stays the same for as long as the mesh lives; place and
incarnation make the address of one process. What is sent to an address reaches that one process or fails.

    place      trainers-a1b2c3.3
    address    trainers-a1b2c3.3  (incarnation 0),  trainers-a1b2c3.3~2  (incarnation 2)

Hosts are numbered within a job: slot 0 is the controller's, the others are those that it attached to. The id of a mesh
on other hosts ends in its layout, so that every agent can tell from an address alone where to send what is for it:

    trainers-a1b2c3@1:3x4      hosts 1, 2 and 3, with 4 ranks each
    trainers-a1b2c3@1+3:5x2    hosts 1, 3, 4 and 5, with 2 ranks each; further ranks are spares, dealt in turn
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

AGENT: Final = "agent"
"""Address of the agent of the host that one is on."""

GATE: Final = "gate"
"""Name of the socket at which a host's agent takes what its processes send to other hosts."""

CONTROLLER: Final = "controller.0"
"""Address of the controller."""

_LAYOUT: Final = re.compile(r"[0-9]+(?::[0-9]+)?(?:\+[0-9]+(?::[0-9]+)?)*x[0-9]+")
_MAX_SLOT: Final = 1 << 20


@lru_cache(maxsize=4096)
def _layout(mesh: str) -> tuple[tuple[int, ...], int]:
    """Slots of a mesh, in the order of its hosts, and how many ranks each has; (0,), 0 for one on slot 0 alone."""
    text = mesh.partition("@")[2]
    if not text:
        return (0,), 0
    if _LAYOUT.fullmatch(text) is None:
        raise ValueError(f"{mesh!r:.120}: not a mesh's id")
    hosts, _, per_host = text.partition("x")
    slots: list[int] = []
    for part in hosts.split("+"):
        first, _, last = part.partition(":")
        if int(last or first) > _MAX_SLOT:
            raise ValueError(f"{mesh!r:.120}: host slots end at {_MAX_SLOT}")
        slots += range(int(first), int(last or first) + 1)
    if not slots:
        raise ValueError(f"{mesh!r:.120}: a layout without hosts")
    return tuple(slots), int(per_host)


def mesh_id(name: str, unique: str, slots: Sequence[int], per_host: int) -> str:
    """The id of a new mesh with ``per_host`` ranks on each of ``slots``."""
    if tuple(slots) == (0,):
        return f"{name}-{unique}"
    runs: list[list[int]] = []
    for slot in slots:
        if runs and slot == runs[-1][1] + 1:
            runs[-1][1] = slot
        else:
            runs.append([slot, slot])
    text = "+".join(str(first) if first == last else f"{first}:{last}" for first, last in runs)
    return f"{name}-{unique}@{text}x{per_host}"


def slots_of(mesh: str) -> tuple[int, ...]:
    """Slots of the hosts that a mesh lies on, in its order."""
    return _layout(mesh)[0]


def per_host_of(mesh: str) -> int:
    """How many ranks a mesh over hosts has on each; 0 where its id does not say, since all are on slot 0."""
    return _layout(mesh)[1]


@lru_cache(maxsize=1 << 16)
def host_of(proc: str) -> int:
    """The slot of the host that ``proc`` is on, or is to be.

    Raises:
        ValueError: It is no address.
    """
    slots, per_host = _layout(mesh_of(proc))
    if len(slots) == 1:
        return slots[0]
    rank = rank_of(proc)
    count = per_host * len(slots)
    return slots[rank // per_host] if rank < count else slots[(rank - count) % len(slots)]


def agent_of(slot: int) -> str:
    """Address of a host's agent, for other hosts."""
    return f"agent@{slot}x1.0"


def file_name(proc: str) -> str:
    """What files of ``proc`` are called: without its layout, since the paths of sockets are short."""
    mesh, _, rest = proc.rpartition(".")
    return f"{mesh.partition('@')[0]}.{rest}" if mesh else proc.partition("@")[0]


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
    mesh = mesh_of(proc).partition("@")[0]
    return mesh.rpartition("-")[0] or mesh
