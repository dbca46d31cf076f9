"""A rank is lost and nobody has handled it: the script ends with exit code 1 and one report, wherever it blocks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from .ending_jobs import NOISE, Job, open_job
from .test_clean_end_surroundings import IPYTHON, PYTEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Some seconds on an idle machine; a script is a whole interpreter, and starts several more.
pytestmark = pytest.mark.timeout(60)

KILL_ONE = "procs, workers = start()\nos.kill(workers.slice(rank=1).pid.call_one().get(timeout=20), signal.SIGKILL)\n"
REPORT = "mesh 'job' rank 1"

BLOCKED = {
    "event": "threading.Event().wait(600)",
    "sleep": "time.sleep(600)",
    "get": "workers.slice(rank=0).asleep.call_one(600).get()",
    "await": "asyncio.run(asyncio.sleep(600))",
    "await_call": ("async def main():\n    await workers.slice(rank=0).asleep.call_one(600)\nasyncio.run(main())"),
    "join": "thread = threading.Thread(target=time.sleep, args=(600,), daemon=True)\nthread.start()\nthread.join()",
    "with": "with this_host().spawn_procs() as others:\n    others.initialized.get()\n    time.sleep(600)",
    "busy": "while True:\n    pass",
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    yield from open_job(tmp_path)


@pytest.mark.parametrize(
    "blocked",
    [pytest.param(name, marks=() if name in {"event", "await_call", "with"} else pytest.mark.soak) for name in BLOCKED],
)
def test_script_ends_with_exit_code_1_and_one_report(job: Job, blocked: str) -> None:
    ended = job.run(f"{KILL_ONE}{BLOCKED[blocked]}\n")

    assert ended.code == 1, ended
    assert ended.noise == []
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count(f"{REPORT} (host") == 1, ended.stderr
    assert "was killed by SIGKILL" in ended.stderr
    assert "unhandled_fault_hook" in ended.stderr
    assert job.left() == []


def test_loss_of_two_meshes_ends_the_script_once(job: Job) -> None:
    body = "others = this_host().spawn_procs(name='more').spawn('others', Worker)\n"
    body += "os.kill(others.pid.call_one().get(timeout=20), signal.SIGKILL)\n"
    ended = job.run(f"{body}{KILL_ONE}time.sleep(600)\n")

    assert ended.code == 1, ended
    assert ended.noise == []
    assert "Traceback" not in ended.stderr, ended.stderr
    assert job.left() == []


def test_hook_of_the_script_may_ignore_the_loss(job: Job) -> None:
    body = "import danaus\nlost = []\ntold = threading.Event()\n"
    body += "danaus.unhandled_fault_hook = lambda failure: (lost.append(failure), told.set())\n"
    body += f"{KILL_ONE}assert told.wait(10)\nprint(len(lost), lost[0].rank, flush=True)\n"
    ended = job.run(body)

    assert (ended.code, ended.stdout) == (0, "1 1\n"), ended
    assert ended.stderr.count(f"{REPORT} (host") == 1
    assert job.left() == []


def test_script_whose_own_call_failed_by_the_loss_may_go_on(job: Job) -> None:
    body = """
procs, workers = start()
pid = workers.slice(rank=1).pid.call_one().get(timeout=20)
future = workers.slice(rank=1).asleep.call_one(600)
os.kill(pid, signal.SIGKILL)
try:
    future.get(timeout=10)
except Exception as error:
    print(type(error).__name__)
# Longer than the root of the tree waits for somebody to have been told.
time.sleep(1.0)
print(workers.slice(rank=0).pid.call_one().get(timeout=10) > 0)
"""
    ended = job.run(body)

    assert (ended.code, ended.stdout) == (0, "SupervisionError\nTrue\n"), ended
    assert ended.noise == []
    assert job.left() == []


def test_pytest_run_fails_and_leaves_nothing(job: Job) -> None:
    body = "def test_loses_a_rank():\n" + "".join(
        f"    {line}\n" for line in [*KILL_ONE.splitlines(), "time.sleep(600)"]
    )
    body += "def test_after_it():\n    procs, workers = start()\n"
    (job.directory / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\naddopts = --import-mode=importlib\n")
    job.start(body, arguments=PYTEST[4:])
    ended = job.wait()

    assert ended.code == 1, ended
    assert "1 failed, 1 passed" in ended.stdout, ended.stdout
    assert "was killed by SIGKILL" in ended.stdout
    assert not NOISE.search(ended.stderr), ended.stderr
    assert job.left() == []


def test_ipython_session_goes_on(tmp_path: Path) -> None:
    for job in open_job(tmp_path, [sys.executable]):
        job.start("", arguments=[*IPYTHON, "-i", str(job.directory / "controller.py")])
        told = "import danaus; told = threading.Event(); default = danaus.unhandled_fault_hook\n"
        told += "danaus.unhandled_fault_hook = lambda failure: (default(failure), told.set())\n"
        job.type(
            f"{told}{KILL_ONE}assert told.wait(10)\nworkers.slice(rank=0).pid.call_one().get(timeout=10) > 0\nexit\n"
        )
        ended = job.wait()

        assert ended.code == 0, ended
        assert "Out[" in ended.stdout, ended.stdout
        assert "True" in ended.stdout
        assert "Traceback" not in ended.stdout
        assert ended.stderr.count(f"{REPORT} (host") == 1, ended.stderr
        assert not NOISE.search(ended.stdout + ended.stderr), ended
        assert job.left() == []
