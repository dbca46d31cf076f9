"""Scripts that are ended at random moments, again and again, in every phase and in every way."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from .ending_jobs import STRICT, Job, open_job
from .test_clean_end_signals import PHASES

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 5
LONGEST_S = 0.6
"""A script has passed from its first line to the end of its phase's start by then, on an idle machine."""

ENDINGS: dict[str, tuple[int, ...]] = {
    "interrupt": (signal.SIGINT,),
    "interrupts": (signal.SIGINT, signal.SIGINT),
    "terminate": (signal.SIGTERM,),
    "kill": (signal.SIGKILL,),
    "agent": (),
    "zygote": (),
}

SURVIVES = """
import numpy as np
import itertools

class Adder(Actor):
    @endpoint
    def total(self, array):
        return int(array.sum())

adders = this_host().spawn_procs({"rank": 2}, name="job").spawn("adders", Adder)
# Small, by frames, by shared memory.
sizes = (10, 1000, 7000, 70_000)
for size in sizes:
    adders.total.call(np.ones(size)).get(timeout=20)
counter = itertools.count()


def go_on():
    while True:
        count = next(counter)
        size = sizes[count % 4]
        totals = list(adders.total.options(timeout=20).call(np.full(size, count)).get())
        assert totals == [size * count] * 2, (count, totals)


for interrupts in range(20):
    try:
        ready()
        go_on()
    except KeyboardInterrupt:
        continue
for count in range(100):
    assert list(adders.total.call(np.full(1000, count)).get(timeout=20)) == [1000 * count] * 2
print("all right")
"""


def pause(chance: random.Random, longest_s: float, *, at_least_s: float = 0.0) -> None:
    # A random moment is the point here; nothing waits for anything by it.
    time.sleep(at_least_s + chance.random() * longest_s)


def end(job: Job, ending: str, chance: random.Random) -> int | None:
    """End the script; return its exit status where that is certain."""
    if ENDINGS[ending]:
        for signum in ENDINGS[ending]:
            job.signal(signum)
            pause(chance, 0.2)
        return -ENDINGS[ending][0]
    pids = job.named("danaus-zyg") if ending == "zygote" else [pid for pid in job.living() if pid != job.controller]
    for pid in pids[:1]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    pause(chance, 0.2)
    # Not SIGKILL: agent and script, both killed at once, leave nobody to remove the socket directory.
    job.signal(signal.SIGINT)
    return None


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ending", ENDINGS)
def test_script_ended_at_a_random_moment_leaves_nothing(tmp_path: Path, ending: str) -> None:
    seed = int(os.environ.get("DANAUS_SOAK_SEED") or int.from_bytes(os.urandom(3), "little"))
    chance = random.Random(seed)
    for number in range(ROUNDS):
        for phase, body in PHASES.items():
            what = f"seed {seed}, round {number}, phase {phase}"
            for job in open_job(tmp_path, STRICT):
                # Before anything of the runtime is there; what an interrupted import makes of torch is its own affair.
                imports = "import torch\n" if phase == "torch" else ""
                job.start(f"{imports}ready('begins')\n{body}")
                job.wait_told("begins")
                pause(chance, LONGEST_S)
                code = end(job, ending, chance)
                ended = job.wait()

                assert ended.noise == [], f"{what}: {ended.stderr}"
                assert code is None or ended.code in {code, 0}, f"{what}: {ended}"
                assert job.left() == [], what


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_script_interrupted_at_random_moments_of_its_calls_goes_on(tmp_path: Path) -> None:
    seed = int(os.environ.get("DANAUS_SOAK_SEED") or int.from_bytes(os.urandom(3), "little"))
    chance = random.Random(seed)
    for number in range(ROUNDS * 4):
        what = f"seed {seed}, round {number}"
        for job in open_job(tmp_path):
            job.start(SURVIVES)
            for _ in range(20):
                job.wait_told()
                pause(chance, 0.02, at_least_s=0.002)
                job.signal(signal.SIGINT)
            ended = job.wait(30.0)

            assert (ended.code, ended.stdout) == (0, "all right\n"), f"{what}: {ended.stdout} {ended.stderr}"
            assert ended.stderr == "", f"{what}: {ended.stderr}"
            assert job.left() == [], what
