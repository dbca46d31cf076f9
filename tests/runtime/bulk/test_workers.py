"""Threads of transfers: every task runs, and threads go when there is nothing to do."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from danaus.runtime.bulk import workers
from danaus.runtime.bulk.workers import MAX_THREADS, Workers

from .stand_ins import LIMIT_S, wait_until

if TYPE_CHECKING:
    import pytest


def test_a_task_is_never_lost_between_threads_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_IDLE_S", 0.0002)
    pool = Workers()
    for _ in range(500):
        done = threading.Event()
        pool.run(done.set)
        assert done.wait(LIMIT_S)

    wait_until(lambda: pool._num_threads == 0)


def test_tasks_run_at_once_up_to_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_IDLE_S", 0.01)
    pool, all_there, done = Workers(), threading.Barrier(MAX_THREADS), list[int]()

    def task() -> None:
        all_there.wait(LIMIT_S)
        done.append(1)

    for _ in range(3 * MAX_THREADS):
        pool.run(task)

    wait_until(lambda: len(done) == 3 * MAX_THREADS)
    assert pool._num_threads <= MAX_THREADS
    wait_until(lambda: pool._num_threads == 0)
