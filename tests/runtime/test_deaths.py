"""What happens to those who wait when a process dies: they hear of it at once, and of everything worth knowing.

All deaths are real: a signal to a real process. The meshes are made per test, because each test breaks its own.
"""

# Endpoints here take and return anything, and some calls are wrong on purpose.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle
import pytest

from danaus import (
    Actor,
    ActorError,
    FailureKind,
    ProcMesh,
    StoppedError,
    SupervisionError,
    concurrent_endpoint,
    endpoint,
    shutdown_context,
    this_host,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

AT_ONCE_S = 0.5
"""A death takes some 5 ms to be heard of; a busy test machine gets this long."""


class Victim(Actor):
    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def say(self, *lines: str) -> None:
        for line in lines:
            print(line)

    @endpoint
    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @concurrent_endpoint
    async def rest(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @endpoint
    def numbers(self):
        yield 0
        time.sleep(60)
        yield 1

    @endpoint
    def exit(self, code: int) -> None:
        os._exit(code)

    @endpoint
    def kill_self(self, signum: int) -> None:
        os.kill(os.getpid(), signum)

    @endpoint
    def raise_exit(self) -> None:
        raise SystemExit(3)

    @endpoint
    def fail(self) -> None:
        raise ValueError("nobody hears me")

    @endpoint
    async def ask(self, other: Victim, seconds: float) -> float:
        return await other.rest.call_one(seconds)

    @endpoint
    def ask_sync(self, other: Victim, seconds: float) -> float:
        return other.rest.call_one(seconds).get()

    @endpoint
    def outcome_of(self, other: Victim) -> str:
        error = other.pid.call_one().exception(timeout=10)
        return type(error).__name__

    @endpoint
    def spawn_below(self) -> list[int]:
        self.below = this_host().spawn_procs({"inner": 2}, name="below")
        return list(self.below.spawn("victims", Victim).pid.call().get(timeout=20))


@pytest.fixture
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"rank": 3}, name="crew") as procs:
        yield procs


def kill(pid: int, signum: int = signal.SIGKILL) -> float:
    os.kill(pid, signum)
    return time.monotonic()


def pids_of(victims: Victim) -> list[int]:
    return list(victims.pid.call().get(timeout=20))


def wait_gone(pid: int, limit_s: float = 5.0) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], limit_s)[0])
    finally:
        os.close(pidfd)


def test_killed_process_fails_every_waiting_call_at_once(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    one = victims.slice(rank=1)
    waiting = [
        victims.rest.call(60),
        one.rest.call_one(60),
        one.sleep.call_one(60),
        one.pid.call_one(),
        one.initialized,
    ]
    # `choose` and `stream` of the slice wait for the same rank.
    waiting += [one.rest.choose(60), *one.rest.stream(60)]
    bystander = victims.slice(rank=0).rest.call_one(0.2)

    killed_s = kill(pids[1])

    for future in waiting:
        assert isinstance(future.exception(timeout=5), SupervisionError), future
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert bystander.get(timeout=5) == 0.2


def test_failure_names_mesh_rank_host_pid_signal_and_last_lines(procs: ProcMesh) -> None:
    victim = procs.spawn("victims", Victim).slice(rank=2)
    pid = victim.pid.call_one().get(timeout=20)
    victim.say.call_one(*(f"line {number}" for number in range(40))).get(timeout=10)
    waiting = victim.rest.call_one(60)

    kill(pid)

    error = waiting.exception(timeout=5)
    assert isinstance(error, SupervisionError)
    failure = error.failure
    assert (failure.kind, failure.mesh, failure.rank) == (FailureKind.KILLED, "crew", 2)
    assert (failure.host, failure.pid, failure.signum, failure.exit_code) == (
        socket.gethostname(),
        pid,
        signal.SIGKILL,
        None,
    )
    assert failure.log_tail[-2:] == ("line 38", "line 39")
    text = str(error)
    for part in ("victims.rest", "'crew' rank 2", socket.gethostname(), str(pid), "SIGKILL", "line 39"):
        assert part in text
    assert "line 25" in failure.report()


def test_supervision_error_keeps_its_fields_when_pickled(procs: ProcMesh) -> None:
    victim = procs.spawn("victims", Victim).slice(rank=0)
    waiting = victim.rest.call_one(60)
    kill(victim.pid.call_one().get(timeout=20))

    error = waiting.exception(timeout=5)
    copy = pickle.loads(pickle.dumps(error))

    assert isinstance(copy, SupervisionError)
    assert (copy.failure, copy.endpoint, str(copy)) == (error.failure, error.endpoint, str(error))


@pytest.mark.parametrize("code", [0, 1, 7])
def test_process_that_exits_by_itself_fails_its_calls_with_the_code(procs: ProcMesh, code: int) -> None:
    victim = procs.spawn("victims", Victim).slice(rank=0)

    error = victim.exit.call_one(code).exception(timeout=10)

    assert isinstance(error, SupervisionError)
    assert (error.failure.kind, error.failure.exit_code) == (FailureKind.EXITED, code)
    assert f"exited with code {code}" in str(error)


def test_crash_in_native_code_is_reported_with_its_signal_and_stack(procs: ProcMesh) -> None:
    victim = procs.spawn("victims", Victim).slice(rank=0)

    error = victim.kill_self.call_one(signal.SIGSEGV).exception(timeout=10)

    assert isinstance(error, SupervisionError)
    assert error.failure.signum == signal.SIGSEGV
    # Python's fault handler writes the stacks; the endpoint is among them.
    assert any("kill_self" in line for line in error.failure.log_tail), error.failure.log_tail


def test_call_to_all_ranks_collects_the_death_among_the_outcomes_when_asked_to(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    waiting = victims.rest.options(on_error="all").call(0.3)

    kill(pids[1])

    outcomes = list(waiting.get(timeout=5))
    assert isinstance(outcomes[1], SupervisionError)
    assert [outcomes[0], outcomes[2]] == [0.3, 0.3]


def test_stream_yields_the_dead_rank_as_its_error_and_the_others_as_values(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    futures = list(victims.rest.stream(0.3))

    kill(pids[0])

    outcomes = [future.exception(timeout=5) or future.get() for future in futures]
    assert isinstance(outcomes[0], SupervisionError)
    assert outcomes[1:] == [0.3, 0.3]


def test_iteration_over_a_generator_ends_with_the_death_of_its_process(procs: ProcMesh) -> None:
    victim = procs.spawn("victims", Victim).slice(rank=0)
    pid = victim.pid.call_one().get(timeout=20)
    items = victim.numbers.call_one()
    assert next(items) == 0

    killed_s = kill(pid)

    with pytest.raises(SupervisionError):
        next(items)
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert list(items) == []


def test_awaited_call_fails_at_once_too(procs: ProcMesh) -> None:
    victim = procs.spawn("victims", Victim).slice(rank=0)
    pid = victim.pid.call_one().get(timeout=20)

    async def wait() -> float:
        waiting = victim.rest.call_one(60)
        killed_s = kill(pid)
        with pytest.raises(SupervisionError):
            await waiting
        return time.monotonic() - killed_s

    assert asyncio.run(wait()) < AT_ONCE_S


def test_two_deaths_at_the_same_moment_are_both_reported(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    waiting = [victims.slice(rank=rank).rest.call_one(60) for rank in range(2)]

    for pid in pids[:2]:
        kill(pid)

    errors = [future.exception(timeout=5) for future in waiting]
    assert [error.failure.rank for error in errors if isinstance(error, SupervisionError)] == [0, 1]


def test_second_death_in_a_mesh_is_noticed_as_fast_as_the_first(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)

    for rank in (0, 1, 2):
        waiting = victims.slice(rank=rank).rest.call_one(60)
        killed_s = kill(pids[rank])
        error = waiting.exception(timeout=5)
        assert isinstance(error, SupervisionError)
        assert error.failure.rank == rank
        assert time.monotonic() - killed_s < AT_ONCE_S


def test_call_spawn_and_broadcast_after_a_death_fail_at_once_and_name_the_rank(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    waiting = victims.rest.call(60)
    kill(pids[1])
    waiting.exception(timeout=5)

    started_s = time.monotonic()
    for error in (
        victims.pid.call().exception(timeout=5),
        victims.slice(rank=1).pid.call_one().exception(timeout=5),
        victims.slice(rank=1).initialized.exception(timeout=5),
    ):
        assert isinstance(error, SupervisionError)
        assert "rank 1" in str(error)
    with pytest.raises(SupervisionError, match=r"slice the mesh[\s\S]*rank 1"):
        procs.spawn("more", Victim)
    with pytest.raises(SupervisionError, match="rank 1"):
        victims.pid.broadcast()
    assert time.monotonic() - started_s < AT_ONCE_S


def test_ranks_that_live_go_on_working_beside_a_dead_one(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    waiting = victims.slice(rank=1).rest.call_one(60)
    kill(pids[1])
    waiting.exception(timeout=5)

    living = procs.slice(rank=slice(0, 3, 2))
    assert [victims.slice(rank=rank).pid.call_one().get(timeout=5) for rank in (0, 2)] == [pids[0], pids[2]]
    assert pids_of(living.spawn("more", Victim)) == [pids[0], pids[2]]
    assert {victims.pid.choose().get(timeout=5) for _ in range(20)} == {pids[0], pids[2]}


def test_calls_to_a_dead_rank_keep_no_memory(procs: ProcMesh) -> None:
    from danaus.runtime.context import local_proc

    victims = procs.spawn("victims", Victim)
    kill(pids_of(victims)[1])
    one = victims.slice(rank=1)
    one.rest.call_one(60).exception(timeout=5)
    before = set(local_proc().ports)

    for _ in range(5):
        assert isinstance(one.say.call_one("x" * (1 << 20)).exception(timeout=5), SupervisionError)

    pool = local_proc().attachments._pool
    assert pool is not None
    assert set(local_proc().ports) <= before
    assert pool.stats().leases == 0


def test_stop_of_a_mesh_with_a_dead_rank_works(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    waiting = victims.slice(rank=0).rest.call_one(60)
    kill(pids[0])
    waiting.exception(timeout=5)

    victims.stop().get(timeout=5)
    procs.stop().get(timeout=5)

    assert all(wait_gone(pid, 0) for pid in pids)
    error = victims.slice(rank=1).pid.call_one().exception(timeout=5)
    assert isinstance(error, StoppedError)


@pytest.mark.parametrize("method", ["ask", "ask_sync"])
def test_actor_that_waits_for_a_dead_actor_hears_of_it_and_so_does_its_caller(procs: ProcMesh, method: str) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    asker, asked = victims.slice(rank=0), victims.slice(rank=1)
    waiting = getattr(asker, method).call_one(asked, 60)
    asked.rest.call_one(0.1).get(timeout=5)

    killed_s = kill(pids[1])

    error = waiting.exception(timeout=5)
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert isinstance(error, ActorError)
    assert isinstance(error.exception, SupervisionError)
    assert (error.exception.failure.rank, error.exception.failure.pid) == (1, pids[1])
    assert asker.pid.call_one().get(timeout=5) == pids[0]


def test_actor_learns_of_a_death_that_happened_before_it_first_called(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    kill(pids[2])
    assert wait_gone(pids[2])

    assert victims.slice(rank=0).outcome_of.call_one(victims.slice(rank=2)).get(timeout=10) == "SupervisionError"


def test_what_a_dead_process_had_spawned_ends_with_it(procs: ProcMesh) -> None:
    owner = procs.spawn("victims", Victim).slice(rank=0)
    pid = owner.pid.call_one().get(timeout=20)
    below = owner.spawn_below.call_one().get(timeout=20)
    assert all(not wait_gone(inner, 0) for inner in below)

    kill(pid)

    assert all(wait_gone(inner, 5) for inner in below)


def test_call_of_a_dead_caller_is_called_off(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    asker, asked = victims.slice(rank=0), victims.slice(rank=1)
    asker.ask.call_one(asked, 60)
    asked.rest.call_one(0.1).get(timeout=5)
    kill(pids[0])
    assert wait_gone(pids[0])

    # With the asker's call gone nothing holds the actor back: a stop waits for what is under way.
    started_s = time.monotonic()
    asked.stop().get(timeout=5)
    assert time.monotonic() - started_s < 2.0


def test_error_in_a_broadcast_fails_the_actor_but_not_its_neighbour(procs: ProcMesh) -> None:
    victims, neighbours = procs.spawn("victims", Victim), procs.spawn("neighbours", Victim)
    victim = victims.slice(rank=0)

    victim.fail.broadcast()

    error = victim.pid.call_one().exception(timeout=5)
    assert isinstance(error, SupervisionError)
    assert (error.failure.kind, error.failure.mesh, error.failure.rank) == (FailureKind.ACTOR_ERROR, "victims", 0)
    assert "ValueError: nobody hears me" in str(error)
    assert 'raise ValueError("nobody hears me")' in error.failure.report()
    assert len(pids_of(neighbours)) == 3
    assert len(pids_of(procs.spawn("new", Victim))) == 3


def test_system_exit_in_an_endpoint_fails_the_actor_and_its_callers(procs: ProcMesh) -> None:
    victim = procs.spawn("victims", Victim).slice(rank=0)
    first = victim.raise_exit.call_one()
    queued = victim.pid.call_one()

    for future in (first, queued, victim.pid.call_one()):
        error = future.exception(timeout=5)
        assert isinstance(error, SupervisionError)
        assert "SystemExit: 3" in str(error)


def children_of(pid: int) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            name, _, rest = stat.rpartition(") ")
            if int(rest.split()[1]) == pid:
                found[int(entry.name)] = name.partition("(")[2]
    return found


def agent_pid() -> int:
    found = [
        pid
        for pid in children_of(os.getpid())
        if b"danaus.runtime.host.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(found) == 1, found
    return found[0]


def test_killed_zygotes_take_nothing_with_them_and_the_next_spawn_works(procs: ProcMesh) -> None:
    victims = procs.spawn("victims", Victim)
    pids = pids_of(victims)
    zygotes = [pid for pid, name in children_of(agent_pid()).items() if name.startswith("danaus-zyg")]
    assert zygotes
    for pid in zygotes:
        kill(pid)

    assert pids_of(victims) == pids
    with this_host().spawn_procs({"rank": 2}) as more:
        assert len(set(pids_of(more.spawn("victims", Victim)))) == 2
    with this_host().spawn_procs({"rank": 1}, preload=["decimal"]) as more:
        assert len(pids_of(more.spawn("victims", Victim))) == 1


def test_killed_agent_fails_every_call_and_the_next_spawn_works() -> None:
    procs = this_host().spawn_procs({"rank": 2}, name="crew")
    victims = procs.spawn("victims", Victim)
    unused = this_host().spawn_procs({"rank": 1}, name="unused")
    pids = pids_of(victims)
    waiting = victims.rest.call(60)
    try:
        killed_s = kill(agent_pid())

        error = waiting.exception(timeout=5)
        assert isinstance(error, SupervisionError)
        assert error.failure.kind is FailureKind.HOST_LOST
        assert time.monotonic() - killed_s < AT_ONCE_S
        assert all(wait_gone(pid) for pid in pids)
        assert isinstance(victims.pid.call().exception(timeout=5), SupervisionError)
        # A mesh that nobody had spoken to yet is lost as well.
        assert isinstance(unused.initialized.exception(timeout=5), SupervisionError)
        assert isinstance(procs.stop().exception(timeout=5), (SupervisionError, type(None)))

        with this_host().spawn_procs({"rank": 2}) as more:
            assert len(pids_of(more.spawn("victims", Victim))) == 2
    finally:
        shutdown_context()


def test_first_process_of_a_controller_script_may_be_the_one_that_dies(tmp_path: Path) -> None:
    script = tmp_path / "controller.py"
    script.write_text(
        "import os, signal\n"
        "from danaus import Actor, SupervisionError, endpoint, this_host\n"
        "class Victim(Actor):\n"
        "    @endpoint\n"
        "    def die(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "victims = this_host().spawn_procs({'rank': 2}, name='crew').spawn('victims', Victim)\n"
        "victims.die.call().get(timeout=10)\n"
    )
    env = {**os.environ, "DANAUS_LOG_DIR": str(tmp_path / "logs")}

    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=20, check=False
    )

    assert done.returncode == 1
    assert "SupervisionError: victims.die: mesh 'crew' rank" in done.stderr
    assert "was killed by SIGKILL" in done.stderr
