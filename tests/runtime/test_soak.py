"""Meshes that come and go for minutes, with deaths at random moments: nothing hangs, nothing piles up."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest

from danaus import Actor, SupervisionError, endpoint, this_host

ROUNDS = 300
LIMIT_S = 20.0


class Member(Actor):
    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def total(self, values: np.ndarray) -> float:
        return float(values.sum())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_meshes_come_and_go_with_random_deaths_and_leave_nothing_behind() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    chance = random.Random(seed)
    values = np.ones(1 << 17)
    files_before = killed = calls = 0
    for number in range(ROUNDS):
        with this_host().spawn_procs({"rank": 4}, name="soak") as procs:
            members = procs.spawn("members", Member)
            pids = list(members.pid.options(timeout=LIMIT_S).call().get())
            waiting = [members.total.options(timeout=LIMIT_S).call(values) for _ in range(chance.randrange(8))]
            if chance.random() < 0.5:
                os.kill(chance.choice(pids), signal.SIGKILL)
                killed += 1
            for future in waiting:
                error = future.exception(timeout=LIMIT_S)
                assert error is None or isinstance(error, SupervisionError), f"seed {seed}: {error!r}"
                assert error is not None or list(future.get()) == [values.sum()] * 4
                calls += 1
        if number == 20:
            files_before = open_files()
    print(f"{ROUNDS} meshes, {killed} killed ranks, {calls} calls checked")
    # A few pooled segments and cached mappings may come and go.
    assert open_files() <= files_before + 16, f"seed {seed}"
