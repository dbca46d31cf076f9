"""A controller script in a process of its own, ended in some way, and what is left of it then.

The script, its processes and theirs carry the job's socket directory in their environment, by which they are found.
They tell that they are where a test wants them through a named pipe, so no test guesses with a sleep.
"""

from __future__ import annotations

import os
import re
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

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ALL_GONE_S = 2.0
"""The contract's limit, from the controller's end to the last process's."""

LIMIT_S = 15.0
"""How long a test waits for anything at all."""

STRICT = (sys.executable, "-X", "dev", "-W", "error")
"""The interpreter of a script, as strict as it gets."""

NOISE = re.compile(
    r"Exception ignored|Warning|was destroyed|never awaited|Fatal Python|danaus agent:|atexit|leaked|zmq\.error"
    r"|Assertion failed|Segmentation|Exception in thread|could not handle"
)
"""What nobody but an interpreter on its way down, or a runtime in disorder, writes."""

PRELUDE = """
import asyncio, atexit, os, signal, sys, threading, time
from danaus import Actor, Channel, concurrent_endpoint, endpoint, shutdown_context, this_host, this_proc


def ready(text="ready"):
    with open(os.environ["JOB_PIPE"], "w") as pipe:
        pipe.write(text + "\\n")


def wait_go():
    assert sys.stdin.readline() == "go\\n"


class Worker(Actor):
    @endpoint
    def pid(self):
        return os.getpid()

    @endpoint
    def sleep(self, seconds, tells=False):
        if tells:
            ready()
        time.sleep(seconds)

    @concurrent_endpoint
    async def asleep(self, seconds, tells=False):
        if tells:
            ready()
        await asyncio.sleep(seconds)


class Lingerer(Actor):
    @endpoint
    def ping(self):
        return None

    def __cleanup__(self, exc):
        ready("cleanup")
        time.sleep(60)


def start(ranks=2):
    procs = this_host().spawn_procs({"rank": ranks}, name="job")
    workers = procs.spawn("workers", Worker)
    workers.pid.call().get(timeout=20)
    return procs, workers


def start_lingerer():
    lingerer = this_host().spawn_procs(name="slow").spawn("lingerer", Lingerer)
    lingerer.ping.call_one().get(timeout=20)
    return lingerer


"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A script that has ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    """From the last signal to the end of the script."""

    @property
    def noise(self) -> list[str]:
        """Lines of its standard error that no user should see."""
        return [line for line in self.stderr.splitlines() if NOISE.search(line)]


class Job:
    """One controller script and everything that it starts.

    Args:
        directory: Where its files go.
        python: What comes before the script on the command line.
    """

    def __init__(self, directory: Path, python: Sequence[str] = STRICT) -> None:
        self.directory, self._python = directory, list(python)
        # Short: unix socket paths have some 100 characters.
        self.sockets = Path(tempfile.mkdtemp(prefix="dn"))
        self._popen: subprocess.Popen[str] | None = None
        self._pipe_path = self.sockets / "told"
        os.mkfifo(self._pipe_path)
        # Open for both, so that it never ends.
        self._pipe = os.open(self._pipe_path, os.O_RDWR | os.O_NONBLOCK)
        self._told = ""
        self._signal_s = 0.0

    @property
    def controller(self) -> int:
        """Pid of the script."""
        assert self._popen is not None
        return self._popen.pid

    def start(self, body: str, *, arguments: Sequence[str] = (), prelude: str = PRELUDE) -> None:
        """Start a script."""
        path = self.directory / "controller.py"
        path.write_text(prelude + body)
        env = {
            **os.environ,
            "DANAUS_SOCKET_DIR": str(self.sockets),
            "DANAUS_LOG_DIR": str(self.directory / "logs"),
            "JOB_PIPE": str(self._pipe_path),
            "IPYTHONDIR": str(self.directory / "ipython"),
        }
        self._signal_s = time.monotonic()
        self._popen = subprocess.Popen(
            [*self._python, *(arguments or [str(path)])],
            cwd=self.directory,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_told(self, text: str = "ready") -> None:
        """Wait until the script, or a process of it, has written ``text`` into the pipe."""
        deadline_s = time.monotonic() + LIMIT_S
        assert self._popen is not None
        while f"{text}\n" not in self._told:
            if not select.select([self._pipe], [], [], min(0.2, max(0.0, deadline_s - time.monotonic())))[0]:
                if self._popen.poll() is not None or time.monotonic() > deadline_s:
                    raise AssertionError(f"{text!r} not told: {self._outputs()}")
                continue
            self._told += os.read(self._pipe, 4096).decode()
        self._told = self._told.replace(f"{text}\n", "", 1)

    def type(self, text: str) -> None:
        """Write to the script's standard input."""
        assert self._popen is not None
        assert self._popen.stdin is not None
        self._popen.stdin.write(text)
        self._popen.stdin.flush()

    def signal(self, signum: int, pid: int | None = None) -> None:
        """Send a signal to the script, or to another process of the job."""
        self._signal_s = time.monotonic()
        os.kill(self.controller if pid is None else pid, signum)

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        """Wait for the script's end."""
        assert self._popen is not None
        try:
            stdout, stderr = self._popen.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_s:g} s: {self._stacks()} {self._outputs()}") from None
        return Ended(self._popen.returncode, stdout, stderr, time.monotonic() - self._signal_s)

    def run(self, body: str) -> Ended:
        """Run a script until it ends by itself."""
        self.start(body)
        return self.wait()

    def agent(self) -> int:
        """Pid of the host agent."""
        [pid] = [pid for pid in self.living() if _parent(pid) == self.controller and "host.agent" in _command(pid)]
        return pid

    def named(self, prefix: str) -> list[int]:
        """Pids of processes by the start of their name: ``danaus-zyg``, or that of a mesh."""
        return sorted(pid for pid, name in self.living().items() if name.startswith(prefix))

    def living(self) -> dict[int, str]:
        """Processes of this job that still run, by pid, with their names; zombies included."""
        mark = f"DANAUS_SOCKET_DIR={self.sockets}".encode()
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
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
        processes = [f"process {pid} {name} {_command(pid)}" for pid, name in self.living().items()]
        return processes + [f"file {path}" for path in self.sockets.rglob("*") if path != self._pipe_path]

    def close(self) -> None:
        """End what a failed test has left."""
        for pid in self.living():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._popen is not None:
            self._popen.communicate()
        os.close(self._pipe)
        shutil.rmtree(self.sockets, ignore_errors=True)

    def _stacks(self) -> str:
        spy = shutil.which("py-spy", path=os.path.dirname(sys.executable))
        if spy is None:
            return ""
        return subprocess.run(
            [spy, "dump", "--pid", str(self.controller)], capture_output=True, text=True, timeout=10, check=False
        ).stdout

    def _outputs(self) -> str:
        assert self._popen is not None
        self._popen.kill()
        return "\n".join(self._popen.communicate(timeout=LIMIT_S))


def open_job(directory: Path, python: Sequence[str] = STRICT) -> Iterator[Job]:
    """For a fixture: a job that is ended with the test."""
    job = Job(directory, python)
    try:
        yield job
    finally:
        # Also where a test that loops over it fails.
        job.close()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:300]
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _wait_end(pid: int, limit_s: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], limit_s)[0])
    finally:
        os.close(pidfd)
