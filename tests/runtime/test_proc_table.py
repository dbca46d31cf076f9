"""The table of a host's processes: every transition of the diagram, and the events that come at the wrong time."""

from __future__ import annotations

from signal import SIGKILL, SIGSEGV, SIGTERM
from typing import Any

import pytest

from danaus.runtime.failure import FailureKind, MeshFailure
from danaus.runtime.host.proc_table import (
    GRACE_S,
    TERM_S,
    AskStop,
    Command,
    Kill,
    MeshInfo,
    ProcState,
    ProcTable,
    TellGone,
    TellUp,
)

OWNER = "controller.0"
Dims = tuple[tuple[str, int], ...]


def info_of(mesh: str, name: str, owner: str, count: int, *, restartable: bool = False, dims: Dims = ()) -> MeshInfo:
    return MeshInfo(mesh, name, owner, dims, count, restartable=restartable)


def table_of(
    count: int, *, up: bool = False, owner: str = OWNER, mesh: str = "m", restartable: bool = False
) -> ProcTable:
    table = ProcTable("gpu7")
    info = info_of(mesh, "workers", owner, count, restartable=restartable)
    table.on_spawn(info, [f"{mesh}.{rank}" for rank in range(count)])
    for rank in range(count):
        if up:
            table.on_started(f"{mesh}.{rank}", 100 + rank)
            table.on_up(f"{mesh}.{rank}")
    return table


def end(table: ProcTable, proc: str, **how: Any) -> list[Command]:
    given: dict[str, Any] = {"exit_code": None, "signum": None, "log_tail": (), "now_s": 0.0}
    return table.on_exit(proc, **given | how)


def failure_in(commands: list[Command], *, to: str = OWNER) -> MeshFailure:
    [told] = [command for command in commands if isinstance(command, TellGone) and command.to == to]
    return told.failure


# starting


def test_a_spawned_process_is_starting_and_has_no_pid() -> None:
    table = table_of(2)

    assert [(record.proc, record.rank, record.state, record.pid) for record in table.procs.values()] == [
        ("m.0", 0, ProcState.STARTING, None),
        ("m.1", 1, ProcState.STARTING, None),
    ]


def test_the_owner_hears_of_a_process_that_is_up_without_asking() -> None:
    table = table_of(1)

    assert table.on_started("m.0", 100) == []
    assert table.on_up("m.0") == [TellUp(OWNER, "m.0")]


def test_a_process_may_be_up_before_its_start_is_known() -> None:
    table = table_of(1)

    assert table.on_up("m.0") == [TellUp(OWNER, "m.0")]
    assert table.on_started("m.0", 100) == []
    assert (table.procs["m.0"].state, table.procs["m.0"].pid) == (ProcState.UP, 100)


def test_being_up_is_told_once() -> None:
    table = table_of(1, up=True)

    assert table.on_up("m.0") == []


def test_a_start_of_an_unknown_process_raises_and_changes_nothing() -> None:
    table = table_of(1)

    with pytest.raises(KeyError):
        table.on_started("m.9", 100)

    assert list(table.procs) == ["m.0"]


def test_a_process_that_could_not_be_started_has_failed_with_the_reason() -> None:
    table = table_of(1)

    failure = failure_in(table.on_not_started("m.0", "no such interpreter", "Traceback ..."))

    assert failure == MeshFailure(
        kind=FailureKind.SPAWN_ERROR,
        mesh="workers",
        rank=0,
        host="gpu7",
        detail="no such interpreter",
        traceback="Traceback ...",
    )
    assert table.procs == {}


# watching


def test_who_watches_a_starting_process_hears_when_it_is_up_and_when_it_ends() -> None:
    table = table_of(1)
    assert table.on_watch("m.0", "a.0") == []

    assert table.on_up("m.0") == [TellUp("a.0", "m.0"), TellUp(OWNER, "m.0")]
    assert [command.to for command in end(table, "m.0", exit_code=1) if isinstance(command, TellGone)] == ["a.0", OWNER]


def test_who_watches_a_process_that_is_up_hears_it_at_once() -> None:
    assert table_of(1, up=True).on_watch("m.0", "a.0") == [TellUp("a.0", "m.0")]


def test_who_watches_a_process_that_has_ended_hears_how_at_once() -> None:
    table = table_of(1, up=True)
    failure = failure_in(end(table, "m.0", exit_code=3))

    assert table.on_watch("m.0", "a.0") == [TellGone("a.0", "m.0", failure)]
    assert table.on_watch("m.0", "a.0") == [TellGone("a.0", "m.0", failure)]


def test_a_watch_may_come_before_the_spawn() -> None:
    table = ProcTable("gpu7")
    assert table.on_watch("m.0", "a.0") == []

    table.on_spawn(info_of("m", "workers", OWNER, 1), ["m.0"])

    assert table.on_up("m.0") == [TellUp("a.0", "m.0"), TellUp(OWNER, "m.0")]


def test_watching_twice_is_told_once() -> None:
    table = table_of(1)
    table.on_watch("m.0", "a.0")
    table.on_watch("m.0", "a.0")

    assert table.on_up("m.0") == [TellUp("a.0", "m.0"), TellUp(OWNER, "m.0")]


def test_who_watches_a_process_that_is_told_to_stop_hears_of_its_end_alone() -> None:
    table = table_of(1, up=True)
    table.on_stop(["m.0"], now_s=0.0)

    assert table.on_watch("m.0", "a.0") == []
    assert failure_in(end(table, "m.0", exit_code=0), to="a.0").kind is FailureKind.STOPPED


def test_a_dead_watcher_is_told_nothing() -> None:
    table = table_of(2, up=True)
    table.on_watch("m.0", "m.1")
    end(table, "m.1", exit_code=0)

    assert [command.to for command in end(table, "m.0", exit_code=0) if isinstance(command, TellGone)] == [OWNER]


# ending by itself


def test_an_exit_is_reported_with_code_pid_and_last_lines() -> None:
    table = table_of(3, up=True)

    failure = failure_in(end(table, "m.2", exit_code=3, log_tail=["one", "two"]))

    assert failure == MeshFailure(
        kind=FailureKind.EXITED,
        mesh="workers",
        rank=2,
        host="gpu7",
        pid=102,
        exit_code=3,
        log_tail=("one", "two"),
    )
    assert sorted(table.procs) == ["m.0", "m.1"]


def test_a_signal_is_reported_by_its_number() -> None:
    failure = failure_in(end(table_of(1, up=True), "m.0", signum=SIGSEGV, log_tail=["x"]))

    assert (failure.kind, failure.signum, failure.exit_code) == (FailureKind.KILLED, SIGSEGV, None)
    assert failure.log_tail == ("x",)


def test_the_reason_that_a_process_gave_wins_over_its_exit_code() -> None:
    table = table_of(1)
    table.on_started("m.0", 100)
    table.on_failing("m.0", FailureKind.BOOTSTRAP_ERROR, "Traceback ...\nValueError: no")

    failure = failure_in(end(table, "m.0", exit_code=1, log_tail=["x"]))

    assert (failure.kind, failure.traceback) == (FailureKind.BOOTSTRAP_ERROR, "Traceback ...\nValueError: no")
    assert (failure.exit_code, failure.log_tail) == (None, ("x",))


def test_the_reason_that_a_process_gave_wins_over_its_signal() -> None:
    table = table_of(1, up=True)
    table.on_failing("m.0", FailureKind.ACTOR_ERROR, "why")

    assert failure_in(end(table, "m.0", signum=SIGKILL)).kind is FailureKind.ACTOR_ERROR


def test_a_process_may_end_while_it_starts() -> None:
    table = table_of(1)
    table.on_started("m.0", 100)

    failure = failure_in(end(table, "m.0", signum=SIGKILL))

    assert (failure.kind, failure.pid) == (FailureKind.KILLED, 100)
    assert table.procs == {}


def test_an_end_is_told_once() -> None:
    table = table_of(1, up=True)
    first = failure_in(end(table, "m.0", exit_code=3))

    assert end(table, "m.0", signum=SIGKILL) == []
    assert table.gone == {"m.0": first}


def test_what_comes_after_the_end_is_ignored() -> None:
    table = table_of(1, up=True)
    end(table, "m.0", exit_code=0)

    table.on_failing("m.0", FailureKind.ACTOR_ERROR, "late")

    assert table.on_up("m.0") == []
    assert table.on_not_started("m.0", "late") == []
    assert table.on_stop(["m.0"], now_s=0.0) == []
    assert table.gone["m.0"].kind is FailureKind.EXITED


# stopping


def test_a_process_that_is_up_is_asked_to_stop() -> None:
    table = table_of(2, up=True)

    assert table.on_stop(["m.1", "m.0", "unknown.0"], now_s=0.0) == [AskStop("m.1"), AskStop("m.0")]
    assert {record.state for record in table.procs.values()} == {ProcState.STOPPING}


def test_a_process_that_was_stopped_is_reported_as_stopped_however_it_ended() -> None:
    for how in ({"exit_code": 0}, {"exit_code": 1}, {"signum": SIGKILL}):
        table = table_of(1, up=True)
        table.on_stop(["m.0"], now_s=0.0)

        failure = failure_in(end(table, "m.0", **how))

        assert (failure.kind, failure.exit_code, failure.signum) == (FailureKind.STOPPED, None, None)


def test_a_starting_process_that_exists_is_terminated() -> None:
    table = table_of(1)
    table.on_started("m.0", 100)

    assert table.on_stop(["m.0"], now_s=0.0) == [Kill("m.0", 100, SIGTERM)]


def test_a_process_stopped_before_it_exists_is_terminated_once_it_does() -> None:
    table = table_of(1)
    assert table.on_stop(["m.0"], now_s=0.0) == []
    assert table.next_check_s() is None

    assert table.on_started("m.0", 100) == [Kill("m.0", 100, SIGTERM)]
    assert table.next_check_s() == GRACE_S


def test_a_process_that_comes_up_after_the_stop_is_asked_then_and_told_to_nobody() -> None:
    table = table_of(1)
    table.on_stop(["m.0"], now_s=0.0)

    assert table.on_up("m.0") == [AskStop("m.0")]
    assert table.procs["m.0"].state is ProcState.STOPPING


def test_a_process_that_cannot_be_started_after_the_stop_has_been_stopped() -> None:
    table = table_of(1)
    table.on_stop(["m.0"], now_s=0.0)

    assert failure_in(table.on_not_started("m.0", "why")).kind is FailureKind.STOPPED
    assert table.procs == {}


def test_stopping_twice_asks_once_and_never_postpones() -> None:
    table = table_of(1, up=True)
    table.on_stop(["m.0"], now_s=10.0)

    assert table.on_stop(["m.0"], now_s=12.0) == []
    assert table.next_check_s() == 10.0 + GRACE_S


def test_a_second_stop_may_shorten_the_grace() -> None:
    table = table_of(1, up=True)
    table.on_stop(["m.0"], now_s=10.0)
    table.on_stop(["m.0"], now_s=11.0, grace_s=0.5)

    assert table.check(now_s=11.4) == []
    assert table.check(now_s=11.5) == [Kill("m.0", 100, SIGTERM)]


def test_a_late_process_gets_sigterm_and_then_sigkill_until_it_is_gone() -> None:
    table = table_of(1, up=True)
    table.on_stop(["m.0"], now_s=10.0)
    times = [10.0, 10.0 + GRACE_S - 0.1]
    assert [table.check(now_s=now_s) for now_s in times] == [[], []]

    term_s = 10.0 + GRACE_S
    assert table.check(now_s=term_s) == [Kill("m.0", 100, SIGTERM)]
    assert table.check(now_s=term_s) == []
    assert table.next_check_s() == term_s + TERM_S
    assert table.check(now_s=term_s + TERM_S) == [Kill("m.0", 100, SIGKILL)]
    assert table.check(now_s=term_s + 2 * TERM_S) == [Kill("m.0", 100, SIGKILL)]

    end(table, "m.0", signum=SIGKILL)
    assert table.check(now_s=1e9) == []
    assert table.next_check_s() is None


def test_a_process_in_time_gets_no_signal() -> None:
    table = table_of(2, up=True)
    table.on_stop(["m.0"], now_s=0.0)
    end(table, "m.0", exit_code=0)

    assert table.check(now_s=1e9) == []


def test_the_next_check_is_the_earliest_of_those_that_stop() -> None:
    table = table_of(3, up=True)
    assert table.next_check_s() is None

    table.on_stop(["m.0"], now_s=5.0)
    table.on_stop(["m.1"], now_s=3.0)

    assert table.next_check_s() == 3.0 + GRACE_S


# ownership


def test_what_a_dead_process_owned_is_stopped() -> None:
    table = table_of(2, up=True)
    table.on_spawn(info_of("child", "children", "m.0", 2), ["child.0", "child.1"])
    table.on_started("child.0", 200)
    table.on_up("child.0")
    table.on_started("child.1", 201)

    commands = end(table, "m.0", signum=SIGKILL, now_s=50.0)

    assert commands[1:] == [AskStop("child.0"), Kill("child.1", 201, SIGTERM)]
    assert table.procs["m.1"].state is ProcState.UP
    assert table.next_check_s() == 50.0 + GRACE_S


def test_a_stopped_process_takes_what_it_owned_with_it() -> None:
    table = table_of(1, up=True)
    table.on_spawn(info_of("child", "children", "m.0", 1), ["child.0"])
    table.on_up("child.0")
    table.on_stop(["m.0"], now_s=0.0)

    assert AskStop("child.0") in end(table, "m.0", exit_code=0)


def test_the_death_of_an_owner_reaches_its_grandchildren_one_by_one() -> None:
    table = table_of(1, up=True)
    table.on_spawn(info_of("child", "children", "m.0", 1), ["child.0"])
    table.on_spawn(info_of("grandchild", "grandchildren", "child.0", 1), ["grandchild.0"])
    for proc in ("child.0", "grandchild.0"):
        table.on_started(proc, 300)
        table.on_up(proc)

    assert AskStop("child.0") in end(table, "m.0", exit_code=0)
    assert table.procs["grandchild.0"].state is ProcState.UP
    assert AskStop("grandchild.0") in end(table, "child.0", exit_code=0)


def test_the_end_of_the_controller_stops_only_what_it_owned() -> None:
    table = table_of(2, up=True)
    table.on_spawn(info_of("child", "children", "m.0", 1), ["child.0"])

    assert table.on_owner_gone(OWNER, now_s=0.0) == [AskStop("m.0"), AskStop("m.1")]


def test_a_kill_for_want_of_memory_is_called_that_and_says_whose_limit_it_was() -> None:
    table = table_of(1, up=True)

    table.on_exit("m.0", exit_code=None, signum=9, log_tail=["x"], now_s=1.0, out_of_memory="cgroup /job may use 1 GiB")

    failure = table.gone["m.0"]
    assert (failure.kind, failure.signum, failure.detail) == (FailureKind.OUT_OF_MEMORY, 9, "cgroup /job may use 1 GiB")
    assert failure.log_tail == ("x",)
