"""Random calls without a circle, among actors that call, wait, await, gather and overlap: nobody is ever alarmed."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
from typing import Any

import cloudpickle
import pytest

from danaus import Actor, concurrent_endpoint, endpoint, this_host
from danaus.runtime.context import local_proc

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 60
"""Far more than anything here takes."""


class Tangled(Actor):
    """Calls only those after it in one order of all, so that no circle can come about."""

    def __init__(self) -> None:
        self.later: list[Any] = []

    @endpoint
    def meet(self, later: list[Any]) -> None:
        self.later = later

    def _calls(self, seed: int, depth: int) -> list[Any]:
        chance = random.Random(seed)
        chosen = chance.sample(self.later, min(len(self.later), chance.randrange(1, 4))) if depth else []
        kinds = ["work", "work_async", "work_gathering", "work_beside"]
        return [
            getattr(mesh, chance.choice(kinds)).call(seed * 7 + number, depth - 1) for number, mesh in enumerate(chosen)
        ]

    @staticmethod
    def _pause_s(seed: int) -> float:
        # One in three is slow enough for those that wait for it to be noted.
        return 0.3 if seed % 3 == 0 else 0.002

    @endpoint
    def work(self, seed: int, depth: int) -> int:
        calls = self._calls(seed, depth)
        threading.Event().wait(self._pause_s(seed))
        return 1 + sum(sum(call.get().values()) for call in calls)

    @endpoint
    async def work_async(self, seed: int, depth: int) -> int:
        calls = self._calls(seed, depth)
        await asyncio.sleep(self._pause_s(seed))
        return 1 + sum([sum((await call).values()) for call in calls])

    @endpoint
    async def work_gathering(self, seed: int, depth: int) -> int:
        values = await asyncio.gather(*self._calls(seed, depth), asyncio.sleep(self._pause_s(seed)))
        return 1 + sum(sum(value.values()) for value in values if value is not None)

    @concurrent_endpoint
    async def work_beside(self, seed: int, depth: int) -> int:
        waiting = [call.as_asyncio() for call in self._calls(seed, depth)]
        await asyncio.sleep(self._pause_s(seed))
        if waiting:
            await asyncio.wait(waiting)
        return 1 + sum(sum(call.result().values()) for call in waiting)

    @endpoint
    def counts(self) -> tuple[int, int]:
        return local_proc().waits.num_probes, local_proc().waits.num_broken


@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(4.0, marks=[pytest.mark.slow, pytest.mark.timeout(60)]),
        pytest.param(180.0, marks=[pytest.mark.soak, pytest.mark.timeout(400)]),
    ],
)
def test_random_calls_without_a_circle_give_no_alarm(duration_s: float) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    chance = random.Random(seed)
    with this_host().spawn_procs({"rank": 3}, name="tangle") as procs:
        places = [procs.slice(rank=0), procs.slice(rank=1), procs.slice(rank=2), procs, procs.slice(rank=1), procs]
        meshes = [place.spawn(f"t{number}", Tangled) for number, place in enumerate(places)]
        for number, mesh in enumerate(meshes):
            mesh.meet.call(meshes[number + 1 :]).get(timeout=LIMIT_S)
        before = [sum(column) for column in zip(*_counts(meshes), strict=True)]
        num_calls, ends_s = 0, time.monotonic() + duration_s
        while time.monotonic() < ends_s:
            calls = [mesh.work.call(chance.randrange(1 << 20), 3) for mesh in meshes[:4]]
            num_calls += sum(sum(call.get(timeout=LIMIT_S).values()) for call in calls)
        after = [sum(column) for column in zip(*_counts(meshes), strict=True)]

        print(f"{num_calls} calls, {after[0] - before[0]} probes, {after[1] - before[1]} alarms")
        assert after[1] == before[1]
        assert after[0] - before[0] > 20


def _counts(meshes: list[Any]) -> list[tuple[int, int]]:
    """One pair of each process."""
    return list(meshes[3].counts.call().get(timeout=LIMIT_S))
