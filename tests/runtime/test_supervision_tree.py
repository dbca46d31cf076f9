"""Losses go up the tree of owners until one has handled them; the script hears of what nobody has. Deaths are real."""

# Endpoints here take and return anything.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

import danaus
from danaus import Actor, FailureKind, MeshFailure, Restart, SupervisionError, endpoint, this_host, this_proc
from danaus.runtime.supervision import asking

from .restarting import LIMIT_S, Counter, Events, kill, retried

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def hook() -> Events:
    """What reaches the script's last resort; ``unhandled`` puts the old one back."""
    events = Events()
    danaus.unhandled_fault_hook = events
    return events


class Owner(Actor):
    """Owns a mesh on its host, and says what it was asked; what it answers is given to it."""

    def __init__(self, answer: Any = True, restart: Restart | None = None, count: int = 2) -> None:
        self.answer = answer
        self.asked: list[MeshFailure] = []
        self.threads: list[int] = []
        self.heard = threading.Event()
        self.procs = this_host().spawn_procs({"rank": count}, name="owned", restart=restart)
        self.members = self.procs.spawn("members", Counter)

    def take(self, failure: MeshFailure) -> None:
        self.asked.append(failure)
        self.threads.append(threading.get_ident())
        self.heard.set()

    @endpoint
    def pids(self) -> list[int]:
        return list(self.members.pid.options(timeout=LIMIT_S).call().get())

    @endpoint
    def alive(self) -> list[int]:
        """Ranks that answer."""
        return [rank for rank in range(len(self.members)) if self._answers(rank)]

    def _answers(self, rank: int) -> bool:
        try:
            self.members.slice(rank=rank).pid.options(timeout=LIMIT_S).call_one().get()
        except SupervisionError:
            return False
        return True

    @endpoint
    def incarnations(self) -> list[int]:
        return self._incarnations()

    def _incarnations(self) -> list[int]:
        while True:
            try:
                return [told[2] for told in self.members.told.options(timeout=LIMIT_S).call().get()]
            except SupervisionError as error:
                if not error.failure.restarts:
                    raise

    @endpoint
    def lose_and_use(self, pid: int) -> list[int]:
        """Lose a rank in the middle of an endpoint, and go on with it."""
        kill(pid)
        return self._incarnations()

    @endpoint
    def questions(self) -> list[tuple[str, int | None, str, bool]]:
        own = threading.get_ident()
        return [
            (failure.mesh, failure.rank, failure.kind.value, thread == own)
            for failure, thread in zip(self.asked, self.threads, strict=True)
        ]

    @endpoint
    def handle(self) -> Any:
        return self.members


class SyncOwner(Owner):
    def __supervise__(self, failure: MeshFailure) -> Any:
        self.take(failure)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class AsyncOwner(Owner):
    async def __supervise__(self, failure: MeshFailure) -> Any:
        await asyncio.sleep(0)
        self.take(failure)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def call(endpoint: Any, *args: Any) -> Any:
    return endpoint.options(timeout=LIMIT_S).call_one(*args).get()


def until(ask: Callable[[], Any], expected: Any) -> None:
    """Ask until the answer is ``expected``: an event is on its way to the one that is asked."""
    deadline_s = time.monotonic() + LIMIT_S
    while (answer := ask()) != expected:
        assert time.monotonic() < deadline_s, f"{answer} instead of {expected}"


BOTH = pytest.mark.parametrize("owner_class", [SyncOwner, AsyncOwner])


@BOTH
@pytest.mark.parametrize("answer", [True, "yes", 1])
def test_a_truthy_answer_handles_the_loss_and_leaves_a_hole(
    owner_class: type[Owner], answer: Any, unhandled: list[MeshFailure]
) -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", owner_class, answer, Restart())
        pids = call(owner.pids)
        kill(pids[1])
        until(lambda: call(owner.questions), [("owned", 1, "killed", True)])

        until(lambda: call(owner.alive), [0])
        assert call(owner.questions) == [("owned", 1, "killed", True)]
    assert unhandled == []


@BOTH
@pytest.mark.parametrize("answer", [False, None, 0])
def test_a_falsy_answer_leaves_it_to_the_policy(
    owner_class: type[Owner], answer: Any, unhandled: list[MeshFailure]
) -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", owner_class, answer, Restart())
        kill(call(owner.pids)[1])

        until(lambda: call(owner.incarnations), [0, 1])
        assert call(owner.questions) == [("owned", 1, "killed", True)]
    assert unhandled == []


@BOTH
def test_without_a_policy_a_falsy_answer_lets_the_loss_go_up(owner_class: type[Owner], hook: Events) -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", owner_class, False)
        kill(call(owner.pids)[1])

        [failure] = hook.wait(lambda seen: len(seen) == 1)

        assert (failure.mesh, failure.rank, failure.kind) == ("owned", 1, FailureKind.KILLED)
        assert call(owner.alive) == [0]


@BOTH
def test_an_owner_that_raises_fails_with_it_and_its_own_owner_hears_of_the_chain(
    owner_class: type[Owner], hook: Events
) -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", owner_class, KeyError("cannot cope"))
        pids = call(owner.pids)
        kill(pids[1])

        [failure] = hook.wait(lambda seen: len(seen) == 1)

        assert (failure.mesh, failure.kind) == ("owner", FailureKind.ACTOR_ERROR)
        assert "cannot cope" in failure.traceback
        assert (failure.cause.mesh, failure.cause.rank) == ("owned", 1)
        assert failure.root.kind is FailureKind.KILLED
        with pytest.raises(SupervisionError):
            call(owner.questions)


def test_an_owner_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "SUPERVISE_S", 0.05)
    owner = this_proc().spawn("owner", HangingOwner)
    kill(call(owner.pids)[0])
    assert HangingOwner.latest.entered.wait(LIMIT_S)

    members = HangingOwner.latest.members
    assert [told[2] for told in retried(lambda: members.told.options(timeout=LIMIT_S).call().get().values())] == [1]

    HangingOwner.latest.released.set()
    # What it answers when it is too late changes nothing.
    assert call(owner.incarnations) == [1]
    owner.stop().get(LIMIT_S)


class HangingOwner(Owner):
    latest: HangingOwner

    def __init__(self) -> None:
        super().__init__(True, Restart(), 1)
        self.entered, self.released = threading.Event(), threading.Event()
        HangingOwner.latest = self

    def __supervise__(self, failure: MeshFailure) -> bool:
        self.entered.set()
        self.released.wait(LIMIT_S)
        return True


def test_an_owner_that_blocks_until_the_lost_rank_is_back_is_not_waited_for() -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", SyncOwner, False, Restart())
        pids = call(owner.pids)
        since_s = time.monotonic()

        assert call(owner.lose_and_use, pids[1]) == [0, 1]

        # Its own limit is 10 s; afterwards it hears of it like anybody.
        assert time.monotonic() - since_s < 5.0
        assert call(owner.questions) == [("owned", 1, "killed", True)]


def test_an_owner_that_is_busy_with_an_await_is_asked_meanwhile() -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", Waiting, True)
        pids = call(owner.pids)

        assert owner.lose_and_wait.options(timeout=LIMIT_S).call_one(pids[0]).get() == 0


class Waiting(AsyncOwner):
    @endpoint
    async def lose_and_wait(self, pid: int) -> int | None:
        """Busy, by an await, until it was asked."""
        kill(pid)
        while not self.asked:  # noqa: ASYNC110  an event would be set by the hook alone, which is what is tested
            await asyncio.sleep(0.001)
        return self.asked[0].rank


def test_a_loss_while_the_owner_is_made_is_told_to_it_afterwards() -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", LosesEarly)

        until(lambda: call(owner.questions), [("owned", 0, "killed", True)])


class LosesEarly(SyncOwner):
    def __init__(self) -> None:
        super().__init__(True)
        kill(self.members.slice(rank=0).pid.call_one().get())
        for _ in range(1000):
            if not self._answers(0):
                break


# deeper


class Middle(Actor):
    """Owns an owner."""

    def __init__(self, answer: bool, inner_answer: bool) -> None:
        self.answer, self.asked = answer, []
        self.procs = this_host().spawn_procs(name="middle")
        self.inner = self.procs.spawn("inner", SyncOwner, inner_answer)

    def __supervise__(self, failure: MeshFailure) -> bool:
        self.asked.append((failure.mesh, failure.rank))
        return self.answer

    @endpoint
    def pids(self) -> list[int]:
        return call(self.inner.pids)

    @endpoint
    def lose_and_use(self, pid: int) -> list[int]:
        """Lose a rank in the middle of an endpoint, and go on with it."""
        kill(pid)
        return self._incarnations()

    @endpoint
    def questions(self) -> tuple[list[Any], int]:
        return self.asked, len(call(self.inner.questions))


@pytest.mark.parametrize(("inner", "middle", "at_root"), [(True, True, 0), (False, True, 0), (False, False, 1)])
def test_a_loss_three_levels_down_stops_at_the_first_that_handles_it(
    inner: bool, middle: bool, at_root: int, hook: Events
) -> None:
    with this_host().spawn_procs(name="top") as procs:
        top = procs.spawn("top", Middle, middle, inner)
        kill(call(top.pids)[1])

        asked_middle = [] if inner else [("owned", 1)]
        until(lambda: call(top.questions), (asked_middle, 1))
        if at_root:
            [failure] = hook.wait(lambda seen: len(seen) == 1)
            assert (failure.mesh, failure.rank) == ("owned", 1)
        assert len(hook.seen) == at_root


def test_holders_of_a_mere_handle_are_not_asked() -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", SyncOwner, True)
        holder = procs.spawn("holder", Holder, call(owner.handle))
        pids = call(holder.pids)
        kill(pids[0])
        until(lambda: len(call(owner.questions)), 1)

        assert call(holder.asked) == 0


class Holder(Actor):
    def __init__(self, members: Any) -> None:
        self.members, self.num_asked = members, 0

    def __supervise__(self, failure: MeshFailure) -> bool:
        self.num_asked += 1
        return True

    @endpoint
    def pids(self) -> list[int]:
        return list(self.members.pid.options(timeout=LIMIT_S).call().get())

    @endpoint
    def asked(self) -> int:
        return self.num_asked


def test_each_lost_rank_is_asked_about_once() -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", SyncOwner, True, None, 3)
        for pid in call(owner.pids):
            kill(pid)

        until(lambda: sorted(each[1] for each in call(owner.questions)), [0, 1, 2])


def test_an_actor_error_without_a_caller_is_asked_about_too() -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", SyncOwner, True)
        call(owner.handle).slice(rank=1).fail.broadcast()

        until(lambda: call(owner.questions), [("members", 1, "actor error", True)])
        until(lambda: call(owner.alive), [0])


def test_an_owner_may_replace_the_rank_in_its_answer(unhandled: list[MeshFailure]) -> None:
    for restart in (None, Restart()):
        with this_host().spawn_procs(name="top") as procs:
            owner = procs.spawn("owner", Replacing, restart)
            for incarnation in (1, 2):
                kill(call(owner.pids)[1])
                until(lambda owner=owner: call(owner.replaced), [1] * incarnation)
                assert call(owner.incarnations) == [0, incarnation]
    assert unhandled == []


class Replacing(Owner):
    def __init__(self, restart: Restart | None) -> None:
        super().__init__(True, restart)
        self.ranks: list[int | None] = []

    def __supervise__(self, failure: MeshFailure) -> bool:
        assert failure.rank is not None
        assert self.procs.healthy().ranks == (0,)
        self.procs.replace(failure.rank).get(LIMIT_S)
        self.ranks.append(failure.rank)
        return True

    @endpoint
    def replaced(self) -> list[int | None]:
        return self.ranks


def test_what_an_owner_that_dies_had_is_stopped_and_told_as_one_loss(hook: Events) -> None:
    with this_host().spawn_procs(name="top") as procs:
        owner = procs.spawn("owner", SyncOwner, True)
        members = call(owner.handle)
        call(owner.pids)
        kill(call(procs.spawn("other", Counter).pid))

        [failure] = hook.wait(lambda seen: len(seen) == 1)

        assert (failure.mesh, failure.kind) == ("top", FailureKind.KILLED)
        with pytest.raises(SupervisionError):
            call(members.slice(rank=0).pid)
    assert len(hook.seen) == 1


def test_the_tenth_failure_is_heard_of_as_fast_as_the_first() -> None:
    took_s: list[float] = []
    with this_host().spawn_procs({"rank": 2}, restart=Restart(max_restarts=100)) as procs:
        counters = procs.spawn("counters", Counter)
        for _ in range(10):
            [pid, _] = retried(lambda: list(counters.pid.options(timeout=LIMIT_S).call().get()))
            waiting = counters.slice(rank=0).wait_file.call_one("/dev/ptmx")
            since_s = time.perf_counter()
            kill(pid)
            with pytest.raises(SupervisionError):
                waiting.get(LIMIT_S)
            took_s.append(time.perf_counter() - since_s)

    assert max(took_s) < 1.0, took_s


# whole scripts


PREAMBLE = """
import os, signal, sys, threading, time
import danaus
from danaus import Actor, MeshFailure, Restart, SupervisionError, endpoint, this_host

class Worker(Actor):
    @endpoint
    def pid(self):
        return os.getpid()

    @endpoint
    def fail(self):
        raise ValueError("no caller is told")

    @endpoint
    def sleep(self):
        time.sleep(60)

def lost(procs):
    changed = threading.Event()
    procs.on_change(lambda change: changed.set() if change.state == "given up" else None)
    return changed
"""


def run_script(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(PREAMBLE + dedent(body))
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=40, check=False, env=dict(os.environ)
    )


def test_what_nobody_handles_ends_the_script_with_exit_code_1_and_one_report(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        procs = this_host().spawn_procs({"rank": 2}, name="workers")
        workers = procs.spawn("w", Worker)
        os.kill(list(workers.pid.call().get())[1], signal.SIGKILL)
        threading.Event().wait(30)
        print("not ended")
        """,
    )

    assert ended.returncode == 1, ended.stderr
    assert "not ended" not in ended.stdout
    assert ended.stderr.count("was killed by SIGKILL") == 1
    assert "mesh 'workers' rank 1" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_script_that_a_call_has_told_is_not_ended(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        procs = this_host().spawn_procs({"rank": 2}, name="workers")
        workers = procs.spawn("w", Worker)
        pids = list(workers.pid.call().get())
        given_up = lost(procs)
        waiting = workers.slice(rank=1).sleep.call()
        os.kill(pids[1], signal.SIGKILL)
        try:
            waiting.get()
        except SupervisionError as error:
            print("told", error.failure.rank, flush=True)
        given_up.wait(20)
        # Longer than the script has to hear of it by a call.
        threading.Event().wait(1.0)
        print("went on", workers.slice(rank=0).pid.call_one().get() == pids[0])
        """,
    )

    assert (ended.returncode, ended.stdout) == (0, "told 1\nwent on True\n"), ended.stderr


def test_a_hook_that_returns_ignores_the_loss(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        seen = threading.Event()
        def hook(failure):
            print("hook", failure.mesh, failure.rank)
            seen.set()
        danaus.unhandled_fault_hook = hook
        procs = this_host().spawn_procs({"rank": 2}, name="workers")
        workers = procs.spawn("w", Worker)
        os.kill(list(workers.pid.call().get())[1], signal.SIGKILL)
        print(seen.wait(20))
        """,
    )

    assert (ended.returncode, ended.stdout) == (0, "hook workers 1\nTrue\n"), ended.stderr


def test_a_script_that_handles_nothing_sees_the_error_of_an_actor_as_well(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        procs = this_host().spawn_procs({"rank": 2}, name="workers")
        workers = procs.spawn("w", Worker)
        workers.slice(rank=0).fail.broadcast()
        threading.Event().wait(30)
        """,
    )

    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("ValueError: no caller is told") in {1, 2}, ended.stderr
    assert "mesh 'w' rank 0" in ended.stderr


def test_a_repaired_loss_is_reported_once_with_its_repair(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        procs = this_host().spawn_procs({"rank": 2}, name="workers", restart=Restart())
        workers = procs.spawn("w", Worker)
        pids = list(workers.pid.call().get())
        back = threading.Event()
        procs.on_change(lambda change: back.set() if change.state == "up" else None)
        os.kill(pids[1], signal.SIGKILL)
        assert back.wait(20)
        print(workers.slice(rank=1).pid.call_one().get() != pids[1])
        """,
    )

    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
    assert ended.stderr.count("was killed by SIGKILL") == 1
    assert "incarnation 1" in ended.stderr


def test_the_loss_of_a_whole_mesh_at_once_is_one_report(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        procs = this_host().spawn_procs({"rank": 4}, name="workers")
        workers = procs.spawn("w", Worker)
        for pid in list(workers.pid.call().get()):
            os.kill(pid, signal.SIGKILL)
        threading.Event().wait(30)
        """,
    )

    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("killed by SIGKILL") == 1, ended.stderr
