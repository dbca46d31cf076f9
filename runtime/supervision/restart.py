"""Decides which ranks of a mesh start again after a failure, when, and when to give up.

Pure logic: no process, thread or clock in this file. Events and the time go in, commands come out; the supervisor
carries them out and says what came of them.

    UP --failed--> WAITING --due, all stopped--> STARTING --started--> UP
    UP, STARTING --another of the scope failed--> STOPPING --ended--> WAITING
    any --given up, not to be restarted--> HOLE --replace--> WAITING
    any --released--> RELEASED, for good

One *incident* is a failure and every rank that starts again because of it; its ranks start together. A rank counts as
UP from the spawn of its mesh on, in incarnation 0.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_BACKOFF_S: Final = 60.0
"""Doubling ends here, or at ``backoff_s`` where that is longer."""

Scope = Literal["rank", "mesh", "rest"]
Preempted = Literal["move", "shrink"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """What to do about a failed rank, declared at ``spawn(..., restart=Restart(...))``.

    Attributes:
        scope: Who starts again: the failed ``"rank"``, all of its ``"mesh"``, or the ``"rest"``, which is the failed
            rank and all of a higher number.
        max_restarts: Restarts of a mesh in any ``within_s`` seconds; the next failure goes up the tree. A failure
            counts once, however many ranks start again because of it.
        within_s: Length of that window.
        backoff_s: Wait before the first restart in the window; it doubles with each further one, up to 60 s.
        stuck: Whether a rank that lives but does not answer is killed and started again.
        preempted: Whether the ranks of a host that is about to be taken away ``"move"`` to another one, or the mesh
            does without them (``"shrink"``).

    Raises:
        ValueError: A value is out of range, or two values contradict each other.
        TypeError: A value has the wrong type.
    """

    scope: Scope = "rank"
    max_restarts: int = 3
    within_s: float = 60.0
    backoff_s: float = 0.0
    stuck: bool = False
    preempted: Preempted = "move"

    def __post_init__(self) -> None:
        _check_choice("scope", self.scope, get_args(Scope))
        _check_choice("preempted", self.preempted, get_args(Preempted))
        _check_type("max_restarts", self.max_restarts, (int,), "a whole number, such as 3")
        _check_type("within_s", self.within_s, (int, float), "a number of seconds")
        _check_type("backoff_s", self.backoff_s, (int, float), "a number of seconds")
        _check_type("stuck", self.stuck, (bool,), "True or False")
        if self.max_restarts < 1:
            raise ValueError(
                f"Restart(max_restarts={self.max_restarts}): give at least 1, or leave restart= out to restart nothing"
            )
        if not self.within_s > 0:
            raise ValueError(f"Restart(within_s={self.within_s!r}): give a number of seconds above 0, such as 60")
        if not 0 <= self.backoff_s < math.inf:
            raise ValueError(f"Restart(backoff_s={self.backoff_s!r}): give 0 or a finite number of seconds above it")
        if self.backoff_s and self._total_backoff_s() >= self.within_s:
            raise ValueError(
                f"Restart(max_restarts={self.max_restarts}, within_s={self.within_s:g}, backoff_s={self.backoff_s:g}): "
                f"the waits alone take {self._total_backoff_s():g} s, so a rank that always fails would never reach "
                "the limit and start again for ever; raise within_s above that, or lower backoff_s or max_restarts"
            )

    def backoff_before_s(self, number: int) -> float:
        """Return the wait before restart ``number`` of the window, counted from 1."""
        if not self.backoff_s:
            return 0.0
        # No window holds so many doublings, and 2.0**1024 overflows.
        return min(self.backoff_s * 2.0 ** min(number - 1, 1000), self._longest_backoff_s)

    @property
    def _longest_backoff_s(self) -> float:
        return max(MAX_BACKOFF_S, self.backoff_s)

    def _total_backoff_s(self) -> float:
        num_doublings = max(0, math.ceil(math.log2(self._longest_backoff_s / self.backoff_s)))
        num_growing = min(num_doublings, self.max_restarts)
        growing_s = sum(self.backoff_before_s(number) for number in range(1, num_growing + 1))
        return growing_s + (self.max_restarts - num_growing) * self._longest_backoff_s


class RankState(Enum):
    """Where a rank is; the module's docstring draws it."""

    UP = auto()
    STOPPING = auto()
    """Told to stop, so as to start again; its process has not ended yet."""
    WAITING = auto()
    """Has no process; starts again once the back-off has passed and all of its incident have ended."""
    STARTING = auto()
    HOLE = auto()
    """Lost, and nobody restarts it; ``on_replace`` fills it."""
    RELEASED = auto()
    """Stopped by its owner; whatever is heard of it later changes nothing."""


@dataclass(frozen=True, slots=True)
class StopRank:
    """Command: end the process of ``rank``; report ``on_ended`` (or ``on_failed``) once it has ended."""

    rank: int


@dataclass(frozen=True, slots=True)
class StartRank:
    """Command: start ``rank`` again; report ``on_started``, or ``on_failed``."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Command: ``rank`` is a hole from now on; the failure goes up the tree."""

    rank: int
    num_restarts: int
    """Restarts of the mesh in the window that ends now."""


Command = StopRank | StartRank | GiveUp


class _Event(Enum):
    FAILED = auto()
    SCOPE_FAILED = auto()
    ENDED = auto()
    DUE = auto()
    STARTED = auto()
    GIVEN_UP = auto()
    FILLED = auto()
    FILLED_EARLY = auto()
    """The process that was given up has not ended yet."""
    FORCED = auto()
    RELEASED = auto()


_UP, _STOPPING, _WAITING = RankState.UP, RankState.STOPPING, RankState.WAITING
_STARTING, _HOLE, _RELEASED = RankState.STARTING, RankState.HOLE, RankState.RELEASED
# What is missing is illegal. A hole hears late of the process that it lost; RELEASED takes anything and is not listed.
_NEXT: Final[dict[_Event, dict[RankState, RankState]]] = {
    _Event.FAILED: {_UP: _WAITING, _STARTING: _WAITING, _STOPPING: _WAITING, _WAITING: _WAITING, _HOLE: _HOLE},
    _Event.SCOPE_FAILED: {_UP: _STOPPING, _STARTING: _STOPPING, _STOPPING: _STOPPING, _WAITING: _WAITING},
    _Event.ENDED: {_STOPPING: _WAITING, _HOLE: _HOLE},
    _Event.DUE: {_WAITING: _STARTING},
    _Event.STARTED: {_STARTING: _UP, _STOPPING: _STOPPING, _HOLE: _HOLE},
    _Event.GIVEN_UP: {_STOPPING: _HOLE, _WAITING: _HOLE, _STARTING: _HOLE},
    _Event.FILLED: {_HOLE: _WAITING},
    _Event.FILLED_EARLY: {_HOLE: _STOPPING},
    _Event.FORCED: {_UP: _STOPPING},
    _Event.RELEASED: dict.fromkeys(RankState, _RELEASED),
}


@dataclass(slots=True)
class _Incident:
    """Ranks that start together, not before ``due_s``."""

    ranks: set[int]
    due_s: float


class RestartTracker:
    """The ranks of one mesh under one policy; without a policy each failure leaves a hole.

    Every event returns the commands that follow from it, in the order in which to carry them out. An illegal event
    raises RuntimeError, a rank that the mesh does not have IndexError, and neither changes anything.
    """

    def __init__(self, policy: Restart | None, num_ranks: int) -> None:
        self.policy = policy
        self._states = [_UP] * num_ranks
        self._incarnations = [0] * num_ranks
        self._incidents: list[_Incident] = []
        self._restarted_at: deque[float] = deque()
        # Told to stop, and not heard of since.
        self._ending: set[int] = set()

    @property
    def num_ranks(self) -> int:
        """Ranks of the mesh, whatever their state."""
        return len(self._states)

    def state(self, rank: int) -> RankState:
        """Where ``rank`` is."""
        if not 0 <= rank < len(self._states):
            raise IndexError(f"rank {rank}: this mesh has ranks 0 to {len(self._states) - 1}")
        return self._states[rank]

    def incarnation(self, rank: int) -> int:
        """How many times ``rank`` has been started again."""
        self.state(rank)
        return self._incarnations[rank]

    def num_restarts(self, now_s: float) -> int:
        """Restarts that count towards the limit at ``now_s``."""
        if self.policy is not None:
            while self._restarted_at and now_s - self._restarted_at[0] >= self.policy.within_s:
                self._restarted_at.popleft()
        return len(self._restarted_at)

    def on_failed(self, rank: int, now_s: float, *, may_restart: bool = True) -> list[Command]:
        """The process (or actor) of ``rank`` is lost.

        A rank whose scope is being restarted already joins that restart, at no further count. With
        ``may_restart=False`` the rank becomes a hole, whatever the policy says; the others of its scope stay.
        """
        was_up = self.state(rank) in {_UP, _STARTING}
        self._states[rank] = self._next(rank, _Event.FAILED)
        self._ending.discard(rank)
        if self._states[rank] in {_HOLE, _RELEASED}:
            return []
        if not may_restart or (was_up and self.policy is None):
            return [*self._give_up([rank], now_s), *self.check(now_s)]
        return self._restart(rank, now_s) if was_up else self.check(now_s)

    def on_ended(self, rank: int, now_s: float) -> list[Command]:
        """``rank``, which was told to stop, has ended."""
        self._states[rank] = self._next(rank, _Event.ENDED)
        self._ending.discard(rank)
        return self.check(now_s)

    def skip_to(self, rank: int, incarnation: int) -> None:
        """The numbers below ``incarnation`` are used up: by processes that were announced and never started."""
        self._incarnations[rank] = max(self.incarnation(rank), incarnation)

    def on_started(self, rank: int) -> list[Command]:
        """``rank`` takes messages again; nothing follows if it has been told to stop meanwhile."""
        self._states[rank] = self._next(rank, _Event.STARTED)
        return []

    def on_released(self, rank: int) -> list[Command]:
        """The owner stopped ``rank``, which never starts again; who waited for its end starts at the next check."""
        self._states[rank] = self._next(rank, _Event.RELEASED)
        self._leave_incident(rank)
        return []

    def on_replace(self, rank: int, now_s: float, *, force: bool = False) -> list[Command]:
        """Someone asks for a new process at ``rank``, now and at no count; a restart that waits is brought forward.

        Raises:
            ValueError: The rank is up and ``force`` is not set, or its owner has stopped it.
        """
        state = self.state(rank)
        if state is _RELEASED:
            raise ValueError(f"replace({rank}): rank {rank} was stopped by its owner; spawn a new mesh")
        if state is _UP and not force:
            raise ValueError(f"replace({rank}): rank {rank} is up; replace({rank}, force=True) ends it first")
        if state is _UP:
            self._states[rank] = self._next(rank, _Event.FORCED)
            self._ending.add(rank)
            self._incidents.append(_Incident({rank}, now_s))
            return [StopRank(rank)]
        if state is _HOLE:
            event = _Event.FILLED_EARLY if rank in self._ending else _Event.FILLED
            self._states[rank] = self._next(rank, event)
            self._incidents.append(_Incident({rank}, now_s))
        for incident in self._incidents:
            if rank in incident.ranks:
                incident.due_s = min(incident.due_s, now_s)
        return self.check(now_s)

    def check(self, now_s: float) -> list[Command]:
        """Start what is due; call it at :meth:`next_check_s`."""
        commands: list[Command] = []
        for incident in [each for each in self._incidents if self._is_stopped(each) and each.due_s <= now_s]:
            self._incidents.remove(incident)
            commands += [self._start(rank) for rank in sorted(incident.ranks)]
        return commands

    def next_check_s(self) -> float | None:
        """When the next rank is due, in the past if it is due already; None while nothing waits for time to pass."""
        return min((each.due_s for each in self._incidents if self._is_stopped(each)), default=None)

    def _next(self, rank: int, event: _Event) -> RankState:
        state = self.state(rank)
        if state is _RELEASED:
            return _RELEASED
        if state not in _NEXT[event]:
            raise RuntimeError(f"rank {rank} is {state.name}: {event.name} is illegal there")
        return _NEXT[event][state]

    def _restart(self, failed: int, now_s: float) -> list[Command]:
        """Open an incident for ``failed`` and its scope, which takes over the ranks of those that it overlaps."""
        assert self.policy is not None
        scope = [rank for rank in self._scope(failed) if self._states[rank] not in {_HOLE, _RELEASED}]
        if self.num_restarts(now_s) >= self.policy.max_restarts:
            return self._give_up([rank for rank in scope if self._states[rank] is not _UP], now_s)
        self._restarted_at.append(now_s)
        incident = _Incident(set(scope), now_s + self.policy.backoff_before_s(len(self._restarted_at)))
        for other in [each for each in self._incidents if each.ranks & incident.ranks]:
            self._incidents.remove(other)
            incident.ranks |= other.ranks
            incident.due_s = max(incident.due_s, other.due_s)
        self._incidents.append(incident)
        to_stop = [rank for rank in scope if self._states[rank] in {_UP, _STARTING}]
        for rank in scope:
            self._states[rank] = self._next(rank, _Event.SCOPE_FAILED)
        self._ending.update(to_stop)
        return [*map(StopRank, to_stop), *self.check(now_s)]

    def _give_up(self, ranks: Iterable[int], now_s: float) -> list[Command]:
        num_restarts = self.num_restarts(now_s)
        commands: list[Command] = []
        for rank in ranks:
            if self._states[rank] is _STARTING:
                self._ending.add(rank)
                commands.append(StopRank(rank))
            self._states[rank] = self._next(rank, _Event.GIVEN_UP)
            self._leave_incident(rank)
            commands.append(GiveUp(rank, num_restarts))
        return commands

    def _start(self, rank: int) -> StartRank:
        self._states[rank] = self._next(rank, _Event.DUE)
        self._incarnations[rank] += 1
        return StartRank(rank, self._incarnations[rank])

    def _scope(self, failed: int) -> range:
        assert self.policy is not None
        if self.policy.scope == "rank":
            return range(failed, failed + 1)
        return range(0 if self.policy.scope == "mesh" else failed, len(self._states))

    def _is_stopped(self, incident: _Incident) -> bool:
        return all(self._states[rank] is _WAITING for rank in incident.ranks)

    def _leave_incident(self, rank: int) -> None:
        for incident in self._incidents:
            incident.ranks.discard(rank)
        self._incidents = [each for each in self._incidents if each.ranks]


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Restart({name}={value!r}): give one of {', '.join(map(repr, choices))}")


def _check_type(name: str, value: object, types: tuple[type, ...], wanted: str) -> None:
    # A bool is an int to Python, not to a reader.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"Restart({name}={value!r}): give {wanted}")
