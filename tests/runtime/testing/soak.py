"""The chaos soak: random messages to meshes of actors while random faults strike, compared with a model.

A seed determines meshes, messages and faults, round by round; not the moments at which processes run. To repeat one
round, give its seed as ``SEED:ROUND``.
"""

# Futures, streams and errors of every kind pass through here.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import os
import random
import select
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from danaus import ActorError, CallTimeoutError, FailureKind, ProcMesh, Restart, SupervisionError, testing, this_host
from danaus.runtime.context import local_proc

from .messages import MANY, WEIGHTS, Messages
from .model import MeshModel, Rule, Violation
from .subject import ENDPOINTS, POINTS, Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GONE_S: Final = 5.0
"""How long what ends may take."""

SCOPES: Final[tuple[Literal["rank", "rest", "mesh"], ...]] = ("rank", "rank", "rest", "mesh")
"""Scopes of restarts, as often as each is taken."""

KINDS: Final = {"kill": 3, "exit": 2, "raise": 3, "stop": 1, "hang": 1, "slow": 1}
"""Kinds of faults, and how often each is injected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """How long a soak goes on, and how large its rounds are.

    Attributes:
        seed: Determines everything; see :func:`parse_seed`.
        only_round: The one round to run, or None for all.
        num_faults: End after the round in which so many faults have struck...
        duration_s: ...or after this time, where it is given.
        limit_s: How long any call may take.
        num_messages: Messages of a round.
        bootstrap: Runs in every process of the meshes.
    """

    seed: int
    only_round: int | None = None
    num_faults: int = 1000
    duration_s: float | None = None
    limit_s: float = 20.0
    num_messages: int = 80
    bootstrap: Callable[[], object] | None = None


def parse_seed(text: str) -> tuple[int, int | None]:
    """Read ``SEED`` or ``SEED:ROUND``."""
    seed, _, number = text.partition(":")
    return int(seed), int(number) if number else None


@dataclass(slots=True)
class Report:
    """What a soak did and found."""

    seed: int
    rounds: int = 0
    restarts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)

    @property
    def rules(self) -> set[Rule]:
        """The rules that were broken."""
        return {violation.rule for violation in self.violations}

    def __str__(self) -> str:
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        checked = ", ".join(f"{kind} {count}" for kind, count in sorted(self.checked.items()))
        lines = [
            f"seed {self.seed}: {self.rounds} rounds, {self.restarts} processes started again",
            f"faults struck: {self.faults.total()} ({faults})",
            f"operations checked: {self.checked.total()} ({checked})",
            f"violations: {len(self.violations)}",
        ]
        return "\n".join([*lines, *(f"  {violation}" for violation in self.violations[:20])])


def run_soak(config: Config) -> Report:
    """Run rounds until enough faults have struck, the time is over, or a rule was broken."""
    report = Report(config.seed)
    end_s = None if config.duration_s is None else time.monotonic() + config.duration_s
    number = config.only_round or 0
    while True:
        before = set(local_proc().ports)
        Round(config, number, report).run()
        report.rounds += 1
        if not report.violations:
            report.violations += _leaks(before, number)
        number += 1
        is_over = report.faults.total() >= config.num_faults if end_s is None else time.monotonic() >= end_s
        if is_over or config.only_round is not None or report.violations:
            return report


def _leaks(ports_before: set[int], number: int) -> Iterator[Violation]:
    """What a round has left: replies awaited, shared memory on loan, files of its processes."""
    local = local_proc()

    def left() -> list[str]:
        pool = local.attachments._pool
        leases = pool.stats().leases if pool is not None else 0
        files = [name for name in os.listdir(local.directory) if name.startswith(("chaos", "below"))]
        found = [f"a reply awaited at port {port}" for port in set(local.ports) - ports_before] + files
        return [*found, f"{leases} leases"] if leases else found

    deadline_s = time.monotonic() + GONE_S
    while left() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    if left():
        yield Violation(Rule.LEFT_BEHIND, f"round {number}: {', '.join(left())}")


class Round(Messages):
    """One mesh, its faults, its messages, and what becomes of them."""

    def __init__(self, config: Config, number: int, report: Report) -> None:
        chance = random.Random(f"{config.seed}:{number}")
        super().__init__(chance, MeshModel(f"round {number}", chance.randint(2, 3)), limit_s=config.limit_s)
        self.config, self.number, self.report = config, number, report
        self.has_policy = chance.random() < 0.7
        self.scope: Literal["rank", "rest", "mesh"] = chance.choice(SCOPES)
        self.window = chance.choice((1, 4, 16, 64))
        self.injection: testing.Injection | None = None

    def run(self) -> None:
        """Spawn, strike, compare, stop."""
        self.procs = this_host().spawn_procs(
            {"rank": self.num_ranks},
            name=f"chaos{self.number}",
            restart=Restart(scope=self.scope, max_restarts=MANY) if self.has_policy else None,
            spares=self.chance.choice((0, 0, 1)) if self.has_policy else 0,
            bootstrap=self.config.bootstrap,
        )
        try:
            self._strike()
        finally:
            self._stop(self.procs)
        self.report.violations += self.model.check()
        self.report.checked += self.checked
        self.report.faults.update(str(fired.fault.kind) for fired in self._fired())
        self.report.faults["kill"] += len(self.killed)
        if self.has_policy:
            self.report.restarts += len(self._ended())

    def _strike(self) -> None:
        chance = self.chance
        mailbox = chance.choice((4, 32, None))
        self.is_bounded = mailbox is not None
        self.subjects = self.procs.spawn("subjects", Subject, **({"mailbox": mailbox} if self.is_bounded else {}))
        chaos = testing.Chaos(
            chance.getrandbits(32),
            ranks=self.num_ranks,
            endpoints=ENDPOINTS,
            points=POINTS,
            kinds=KINDS,
            max_nth=6,
            max_s=0.1,
            incarnation=chance.choice(("current", "every")),
        )
        self.injection = testing.inject(self.subjects, *chaos.take(chance.randint(4, 10)), timeout=self.limit_s)
        for _ in range(self.config.num_messages):
            self.send(chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
            while len(self.waiting) > self.window:
                self.collect(chance.randrange(len(self.waiting)))
            if self.report.violations:
                break
        while self.waiting:
            self.collect(0)
        self.injection.withdraw()
        for rank in range(self.num_ranks):
            if not self.report.violations:
                self._settle(rank)

    def _settle(self, rank: int) -> None:
        """No more faults: a rank with a policy answers again within the limit, one without says why it does not."""
        logs = self.model.ranks[rank].logs
        num_logs = len(logs)
        deadline_s = time.monotonic() + self.limit_s
        while len(logs) == num_logs and not self.report.violations:
            self.last += 1
            self.ask_state(self.last, rank, self.subjects.slice(rank=rank))
            self.collect(len(self.waiting) - 1)
            if not self.has_policy:
                return
            if time.monotonic() > deadline_s:
                self.violate(Rule.NO_RETURN, f"rank {rank} has not answered for {self.limit_s:g} s")

    def _stop(self, procs: ProcMesh) -> None:
        error = self.error(procs.stop(timeout=self.limit_s))
        if error is not None:
            self.violate(Rule.LEFT_BEHIND, f"stop of the mesh: {error!r:.300}")
        for pid in self.pids:
            if not _is_gone(pid):
                self.violate(Rule.LEFT_BEHIND, f"process {pid}")

    # what errors have to follow from:

    def violate(self, rule: Rule, text: str) -> None:
        self.report.violations.append(Violation(rule, f"round {self.number}: {text}"))

    def on_late(self, kind: str, number: int, sent_to: set[tuple[int, int]], error: Exception) -> None:
        """Late for a death that its caller has not heard of, or for no reason."""
        ended = sorted(sent_to & self._ended())
        rule = Rule.DEATH_MISSED if ended else Rule.NO_ANSWER
        to = f"{kind} {number} to {sorted(sent_to)} (rank, incarnation)"
        told = f"{error!r:.300}; faults: {self._fired_text()}; {self._state_text()}"
        self.violate(rule, f"{to}, of which {ended} had been ended: {told}")

    def explain(self, kind: str, number: int, error: Exception) -> None:
        """Every error has to follow from a fault that has struck."""
        if isinstance(error, CallTimeoutError):
            self.on_late(kind, number, self.now(range(self.num_ranks)), error)
        elif not self._is_explained(error) or (kind == "retry" and self.has_policy):
            self.violate(Rule.UNEXPLAINED, f"{kind} {number}: {error!r:.2000}; faults: {self._fired_text()}")

    def _is_explained(self, error: BaseException | None) -> bool:
        if isinstance(error, SupervisionError):
            failure = error.failure.root
            if failure.kind is FailureKind.ACTOR_ERROR:
                return "InjectedError" in failure.traceback
            return (failure.rank, failure.incarnation) in self._ended()
        if isinstance(error, ActorError):
            inner = error.exception
            return isinstance(inner, testing.InjectedError) or self._is_explained(inner)
        return False

    def _fired(self) -> list[testing.Fired]:
        return self.injection.fired if self.injection is not None else []

    def _ended(self) -> set[tuple[int, int]]:
        """Rank and incarnation of the processes that faults have ended."""
        ends = {testing.FaultKind.KILL, testing.FaultKind.EXIT}
        return self.killed | {(each.rank, each.incarnation) for each in self._fired() if each.fault.kind in ends}

    def _state_text(self) -> str:
        """What this process believes of the mesh, for whoever looks into a violation."""
        local, parts = local_proc(), []
        for proc in self.procs._proc_ids():
            link = local.links.get(proc)
            lanes = [lane for key, lane in local.lanes.items() if key[0] == proc]
            under_way = ", ".join(f"{lane.actor} {lane.account.under_way}+{len(lane.backlog)}" for lane in lanes)
            is_open = link is not None and link.is_open
            parts.append(f"{proc} open {is_open}, held {len(link._held) if link else 0}, under way: {under_way}")
        for key, owned in (*local.supervisor.procs.items(), *local.supervisor.actors.items()):
            states = [owned.tracker.state(rank).name for rank in range(self.num_ranks)]
            parts.append(f"{key}: {', '.join(states)}")
        return "; ".join(parts)

    def _fired_text(self) -> str:
        return "; ".join([*map(str, self._fired()), *(f"killed {each}" for each in sorted(self.killed))])


def _is_gone(pid: int) -> bool:
    """Whether a process ends within the limit."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], GONE_S)[0])
    finally:
        os.close(pidfd)
