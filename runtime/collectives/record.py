"""The groups of this process's actors: each forms, loses members, forms again, and ends with its actor.

The object that users hold stays the same over all generations of a group; what connects it is replaced. A member that
is lost breaks the generation in all others, on their I/O threads. From then on

    an actor that asks for the group   waits for the next generation, and for the lost member's next incarnation
    an actor that is idle              joins the next generation by itself, once all others are ready (see rejoin.py)
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..calls.replies import gone_error
from ..errors import ActorError, CallTimeoutError, SupervisionError
from ..failure import pack_failure
from ..messages import wire
from .generation import Generation, news_limit_s, wait_broken
from .roll_call import Membership, NotFormed
from .sockets import unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..calls.future import Future
    from ..failure import MeshFailure
    from ..proc import LocalProc
    from .groups import Line
    from .roll_call import Formed

_log = logging.getLogger("danaus")

CONNECT_LIMIT_S: Final = 10.0
"""Least time to connect once all members are there, however little is left of the limit that was asked for."""


class _Lost(Exception):  # noqa: N818  names a state
    """A member was lost while the group formed."""


class GroupRecord:
    """One group of one actor: which generation it is in, and the object that users hold, which stays the same.

    Attributes:
        group: The torch ProcessGroup, once it has formed.
        number: The last generation that this member has been in; 0 before the first.
        current: That generation.
        on_reformed: Called on the actor's thread with the number of a generation that it has joined while idle.
        announced: What tells that all members are ready, while this one waits for that without its thread.
    """

    def __init__(self, line: Line, backend: str) -> None:
        self.line, self.backend = line, backend
        self.local: LocalProc = line.instance.proc_runtime
        self.number = 0
        self.group: Any = None
        self.current: Generation | None = None
        self.on_reformed: Callable[[int], object] | None = None
        self.announced: Future[bool] | None = None
        self.is_ended = False
        self._renewals = 0
        self._device: Any = None
        # Known to C++ alone, a store loses its Python methods.
        self._stores: list[Any] = []
        self._lock = threading.Lock()

    @property
    def place(self) -> int:
        """This member's place in the group."""
        return self.line.ranks.index(self.line.own_rank)

    @property
    def is_whole(self) -> bool:
        """Whether the group can be used."""
        from . import c10d

        current = self.current
        if self.group is None or current is None or not current.is_formed or current.is_broken:
            return False
        return c10d.is_entered(self.group)

    def hole(self) -> MeshFailure | None:
        """The end of a member that nothing follows, so that the group cannot form."""
        failures = (self.local.gone.get(self.local.resolve(place)) for place in self.line.places())
        return next((failure for failure in failures if failure is not None), None)

    def get(self, timeout_s: float, *, idle: bool = False) -> Any:
        """Return the group, formed with the other members if it was not, or is broken.

        Args:
            timeout_s: Limit for all of it.
            idle: Leave the others waiting if the time is over, rather than to fail them too.
        """
        # Not one lock for the process: two actors may form their groups in one order here and in the other elsewhere,
        # and the two processes would wait for each other.
        with self._lock:
            deadline_s = time.monotonic() + timeout_s
            while not self.is_whole:
                try:
                    self._form(deadline_s, timeout_s, idle)
                except _Lost as lost:
                    _log.debug("%s: %s; it forms again", self.line.label, lost)
            return self.group

    def _form(self, deadline_s: float, timeout_s: float, idle: bool) -> None:
        from . import c10d

        line = self.line
        c10d.ensure_default(line.mesh_id, line.own_rank, self.local.mesh_size)
        hole = self.hole()
        if hole is not None:
            raise gone_error(hole, line.label)
        self._withdraw()
        self._leave()
        if self._device is None:
            self._device = c10d.open_device(self.local.host_address)
        formed = self._join(deadline_s, timeout_s, idle)
        self._check_reach(formed)
        connect_by_s = max(deadline_s, time.monotonic() + CONNECT_LIMIT_S)
        generation = self._begin(formed, connect_by_s)
        try:
            self._connect(generation)
        except RuntimeError as error:
            # Its listener may hold connections of those that came to this generation in vain.
            self._device = None
            self._leave()
            if wait_broken([generation], news_limit_s(generation.procs)) is not None:
                if generation.ended_s < connect_by_s:
                    raise _Lost(generation.reason) from error
                raise TimeoutError(f"{line.label}: the members did not connect within {timeout_s:g} s") from error
            # The others would wait for this one.
            self.break_up(None, f"{line.member(self.place)} could not connect")
            raise RuntimeError(f"{line.label}: its members could not connect: {error}") from error
        c10d.lend_to_default(self.group)

    def _check_reach(self, formed: Formed) -> None:
        """Refuse what would only time out; all members come to the same answer."""
        members = [member for member in formed.members if member.listener is not None]
        places = unreachable([member.listener for member in members if member.listener is not None])
        if places and "gloo" in self.backend:
            hosts = ", ".join(sorted({f"{members[place].host!r}" for place in places}))
            raise RuntimeError(
                f"{self.line.label}: members on {hosts} listen on a loopback address, which other hosts cannot reach; "
                "start these hosts with an address that the others know (danaus host --advertise ADDRESS), or set "
                "GLOO_SOCKET_IFNAME"
            )

    def _begin(self, formed: Formed, connect_by_s: float) -> Generation:
        from . import c10d
        from .store import space_name

        home = formed.members[0].proc
        space = space_name(self.line.address, formed.generation, home)
        store = c10d.RuntimeStore(home, space, timeout_s=connect_by_s - time.monotonic())
        self._stores.append(store)
        generation = self.current = Generation(formed, self.place, store)
        self.number = formed.generation
        for proc in generation.procs:
            self.local.link(proc)
            if proc in self.local.gone:
                # The news came before there was anyone to take it.
                generation.end(self.local.gone[proc])
        self.local.run_at(connect_by_s, partial(self._on_late, generation))
        return generation

    def _connect(self, generation: Generation) -> None:
        from . import c10d

        line, store = self.line, generation.store
        recipe = c10d.Recipe(f"{line.address}/{self.backend}", line.label, line.ranks, self.place, self.backend)
        group: Any = self.group if self.group is not None and c10d.is_entered(self.group) else None
        if group is not None:
            if self._renewals < c10d.MAX_RENEWALS:
                self._renewals += 1
                c10d.renew_group(group, recipe, store, self._device, self._renewals)
            else:
                # Torch has no numbers left for its backends: from here on users hold another object.
                c10d.end_group(group)
                group = None
        if group is None:
            group, self._renewals = c10d.make_group(recipe, store, self._device), 0
        self.group = group
        store.limit_s = None
        generation.finish(c10d.aborts_of(group))

    def membership(self) -> Membership:
        """What this member tells the roll call."""
        return Membership(
            group=self.line.address,
            rank=self.place,
            places=self.line.places(),
            proc=self.local.proc_id,
            host=self.local.host,
            backend=self.backend,
            generation=self.number,
            listener=None if self._device is None else self._device.listener,
        )

    def _join(self, deadline_s: float, timeout_s: float, idle: bool) -> Formed:
        from .runtime_store import wait_here
        from .store import store_in

        line, member = self.line, self.membership()
        rest_s = max(0.0, deadline_s - time.monotonic())
        try:
            # The store keeps the time; it is late only where its process is stuck.
            join = store_in(member.places[0]).join.options(timeout=rest_s + 10.0)
            outcome = wait_here(join.call_one(member, rest_s, idle))
        except SupervisionError as error:
            if self.hole() is None and rest_s > 0:
                raise _Lost(str(error)) from error
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
            return gone_error(outcome.failure, line.label)
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

    def _on_late(self, generation: Generation) -> None:
        if generation is self.current and not generation.is_formed:
            self.break_up(None, f"{self.line.member(self.place)} was not connected in time")

    def break_up(self, failure: MeshFailure | None, reason: str) -> None:
        """End the generation in all members, though none has died."""
        generation = self.current
        if generation is None or generation.is_broken:
            return
        generation.end(failure, reason)
        fields = {
            "group": self.line.address,
            "generation": generation.number,
            "failure": None if failure is None else pack_failure(failure),
            "reason": reason,
        }
        for proc in generation.procs:
            if proc != self.local.proc_id and proc not in self.local.gone:
                self.local.send(proc, [wire.EVENT, "group_broken", fields])

    def end(self) -> None:
        """Close the group (the actor has ended)."""
        from . import c10d

        self.is_ended = True
        self._withdraw()
        if self.group is not None:
            c10d.end_group(self.group)
        self._leave()
        self.group = self.current = self._device = None
        self._stores.clear()

    def _withdraw(self) -> None:
        announced, self.announced = self.announced, None
        if announced is not None:
            announced.cancel()

    def _leave(self) -> None:
        from .store import space_name, store_in

        generation = self.current
        if generation is None or generation.procs[0] in self.local.gone:
            return
        space = space_name(self.line.address, generation.number, generation.procs[0])
        try:
            store_in(generation.procs[0]).leave.broadcast(space, self.local.proc_id)
        except SupervisionError:
            # The store went with its process.
            return
