"""Where process groups form: a key-value store and a roll call, in the proc of each group's first member.

The built-in actor `StoreActor` is made in a proc by the first message to it. It serves every group whose first member
lives there: the traffic stays among the members, groups share nothing but the proc, and a group does not outlive its
store for long, since the store dies only with a member. (In the mesh's owner, all groups of a job would queue at one
process, next to the user's script.)

    join      waits until every member has asked for the same group, and starts its next generation
    set, ...  what torch's Store offers, in a space of keys per generation

A space ends when a member dies or when all have left: whoever waits in it, or uses it afterwards, gets an error.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..actor import Actor, concurrent_endpoint
from ..actor_mesh import ActorMesh
from ..calls.future import call_soon
from ..context import context
from ..mesh import ProcMesh
from ..messages import wire
from ..messages.credits import DEFAULT_MAILBOX
from ..messages.payload import dump
from ..shapes.shape import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..failure import MeshFailure

STORE_KEY: Final = "@store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One member's wish to form a group."""

    group: str
    """Address of the group: the same for all members, different for any other group."""
    rank: int
    procs: tuple[str, ...]
    """Processes of all members, in group order."""
    host: str
    backend: str
    generation: int
    """The last generation that this member has been in; 0 before the first."""


@dataclass(frozen=True, slots=True)
class Formed:
    """All members are here."""

    generation: int
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotFormed:
    """The group did not come about: some members never asked, asked for other backends, or died."""

    missing: tuple[int, ...] = ()
    backends: tuple[tuple[int, str], ...] = ()
    failure: MeshFailure | None = None


class RollCall:
    """Who has asked for a group's next generation. Pure."""

    def __init__(self, procs: Sequence[str], *, last_generation: int = 0) -> None:
        self.procs, self.last_generation = tuple(procs), last_generation
        self.arrived: dict[int, Membership] = {}

    def arrive(self, member: Membership) -> Formed | NotFormed | None:
        """Note one member; return the outcome once it is known."""
        self.arrived[member.rank] = member
        backends = {rank: other.backend for rank, other in sorted(self.arrived.items())}
        if len(set(backends.values())) > 1:
            return NotFormed(backends=tuple(backends.items()))
        if self.missing():
            return None
        members = [self.arrived[rank] for rank in range(len(self.procs))]
        last = max(self.last_generation, *(each.generation for each in members))
        return Formed(last + 1, tuple(each.host for each in members))

    def missing(self) -> tuple[int, ...]:
        """Group ranks that have not asked."""
        return tuple(rank for rank in range(len(self.procs)) if rank not in self.arrived)


class Space:
    """The keys of one generation of one group."""

    def __init__(self, procs: Sequence[str] = ()) -> None:
        self.procs = set(procs)
        self.data: dict[str, bytes] = {}
        self.ended: str | None = None
        self._arrivals: dict[str, asyncio.Event] = {}

    def put(self, key: str, value: bytes) -> None:
        """Set one key and wake who waits for it."""
        self.data[key] = value
        arrival = self._arrivals.pop(key, None)
        if arrival is not None:
            arrival.set()

    def end(self, reason: str) -> None:
        """Fail who waits here, now and later."""
        self.ended = reason
        for arrival in self._arrivals.values():
            arrival.set()
        self._arrivals.clear()

    def check(self) -> None:
        """Raise where the space has ended."""
        if self.ended is not None:
            raise RuntimeError(self.ended)

    async def wait_for(self, keys: Sequence[str], timeout_s: float) -> None:
        """Return when all of ``keys`` are set.

        Raises:
            TimeoutError: Some are still missing; the message names them.
            RuntimeError: The space has ended.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for key in keys:
                    while key not in self.data:
                        self.check()
                        await self._arrivals.setdefault(key, asyncio.Event()).wait()
        except TimeoutError:
            missing = [key for key in keys if key not in self.data]
            raise TimeoutError(f"nobody has set {', '.join(missing)} within {timeout_s:g} s") from None


class _Waiting:
    """A roll call under way, and how those who wait for it hear the outcome."""

    def __init__(self, roll: RollCall) -> None:
        self.roll = roll
        self.outcome: Formed | NotFormed | None = None
        self.decided = asyncio.Event()

    def decide(self, outcome: Formed | NotFormed) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.decided.set()


class StoreActor(Actor):
    """The store of every group whose first member lives in this proc."""

    def __init__(self) -> None:
        self._spaces: dict[str, Space] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._generations: dict[str, int] = {}
        self._proc = context().actor_instance.proc_runtime
        self._loop: asyncio.AbstractEventLoop | None = None

    @concurrent_endpoint
    async def join(self, member: Membership, timeout_s: float) -> Formed | NotFormed:
        """Wait for the other members of a group."""
        self._watch(member.procs)
        waiting = self._waiting.get(member.group)
        if waiting is None:
            waiting = self._waiting[member.group] = _Waiting(self._new_roll(member))
        outcome = self._first_death(member.procs) or waiting.roll.arrive(member)
        if outcome is None:
            try:
                async with asyncio.timeout(timeout_s):
                    await waiting.decided.wait()
            except TimeoutError:
                # This member leaves, so the others would wait in vain.
                outcome = NotFormed(missing=waiting.roll.missing())
        if outcome is not None:
            self._decide(member.group, waiting, outcome)
        assert waiting.outcome is not None
        return waiting.outcome

    def _new_roll(self, member: Membership) -> RollCall:
        return RollCall(member.procs, last_generation=self._generations.get(member.group, 0))

    def _decide(self, group: str, waiting: _Waiting, outcome: Formed | NotFormed) -> None:
        if isinstance(outcome, Formed) and waiting.outcome is None:
            self._generations[group] = outcome.generation
            self._spaces[space_name(group, outcome.generation)] = Space(waiting.roll.procs)
        waiting.decide(outcome)
        if self._waiting.get(group) is waiting:
            del self._waiting[group]

    def _watch(self, procs: Sequence[str]) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._proc.on_gone.append(self._on_gone)
        for proc in procs:
            self._proc.link(proc)

    def _first_death(self, procs: Sequence[str]) -> NotFormed | None:
        failures = (self._proc.gone.get(proc) for proc in procs)
        return next((NotFormed(failure=failure) for failure in failures if failure is not None), None)

    def _on_gone(self, proc: str, failure: MeshFailure) -> None:
        """A process has died (I/O thread)."""
        assert self._loop is not None
        call_soon(self._loop, lambda: self._on_death(proc, failure))

    def _on_death(self, proc: str, failure: MeshFailure) -> None:
        for space in self._spaces.values():
            if proc in space.procs:
                space.end(f"the group has ended, because a member is gone: {failure}")
        for group, waiting in list(self._waiting.items()):
            if proc in waiting.roll.procs:
                self._decide(group, waiting, NotFormed(failure=failure))

    def _space(self, name: str) -> Space:
        space = self._spaces.get(name)
        if space is None:
            space = self._spaces[name] = Space()
        space.check()
        return space

    @concurrent_endpoint
    async def leave(self, space: str, proc: str) -> None:
        """Forget a member; the last one takes the space with it."""
        known = self._spaces.get(space)
        if known is not None:
            known.procs.discard(proc)
            if not known.procs - self._proc.gone.keys():
                known.end("the group has ended: all of its members have left")
                del self._spaces[space]

    @concurrent_endpoint
    async def put(self, space: str, items: dict[str, bytes]) -> None:
        """Set keys."""
        for key, value in items.items():
            self._space(space).put(key, value)

    @concurrent_endpoint
    async def get(self, space: str, keys: list[str], timeout_s: float) -> list[bytes]:
        """Return the values of ``keys``, waiting for them to be set."""
        where = self._space(space)
        await where.wait_for(keys, timeout_s)
        return [where.data[key] for key in keys]

    @concurrent_endpoint
    async def wait(self, space: str, keys: list[str], timeout_s: float) -> None:
        """Return when all of ``keys`` are set."""
        await self._space(space).wait_for(keys, timeout_s)

    @concurrent_endpoint
    async def add(self, space: str, key: str, amount: int) -> int:
        """Add to a counter, kept as text, and return its new value."""
        where = self._space(space)
        total = int(where.data.get(key, b"0")) + amount
        where.put(key, str(total).encode())
        return total

    @concurrent_endpoint
    async def append(self, space: str, key: str, value: bytes) -> None:
        """Append to a value."""
        where = self._space(space)
        where.put(key, where.data.get(key, b"") + value)

    @concurrent_endpoint
    async def compare_set(self, space: str, key: str, expected: bytes, desired: bytes) -> bytes:
        """Set ``key`` if it holds ``expected`` (or is not there and nothing is expected); return what it holds then."""
        where = self._space(space)
        if where.data.get(key, b"") == expected:
            where.put(key, desired)
        return where.data.get(key, expected)

    @concurrent_endpoint
    async def delete(self, space: str, key: str) -> bool:
        """Remove a key; return whether it was there."""
        return self._space(space).data.pop(key, None) is not None

    @concurrent_endpoint
    async def keys(self, space: str) -> list[str]:
        """Return the keys that are set."""
        return list(self._space(space).data)


def space_name(group: str, generation: int) -> str:
    """Name the space of keys of one generation of a group."""
    return f"{group}#{generation}"


def store_in(proc_id: str) -> Any:
    """A handle on the store actor of a proc; its first message makes it."""
    mesh_id, _, rank = proc_id.rpartition(".")
    procs = ProcMesh(mesh_id, mesh_id.rsplit("-", 1)[0], Region((), int(rank), (), ()))
    return ActorMesh("store", STORE_KEY, StoreActor, procs, procs._region, DEFAULT_MAILBOX)


def store_spawn(key: str, proc_id: str) -> wire.Envelope | None:
    """Return the message that makes the store actor in this proc, where ``key`` is its address."""
    if key != STORE_KEY:
        return None
    return [wire.SPAWN, STORE_KEY, proc_id, dump((store_in(proc_id), (), {}, None)).body, None]
