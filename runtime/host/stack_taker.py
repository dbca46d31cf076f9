"""Takes the stacks of processes on this host without ever waiting: by py-spy, else by the processes' own handlers.

A shell around stacks.py for the agent's loop: children are watched by pidfd, everything has a time limit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .. import config
from .stacks import STACK_SIGNAL, Stacks, is_armed, parse_faulthandler, parse_py_spy, signal_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    Done: TypeAlias = Callable[[Stacks | None, str], None]
    """Gets the stacks, or None and the reason in words."""

_PRINT_S: Final = 0.1
"""Time for a process to print its stacks."""
_KILL_S: Final = 0.1
_MAX_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A process whose stacks are wanted."""

    pid: int
    path: str
    """File that it prints its stacks to."""
    thread: int
    """Id of the thread that its signal goes to, which has to be one of Python's."""
    names: Mapping[int, str]
    """Names of its threads, as far as they are known."""
    is_stopped: bool


class StackTaker:
    """Takes stacks, a few at a time.

    Args:
        limit_s: Time that py-spy gets.
        watch: Has a function called when a descriptor can be read.
        unwatch: Ends that.
    """

    def __init__(
        self, limit_s: float, *, watch: Callable[[int, Callable[[], object]], None], unwatch: Callable[[int], None]
    ) -> None:
        self._limit_s, self._watch, self._unwatch = limit_s, watch, unwatch
        self._py_spy = find_py_spy()
        self._spies: list[_Spy] = []
        self._prints: list[_Print] = []
        self._waiting: list[tuple[Subject, Done]] = []

    def take(self, subject: Subject, done: Done, *, now_s: float) -> None:
        """Take the stacks of ``subject``; ``done`` gets them, or None and the reason in words."""
        if self._py_spy is None:
            reason = "py-spy is not installed (pip install 'danaus[jobs]')"
            self._ask(subject, done, reason, now_s)
        elif len(self._spies) >= _MAX_AT_ONCE:
            self._waiting.append((subject, done))
        else:
            self._spy(self._py_spy, subject, done, now_s)

    def check(self, *, now_s: float) -> None:
        """Go on with whatever has come to its time limit."""
        for spy in [spy for spy in self._spies if now_s >= spy.limit_at_s]:
            spy.kill()
            spy.limit_at_s = now_s + _KILL_S
        ready = [each for each in self._prints if now_s >= each.read_at_s]
        self._prints = [each for each in self._prints if now_s < each.read_at_s]
        for each in ready:
            each.read()

    def next_check_s(self) -> float | None:
        """When :meth:`check` may have something to do."""
        times = [spy.limit_at_s for spy in self._spies] + [each.read_at_s for each in self._prints]
        return min(times, default=None)

    def close(self) -> None:
        """End what is under way; nobody hears of it."""
        for spy in self._spies:
            spy.kill()
            self._unwatch(spy.pidfd)
            spy.close()
        self._spies.clear()

    def _spy(self, py_spy: str, subject: Subject, done: Done, now_s: float) -> None:
        try:
            spy = _Spy(py_spy, subject.pid, now_s + self._limit_s)
        except OSError as error:
            self._ask(subject, done, f"py-spy could not be started: {error}", now_s)
            return
        self._spies.append(spy)
        self._watch(spy.pidfd, lambda: self._on_spied(spy, subject, done))

    def _on_spied(self, spy: _Spy, subject: Subject, done: Done) -> None:
        self._unwatch(spy.pidfd)
        self._spies.remove(spy)
        out, error = spy.close()
        now_s = time.monotonic()
        try:
            stacks = parse_py_spy(out)
        except ValueError:
            self._ask(subject, done, f"py-spy: {error}", now_s)
        else:
            done(stacks, "")
        if self._waiting:
            self.take(*self._waiting.pop(0), now_s=now_s)

    def _ask(self, subject: Subject, done: Done, reason: str, now_s: float) -> None:
        if subject.is_stopped:
            done(None, f"{reason}; a stopped process cannot print its stacks itself")
        elif not is_armed(subject.pid):
            done(None, f"{reason}; the process does not handle signal {STACK_SIGNAL} any more")
        else:
            size_bytes = _size_bytes(subject.path)
            if signal_thread(subject.pid, subject.thread, STACK_SIGNAL):
                self._prints.append(_Print(subject, size_bytes, now_s + _PRINT_S, reason, done))
            else:
                done(None, f"{reason}; its I/O thread has ended")


class _Spy:
    """One run of py-spy."""

    def __init__(self, py_spy: str, pid: int, limit_at_s: float) -> None:
        self.limit_at_s = limit_at_s
        self._out, self._error = os.memfd_create("py-spy-out"), os.memfd_create("py-spy-error")
        try:
            self._process = subprocess.Popen(  # noqa: S603  a path that was found, and a number
                [py_spy, "dump", "--nonblocking", "--json", "--full-filenames", "--pid", str(pid)],
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=self._error,
            )
        except OSError:
            self._close_files()
            raise
        self.pidfd = os.pidfd_open(self._process.pid)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> tuple[str, str]:
        """Reap it, which has ended or was killed; return what it printed, and why it failed."""
        code = self._process.wait()
        out, error = (os.pread(fd, 16 << 20, 0).decode(errors="replace") for fd in (self._out, self._error))
        self._close_files()
        os.close(self.pidfd)
        if code == -signal.SIGKILL:
            error = "did not end in time"
        reason = error.strip().partition("\n")[0].removeprefix("Error: ")
        return out, reason or f"exit code {code}"

    def _close_files(self) -> None:
        os.close(self._out)
        os.close(self._error)


class _Print:
    """A process that was asked to print its stacks."""

    def __init__(
        self,
        subject: Subject,
        offset_bytes: int,
        read_at_s: float,
        reason: str,
        done: Done,
    ) -> None:
        self.read_at_s = read_at_s
        self._subject, self._offset_bytes, self._reason, self._done = subject, offset_bytes, reason, done

    def read(self) -> None:
        """Read what is there by now."""
        try:
            with open(self._subject.path, encoding="utf-8", errors="replace") as file:
                file.seek(self._offset_bytes)
                stacks = parse_faulthandler(file.read(), self._subject.names)
        except (OSError, ValueError):
            self._done(None, f"{self._reason}; the process did not print its stacks either")
        else:
            self._done(stacks, "")


def find_py_spy() -> str | None:
    """Path of py-spy: what the settings say, beside this interpreter, or on PATH."""
    chosen = config.py_spy()
    if chosen is not None:
        return chosen or None
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("py-spy")


def _size_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
