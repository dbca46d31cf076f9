"""Calls that are sent again when their rank was lost: for endpoints that may run twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from danaus import Actor, Restart, SupervisionError, endpoint, this_host
from danaus.runtime.context import local_proc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from danaus import ProcMesh


class Doubtful(Actor):
    """Dies in its first life, if it is told to, after it has left a mark."""

    def __init__(self, marks: str) -> None:
        self.marks = marks

    @endpoint(idempotent=True)
    def total(self, values: np.ndarray) -> tuple[int, int]:
        self._die_once("total")
        return int(values.sum()), os.getpid()

    @endpoint(idempotent=True)
    def always_dies(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @endpoint(idempotent=True)
    async def fails_once_as_an_actor(self) -> int:
        if _is_first(f"{self.marks}/actor-{os.getpid()}"):
            raise SystemExit
        return os.getpid()

    @endpoint(idempotent=True)
    async def fails_once_slowly(self) -> int:
        if _is_first(f"{self.marks}/slowly-{os.getpid()}"):
            _wait_for_the_next_message_after_each_answer()
            raise SystemExit
        return os.getpid()

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    def _die_once(self, name: str) -> None:
        if _is_first(f"{self.marks}/{name}"):
            os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_the_next_message_after_each_answer() -> None:
    """Have an actor that ends find the call that is sent again in its queue before it has gone on."""
    proc = local_proc()
    runner = next(runner for runner in proc.actors.values() if runner.thread_id == threading.get_ident())
    reply_gone = proc.reply_gone

    def and_wait(*args: Any, **options: Any) -> None:
        reply_gone(*args, **options)
        limit_s = time.monotonic() + 2
        while runner._queue.empty() and time.monotonic() < limit_s:
            time.sleep(0.001)

    setattr(proc, "reply_gone", and_wait)  # noqa: B010  a method, for once


def _is_first(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"d": 2}, restart=Restart(max_restarts=100)) as mesh:
        yield mesh


def test_a_call_is_sent_again_to_the_next_incarnation(procs: ProcMesh, tmp_path: Path) -> None:
    one = procs.spawn("doubtful", Doubtful, str(tmp_path)).slice(d=0)
    before = one.pid.call_one().get(timeout=10)

    total, pid = one.total.options(retries=1).call_one(np.ones(10)).get(timeout=10)

    assert total == 10
    assert pid != before


def test_what_is_sent_again_are_the_arguments_of_the_first_time(procs: ProcMesh, tmp_path: Path) -> None:
    one = procs.spawn("doubtful", Doubtful, str(tmp_path)).slice(d=1)
    values = np.ones(300_000)

    reply = one.total.options(retries=1).call_one(values)
    values[:] = 7
    total, _ = reply.get(timeout=10)

    assert total == 300_000


def test_a_call_to_all_asks_only_the_lost_rank_again(procs: ProcMesh, tmp_path: Path) -> None:
    mesh = procs.spawn("doubtful", Doubtful, str(tmp_path))
    before = list(mesh.pid.call().get(timeout=10).values())

    replies = list(mesh.total.options(retries=1).call(np.ones(3)).get(timeout=10).values())

    assert [total for total, _ in replies] == [3, 3]
    assert sum(pid in before for _, pid in replies) == 1


def test_past_its_retries_a_call_fails_with_the_last_loss(procs: ProcMesh, tmp_path: Path) -> None:
    one = procs.spawn("doubtful", Doubtful, str(tmp_path)).slice(d=0)

    with pytest.raises(SupervisionError, match="SIGKILL") as caught:
        one.always_dies.options(retries=2).call_one().get(timeout=15)

    assert caught.value.failure.restarts
    assert one.pid.call_one().get(timeout=10)


def test_an_actor_that_is_made_again_is_asked_again(procs: ProcMesh, tmp_path: Path) -> None:
    one = procs.spawn("doubtful", Doubtful, str(tmp_path)).slice(d=1)
    before = one.pid.call_one().get(timeout=10)

    assert one.fails_once_as_an_actor.options(retries=1).call_one().get(timeout=10) == before


def test_a_call_sent_again_to_an_actor_that_is_still_ending_is_for_the_next(procs: ProcMesh, tmp_path: Path) -> None:
    one = procs.spawn("doubtful", Doubtful, str(tmp_path)).slice(d=1)

    assert one.fails_once_slowly.options(retries=1).call_one().get(timeout=10)


def test_without_a_policy_nothing_is_sent_again(tmp_path: Path) -> None:
    with this_host().spawn_procs({"d": 1}) as procs:
        one = procs.spawn("doubtful", Doubtful, str(tmp_path))

        with pytest.raises(SupervisionError) as caught:
            one.total.options(retries=5).call_one(np.ones(1)).get(timeout=10)

    assert not caught.value.failure.restarts
