"""Host agent, zygote or procs are killed, whatever the script is at: it hears of that, and nothing is left at its end.

Each kind of process is killed in each phase of a script; the script says itself that it has reached its phase.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from .ending_jobs import ALL_GONE_S, LIMIT_S, Job, open_job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Some seconds on an idle machine; a script is a whole interpreter, and starts several more.
pytestmark = pytest.mark.timeout(60)

PHASES = {
    "start": "procs = this_host().spawn_procs({'rank': 8}, name='job')\nready()\nprocs.initialized.get()\nwait_go()\n",
    "bootstrap": (
        "def linger():\n    ready()\n    time.sleep(600)\n"
        "this_host().spawn_procs({'rank': 8}, name='job', bootstrap=linger).initialized.get()\n"
    ),
    "call": "procs, workers = start()\nworkers.slice(rank=0).sleep.call_one(600, tells=True).get()\n",
    "await": (
        "procs, workers = start()\nworkers.slice(rank=0).asleep.call_one(600, tells=True)\n"
        "async def main():\n    await asyncio.gather(workers.asleep.call(600), workers.asleep.call(600))\n"
        "asyncio.run(main())\n"
    ),
    "stop": "lingerer = start_lingerer()\nprocs, workers = start()\nlingerer.stop()\nready()\nprocs.stop().get()\n",
    "exit": "lingerer = start_lingerer()\nprocs, workers = start()\n",
}
TELLS = {"stop": "cleanup", "exit": "cleanup"}
ENDS_BY_ERROR = ("start", "bootstrap", "call", "await")


def for_soak(*phases: str) -> list[Any]:
    return [pytest.param(phase, marks=pytest.mark.soak) for phase in phases]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    yield from open_job(tmp_path)


def reach(job: Job, phase: str) -> None:
    job.start(PHASES[phase])
    job.wait_told(TELLS.get(phase, "ready"))


def check(job: Job, phase: str, *parts: str) -> None:
    ended = job.wait()
    assert ended.noise == [], ended.stderr
    if phase in ENDS_BY_ERROR:
        assert ended.code == 1, ended
        assert "SupervisionError: " in ended.stderr or "StoppedError: " in ended.stderr, ended.stderr
        for part in parts:
            assert part in ended.stderr
    else:
        assert "Traceback" not in ended.stderr
        assert ended.code == 0
    assert job.left() == []


def wait_named(job: Job, prefix: str, count: int) -> list[int]:
    deadline_s = time.monotonic() + LIMIT_S
    while len(pids := job.named(prefix)) < count:
        assert time.monotonic() < deadline_s, f"{pids} of {count} {prefix}: {job.living()}"
        time.sleep(0.001)
    return pids


@pytest.mark.parametrize("phase", ["start", "await", "stop", "exit", *for_soak("bootstrap", "call")])
def test_killed_agent_is_told_and_leaves_nothing(job: Job, phase: str) -> None:
    reach(job, phase)
    job.signal(signal.SIGKILL, job.agent())

    check(job, phase, "host agent")


@pytest.mark.parametrize("phase", ["call", *for_soak("start", "stop", "exit")])
def test_agent_that_is_told_to_end_ends_the_job(job: Job, phase: str) -> None:
    reach(job, phase)
    job.signal(signal.SIGTERM, job.agent())

    check(job, phase)


def test_killed_agent_takes_what_user_code_had_started_with_it(job: Job) -> None:
    body = """
import subprocess

class Parent(Actor):
    @endpoint
    def start(self):
        subprocess.Popen(["sleep", "600"])
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        ready()
        time.sleep(600)

this_host().spawn_procs().spawn("parent", Parent).start.call_one().get()
"""
    job.start(body)
    job.wait_told()
    assert len(wait_named(job, "sleep", 2)) == 2
    job.signal(signal.SIGKILL, job.agent())

    check(job, "call", "host agent")


@pytest.mark.parametrize("phase", ["start", "stop", *for_soak("call", "exit")])
def test_killed_zygotes_are_missed_by_nobody(job: Job, phase: str) -> None:
    job.start(PHASES[phase].replace("600, tells=True).get()", "0.5, tells=True).get()"))
    if phase == "start":
        job.wait_told()
    else:
        job.wait_told(TELLS.get(phase, "ready"))
    for pid in wait_named(job, "danaus-zyg", 1):
        job.signal(signal.SIGKILL, pid)
    job.type("go\n")

    ended = job.wait()
    assert (ended.code, ended.stderr) == (0, "")
    assert job.left() == []


def test_zygote_killed_while_it_imports_is_replaced(job: Job) -> None:
    job.start(PHASES["start"].replace("name='job'", "name='job', preload=['torch']"))
    seed = wait_named(job, "danaus-zyg-plai", 1)[0]
    deadline_s = time.monotonic() + LIMIT_S
    is_killed = False
    while not is_killed:
        assert time.monotonic() < deadline_s
        for pid in set(job.named("danaus-zyg")) - set(job.named("danaus-zyg-plai")) - {seed}:
            # The process in between, by which zygotes fork, may be gone again.
            with contextlib.suppress(ProcessLookupError):
                job.signal(signal.SIGKILL, pid)
                is_killed = True
    job.type("go\n")

    ended = job.wait()
    assert (ended.code, ended.stderr) == (0, "")
    assert job.left() == []


@pytest.mark.parametrize("phase", ["bootstrap", "exit", *for_soak("call", "await")])
def test_killed_procs_are_told_and_leave_nothing(job: Job, phase: str) -> None:
    reach(job, phase)
    if phase == "exit":
        for pid in job.named("slow-"):
            job.signal(signal.SIGKILL, pid)
    else:
        job.signal(signal.SIGKILL, wait_named(job, "job-", 1)[0])

    check(job, phase, "was killed by SIGKILL")


@pytest.mark.parametrize("victim", ["agent", "controller"])
def test_agent_and_controller_survive_nothing_of_each_other_while_starting(job: Job, victim: str) -> None:
    job.start("ready()\nprocs = this_host().spawn_procs({'rank': 2})\nwait_go()\n")
    job.wait_told()
    deadline_s = time.monotonic() + LIMIT_S
    while len(job.living()) < 2:
        assert time.monotonic() < deadline_s
    if victim == "controller":
        job.signal(signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL
    else:
        job.signal(signal.SIGKILL, job.agent())
        os.kill(job.controller, signal.SIGINT)
        assert job.wait().code == -signal.SIGINT

    assert job.left(limit_s=ALL_GONE_S) == []
