"""Decides what a daemon does about the jobs that attach to it.

Pure: no socket, process or clock in this file. The daemon passes in requests, what its children did and the time, and
carries out the returned commands. Per (job, slot) there is one agent at most:

    STARTING --up--> UP --detach, shutdown, a newer incarnation--> ENDING --exit--> gone, or the newer one STARTING
        `--no answer, or a wrong one: ENDING
"""

from __future__ import annotations

import hmac
import signal
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from .daemon_protocol import Attach

MAX_JOBS: Final = 64
START_LIMIT_S: Final = 60.0
"""Python on a cold, busy file system takes its time."""
END_LIMIT_S: Final = 7.0
_MAX_WAITING: Final = 16
"""Unanswered requests per agent."""

ENDING: Final = "this daemon is ending"


class Key(NamedTuple):
    """Which agent."""

    job: str
    slot: int


class Asker(NamedTuple):
    """Whose request, and which."""

    caller: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Start:
    """Command: start the agent that ``attach`` asks for."""

    key: Key
    attach: Attach


@dataclass(frozen=True, slots=True)
class Signal:
    """Command: send a signal to an agent."""

    key: Key
    signum: int


@dataclass(frozen=True, slots=True)
class Send:
    """Command: send a message to a caller."""

    caller: bytes
    message: list[Any]


Command: TypeAlias = Start | Signal | Send


class JobState(Enum):
    """Of one agent."""

    STARTING = "starting"
    UP = "up"
    ENDING = "ending"


@dataclass(slots=True)
class _Agent:
    attach: Attach
    owner: bytes
    deadline_s: float | None
    state: JobState = JobState.STARTING
    reply: dict[str, Any] = field(default_factory=dict[str, Any])
    reason: str = "its agent ended before it was up: the daemon's standard error says why"
    waiting: list[Asker] = field(default_factory=list[Asker])
    following: Attach | None = None
    follower: Asker | None = None


class JobTable:
    """The agents of one daemon.

    Args:
        reply: What every ``attached`` answer says besides the agent's own part: host, versions.
        drain_s: How long an agent may take to end after SIGTERM.
        max_jobs: More agents are refused.
    """

    def __init__(self, reply: dict[str, Any], *, drain_s: float, max_jobs: int = MAX_JOBS) -> None:
        self._reply, self._drain_s, self._max_jobs = reply, drain_s, max_jobs
        self._agents: dict[Key, _Agent] = {}
        self._detaching: list[tuple[Asker, str]] = []
        self._is_ending = False

    @property
    def is_over(self) -> bool:
        """Whether the daemon may end."""
        return self._is_ending and not self._agents

    def state(self, key: Key) -> JobState | None:
        """Return an agent's state, None where there is none."""
        agent = self._agents.get(key)
        return None if agent is None else agent.state

    # requests:

    def on_attach(self, asker: Asker, attach: Attach, *, now_s: float) -> list[Command]:
        """A caller wants an agent; asking for the one that runs is answered again, and makes the caller its owner."""
        if self._is_ending:
            return [_refuse(asker, ENDING)]
        key = Key(attach.job, attach.slot)
        agent = self._agents.get(key)
        if agent is None:
            if len(self._agents) >= self._max_jobs:
                return [_refuse(asker, f"this daemon runs {self._max_jobs} jobs' agents already; detach one first")]
            return self._start(key, asker, attach, now_s=now_s)
        newest = agent.following or agent.attach
        if attach.incarnation > newest.incarnation:
            return self._replace(key, agent, asker, attach, now_s=now_s)
        return self._join(agent, asker, attach, newest)

    def _start(self, key: Key, asker: Asker, attach: Attach, *, now_s: float) -> list[Command]:
        self._agents[key] = _Agent(attach, asker.caller, now_s + START_LIMIT_S, waiting=[asker])
        return [Start(key, attach)]

    def _replace(self, key: Key, agent: _Agent, asker: Asker, attach: Attach, *, now_s: float) -> list[Command]:
        commands: list[Command] = []
        if agent.follower is not None:
            commands.append(_refuse(agent.follower, f"incarnation {attach.incarnation} has taken its place"))
        agent.following, agent.follower = attach, asker
        return commands + self._end(key, agent, signal.SIGINT, "a newer incarnation has taken its place", now_s=now_s)

    def _join(self, agent: _Agent, asker: Asker, attach: Attach, newest: Attach) -> list[Command]:
        if attach.incarnation < newest.incarnation or not hmac.compare_digest(attach.secret, newest.secret):
            return [
                _refuse(asker, f"slot {attach.slot} of job {attach.job} runs incarnation {newest.incarnation} already")
            ]
        if agent.following is not None:
            stale, agent.follower = agent.follower, asker
            return [] if stale is None else [_refuse(stale, "asked again meanwhile")]
        if agent.state is JobState.ENDING:
            return [_refuse(asker, "that agent is ending; attach with a higher incarnation")]
        if agent.state is JobState.STARTING:
            if len(agent.waiting) >= _MAX_WAITING:
                return [_refuse(asker, "asked too often while it starts")]
            agent.waiting.append(asker)
            agent.owner = asker.caller
            return []
        agent.owner = asker.caller
        return [Send(asker.caller, ["attached", asker.number, agent.reply])]

    def on_detach(self, asker: Asker, job: str, *, now_s: float) -> list[Command]:
        """A job is over on this host."""
        if len(self._detaching) >= _MAX_WAITING * self._max_jobs:
            return [_refuse(asker, "asked too often")]
        commands: list[Command] = []
        for key, agent in self._agents.items():
            if key.job == job:
                commands += self._drop_follower(agent, "the job was detached")
                commands += self._end(key, agent, signal.SIGINT, "the job was detached", now_s=now_s)
        self._detaching.append((asker, job))
        return commands + self._answer_detaching()

    def on_end(self, signum: int, *, now_s: float) -> list[Command]:
        """The daemon is to end: at once (SIGINT), or after its agents have drained (SIGTERM)."""
        self._is_ending = True
        commands: list[Command] = []
        for key, agent in self._agents.items():
            commands += self._drop_follower(agent, ENDING)
            commands += self._end(key, agent, signum, ENDING, now_s=now_s)
        return commands

    # what the children did:

    def on_up(self, key: Key, endpoint: str, pid: int) -> list[Command]:
        """An agent listens at ``endpoint``."""
        agent = self._agents[key]
        if agent.state is not JobState.STARTING:
            return []
        agent.state, agent.deadline_s = JobState.UP, None
        agent.reply = {"endpoint": endpoint, "pid": pid, **self._reply}
        waiting, agent.waiting = agent.waiting, []
        return [Send(asker.caller, ["attached", asker.number, agent.reply]) for asker in waiting]

    def on_not_started(self, key: Key, reason: str, *, now_s: float) -> list[Command]:
        """An agent's process could not be made."""
        agent = self._agents[key]
        agent.state, agent.reason = JobState.ENDING, reason
        return self.on_exit(key, 0, now_s=now_s)

    def on_wrong(self, key: Key, reason: str, *, now_s: float) -> list[Command]:
        """An agent answered nonsense, or could not be told its settings."""
        agent = self._agents[key]
        if agent.state is not JobState.STARTING:
            return []
        return self._end(key, agent, signal.SIGKILL, reason, now_s=now_s)

    def on_exit(self, key: Key, code: int, *, now_s: float) -> list[Command]:
        """An agent has ended; its caller hears of it unless it never was up."""
        agent = self._agents.pop(key)
        how = f"{agent.reason} (code {code})" if agent.state is JobState.STARTING else agent.reason
        commands: list[Command] = [_refuse(asker, how) for asker in agent.waiting]
        if agent.reply:
            fields = {"job": key.job, "slot": key.slot, "incarnation": agent.attach.incarnation, "code": code}
            commands.append(Send(agent.owner, ["exited", fields]))
        if agent.following is not None and agent.follower is not None:
            commands += self._start(key, agent.follower, agent.following, now_s=now_s)
        return commands + self._answer_detaching()

    # time:

    def next_check_s(self) -> float | None:
        """Return when :meth:`check` has something to do."""
        return min((each.deadline_s for each in self._agents.values() if each.deadline_s is not None), default=None)

    def check(self, *, now_s: float) -> list[Command]:
        """Kill agents that took too long to start, or to end."""
        commands: list[Command] = []
        for key, agent in self._agents.items():
            if agent.deadline_s is not None and now_s >= agent.deadline_s:
                late = f"its agent was not up within {START_LIMIT_S:g} s"
                commands += self._end(key, agent, signal.SIGKILL, late, now_s=now_s)
        return commands

    def _end(self, key: Key, agent: _Agent, signum: int, reason: str, *, now_s: float) -> list[Command]:
        limit_s = self._drain_s + END_LIMIT_S if signum == signal.SIGTERM else END_LIMIT_S
        deadline_s = now_s + limit_s
        if agent.state is JobState.ENDING:
            if agent.deadline_s is not None:
                deadline_s = min(deadline_s, agent.deadline_s)
        else:
            agent.state, agent.reason = JobState.ENDING, reason
        # A kill is not repeated.
        agent.deadline_s = None if signum == signal.SIGKILL else deadline_s
        return [Signal(key, signum)]

    def _drop_follower(self, agent: _Agent, reason: str) -> list[Command]:
        follower, agent.follower, agent.following = agent.follower, None, None
        return [] if follower is None else [_refuse(follower, reason)]

    def _answer_detaching(self) -> list[Command]:
        jobs = {key.job for key in self._agents}
        done = [asker for asker, job in self._detaching if job not in jobs]
        self._detaching = [each for each in self._detaching if each[1] in jobs]
        return [Send(asker.caller, ["detached", asker.number, {}]) for asker in done]


def _refuse(asker: Asker, reason: str) -> Send:
    return Send(asker.caller, ["refused", asker.number, {"reason": reason}])
