"""The script is told to end, once or twice, whatever it is at: it ends as it should, and nothing of its job is left.

Ways of ending times phases of a script; the script says itself that it has reached its phase.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from .ending_jobs import Ended, Job, open_job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Some seconds on an idle machine; a script is a whole interpreter, and starts several more.
pytestmark = pytest.mark.timeout(60)

SOON_S = 5.0
"""How long a script may take to end once it is told to."""

PHASES = {
    "runtime": "here = this_host()\nready()\nthreading.Event().wait(600)\n",
    "agent": "procs = this_host().spawn_procs({'rank': 2})\nready()\nthreading.Event().wait(600)\n",
    "idle": "procs, workers = start()\nready()\nthreading.Event().wait(600)\n",
    "spawn": "procs = this_host().spawn_procs({'rank': 8}, name='job')\nready()\nprocs.initialized.get()\nwait_go()\n",
    "torch_spawn": (
        "procs = this_host().spawn_procs({'rank': 8}, preload=['torch'])\nready()\nprocs.initialized.get()\nwait_go()\n"
    ),
    "call": "procs, workers = start()\nworkers.slice(rank=0).sleep.call_one(600, tells=True).get()\n",
    "calls": (
        "procs, workers = start()\nworkers.slice(rank=0).asleep.call_one(600, tells=True)\n"
        "workers.asleep.call(600).get()\n"
    ),
    "await": (
        "procs, workers = start()\nasync def main():\n"
        "    first = workers.slice(rank=0).asleep.call_one(600, tells=True)\n"
        "    await asyncio.gather(first, workers.asleep.call(600))\n"
        "asyncio.run(main())\n"
    ),
    "stop": (
        "procs, workers = start()\nbusy = workers.sleep.call(600)\nlingerer = start_lingerer()\n"
        "lingerer.stop()\nprocs.stop().get()\n"
    ),
    "torch": "import torch\nprocs, workers = start()\nworkers.slice(rank=0).sleep.call_one(600, tells=True).get()\n",
    "shutdown": "lingerer = start_lingerer()\nshutdown_context()\n",
    "exit": "lingerer = start_lingerer()\n",
}
"""Bodies of scripts that stay in their phase until they are ended."""

SECOND = [
    "call",
    "spawn",
    "stop",
    *(pytest.param(phase, marks=pytest.mark.soak) for phase in ("idle", "await", "torch")),
]
TELLS = {"stop": "cleanup", "shutdown": "cleanup", "exit": "cleanup"}


def covered(*often: str) -> list[Any]:
    """All phases; those that are not in ``often`` for the soak alone."""
    return [phase if phase in often else pytest.param(phase, marks=pytest.mark.soak) for phase in PHASES]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    yield from open_job(tmp_path)


def reach(job: Job, phase: str, *, also: str = "") -> None:
    job.start(also + PHASES[phase])
    job.wait_told(TELLS.get(phase, "ready"))


def check_interrupted(ended: Ended, phase: str) -> None:
    assert ended.noise == [], ended.stderr
    assert ended.code == -signal.SIGINT, ended
    if phase == "exit":
        assert ended.stderr == ""
    else:
        assert ended.stderr.endswith("KeyboardInterrupt\n"), ended.stderr
        assert phase == "await" or ended.stderr.count("Traceback") == 1, ended.stderr


@pytest.mark.parametrize(
    "phase", covered("runtime", "agent", "torch_spawn", "calls", "await", "stop", "shutdown", "exit")
)
def test_interrupt_ends_the_script_and_its_job(job: Job, phase: str) -> None:
    reach(job, phase)
    job.signal(signal.SIGINT)
    ended = job.wait()

    check_interrupted(ended, phase)
    assert job.left() == []
    assert ended.seconds < SOON_S


@pytest.mark.parametrize("phase", SECOND)
def test_second_interrupt_while_cleaning_up_ends_the_script_at_once(job: Job, phase: str) -> None:
    reach(job, phase, also="lasting = start_lingerer()\n")
    job.signal(signal.SIGINT)
    job.wait_told("cleanup")
    job.signal(signal.SIGINT)
    ended = job.wait()

    check_interrupted(ended, phase)
    assert job.left() == []
    assert ended.seconds < 2.5


@pytest.mark.parametrize("phase", covered("await", "exit"))
def test_terminated_script_leaves_nothing(job: Job, phase: str) -> None:
    reach(job, phase)
    job.signal(signal.SIGTERM)
    ended = job.wait()

    assert (ended.code, ended.stderr) == (-signal.SIGTERM, "")
    assert job.left() == []


@pytest.mark.parametrize("phase", covered("runtime", "agent", "torch_spawn", "stop", "exit"))
def test_killed_script_leaves_nothing(job: Job, phase: str) -> None:
    reach(job, phase)
    job.signal(signal.SIGKILL)
    ended = job.wait()

    assert (ended.code, ended.stderr) == (-signal.SIGKILL, "")
    assert job.left() == []
