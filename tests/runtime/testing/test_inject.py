"""Each kind of fault, at real processes: it strikes where and when it was asked to, and whoever injected it knows."""

# Endpoints here take and return anything.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import (
    Actor,
    ActorError,
    FailureKind,
    ProcMesh,
    Restart,
    SupervisionError,
    concurrent_endpoint,
    endpoint,
    testing,
    this_host,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Fault = testing.Fault
LIMIT_S = 10.0


class Worker(Actor):
    def __init__(self) -> None:
        self.done = 0

    @endpoint
    def step(self) -> int:
        self.done += 1
        testing.point("mid", step=self.done)
        return self.done

    @endpoint
    def look(self) -> int:
        return self.done

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def numbers(self, count: int):
        yield from range(count)

    @endpoint
    async def step_async(self) -> int:
        self.done += 1
        return self.done

    @endpoint(concurrency=4)
    async def numbers_async(self, count: int):
        for number in range(count):
            await asyncio.sleep(0)
            yield number

    @concurrent_endpoint
    async def rest(self) -> str:
        return "rested"

    @endpoint
    def step_on_thread(self) -> int:
        thread = threading.Thread(target=testing.point, args=("thread",))
        thread.start()
        thread.join()
        return self.done

    @endpoint
    def inject_into(self, other: Worker) -> str:
        with testing.inject(other, Fault.raises(KeyError("from afar"), endpoint="step")) as faults:
            error = other.step.call_one().exception(timeout=LIMIT_S)
            return f"{type(error).__name__} {len(faults.fired)}"


@pytest.fixture
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"rank": 2}, name="crew") as procs:
        yield procs


@pytest.fixture
def workers(procs: ProcMesh) -> Worker:
    return procs.spawn("workers", Worker)


def one(workers: Worker, rank: int = 0) -> Worker:
    return workers.slice(rank=rank)


def outcomes(workers: Worker, count: int) -> list[object]:
    """Each step's value, or the name of its error."""
    futures = [one(workers).step.call_one() for _ in range(count)]
    return [
        type(error).__name__ if (error := future.exception(timeout=LIMIT_S)) else future.get() for future in futures
    ]


def take_all(items: Any, into: list[int]) -> None:
    for item in items:
        into.append(item)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_kill_strikes_the_nth_call_and_is_known_before_the_death_is(workers: Worker) -> None:
    with testing.inject(workers, Fault.kill(rank=0, endpoint="step", nth=3)) as faults:
        futures = [one(workers).step.call_one() for _ in range(3)]
        assert [future.get(timeout=LIMIT_S) for future in futures[:2]] == [1, 2]
        error = futures[2].exception(timeout=LIMIT_S)

        assert isinstance(error, SupervisionError)
        assert (error.failure.kind, error.failure.signum) == (FailureKind.KILLED, signal.SIGKILL)
        (fired,) = faults.fired
        assert (fired.rank, fired.incarnation, fired.pid) == (0, 0, error.failure.pid)
        assert fired.at == "before 'step'"
    assert one(workers, 1).step.call_one().get(timeout=LIMIT_S) == 1


def test_exit_ends_the_process_with_its_code(workers: Worker) -> None:
    with testing.inject(workers, Fault.exit(7, rank=0)) as faults:
        error = one(workers).look.call_one().exception(timeout=LIMIT_S)

        assert isinstance(error, SupervisionError)
        assert (error.failure.kind, error.failure.exit_code) == (FailureKind.EXITED, 7)
        assert len(faults.fired) == 1


def test_raise_reaches_the_caller_once_and_the_body_does_not_run(workers: Worker) -> None:
    with testing.inject(workers, Fault.raises(KeyError("lost"), rank=0, endpoint="step", nth=2)) as faults:
        assert outcomes(workers, 3) == [1, "ActorError", 2]

    assert [str(fired.fault) for fired in faults.fired] == ["raise(KeyError) rank 0 before call 2 of 'step'"]


def test_raise_after_the_body_leaves_what_the_body_did(workers: Worker) -> None:
    with testing.inject(workers, Fault.raises(KeyError("lost"), rank=0, endpoint="step", when="after")):
        assert outcomes(workers, 2) == ["ActorError", 2]


def test_raised_exception_is_the_one_given(workers: Worker) -> None:
    with testing.inject(workers, Fault.raises(KeyError("lost", 3), rank=0)):
        error = one(workers).look.call_one().exception(timeout=LIMIT_S)

    assert isinstance(error, ActorError)
    assert isinstance(error.exception, KeyError)
    assert error.exception.args == ("lost", 3)


def test_raise_without_a_caller_fails_the_actor(workers: Worker) -> None:
    with testing.inject(workers, Fault.raises(KeyError("lost"), rank=0, endpoint="step")):
        one(workers).step.broadcast()
        error = one(workers).look.call_one().exception(timeout=LIMIT_S)

    assert isinstance(error, SupervisionError)
    assert error.failure.kind is FailureKind.ACTOR_ERROR
    assert "lost" in error.failure.traceback


def test_stop_stands_still_until_resumed(workers: Worker) -> None:
    pid = one(workers).pid.call_one().get(timeout=LIMIT_S)
    with testing.inject(workers, Fault.stop(rank=0, endpoint="step")) as faults:
        future = one(workers).step.call_one()
        faults.wait_fired(timeout=LIMIT_S)
        with pytest.raises(TimeoutError):
            future.get(timeout=0.2)
        assert state_of(pid) == "T"
    testing.resume(workers, 0)

    assert future.get(timeout=LIMIT_S) == 1


def test_stop_with_a_time_goes_on_by_itself(workers: Worker) -> None:
    with testing.inject(workers, Fault.stop(for_s=0.3, rank=0)) as faults:
        started_s = time.monotonic()
        assert one(workers).step.call_one().get(timeout=LIMIT_S) == 1

    assert time.monotonic() - started_s >= 0.3
    assert len(faults.fired) == 1


def test_hang_blocks_the_thread_alone_and_ends_when_withdrawn(workers: Worker) -> None:
    with testing.inject(workers, Fault.hang(rank=0, endpoint="step")) as faults:
        future = one(workers).step.call_one()
        faults.wait_fired(timeout=LIMIT_S)
        # The process answers beside the blocked thread.
        others = workers._procs.slice(rank=0).spawn("others", Worker)
        assert others.look.call_one().get(timeout=LIMIT_S) == 0
        assert not future.done()

    assert future.get(timeout=LIMIT_S) == 1


def test_hang_that_holds_the_lock_blocks_every_thread(workers: Worker) -> None:
    others = workers._procs.slice(rank=0).spawn("others", Worker)
    others.look.call_one().get(timeout=LIMIT_S)
    with testing.inject(workers, Fault.hang(for_s=0.5, holds_gil=True, rank=0, endpoint="step")) as faults:
        future = one(workers).step.call_one()
        longest_s = 0.0
        while not future.done():
            asked_s = time.monotonic()
            others.look.call_one().get(timeout=LIMIT_S)
            longest_s = max(longest_s, time.monotonic() - asked_s)

    assert longest_s > 0.3
    assert len(faults.fired) == 1


def test_slow_takes_its_time(workers: Worker) -> None:
    with testing.inject(workers, Fault.slow(0.3, rank=0, endpoint="step")):
        started_s = time.monotonic()
        assert outcomes(workers, 2) == [1, 2]

    assert time.monotonic() - started_s >= 0.3


def test_slow_async_endpoint_lets_others_go_on(workers: Worker) -> None:
    with testing.inject(workers, Fault.slow(60, rank=0, endpoint="numbers_async")) as faults:
        items = one(workers).numbers_async.call_one(3)
        faults.wait_fired(timeout=LIMIT_S)

        assert one(workers).rest.call_one().get(timeout=LIMIT_S) == "rested"
        items.close()


@pytest.mark.parametrize("name", ["step_async", "rest"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_async_endpoints_are_struck_as_well(workers: Worker, name: str, when: str) -> None:
    with testing.inject(workers, Fault.raises(KeyError("lost"), rank=0, endpoint=name, when=when)) as faults:  # type: ignore[arg-type]
        error = getattr(one(workers), name).call_one().exception(timeout=LIMIT_S)

    assert isinstance(error, ActorError)
    assert [fired.at for fired in faults.fired] == [f"{when} {name!r}"]


@pytest.mark.parametrize("name", ["numbers", "numbers_async"])
@pytest.mark.parametrize(("when", "expected"), [("before", []), ("after", [0, 1, 2])])
def test_generators_are_struck_before_the_first_item_or_after_the_last(
    workers: Worker, name: str, when: str, expected: list[int]
) -> None:
    got: list[int] = []
    with testing.inject(workers, Fault.raises(KeyError("lost"), rank=0, endpoint=name, when=when)):  # type: ignore[arg-type]
        items = getattr(one(workers), name).call_one(3)
        with pytest.raises(ActorError, match="lost"):
            take_all(items, got)

    assert got == expected


def test_point_strikes_in_the_middle_of_an_endpoint_at_its_step(workers: Worker) -> None:
    with testing.inject(workers, Fault.raises(KeyError("lost"), rank=0, point="mid", step=2)) as faults:
        assert outcomes(workers, 3) == [1, "ActorError", 3]

    assert [fired.at for fired in faults.fired] == ["point 'mid' of step 2"]


def test_point_passed_by_a_thread_of_the_actors_own_counts(workers: Worker) -> None:
    with testing.inject(workers, Fault.slow(0.01, rank=0, point="thread")) as faults:
        one(workers).step_on_thread.call_one().get(timeout=LIMIT_S)

        assert len(faults.wait_fired(timeout=LIMIT_S)) == 1


def test_fault_for_every_rank_strikes_each(workers: Worker) -> None:
    with testing.inject(workers, Fault.slow(0.01, endpoint="step", nth=2)) as faults:
        for _ in range(3):
            workers.step.call().get(timeout=LIMIT_S)

    assert sorted(fired.rank for fired in faults.fired) == [0, 1]


def test_ranks_are_those_of_the_slice_given(workers: Worker) -> None:
    with testing.inject(one(workers, 1), Fault.slow(0.01, rank=0)) as faults:
        workers.step.call().get(timeout=LIMIT_S)

    assert [fired.rank for fired in faults.fired] == [0]
    assert faults.fired[0].pid == one(workers, 1).pid.call_one().get(timeout=LIMIT_S)


def test_fault_for_an_actor_leaves_its_neighbours_alone(procs: ProcMesh, workers: Worker) -> None:
    others = procs.spawn("others", Worker)
    with testing.inject(workers, Fault.raises(KeyError("lost"), endpoint="step")) as faults:
        assert list(others.step.call().get(timeout=LIMIT_S)) == [1, 1]
        assert faults.fired == []

    with testing.inject(procs, Fault.raises(KeyError("lost"), rank=0)) as faults:
        assert isinstance(others.look.call().exception(timeout=LIMIT_S), ActorError)


def test_withdrawn_fault_does_not_strike(workers: Worker) -> None:
    faults = testing.inject(workers, Fault.kill(rank=0))
    faults.withdraw()

    assert outcomes(workers, 1) == [1]
    assert faults.fired == []


def test_faults_injected_one_after_another_each_keep_their_count(workers: Worker) -> None:
    with testing.inject(workers, Fault.raises(KeyError("first"), rank=0, endpoint="step", nth=3)):
        assert outcomes(workers, 1) == [1]
        with testing.inject(workers, Fault.raises(KeyError("second"), rank=0, endpoint="step", nth=1)):
            assert outcomes(workers, 3) == ["ActorError", "ActorError", 2]


def test_actor_may_inject_into_another(workers: Worker) -> None:
    assert one(workers).inject_into.call_one(one(workers, 1)).get(timeout=LIMIT_S) == "ActorError 1"


def test_wait_for_a_fault_that_does_not_strike_ends_and_teaches(workers: Worker) -> None:
    with (
        testing.inject(workers, Fault.kill(rank=0, endpoint="step")) as faults,
        pytest.raises(TimeoutError, match=r"0 of 1 faults have struck.*kill rank 0 before call 1 of 'step'"),
    ):
        faults.wait_fired(timeout=0.05)


def test_unknown_rank_and_endpoint_are_refused(workers: Worker) -> None:
    with pytest.raises(ValueError, match=r"rank 2 of .*: its ranks are 0 to 1"):
        testing.inject(workers, Fault.kill(rank=2))
    with pytest.raises(ValueError, match=r"Worker has no such endpoint; its endpoints: .*look"):
        testing.inject(workers, Fault.kill(endpoint="stepp"))
    with pytest.raises(TypeError, match="expected a mesh of procs or of actors"):
        testing.inject(this_host(), Fault.kill())
    with pytest.raises(ValueError, match=r"testing\.kill: rank 5"):
        testing.kill(workers, 5)


def test_injecting_into_a_dead_rank_says_how_it_died(workers: Worker) -> None:
    testing.kill(workers, 0)
    one(workers).look.call_one().exception(timeout=LIMIT_S)

    with pytest.raises(SupervisionError, match="SIGKILL"):
        testing.inject(workers, Fault.slow(1.0, rank=0))
    with pytest.raises(SupervisionError, match=r"testing\.kill of [\s\S]*SIGKILL"):
        testing.kill(workers, 0)


def test_kill_from_outside_ends_a_rank_whatever_it_does(workers: Worker) -> None:
    with testing.inject(workers, Fault.hang(holds_gil=True, rank=0)) as faults:
        future = one(workers).step.call_one()
        faults.wait_fired(timeout=LIMIT_S)
        assert testing.kill(workers, 0) == 0

        error = future.exception(timeout=LIMIT_S)
    assert isinstance(error, SupervisionError)
    assert error.failure.signum == signal.SIGKILL


def test_stop_and_resume_from_outside(procs: ProcMesh, workers: Worker) -> None:
    pid = one(workers).pid.call_one().get(timeout=LIMIT_S)
    testing.stop(procs, 0)
    future = one(workers).step.call_one()

    with pytest.raises(TimeoutError):
        future.get(timeout=0.2)
    assert state_of(pid) == "T"
    with pytest.raises(TimeoutError, match=r"not every one of .* has armed"):
        testing.inject(workers, Fault.kill(), timeout=0.2)
    testing.resume(procs, 0)
    assert future.get(timeout=LIMIT_S) == 1


def test_kill_waits_for_a_process_that_is_starting(procs: ProcMesh) -> None:
    testing.kill(procs, 1)

    assert isinstance(procs.initialized.exception(timeout=LIMIT_S), SupervisionError)


def answers_again(worker: Worker) -> int:
    """Call until the rank has an answer; fail after the limit."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        future = worker.look.options(timeout=LIMIT_S).call_one()
        if future.exception() is None:
            return future.get()
    raise AssertionError(f"no answer within {LIMIT_S} s")


@pytest.fixture
def restarted() -> Iterator[Worker]:
    with this_host().spawn_procs({"rank": 2}, name="again", restart=Restart()) as procs:
        yield procs.spawn("workers", Worker)


def test_fault_for_the_current_incarnation_dies_with_it(restarted: Worker) -> None:
    with testing.inject(restarted, Fault.kill(rank=0, endpoint="step", nth=2)) as faults:
        assert testing.kill(restarted, 0) == 0
        answers_again(one(restarted))
        assert outcomes(restarted, 3) == [1, 2, 3]

    assert faults.fired == []


def test_fault_for_every_incarnation_strikes_once_in_each(restarted: Worker) -> None:
    with testing.inject(restarted, Fault.kill(rank=0, endpoint="step", incarnation="every")) as faults:
        for _ in range(2):
            assert isinstance(one(restarted).step.call_one().exception(timeout=LIMIT_S), SupervisionError)
            answers_again(one(restarted))

        assert [fired.incarnation for fired in faults.fired] == [0, 1]
    assert outcomes(restarted, 1) == [1]


def test_fault_for_a_later_incarnation_waits_for_it(restarted: Worker) -> None:
    fault = Fault.raises(KeyError("lost"), rank=0, endpoint="step", incarnation=1)
    with testing.inject(restarted, fault) as faults:
        assert outcomes(restarted, 2) == [1, 2]
        testing.kill(restarted, 0)
        one(restarted).step.call_one().exception(timeout=LIMIT_S)
        answers_again(one(restarted))

        assert "ActorError" in outcomes(restarted, 1) or faults.fired
        assert [fired.incarnation for fired in faults.fired] == [1]
