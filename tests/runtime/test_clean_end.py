"""However a controller ends, nothing of its job is left: no process, no socket directory, no noise.

Each test runs a controller script of its own; whatever the script starts carries the job's socket directory in its
environment, by which the tests find it.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ALL_GONE_S = 2.0
"""The contract's limit, from the controller's end to the last process's."""

PRELUDE = """
import asyncio, os, signal, subprocess, sys, threading, time
import numpy as np
from danaus import Actor, Future, concurrent_endpoint, endpoint, shutdown_context, this_host, this_proc


class Worker(Actor):
    @endpoint
    def pid(self):
        return os.getpid()

    @endpoint
    def keep(self, array):
        self.array = array
        return int(array.sum())

    @endpoint
    def sleep(self, seconds):
        time.sleep(seconds)

    @endpoint
    async def asleep(self, seconds):
        await asyncio.sleep(seconds)

    @endpoint
    def leave_child(self):
        return subprocess.Popen(["sleep", "600"]).pid

    @endpoint
    def numbers(self):
        number = 0
        while True:
            yield number
            number += 1


class WithCleanup(Actor):
    def __init__(self, path):
        self.path = path

    @endpoint
    def ping(self):
        return None

    def __cleanup__(self, exc):
        open(self.path, "w").write(repr(exc))


def start(ranks=2):
    procs = this_host().spawn_procs({"rank": ranks}, name="job")
    workers = procs.spawn("workers", Worker)
    workers.pid.call().get(timeout=20)
    return procs, workers


def ready():
    print("ready", flush=True)
"""

IDLE = "procs, workers = start()\nready()\n"
IN_CALL = "procs, workers = start()\nfuture = workers.sleep.call(600)\nready()\n"
IN_ASYNC_CALL = "procs, workers = start()\nfuture = workers.asleep.call(600)\nready()\n"
IN_SPAWN = "procs = this_host().spawn_procs({'rank': 4})\nworkers = procs.spawn('workers', Worker)\nready()\n"
IN_STREAM = "procs, workers = start(1)\nitems = workers.numbers.call_one()\nnext(items)\nready()\n"
WITH_MEMORY = (
    "procs, workers = start()\nworkers.keep.call(np.ones(1 << 20)).get(timeout=20)\n"
    "back = workers.keep.call(np.ones(1 << 20))\nready()\n"
)
STATES = {
    "idle": IDLE,
    "call": IN_CALL,
    "async_call": IN_ASYNC_CALL,
    "spawn": IN_SPAWN,
    "stream": IN_STREAM,
    "memory": WITH_MEMORY,
}
FOR_EVER = "threading.Event().wait(600)\n"


@dataclass(frozen=True, slots=True)
class Ended:
    """A controller that has ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    """From the signal (or the first line) to the end of the controller."""
    living: tuple[int, ...]
    """Processes of the job just before the signal."""


class Job:
    """One controller script and everything that it starts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Short: unix socket paths have some 100 characters.
        self.sockets = Path(tempfile.mkdtemp(prefix="dn"))
        self._popen: subprocess.Popen[str] | None = None

    def run(self, body: str, *, signum: int | None = None, limit_s: float = 15.0) -> Ended:
        """Run a script until it ends; send it ``signum`` once it has printed ``ready``."""
        path = self.directory / "controller.py"
        path.write_text(PRELUDE + body)
        env = {**os.environ, "DANAUS_SOCKET_DIR": str(self.sockets), "DANAUS_LOG_DIR": str(self.directory / "logs")}
        popen = self._popen = subprocess.Popen(
            [sys.executable, "-W", "error", str(path)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert popen.stdout is not None
        line, living = popen.stdout.readline(), ()
        started_s = time.monotonic()
        if signum is not None:
            assert line == "ready\n", line + popen.communicate(timeout=limit_s)[1]
            living = tuple(self.living())
            started_s = time.monotonic()
            popen.send_signal(signum)
        stdout, stderr = popen.communicate(timeout=limit_s)
        return Ended(popen.returncode, line + stdout, stderr, time.monotonic() - started_s, living)

    def living(self) -> dict[int, str]:
        """Processes of this job that still run, zombies included."""
        mark = f"DANAUS_SOCKET_DIR={self.sockets}".encode()
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def left(self, *, limit_s: float = ALL_GONE_S) -> list[str]:
        """What is left of the job once ``limit_s`` has passed, or nothing as soon as that is so."""
        deadline_s = time.monotonic() + limit_s
        while living := self.living():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0 or not _wait_end(next(iter(living)), remaining_s):
                break
        living = self.living()
        return [f"process {pid} {command}" for pid, command in living.items()] + [
            f"file {path}" for path in self.sockets.rglob("*")
        ]

    def close(self) -> None:
        """End what a failed test has left."""
        for pid in self.living():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._popen is not None:
            self._popen.communicate()
        shutil.rmtree(self.sockets, ignore_errors=True)


def _wait_end(pid: int, limit_s: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], limit_s)[0])
    finally:
        os.close(pidfd)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()


@pytest.mark.parametrize("state", ["idle", "call", "spawn", "memory"])
def test_script_that_returns_leaves_nothing_and_says_nothing(job: Job, state: str) -> None:
    ended = job.run(STATES[state])

    assert (ended.code, ended.stdout, ended.stderr) == (0, "ready\n", "")
    assert job.left() == []
    assert ended.seconds < 3.0


@pytest.mark.parametrize("state", ["idle", "call"])
def test_script_that_raises_leaves_nothing_and_shows_its_own_traceback_alone(job: Job, state: str) -> None:
    ended = job.run(STATES[state] + "raise ValueError('of the script')\n")

    assert ended.code == 1
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.endswith("ValueError: of the script\n")
    assert job.left() == []


@pytest.mark.parametrize(
    ("state", "ending"), [("idle", "os._exit(3)"), ("call", "os._exit(3)"), ("spawn", "sys.exit(3)")]
)
def test_script_that_exits_leaves_nothing_and_keeps_its_code(job: Job, state: str, ending: str) -> None:
    ended = job.run(f"{STATES[state]}{ending}\n")

    assert (ended.code, ended.stderr) == (3, "")
    assert job.left() == []


@pytest.mark.parametrize("state", ["idle", "call", "async_call", "spawn", "stream"])
def test_interrupted_script_leaves_nothing_and_shows_one_keyboard_interrupt(job: Job, state: str) -> None:
    ended = job.run(STATES[state] + FOR_EVER, signum=signal.SIGINT)

    assert ended.code == -signal.SIGINT
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert ended.stderr.endswith("KeyboardInterrupt\n"), ended.stderr
    assert job.left() == []
    assert ended.seconds < 3.0


@pytest.mark.parametrize(
    ("state", "signum"),
    [*((state, signal.SIGKILL) for state in STATES), ("idle", signal.SIGTERM), ("call", signal.SIGTERM)],
)
def test_killed_script_leaves_nothing_within_two_seconds(job: Job, state: str, signum: int) -> None:
    ended = job.run(STATES[state] + FOR_EVER, signum=signum)

    assert (ended.code, ended.stderr) == (-signum, "")
    assert len(ended.living) > 1
    assert job.left() == []


def test_interrupt_of_a_blocking_get_ends_the_wait(job: Job) -> None:
    ended = job.run(IN_CALL + "future.get()\n", signum=signal.SIGINT)

    assert ended.code == -signal.SIGINT
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert job.left() == []
    assert ended.seconds < 3.0


def test_interrupt_inside_a_with_block_stops_the_mesh_on_the_way_out(job: Job) -> None:
    body = "with this_host().spawn_procs({'rank': 2}) as procs:\n    procs.initialized.get(timeout=20)\n    ready()\n"
    ended = job.run(body + "    " + FOR_EVER, signum=signal.SIGINT)

    assert ended.code == -signal.SIGINT
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert job.left() == []


def test_script_that_handles_the_interrupt_can_go_on(job: Job) -> None:
    body = (
        f"procs, workers = start()\ntry:\n    ready()\n    {FOR_EVER}except KeyboardInterrupt:\n    pass\n"
        "print(len(workers.pid.call().get(timeout=10)), flush=True)\n"
    )
    ended = job.run(body, signum=signal.SIGINT)

    assert (ended.code, ended.stdout, ended.stderr) == (0, "ready\n2\n", "")
    assert job.left() == []


def test_controller_inside_asyncio_run_leaves_nothing(job: Job) -> None:
    body = """
async def main():
    async with this_host().spawn_procs({"rank": 2}) as procs:
        workers = procs.spawn("workers", Worker)
        print(len(await workers.pid.call()), flush=True)
        async for number in workers.slice(rank=0).numbers.call_one():
            if number == 3:
                break
    raise ValueError("inside the loop")

asyncio.run(main())
"""
    ended = job.run(body)

    assert (ended.code, ended.stdout) == (1, "2\n")
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert ended.stderr.endswith("ValueError: inside the loop\n")
    assert job.left() == []


def test_interrupt_inside_asyncio_run_leaves_nothing(job: Job) -> None:
    body = """
async def main():
    procs = this_host().spawn_procs({"rank": 2})
    workers = procs.spawn("workers", Worker)
    await workers.pid.call()
    ready()
    await workers.asleep.call(600)

asyncio.run(main())
"""
    ended = job.run(body, signum=signal.SIGINT)

    assert ended.code == -signal.SIGINT
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr
    assert "atexit" not in ended.stderr
    assert job.left() == []


def test_controller_in_a_thread_leaves_nothing(job: Job) -> None:
    body = """
def main():
    procs, workers = start()
    print(len(workers.pid.call().get(timeout=10)), flush=True)

thread = threading.Thread(target=main)
thread.start()
thread.join()
"""
    ended = job.run(body)

    assert (ended.code, ended.stdout, ended.stderr) == (0, "2\n", "")
    assert job.left() == []


def test_daemon_thread_blocked_in_a_call_does_not_disturb_the_end(job: Job) -> None:
    body = IN_CALL + "threading.Thread(target=future.exception, daemon=True).start()\n"
    ended = job.run(body)

    assert (ended.code, ended.stderr) == (0, "")
    assert job.left() == []
    assert ended.seconds < 3.0


def test_actors_in_the_controllers_own_process_end_with_it(job: Job) -> None:
    body = """
here = this_proc().spawn("here", Worker)
here.pid.call_one().get(timeout=10)
blocked = here.sleep.call_one(600)
ready()
"""
    ended = job.run(body)

    assert (ended.code, ended.stderr) == (0, "")
    assert job.left() == []


def test_script_that_only_imports_danaus_starts_nothing(job: Job) -> None:
    ended = job.run("print(sorted(thread.name for thread in threading.enumerate()), flush=True)\n")

    assert (ended.code, ended.stdout, ended.stderr) == (0, "['MainThread']\n", "")
    assert job.left() == []


def test_children_that_the_script_forks_neither_end_the_job_nor_outlive_their_own_end(job: Job) -> None:
    body = """
import multiprocessing
procs, workers = start()

def child(queue):
    queue.put(os.getpid())

context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=child, args=(queue,))
process.start()
process.join(10)
assert process.exitcode == 0, process.exitcode
pid = os.fork()
if pid == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
print(len(workers.pid.call().get(timeout=10)), flush=True)
"""
    ended = job.run(body)

    assert (ended.code, ended.stdout, ended.stderr) == (0, "2\n", "")
    assert job.left() == []


def test_forked_child_can_be_a_controller_of_its_own(job: Job) -> None:
    body = """
procs, workers = start(1)
pid = os.fork()
if pid == 0:
    own, its = start(1)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
print(len(workers.pid.call().get(timeout=10)), flush=True)
"""
    ended = job.run(body)

    assert (ended.code, ended.stdout, ended.stderr) == (0, "1\n", "")
    assert job.left() == []


def test_shutdown_context_ends_the_job_and_a_new_one_can_start(job: Job) -> None:
    body = """
for _ in range(2):
    procs, workers = start()
    pids = list(workers.pid.call().get(timeout=10))
    shutdown_context().get(timeout=1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
shutdown_context().get()
print(os.listdir(os.environ["DANAUS_SOCKET_DIR"]), [thread.name for thread in threading.enumerate()], flush=True)
"""
    ended = job.run(body)

    assert (ended.code, ended.stdout, ended.stderr) == (0, "[] ['MainThread']\n", "")
    assert job.left() == []


@pytest.mark.parametrize("signum", [None, signal.SIGKILL])
def test_children_of_user_code_in_a_proc_end_with_the_job(job: Job, signum: int | None) -> None:
    body = "procs, workers = start()\nworkers.leave_child.call().get(timeout=10)\nready()\n"
    ended = job.run(body if signum is None else body + FOR_EVER, signum=signum)

    assert ended.stderr == ""
    assert job.left() == []
    assert ended.seconds < 3.0


@pytest.mark.parametrize("signum", [None, signal.SIGINT, signal.SIGKILL])
def test_actors_are_cleaned_up_whichever_way_the_controller_ends(job: Job, signum: int | None) -> None:
    mark = job.directory / "cleaned"
    body = f"""
procs = this_host().spawn_procs({{"rank": 1}})
actor = procs.spawn("actor", WithCleanup, {str(mark)!r})
actor.ping.call_one().get(timeout=10)
ready()
"""
    job.run(body if signum is None else body + FOR_EVER, signum=signum)

    assert job.left() == []
    assert mark.read_text() == "None"
