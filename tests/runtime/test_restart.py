"""Ranks that are lost and started again by policy: the same handles, the next incarnation. Every death is real."""

# Endpoints here take and return anything, and some calls are wrong on purpose.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pytest

from danaus import (
    Actor,
    ActorError,
    FailureKind,
    MeshFailure,
    ProcMesh,
    Restart,
    StoppedError,
    SupervisionError,
    checkpoint,
    context,
    endpoint,
    this_host,
    this_proc,
)
from danaus.runtime.context import local_proc

from .restarting import LIMIT_S, Counter, Events, kill, kill_agent, retried

if TYPE_CHECKING:
    from collections.abc import Iterator

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)


OFTEN = Restart(max_restarts=100)


def spawn(count: int = 2, *, restart: Restart | None = OFTEN, **options: Any) -> ProcMesh:
    return this_host().spawn_procs({"rank": count}, name="workers", restart=restart, **options)


def call(endpoint: Any, *args: Any, **kwargs: Any) -> Any:
    """The answer of one rank; a call that is on its way when the rank is lost fails, so it may take another."""
    return retried(lambda: endpoint.options(timeout=LIMIT_S).call_one(*args, **kwargs).get())


def call_all(endpoint: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """The answers of all ranks."""
    return retried(lambda: list(endpoint.options(timeout=LIMIT_S).call(*args, **kwargs).get()))


@pytest.fixture
def procs() -> Iterator[ProcMesh]:
    """Two ranks under a policy that does not run out."""
    with spawn() as mesh:
        yield mesh


# the handle, the arguments, the state


def test_the_same_handle_answers_as_the_next_incarnation_and_survivors_are_left_alone(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter, 5)
    before = call_all(counters.pid)
    call_all(counters.add, 1)

    kill(before[0])
    stories = call_all(counters.told)

    after = call_all(counters.pid)
    assert stories == [(["init"], 5, 1), (["init"], 6, 0)]
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)


def test_every_actor_of_the_process_is_made_again_with_its_own_arguments(procs: ProcMesh) -> None:
    first = procs.spawn("first", Counter, 1)
    second = procs.spawn("second", Counter, start=2)
    one = procs.slice(rank=1).spawn("one", Counter, 3)
    kill(call_all(first.pid)[1])

    assert call_all(first.told) == [(["init"], 1, 0), (["init"], 1, 1)]
    assert call_all(second.told) == [(["init"], 2, 0), (["init"], 2, 1)]
    assert call(one.told) == (["init"], 3, 1)


def test_large_arguments_are_there_for_every_incarnation(procs: ProcMesh) -> None:
    array = np.arange(1 << 19, dtype=np.float64)
    counters = procs.spawn("counters", Counter, 0, array)
    total = float(array.sum())
    array[:] = 0

    for _ in range(3):
        assert call_all(counters.total) == [total, total]
        kill(call_all(counters.pid)[0])

    assert call_all(counters.total) == [total, total]


def test_init_runs_and_then_restore_with_the_last_checkpoint(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter)
    call_all(counters.add, 1, keep=True)
    call_all(counters.add, 1, keep=True)
    call_all(counters.add, 40)

    kill(call_all(counters.pid)[0])

    assert call_all(counters.told) == [(["init", "restore 2"], 2, 1), (["init"], 42, 0)]


def test_a_checkpoint_serves_more_than_one_restart(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter)
    call_all(counters.add, 7, keep=True)

    for incarnation in (1, 2):
        kill(call_all(counters.pid)[1])
        assert call_all(counters.told)[1] == (["init", "restore 7"], 7, incarnation)


def test_a_checkpoint_that_cannot_be_pickled_is_refused_and_the_last_one_stays(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", KeepsALock)
    call_all(counters.keep_good, 3)

    with pytest.raises(ActorError, match="cannot be pickled") as told:
        call_all(counters.keep_bad)
    assert isinstance(told.value.exception, TypeError)
    kill(call_all(counters.pid)[0])

    assert call_all(counters.restored) == [3, None]


class KeepsALock(Actor):
    def __init__(self) -> None:
        self.state: Any = None

    def restore(self, state: Any) -> None:
        self.state = state

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def keep_good(self, state: Any) -> None:
        checkpoint(state)

    @endpoint
    def keep_bad(self) -> None:
        checkpoint({"lock": threading.Lock()})

    @endpoint
    def restored(self) -> Any:
        return self.state


def test_a_checkpoint_with_a_path_is_on_disk_as_well(procs: ProcMesh, tmp_path: Path) -> None:
    counters = procs.spawn("counters", Counter)
    call_all(counters.add, 5, keep=True, path=str(tmp_path))

    files = sorted(tmp_path.iterdir())
    assert [pickle.loads(file.read_bytes()) for file in files] == [5, 5]
    kill(call_all(counters.pid)[0])
    assert call_all(counters.told)[0] == (["init", "restore 5"], 5, 1)


def test_a_state_larger_than_an_agent_keeps_needs_a_path(tmp_path: Path) -> None:
    with spawn(1, bootstrap=keep_little) as procs:
        counters = procs.spawn("counters", Counter)
        call(counters.keep, "small")
        with pytest.raises(ActorError, match="give a path="):
            call(counters.keep, "x" * (2 << 20))
        kill(call(counters.pid))
        assert call(counters.told)[0] == ["init", "restore small"]

        large = "y" * (2 << 20)
        call(counters.keep, large, str(tmp_path))
        kill(call(counters.pid))
        assert call(counters.told)[1] == large


def keep_little() -> None:
    from danaus.runtime import keeping

    keeping.MAX_KEPT_BYTES = 1 << 20  # type: ignore[misc]


def test_a_path_that_cannot_be_written_is_an_error_and_what_was_kept_stays(procs: ProcMesh, tmp_path: Path) -> None:
    counters = procs.spawn("counters", Counter)
    call_all(counters.keep, 1)
    (tmp_path / "file").write_text("")

    with pytest.raises(ActorError) as told:
        call_all(counters.keep, 2, str(tmp_path / "file" / "folder"))

    assert isinstance(told.value.exception, OSError)
    kill(call_all(counters.pid)[0])
    assert call_all(counters.told)[0][1] == 1


def test_a_checkpoint_outside_of_an_actor_is_refused() -> None:
    with pytest.raises(RuntimeError, match="outside of an actor"):
        checkpoint(1)


# calls in flight, calls while it restarts


def test_a_call_in_flight_fails_and_says_that_the_rank_comes_back(procs: ProcMesh, tmp_path: Path) -> None:
    counters = procs.spawn("counters", Counter)
    pids = call_all(counters.pid)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    waiting = counters.slice(rank=0).wait_file.options(timeout=LIMIT_S).call_one(str(pipe))
    kill(pids[0])

    with pytest.raises(SupervisionError) as told:
        waiting.get()

    failure = told.value.failure
    assert (failure.restarts, failure.kind, failure.rank, failure.pid) == (True, FailureKind.KILLED, 0, pids[0])
    assert call_all(counters.told)[0][2] == 1


def test_calls_made_while_the_rank_is_away_wait_for_it_within_their_timeout() -> None:
    with spawn(1, restart=Restart(backoff_s=2.0, max_restarts=2)) as procs:
        counters = procs.spawn("counters", Counter)
        changes = Events()
        procs.on_change(changes)
        kill(call(counters.pid))
        changes.wait_states("lost")

        short = counters.told.options(timeout=0.1).call_one()
        long = counters.told.options(timeout=LIMIT_S).call_one()

        with pytest.raises(TimeoutError):
            short.get()
        assert long.get() == (["init"], 0, 1)


def test_messages_keep_their_order_across_the_wait(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Appender)
    changes = Events()
    procs.on_change(changes)
    kill(call_all(counters.pid)[0])
    changes.wait_states("lost")

    for number in range(50):
        counters.append.broadcast(number)

    assert call_all(counters.items)[0] == list(range(50))


class Appender(Actor):
    def __init__(self) -> None:
        self.all: list[int] = []

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def append(self, number: int) -> None:
        self.all.append(number)

    @endpoint
    def items(self) -> list[int]:
        return self.all


class Peer(Actor):
    """Calls another mesh through handles that it was given."""

    def __init__(self, handle: Any = None) -> None:
        self.handle = handle

    @endpoint
    def take(self, data: bytes) -> None:
        self.data = data

    @endpoint
    def ask(self) -> list[Any]:
        return call_all(self.handle.told)

    @endpoint
    def ask_late(self) -> list[Any]:
        """Use a handle for the first time that was pickled long ago."""
        return call_all(pickle.loads(self.data).told)


def test_a_handle_in_another_process_goes_on_with_the_next_incarnation(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter)
    with this_host().spawn_procs(name="elsewhere") as elsewhere:
        peer = elsewhere.spawn("peer", Peer, counters)
        assert [each[2] for each in call(peer.ask)] == [0, 0]
        for incarnation in (1, 2):
            kill(call_all(counters.pid)[0])
            assert call_all(counters.told)[0][2] == incarnation
            # The peer hears of it by itself, and calls again if it has to.
            assert [each[2] for each in call(peer.ask)] == [incarnation, 0]


def test_a_handle_pickled_before_a_death_works_when_first_used_after_it(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter)
    with this_host().spawn_procs(name="elsewhere") as elsewhere:
        peer = elsewhere.spawn("peer", Peer)
        call(peer.take, pickle.dumps(counters))
        for _ in range(3):
            kill(call_all(counters.pid)[1])
            call_all(counters.told)

        assert [each[2] for each in call(peer.ask_late)] == [0, 3]


# deaths at the wrong moment


def test_messages_for_a_process_that_dies_while_it_starts_reach_the_next(tmp_path: Path) -> None:
    marker = tmp_path / "once"
    with spawn(1, bootstrap=lambda: die_once(str(marker))) as procs:
        counters = procs.spawn("counters", Counter, 5)
        assert call(counters.told) == (["init"], 5, 1)


def test_messages_held_for_a_process_that_never_came_up_reach_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    local = local_proc()
    held = threading.Event()
    monkeypatch.setitem(local.on_event, "up", lambda fields: held.set() if fields["proc"].endswith(".0") else None)
    with spawn(1) as procs:
        counters = procs.spawn("counters", Counter, 5)
        answer = counters.told.options(timeout=LIMIT_S).call_one()
        assert held.wait(LIMIT_S)
        monkeypatch.undo()
        kill_descendant("workers")
        assert answer.get() == (["init"], 5, 1)


def kill_descendant(name: str) -> None:
    """Kill the process of this job whose name begins so."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().startswith(name):
                kill(int(comm.parent.name))
                return
    raise AssertionError(f"there is no process {name}")


def die_once(marker: str) -> None:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_killed_during_its_restart_is_started_once_more(procs: ProcMesh, tmp_path: Path) -> None:
    dying = procs.spawn("dying", DiesAtFirstRestart, str(tmp_path / "once"))
    kill(call_all(dying.pid)[0])

    assert call_all(dying.incarnation) == [2, 0]


class DiesAtFirstRestart(Actor):
    def __init__(self, marker: str) -> None:
        if context().actor_instance.incarnation:
            die_once(marker)

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def incarnation(self) -> int:
        return context().actor_instance.incarnation


def test_twenty_kills_in_a_row_are_each_repaired() -> None:
    chance = random.Random(3)
    with spawn(3) as procs:
        counters = procs.spawn("counters", Counter, 1)
        expected = [0, 0, 0]
        for _ in range(20):
            rank = chance.randrange(3)
            kill(call_all(counters.pid)[rank])
            expected[rank] += 1
            assert [each[2] for each in call_all(counters.told)] == expected


def test_ranks_killed_at_once_all_come_back() -> None:
    with spawn(4) as procs:
        counters = procs.spawn("counters", Counter, 1)
        for pid in call_all(counters.pid)[:3]:
            kill(pid)

        assert [each[2] for each in call_all(counters.told)] == [1, 1, 1, 0]


def test_the_host_agent_killed_takes_all_and_all_come_back_through_a_new_one(unhandled: list[MeshFailure]) -> None:
    with spawn(2) as procs, this_host().spawn_procs(name="plain") as plain:
        counters = procs.spawn("counters", Counter, 4)
        other = plain.spawn("other", Counter)
        call(other.pid)
        call_all(counters.pid)
        for _ in range(2):
            changes = Events()
            procs.on_change(changes)
            kill_agent()
            changes.wait(lambda seen: sum(change.state == "lost" for change in seen) == 2)
            assert [each[:2] for each in call_all(counters.told)] == [(["init"], 4)] * 2
        with pytest.raises(SupervisionError) as told:
            call(other.pid)
        assert told.value.failure.kind is FailureKind.HOST_LOST


def test_the_host_agent_killed_while_a_rank_waits_for_its_turn_loses_nothing() -> None:
    with spawn(1, restart=Restart(backoff_s=1.0, max_restarts=4)) as procs:
        counters = procs.spawn("counters", Counter, 4)
        changes = Events()
        procs.on_change(changes)
        kill(call(counters.pid))
        changes.wait_states("lost")
        kill_agent()

        assert call(counters.told)[:2] == (["init"], 4)


# scopes


def test_with_scope_mesh_all_ranks_start_again_together() -> None:
    with spawn(3, restart=Restart(scope="mesh")) as procs:
        counters = procs.spawn("counters", Counter, 1)
        before = call_all(counters.pid)
        changes = Events()
        procs.on_change(changes)
        kill(before[1])
        changes.wait(lambda seen: sum(change.state == "up" for change in seen) == 3)

        assert [each[2] for each in call_all(counters.told)] == [1, 1, 1]
        assert not set(before) & set(call_all(counters.pid))


def test_with_scope_rest_the_failed_rank_and_those_after_it_start_again() -> None:
    with spawn(3, restart=Restart(scope="rest")) as procs:
        counters = procs.spawn("counters", Counter, 1)
        before = call_all(counters.pid)
        changes = Events()
        procs.on_change(changes)
        kill(before[1])
        changes.wait(lambda seen: sum(change.state == "up" for change in seen) == 2)

        assert [each[2] for each in call_all(counters.told)] == [0, 1, 1]
        assert call_all(counters.pid)[0] == before[0]


def test_a_scope_of_actors_makes_the_others_again_where_they_are() -> None:
    with spawn(2, restart=None) as procs:
        counters = procs.spawn("counters", Counter, 1, restart=Restart(scope="mesh"))
        before = call_all(counters.pid)
        call_all(counters.add, 5)

        counters.slice(rank=0).fail.broadcast()

        assert call_until(counters, lambda told: [each[1:] for each in told] == [(1, 1), (1, 1)])
        assert call_all(counters.pid) == before


def call_until(counters: Any, condition: Any) -> bool:
    """Ask until ``condition`` holds: the failure is on its way to the owner meanwhile."""
    return any(condition(call_all(counters.told)) for _ in range(1000))


# limits


def test_past_its_limit_the_failure_goes_up_and_calls_say_that_nobody_restarts_it(
    unhandled: list[MeshFailure],
) -> None:
    with spawn(2, restart=Restart(max_restarts=1)) as procs:
        counters = procs.spawn("counters", Counter)
        changes = Events()
        procs.on_change(changes)
        kill(call_all(counters.pid)[0])
        kill(call_all(counters.pid)[0])
        [given_up] = [each for each in changes.wait_states("given up") if each.state == "given up"]

        with pytest.raises(SupervisionError) as told:
            call_all(counters.pid)

        assert told.value.failure.restarts is False
        assert told.value.failure.incarnation == 1
        assert (given_up.rank, given_up.failure.incarnation) == (0, 1)
        assert "1 restart" in given_up.failure.report()
        assert call(counters.slice(rank=1).told)[2] == 0


def test_what_nobody_handles_reaches_the_hook_once() -> None:
    import danaus

    events = Events()
    danaus.unhandled_fault_hook = events
    with spawn(2, restart=Restart(max_restarts=1)) as procs:
        counters = procs.spawn("counters", Counter)
        for incarnation in (0, 1):
            assert call_all(counters.told)[0][2] == incarnation
            kill(call_all(counters.pid)[0])

        [failure] = events.wait(lambda seen: len(seen) > 0)

        assert (failure.rank, failure.incarnation, failure.kind) == (0, 1, FailureKind.KILLED)


def test_a_given_up_rank_comes_back_by_hand(unhandled: list[MeshFailure]) -> None:
    with spawn(1, restart=Restart(max_restarts=1)) as procs:
        counters = procs.spawn("counters", Counter, 9)
        changes = Events()
        procs.on_change(changes)
        kill(call(counters.pid))
        kill(call(counters.pid))
        changes.wait_states("given up")

        procs.replace(0).get(LIMIT_S)

        assert call(counters.told)[:2] == (["init"], 9)


def test_a_restore_that_raises_is_a_failed_restart_and_ends_in_giving_up(unhandled: list[MeshFailure]) -> None:
    with spawn(1, restart=Restart(max_restarts=2)) as procs:
        broken = procs.spawn("broken", BadRestore)
        call(broken.keep)
        kill(call(broken.pid))

        with pytest.raises(SupervisionError) as told:
            call(broken.pid)

        failure = told.value.failure
        assert (failure.kind, failure.restarts) == (FailureKind.RESTORE_ERROR, False)
        assert "cannot take it back" in failure.traceback


class BadRestore(Actor):
    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def keep(self) -> None:
        checkpoint("state")

    def restore(self, state: Any) -> None:
        raise KeyError(f"cannot take it back: {state}")


# actors that fail


def test_an_actor_that_fails_without_a_caller_is_made_again_where_it_was(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter, 1)
    before = call_all(counters.pid)
    call_all(counters.add, 1, keep=True)

    counters.slice(rank=1).fail.broadcast()
    told = call_all(counters.told)

    assert told == [(["init"], 2, 0), (["init", "restore 2"], 2, 1)]
    assert call_all(counters.pid) == before


def test_without_a_policy_an_actor_that_fails_is_lost_and_says_why(unhandled: list[MeshFailure]) -> None:
    with spawn(2, restart=None) as procs:
        counters = procs.spawn("counters", Counter)
        counters.slice(rank=1).fail.broadcast("no way")

        with pytest.raises(SupervisionError) as told:
            call_all(counters.pid)

        failure = told.value.failure
        assert (failure.kind, failure.rank, failure.restarts) == (FailureKind.ACTOR_ERROR, 1, False)
        assert "ValueError: no way" in failure.traceback


def test_a_policy_of_an_actor_mesh_alone_serves_its_actors_and_its_processes() -> None:
    with spawn(2, restart=None) as procs:
        counters = procs.spawn("counters", Counter, 3, restart=Restart())
        counters.slice(rank=0).fail.broadcast()
        assert [each[1:] for each in call_all(counters.told)] == [(3, 1), (3, 0)]

        kill(call_all(counters.pid)[1])

        assert [each[1:] for each in call_all(counters.told)] == [(3, 1), (3, 1)]


def test_messages_after_the_failure_wait_for_the_actor_to_be_made_again(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter, 1)
    one = counters.slice(rank=0)
    one.fail.broadcast()
    # In the mailbox already when the actor fails, or later: in any case it is not there any more when this returns.
    with contextlib.suppress(SupervisionError):
        one.pid.options(timeout=LIMIT_S).call_one().get()

    one.add.broadcast(10)
    one.add.broadcast(100)

    assert one.told.options(timeout=LIMIT_S).call_one().get() == (["init"], 111, 1)


def test_an_init_that_heals_at_the_second_try_is_just_a_little_late(procs: ProcMesh, tmp_path: Path) -> None:
    healing = procs.slice(rank=0).spawn("healing", FailsOnce, str(tmp_path / "once"))
    answer = healing.incarnation.options(timeout=LIMIT_S).call_one()

    assert answer.get() == 1


class FailsOnce(Actor):
    def __init__(self, marker: str) -> None:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        raise OSError("not yet")

    @endpoint
    def incarnation(self) -> int:
        return context().actor_instance.incarnation


def test_a_mesh_may_be_stopped_while_an_init_of_it_fails(procs: ProcMesh, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    late = procs.slice(rank=0).spawn("late", FailsWhenTold, str(pipe))
    answer = late.get.options(timeout=LIMIT_S).call_one()
    stopped = late.stop()
    pipe.write_text("")

    stopped.get(LIMIT_S)
    with pytest.raises(SupervisionError):
        answer.get()
    with pytest.raises(SupervisionError):
        call(late.get)


class FailsWhenTold(Actor):
    def __init__(self, pipe: str) -> None:
        Path(pipe).read_text()
        raise ValueError("told to fail")

    @endpoint
    def get(self) -> None:
        return


def test_an_init_that_never_heals_is_given_up_with_its_traceback(unhandled: list[MeshFailure]) -> None:
    with spawn(1, restart=Restart(max_restarts=2)) as procs:
        hopeless = procs.spawn("hopeless", Hopeless)

        with pytest.raises(SupervisionError) as told:
            call(hopeless.get)

        failure = told.value.failure
        assert (failure.kind, failure.incarnation, failure.restarts) == (FailureKind.INIT_ERROR, 2, False)
        assert "ValueError: hopeless" in failure.traceback


class Hopeless(Actor):
    def __init__(self) -> None:
        raise ValueError("hopeless")

    @endpoint
    def get(self) -> None:
        return


def test_an_actor_given_up_comes_back_with_its_process() -> None:
    with spawn(1, restart=Restart(max_restarts=1)) as procs:
        counters = procs.spawn("counters", Counter, 3)
        other = procs.spawn("other", Counter, 4)
        counters.fail.broadcast()
        assert call(counters.told)[1:] == (3, 1)
        counters.fail.broadcast()
        with pytest.raises(SupervisionError):
            call(counters.told)

        kill(call(other.pid))
        assert call(counters.told)[1] == 3

        # It counts as any other again.
        counters.fail.broadcast()
        with pytest.raises(SupervisionError) as told:
            call(counters.told)
        assert told.value.failure.restarts is False


# what a dead actor owned


class Owner(Actor):
    """Has a mesh of its own, whose process says in a file that it lives, by a lock on it."""

    def __init__(self, folder: str) -> None:
        import fcntl

        self.pid_file = os.path.join(folder, "pids")
        with open(self.pid_file, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self.alive = [pid for pid in map(int, file.read().split()) if is_alive(pid)]
        self.procs = this_host().spawn_procs(name="owned")
        self.member = self.procs.spawn("member", Counter)
        with open(self.pid_file, "a", encoding="utf-8") as file:
            file.write(f"{call(self.member.pid)}\n")

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def alive_before(self) -> list[int]:
        """Processes of earlier incarnations that were there when this one was made."""
        return self.alive

    @endpoint
    def member_pid(self) -> int:
        return call(self.member.pid)

    @endpoint
    def fail(self) -> None:
        raise ValueError("broken")


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_dead_actor_owned_has_ended_before_it_is_made_again(tmp_path: Path) -> None:
    with spawn(1) as procs:
        owner = procs.spawn("owner", Owner, str(tmp_path))
        member = call(owner.member_pid)
        for _ in range(2):
            kill(call(owner.pid))
            assert call(owner.alive_before) == []
            assert not is_alive(member)
            member = call(owner.member_pid)

        owner.fail.broadcast()
        assert call(owner.alive_before) == []
        assert not is_alive(member)


# bad input


@pytest.mark.parametrize("policy", ["rank", 3, Restart])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(TypeError, match=r"spawn_procs\(restart=.*expected danaus.Restart"):
        this_host().spawn_procs(restart=policy)


def test_a_mesh_that_was_stopped_stays_so_whatever_its_policy() -> None:
    procs = spawn(2)
    counters = procs.spawn("counters", Counter)
    pids = call_all(counters.pid)
    procs.stop().get(LIMIT_S)

    with pytest.raises(StoppedError):
        call_all(counters.pid)
    assert not any(map(is_alive, pids))


def test_a_rank_that_waits_for_its_turn_can_be_stopped() -> None:
    procs = spawn(1, restart=Restart(backoff_s=5.0, max_restarts=2))
    counters = procs.spawn("counters", Counter)
    changes = Events()
    procs.on_change(changes)
    kill(call(counters.pid))
    changes.wait_states("lost")
    waiting = counters.pid.options(timeout=LIMIT_S).call_one()

    procs.stop().get(LIMIT_S)

    with pytest.raises(StoppedError):
        waiting.get()


def test_nothing_is_kept_of_meshes_that_ended(procs: ProcMesh) -> None:
    supervisor = local_proc().supervisor
    before = len(supervisor.procs), len(supervisor.actors)
    for _ in range(3):
        with spawn(1) as inner:
            counters = inner.spawn("counters", Counter)
            kill(call(counters.pid))
            call(counters.told)
        procs.spawn("others", Counter).stop().get(LIMIT_S)
    on_io = threading.Event()
    local_proc().run_soon(on_io.set)
    assert on_io.wait(LIMIT_S)

    assert (len(supervisor.procs), len(supervisor.actors)) == before


def test_actors_of_the_controllers_process_are_made_again_too() -> None:
    counters = this_proc().spawn("here", Counter, 2, restart=Restart())
    call(counters.add, 5, keep=True)
    counters.fail.broadcast()

    assert call(counters.told) == (["init", "restore 7"], 7, 1)
    counters.stop().get(LIMIT_S)
