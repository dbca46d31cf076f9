"""The table of a host's processes: ranks that are started again, spares, and any order of events."""

from __future__ import annotations

from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.address import incarnation_of, next_address, place_of
from danaus.runtime.failure import FailureKind, MeshFailure
from danaus.runtime.host.proc_table import (
    AskStop,
    Command,
    Kill,
    MeshInfo,
    ProcState,
    ProcTable,
    TellGone,
    TellReplaced,
    TellUp,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

OWNER = "controller.0"
DIMS = (("gpus", 2),)
POLICY = MeshInfo("m", "workers", OWNER, DIMS, 2, restartable=True)
NO_POLICY = MeshInfo("m", "workers", OWNER, DIMS, 2)
STUCK = MeshFailure(kind=FailureKind.STUCK, mesh="workers", rank=0, host="gpu7")
AGAIN = MeshFailure(kind=FailureKind.RESTARTED, mesh="workers", rank=0, host="gpu7", detail="with rank 1", cause=STUCK)


def table_of(info: MeshInfo, *, spares: int = 0) -> ProcTable:
    """A mesh of two ranks that are up, watched by ``a.0``."""
    table = ProcTable("gpu7")
    table.on_spawn(info, ["m.0", "m.1"])
    if spares:
        table.on_spawn(MeshInfo("m", "workers", OWNER, (), 2), [f"m.{2 + index}" for index in range(spares)])
    for pid, proc in enumerate(list(table.procs)):
        start(table, proc, pid=100 + pid)
    table.on_watch("m.0", "a.0")
    return table


def start(table: ProcTable, proc: str, *, pid: int) -> list[Command]:
    table.on_started(proc, pid)
    return table.on_up(proc)


def kill(table: ProcTable, proc: str, **how: Any) -> list[Command]:
    given: dict[str, Any] = {"exit_code": None, "signum": SIGKILL, "log_tail": (), "now_s": 0.0}
    return table.on_exit(proc, **given | how)


def told(commands: list[Command]) -> list[tuple[str, str, str | None]]:
    return [(command.to, command.proc, command.following) for command in commands if isinstance(command, TellGone)]


def heard_up(commands: list[Command]) -> list[str]:
    return [command.to for command in commands if isinstance(command, TellUp)]


def failure_in(commands: list[Command]) -> MeshFailure:
    [failure] = {id(c.failure): c.failure for c in commands if isinstance(c, TellGone)}.values()
    return failure


# following


def test_without_a_policy_nothing_follows() -> None:
    table = table_of(NO_POLICY)

    commands = kill(table, "m.0")

    assert told(commands) == [("a.0", "m.0", None), (OWNER, "m.0", None)]
    assert failure_in(commands).restarts is False
    assert list(table.procs) == ["m.1"]


def test_with_a_policy_the_next_incarnation_waits_for_its_owner_and_has_the_watchers() -> None:
    table = table_of(POLICY)

    commands = kill(table, "m.0")

    assert told(commands) == [("a.0", "m.0", "m.0~1"), (OWNER, "m.0", "m.0~1")]
    assert failure_in(commands).restarts is True
    record = table.procs["m.0~1"]
    assert (record.state, record.rank, record.pid) == (ProcState.PENDING, 0, None)
    assert record.watchers == {"a.0", OWNER}


def test_a_failure_says_the_incarnation_and_the_dimensions_of_the_mesh() -> None:
    table = table_of(POLICY)
    kill(table, "m.0")
    table.on_spawn(POLICY, ["m.0~1"])
    start(table, "m.0~1", pid=200)

    failure = failure_in(kill(table, "m.0~1"))

    assert (failure.incarnation, failure.pid, failure.dims, failure.rank) == (1, 200, DIMS, 0)


def test_a_pending_process_is_started_by_its_owners_order() -> None:
    table = table_of(POLICY)
    kill(table, "m.0")

    assert table.on_spawn(POLICY, ["m.0~1"]) == []
    assert table.procs["m.0~1"].state is ProcState.STARTING
    assert start(table, "m.0~1", pid=200) == [TellUp("a.0", "m.0~1"), TellUp(OWNER, "m.0~1")]


def test_a_pending_process_that_is_stopped_never_was() -> None:
    table = table_of(POLICY)
    kill(table, "m.0")

    commands = table.on_stop(["m.0~1"], now_s=0.0)

    assert told(commands) == [("a.0", "m.0~1", None), (OWNER, "m.0~1", None)]
    assert failure_in(commands).kind is FailureKind.STOPPED
    assert list(table.procs) == ["m.1"]


def test_an_order_that_comes_after_the_stop_starts_nothing() -> None:
    table = table_of(POLICY)
    kill(table, "m.0")
    table.on_stop(["m.0~1"], now_s=0.0)

    assert table.on_spawn(POLICY, ["m.0~1"]) == []
    assert "m.0~1" not in table.procs


def test_an_abandoned_process_is_gone_as_the_one_before_it() -> None:
    table = table_of(POLICY)
    first = failure_in(kill(table, "m.0", signum=SIGTERM))

    commands = table.on_abandon("m.0~1")

    assert told(commands) == [("a.0", "m.0~1", None), (OWNER, "m.0~1", None)]
    last = failure_in(commands)
    assert (last.signum, last.incarnation, last.restarts) == (SIGTERM, first.incarnation, False)
    assert list(table.procs) == ["m.1"]


@pytest.mark.parametrize("proc", ["m.0", "m.0~1", "unknown.0"])
def test_what_is_not_pending_cannot_be_abandoned(proc: str) -> None:
    table = table_of(POLICY)
    kill(table, "m.0")
    table.on_spawn(POLICY, ["m.0~1"])

    assert table.on_abandon(proc) == []
    assert table.procs["m.0~1"].state is ProcState.STARTING


def test_a_stopped_process_has_no_successor() -> None:
    table = table_of(POLICY)
    table.on_stop(["m.0"], now_s=0.0)

    assert told(kill(table, "m.0")) == [("a.0", "m.0", None), (OWNER, "m.0", None)]


def test_a_process_that_could_not_be_started_may_be_started_again() -> None:
    table = ProcTable("gpu7")
    table.on_spawn(POLICY, ["m.0"])

    assert told(table.on_not_started("m.0", "why")) == [(OWNER, "m.0", "m.0~1")]


def test_a_mesh_may_get_its_policy_later_and_lose_it() -> None:
    table = table_of(NO_POLICY)
    table.on_policy("m", restartable=True)
    assert told(kill(table, "m.0"))[0] == ("a.0", "m.0", "m.0~1")

    table.on_policy("m", restartable=False)

    assert told(kill(table, "m.1")) == [(OWNER, "m.1", None)]


def test_a_policy_of_another_mesh_changes_nothing() -> None:
    table = table_of(NO_POLICY)
    table.on_policy("other", restartable=True)

    assert told(kill(table, "m.0"))[0] == ("a.0", "m.0", None)


# watching what follows


def test_who_watches_a_process_that_another_follows_hears_of_both() -> None:
    table = table_of(POLICY)
    failure = failure_in(kill(table, "m.0"))

    assert table.on_watch("m.0", "b.0") == [TellGone("b.0", "m.0", failure, "m.0~1")]
    table.on_spawn(POLICY, ["m.0~1"])
    assert TellUp("b.0", "m.0~1") in start(table, "m.0~1", pid=200)
    assert table.on_watch("m.0", "c.0") == [TellGone("c.0", "m.0", failure, "m.0~1"), TellUp("c.0", "m.0~1")]


def test_who_watches_the_first_of_many_hears_of_each() -> None:
    table = table_of(POLICY)
    proc = "m.0"
    for pid in range(200, 203):
        kill(table, proc)
        proc = next_address(proc)
        table.on_spawn(POLICY, [proc])
        start(table, proc, pid=pid)

    commands = table.on_watch("m.0", "b.0")

    chain = [("b.0", "m.0", "m.0~1"), ("b.0", "m.0~1", "m.0~2"), ("b.0", "m.0~2", "m.0~3")]
    assert told(commands) == chain
    assert commands[-1] == TellUp("b.0", "m.0~3")


def test_who_watched_a_hole_hears_when_it_is_filled() -> None:
    table = table_of(NO_POLICY)
    kill(table, "m.0")
    table.on_watch("m.0", "late.0")

    commands = table.on_spawn(NO_POLICY, ["m.0~1"])

    assert commands == [TellReplaced(to, "m.0", "m.0~1") for to in ("a.0", OWNER, "late.0")]
    assert heard_up(start(table, "m.0~1", pid=200)) == ["a.0", OWNER, "late.0"]


def test_who_asks_for_a_filled_hole_by_its_old_address_hears_of_the_new_one() -> None:
    table = table_of(NO_POLICY)
    failure = failure_in(kill(table, "m.0"))
    table.on_spawn(NO_POLICY, ["m.0~1"])
    start(table, "m.0~1", pid=200)

    assert table.on_watch("m.0", "b.0") == [TellGone("b.0", "m.0", failure, "m.0~1"), TellUp("b.0", "m.0~1")]


def test_an_abandoned_rank_is_filled_by_the_incarnation_after_it() -> None:
    table = table_of(POLICY)
    kill(table, "m.0")
    table.on_abandon("m.0~1")

    assert table.on_spawn(POLICY, ["m.0~1"]) == []
    assert "m.0~1" not in table.procs
    assert table.on_spawn(POLICY, ["m.0~2"]) == [TellReplaced(to, "m.0~1", "m.0~2") for to in ("a.0", OWNER)]
    assert heard_up(start(table, "m.0~2", pid=200)) == ["a.0", OWNER]


def test_a_watch_may_come_before_the_order_to_fill_a_hole() -> None:
    table = table_of(NO_POLICY)
    kill(table, "m.1")
    table.on_watch("m.1~1", "early.0")

    table.on_spawn(NO_POLICY, ["m.1~1"])

    assert heard_up(start(table, "m.1~1", pid=200)) == [OWNER, "early.0"]


def test_a_dead_watcher_hears_nothing_of_what_follows() -> None:
    table = table_of(POLICY)
    table.on_watch("m.0", "m.1")
    kill(table, "m.0")
    kill(table, "m.1")

    table.on_spawn(POLICY, ["m.0~1"])

    assert heard_up(start(table, "m.0~1", pid=200)) == ["a.0", OWNER]


def test_what_was_kept_for_those_who_watch_a_hole_goes_with_its_mesh() -> None:
    table = table_of(NO_POLICY)
    kill(table, "m.0")

    table.on_mesh_over("m")

    assert table.on_spawn(NO_POLICY, ["m.0~1"]) == []


# ended to be started again


def test_a_process_to_be_restarted_is_asked_to_stop_and_its_end_says_why() -> None:
    table = table_of(POLICY)

    assert table.on_restart("m.0", AGAIN, now_s=0.0) == [AskStop("m.0", AGAIN)]
    commands = kill(table, "m.0", exit_code=0, signum=None)

    assert told(commands)[0] == ("a.0", "m.0", "m.0~1")
    failure = failure_in(commands)
    assert (failure.kind, failure.detail, failure.cause, failure.pid) == (AGAIN.kind, AGAIN.detail, STUCK, 100)


def test_a_process_to_be_restarted_that_was_not_yet_started_is_followed_all_the_same() -> None:
    table = ProcTable("gpu7")
    table.on_spawn(POLICY, ["m.0"])

    assert table.on_restart("m.0", AGAIN, now_s=0.0) == []
    commands = table.on_not_started("m.0", "")

    assert told(commands) == [(OWNER, "m.0", "m.0~1")]
    assert failure_in(commands).kind is FailureKind.RESTARTED


def test_a_process_to_be_restarted_that_is_stopped_after_all_is_stopped() -> None:
    table = table_of(POLICY)
    table.on_restart("m.0", AGAIN, now_s=0.0)

    assert table.on_stop(["m.0"], now_s=0.0) == []

    commands = kill(table, "m.0", exit_code=0, signum=None)
    assert told(commands)[0] == ("a.0", "m.0", None)
    assert failure_in(commands).kind is FailureKind.STOPPED


def test_a_stuck_process_is_killed_without_being_asked_for_long() -> None:
    table = table_of(POLICY)
    table.on_restart("m.0", STUCK, now_s=5.0)

    assert table.check(now_s=5.0) == [Kill("m.0", 100, SIGKILL)]
    assert failure_in(kill(table, "m.0")).kind is FailureKind.STUCK


@pytest.mark.parametrize("proc", ["m.0~1", "unknown.0"])
def test_what_does_not_run_cannot_be_restarted(proc: str) -> None:
    table = table_of(POLICY)
    kill(table, "m.0")

    assert table.on_restart(proc, AGAIN, now_s=0.0) == []


# spares


def test_nobody_hears_of_spares() -> None:
    table = table_of(POLICY, spares=1)
    assert table.find_spare("m") == "m.2"

    commands = kill(table, "m.2")

    assert told(commands) == []
    assert table.find_spare("m") is None
    assert list(table.procs) == ["m.0", "m.1"]


def test_a_spare_that_is_not_up_is_none() -> None:
    table = ProcTable("gpu7")
    table.on_spawn(POLICY, ["m.0", "m.1", "m.2"])

    assert table.find_spare("m") is None
    start(table, "m.2", pid=100)
    assert table.find_spare("other") is None
    assert table.find_spare("m") == "m.2"
    table.on_stop(["m.2"], now_s=0.0)
    assert table.find_spare("m") is None


def test_an_adopted_spare_is_the_rank_and_says_so_itself() -> None:
    table = table_of(POLICY, spares=1)
    kill(table, "m.0")
    table.on_spawn(POLICY, ["m.0~1"])

    table.on_adopt("m.2", "m.0~1")

    record = table.procs["m.0~1"]
    assert (record.pid, record.rank, record.state) == (102, 0, ProcState.STARTING)
    assert table.on_up("m.0~1") == [TellUp("a.0", "m.0~1"), TellUp(OWNER, "m.0~1")]
    assert "m.2" not in table.procs


def test_an_adopted_spare_that_ends_may_be_followed_like_any_rank() -> None:
    table = table_of(POLICY, spares=1)
    kill(table, "m.0")
    table.on_spawn(POLICY, ["m.0~1"])
    table.on_adopt("m.2", "m.0~1")
    table.on_up("m.0~1")

    commands = kill(table, "m.0~1")

    assert told(commands)[0] == ("a.0", "m.0~1", "m.0~2")
    assert failure_in(commands).dims == DIMS


# any order of events

NAMES = ["started", "up", "watch", "failing", "not_started", "exit", "stop", "owner_gone", "check"]
RESTARTS = ["spawn", "abandon", "restart", "policy", "no_policy", "adopt"]
EVENTS = st.tuples(st.sampled_from([*NAMES, *RESTARTS]), st.sampled_from(["m.0", "m.1", "m.2", "child.0"]))


class Life:
    """A table under events at a place, whichever incarnation is there; keeps what was told."""

    def __init__(self) -> None:
        self.table = ProcTable("gpu7")
        self.infos = {"m": POLICY, "child": MeshInfo("child", "children", "m.0", (), 1, restartable=True)}
        self.table.on_spawn(POLICY, ["m.0", "m.1", "m.2"])
        self.table.on_spawn(self.infos["child"], ["child.0"])
        self.pids = iter(range(100, 1000))
        self.now_s = 0.0
        self.ended: list[str] = []
        self.told: list[tuple[str, str]] = []

    def current(self, place: str) -> str:
        living = [proc for proc in self.table.procs if place_of(proc) == place]
        assert len(living) <= 1
        past = [proc for proc in self.table.gone if place_of(proc) == place]
        return living[0] if living else max(past, key=incarnation_of)

    def happen(self, event: str, place: str) -> None:
        self.now_s += 1.0
        proc = self.current(place)
        before = set(self.table.procs)
        commands = self._events(proc)[event]() or []
        # A spare that was adopted has not ended.
        self.ended += [each for each in before - set(self.table.procs) if each in self.table.gone]
        if event != "watch":
            self.told += [(each.to, each.proc) for each in commands if isinstance(each, TellGone)]
        for command in commands:
            if isinstance(command, Kill):
                assert self.table.procs[command.proc].pid == command.pid
                assert self.table.procs[command.proc].state is ProcState.STOPPING

    def _events(self, proc: str) -> dict[str, Callable[[], list[Command] | None]]:
        table, now_s = self.table, self.now_s
        return {
            "started": lambda: self._start(proc),
            "up": lambda: table.on_up(proc) if self._runs(proc) else [],
            "watch": lambda: table.on_watch(proc, "watcher.0"),
            "failing": lambda: table.on_failing(proc, FailureKind.ACTOR_ERROR, "why"),
            "not_started": lambda: table.on_not_started(proc, "why") if not self._runs(proc) else [],
            "exit": lambda: kill(table, proc, now_s=now_s) if self._runs(proc) else [],
            "stop": lambda: table.on_stop([proc], now_s=now_s),
            "owner_gone": lambda: table.on_owner_gone(proc, now_s=now_s),
            "check": lambda: table.check(now_s=now_s),
            "spawn": lambda: self._spawn(proc),
            "abandon": lambda: table.on_abandon(proc),
            "restart": lambda: table.on_restart(proc, AGAIN, now_s=now_s),
            "policy": lambda: table.on_policy("m", restartable=True),
            "no_policy": lambda: table.on_policy("m", restartable=False),
            "adopt": lambda: self._adopt(proc),
        }

    def _runs(self, proc: str) -> bool:
        return proc in self.table.procs and self.table.procs[proc].pid is not None

    def _start(self, proc: str) -> list[Command]:
        record = self.table.procs.get(proc)
        may_start = record is not None and record.pid is None and record.state is not ProcState.PENDING
        return self.table.on_started(proc, next(self.pids)) if may_start else []

    def _spawn(self, proc: str) -> list[Command]:
        record = self.table.procs.get(proc)
        if record is None:
            return self.table.on_spawn(self.infos[proc.partition(".")[0]], [next_address(proc)])
        return self.table.on_spawn(record.info, [proc]) if record.state is ProcState.PENDING else []

    def _adopt(self, proc: str) -> None:
        spare, record = self.table.find_spare("m"), self.table.procs.get(proc)
        is_waiting = record is not None and record.state is ProcState.STARTING and record.pid is None
        if spare is not None and is_waiting and incarnation_of(proc) and place_of(proc) != place_of(spare):
            self.table.on_adopt(spare, proc)
            # The agent starts another at once.
            self.table.on_spawn(MeshInfo("m", "workers", OWNER, (), 2), [next_address(spare)])


@UNHURRIED
@given(st.lists(EVENTS, max_size=60))
def test_in_any_order_of_events_each_process_ends_once_and_each_owner_hears_of_it(
    events: list[tuple[str, str]],
) -> None:
    life = Life()
    for event, place in events:
        life.happen(event, place)

    table = life.table
    assert sorted(life.ended) == sorted(table.gone)
    assert not set(table.procs) & set(table.gone)
    assert len(set(life.told)) == len(life.told)
    for proc in table.gone:
        owner = "m.0" if place_of(proc) == "child.0" else OWNER
        is_spare = place_of(proc) == "m.2"
        assert (owner, proc) in life.told or is_spare or owner in table.gone
    for proc, record in table.procs.items():
        assert record.proc == proc
        assert record.state is not ProcState.PENDING or record.pid is None


@UNHURRIED
@given(st.lists(EVENTS, max_size=60))
def test_a_process_that_ends_is_followed_by_at_most_one(events: list[tuple[str, str]]) -> None:
    life = Life()
    for event, place in events:
        life.happen(event, place)

    for proc, failure in life.table.gone.items():
        if failure.restarts and place_of(proc) != "m.2":
            following = next_address(proc)
            assert following in life.table.procs or following in life.table.gone
