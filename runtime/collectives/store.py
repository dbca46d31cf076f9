"""Where process groups form: a key-value store and a roll call, in the proc of each group's first member.

The built-in actor `StoreActor` is made in a proc by the first message to it. It serves every group whose first member
lives there: the traffic stays among the members, groups share nothing but the proc, and a group does not outlive its
store for long, since the store dies only with a member. (In the mesh's owner, all groups of a job would queue at one
process, next to the user's script.)

    join      waits until every member has asked for the same group, and starts its next generation
    set, ...  what torch's Store offers, in a space of keys per generation

A space ends when a member dies or when all have left: whoever waits in it, or uses it afterwards, gets an error. A
member that has died is waited for if its place has a next incarnation.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from ..actor import Actor, concurrent_endpoint
from ..actor_mesh import ActorMesh
from ..address import mesh_of, name_of, place_of, rank_of
from ..calls.future import call_soon
from ..context import context
from ..mesh import ProcMesh
from ..messages import wire
from ..messages.credits import DEFAULT_MAILBOX
from ..messages.payload import dump
from ..shapes.shape import Region
from .roll_call import Formed, NotFormed, RollCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..failure import MeshFailure
    from .roll_call import Membership

STORE_KEY: Final = "@store"


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
        self.ready: dict[int, tuple[str, asyncio.Event]] = {}
        """Members that would come at once, by rank: their processes, and what calls them in."""

    def release_ready(self) -> None:
        """Tell those who have announced themselves."""
        for _, called_in in self.ready.values():
            called_in.set()
        self.ready.clear()

    def withdraw(self, proc: str) -> None:
        """A process has died."""
        self.roll.withdraw(proc)
        self.ready = {rank: ready for rank, ready in self.ready.items() if ready[0] != proc}

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
    async def join(self, member: Membership, timeout_s: float, idle: bool = False) -> Formed | NotFormed:
        """Wait for the other members of a group; an idle one that waits in vain leaves the others waiting."""
        waiting = self._waiting_for(member)
        outcome = self._first_hole(member.places) or waiting.roll.arrive(member)
        self._call_in(waiting)
        if outcome is None:
            try:
                async with asyncio.timeout(timeout_s):
                    await waiting.decided.wait()
            except TimeoutError:
                missing = NotFormed(missing=waiting.roll.missing())
                if idle:
                    waiting.roll.withdraw(member.proc)
                    return missing
                # This member leaves, so the others would wait in vain.
                outcome = missing
        if outcome is not None:
            self._decide(member.group, waiting, outcome)
        assert waiting.outcome is not None
        return waiting.outcome

    @concurrent_endpoint
    async def announce(self, member: Membership) -> bool:
        """Return once every member has either asked for the group or announced that it is ready to.

        Returns:
            Whether the group may form; False where a member is gone for good.
        """
        waiting = self._waiting_for(member)
        ready = waiting.ready[member.rank] = member.proc, asyncio.Event()
        self._call_in(waiting)
        try:
            if self._first_hole(member.places) is None:
                await ready[1].wait()
        finally:
            if waiting.ready.get(member.rank) is ready:
                del waiting.ready[member.rank]
        return self._first_hole(member.places) is None

    def _waiting_for(self, member: Membership) -> _Waiting:
        self._watch(member.places)
        waiting = self._waiting.get(member.group)
        if waiting is None:
            waiting = self._waiting[member.group] = _Waiting(self._new_roll(member))
        return waiting

    def _call_in(self, waiting: _Waiting) -> None:
        """Once everyone has asked or announced, let those come that have only announced."""
        if waiting.ready and not set(waiting.roll.missing()) - waiting.ready.keys():
            waiting.release_ready()

    def _new_roll(self, member: Membership) -> RollCall:
        return RollCall(member.places, last_generation=self._generations.get(member.group, 0))

    def _decide(self, group: str, waiting: _Waiting, outcome: Formed | NotFormed) -> None:
        if isinstance(outcome, Formed) and waiting.outcome is None:
            self._generations[group] = outcome.generation
            name = space_name(group, outcome.generation, self._proc.proc_id)
            space = self._spaces[name] = Space([member.proc for member in outcome.members])
            for member in outcome.members:
                if member.proc in self._proc.gone:
                    space.end(_ended(self._proc.gone[member.proc]))
        waiting.decide(outcome)
        waiting.release_ready()
        if self._waiting.get(group) is waiting:
            del self._waiting[group]

    def _watch(self, places: Sequence[str]) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._proc.on_gone.append(self._on_gone)
        for place in places:
            self._proc.link(self._proc.resolve(place))

    def _first_hole(self, places: Sequence[str]) -> NotFormed | None:
        """The first place whose process is gone, and where none follows."""
        failures = (self._proc.gone.get(self._proc.resolve(place)) for place in places)
        return next((NotFormed(failure=failure) for failure in failures if failure is not None), None)

    def _on_gone(self, proc: str, failure: MeshFailure) -> None:
        """A process has died (I/O thread)."""
        assert self._loop is not None
        call_soon(self._loop, lambda: self._on_death(proc, failure))

    def _on_death(self, proc: str, failure: MeshFailure) -> None:
        for space in self._spaces.values():
            if proc in space.procs:
                space.end(_ended(failure))
        for group, waiting in list(self._waiting.items()):
            if place_of(proc) not in waiting.roll.places:
                continue
            waiting.withdraw(proc)
            hole = self._first_hole(waiting.roll.places)
            if hole is not None:
                self._decide(group, waiting, hole)
            else:
                self._watch(waiting.roll.places)

    def _space(self, name: str) -> Space:
        space = self._spaces.get(name)
        if space is None:
            # Before it stands a name of the user's, which may hold anything.
            _, at, proc = name.rpartition("#")[2].partition("@")
            if at and proc != self._proc.proc_id:
                raise RuntimeError(f"the group has ended, because {proc}, where its store was, is gone")
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


def _ended(failure: MeshFailure) -> str:
    return f"the group has ended, because a member is gone: {failure}"


def space_name(group: str, generation: int, proc: str) -> str:
    """Name the space of keys, in ``proc``, of one generation of a group."""
    return f"{group}#{generation}@{proc}"


def store_in(proc_id: str) -> Any:
    """A handle on the store actor of a proc; its first message makes it."""
    procs = ProcMesh(mesh_of(proc_id), name_of(proc_id), Region((), rank_of(proc_id), (), ()))
    return ActorMesh("store", STORE_KEY, StoreActor, procs, procs._region, DEFAULT_MAILBOX)


def store_spawn(key: str, proc_id: str) -> wire.Envelope | None:
    """Return the message that makes the store actor in this proc, where ``key`` is its address."""
    if key != STORE_KEY:
        return None
    body = dump((store_in(proc_id), (), {}, None)).body
    return [wire.SPAWN, STORE_KEY, proc_id, [0, False, None, None], body, None]
