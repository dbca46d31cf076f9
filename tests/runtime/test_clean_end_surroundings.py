"""The ends of a controller that does not run as a plain script: under pytest, in IPython, in a fork, in threads.

The session or the runner sees the interruption its own way; what the runtime started is gone either way.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from .ending_jobs import LIMIT_S, NOISE, Ended, Job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Some seconds on an idle machine; a script is a whole interpreter, and starts several more.
pytestmark = pytest.mark.timeout(60)

PYTEST = ("-X", "dev", "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "controller.py")
IPYTHON = ("-X", "dev", "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=nocolor", "--no-confirm-exit")


def for_soak(*values: object) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.soak) for value in values]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, [sys.executable])
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\naddopts = --import-mode=importlib\n")
    yield job
    job.close()


def start_pytest(job: Job, body: str) -> None:
    job.start(body, arguments=PYTEST)


def start_ipython(job: Job, *cells: str) -> None:
    job.start("", arguments=[*IPYTHON, "-i", str(job.directory / "controller.py")])
    for cell in cells:
        job.type(cell + "\n")


IN_TEST = {
    "idle": """
def test_idle():
    start()
    ready()
    threading.Event().wait(600)
""",
    "spawn": """
def test_spawn():
    procs = this_host().spawn_procs({"rank": 8}, bootstrap=lambda: time.sleep(600))
    ready()
    procs.initialized.get()
""",
    "call": """
def test_call():
    procs, workers = start()
    workers.slice(rank=0).sleep.call_one(600, tells=True).get()
""",
    "await": """
def test_await():
    procs, workers = start()

    async def main():
        await workers.slice(rank=0).asleep.call_one(600, tells=True)

    asyncio.run(main())
""",
}


@pytest.mark.parametrize("ending", ["pass", "raise ValueError"])
def test_pytest_run_leaves_nothing(job: Job, ending: str) -> None:
    body = f"def test_body():\n    procs, workers = start()\n    pending = workers.sleep.call(600)\n    {ending}\n"
    start_pytest(job, body)
    ended = job.wait()

    assert ended.code == (0 if ending == "pass" else 1), ended
    assert ended.stderr == ""
    assert not NOISE.search(ended.stdout), ended.stdout
    assert job.left() == []


@pytest.mark.parametrize("phase", ["spawn", "await", *for_soak("idle", "call")])
def test_interrupted_pytest_run_leaves_nothing(job: Job, phase: str) -> None:
    start_pytest(job, IN_TEST[phase])
    job.wait_told()
    job.signal(signal.SIGINT)
    ended = job.wait()

    assert ended.code == pytest.ExitCode.INTERRUPTED, ended
    assert ended.stderr == ""
    assert "KeyboardInterrupt" in ended.stdout
    assert not NOISE.search(ended.stdout), ended.stdout
    assert job.left() == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, *for_soak(signal.SIGTERM)])
def test_killed_pytest_run_leaves_nothing(job: Job, signum: int) -> None:
    start_pytest(job, IN_TEST["call"])
    job.wait_told()
    job.signal(signum)

    assert job.wait().code == -signum
    assert job.left() == []


def finish_ipython(job: Job, cell: str = "exit") -> Ended:
    job.type(cell + "\n")
    ended = job.wait()
    assert not NOISE.search(ended.stdout + ended.stderr), ended
    assert job.left() == []
    return ended


def test_ipython_session_ends_with_a_mesh_up(job: Job) -> None:
    start_ipython(job, "procs, workers = start()", "pending = workers.sleep.call(600)", "ready()")
    job.wait_told()
    ended = finish_ipython(job)

    assert (ended.code, ended.stderr) == (0, "")
    assert "Traceback" not in ended.stdout, ended.stdout


@pytest.mark.parametrize(
    "cell",
    [
        "workers.asleep.options().call(600, True).get()",
        "await workers.asleep.call(600, True)",
        "this_host().spawn_procs({'rank': 8}, bootstrap=lambda: (ready(), time.sleep(600))).initialized.get()",
    ],
)
def test_ipython_session_goes_on_after_an_interrupt(job: Job, cell: str) -> None:
    start_ipython(job, "procs, workers = start(1)", cell)
    job.wait_told()
    job.signal(signal.SIGINT)
    job.type("print(len(workers.pid.call().get(timeout=10)), 'answered'); ready('again')\n")
    job.wait_told("again")
    ended = finish_ipython(job)

    assert ended.code == 0, ended
    assert ended.stdout.count("Traceback") == 1, ended.stdout
    assert "1 answered" in ended.stdout, ended.stdout


def test_killed_ipython_session_leaves_nothing(job: Job) -> None:
    start_ipython(job, "procs, workers = start()", "workers.slice(rank=0).sleep.call_one(600, True).get()")
    job.wait_told()
    job.signal(signal.SIGKILL)

    assert job.wait(LIMIT_S).code == -signal.SIGKILL
    assert job.left() == []
