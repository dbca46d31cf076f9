"""The stacks of all threads of a process, as seen from outside: what two tools print, read and put in one form.

`py-spy` names threads and says which one holds the interpreter lock. Where it cannot be had, the process prints its
stacks itself: `faulthandler`'s handler in C runs without the lock, on whichever thread gets the signal. A stopped
process runs no handlers.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import re
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STACK_SIGNAL: Final = signal.SIGRTMAX - 5
"""Has a process print its stacks. A real-time signal that neither libraries nor profilers are known to use."""

PR_SET_PTRACER: Final = 0x59616D61
_MAX_FRAMES: Final = 60
_BEGINS: Final = {("handler.py", "run_sync"), ("handler.py", "run_async"), ("runner.py", "_construct")}
_RUNTIME: Final = os.path.dirname(os.path.dirname(__file__)) + os.sep
_THREAD: Final = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)(?: \[(.*)\])? \(most recent call first\):")
_FRAME: Final = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')


@dataclass(frozen=True, slots=True)
class Frame:
    """One call of a stack."""

    file: str
    line: int
    function: str

    @property
    def begins_user_code(self) -> bool:
        """Whether what it calls is the user's: frames further out are the runtime's, and of no use to anybody."""
        return (os.path.basename(self.file), self.function.rpartition(".")[2]) in _BEGINS

    @property
    def is_plumbing(self) -> bool:
        """Whether it is the runtime's own, or what starts threads and processes."""
        return (
            self.file.startswith(_RUNTIME) or self.file == "<string>" or os.path.basename(self.file) == "threading.py"
        )

    @property
    def excuses_silence(self) -> bool:
        """Whether code below this frame may hold the interpreter lock for long: an import, or the start of CUDA."""
        return self.file.startswith("<frozen importlib") or self.function.rpartition(".")[2] == "_lazy_init"


@dataclass(frozen=True, slots=True)
class ThreadStack:
    """One thread; frames innermost first."""

    name: str
    frames: tuple[Frame, ...]
    owns_gil: bool = False
    is_active: bool = False

    @property
    def excuses_silence(self) -> bool:
        """Whether it is inside something that may take long."""
        return any(frame.excuses_silence for frame in self.frames)

    def _told_frames(self) -> tuple[Frame, ...]:
        """Without what the runtime did to get there."""
        entry = next((index for index, frame in enumerate(self.frames) if frame.begins_user_code), 0)
        frames = self.frames[: entry or None]
        while len(frames) > 1 and frames[-1].is_plumbing:
            frames = frames[:-1]
        return frames

    def __str__(self) -> str:
        title = f"thread {self.name}" + (" (holds the interpreter lock)" if self.owns_gil else "") + ":"
        frames = self._told_frames()
        shown = frames[:_MAX_FRAMES]
        lines = [f'  File "{frame.file}", line {frame.line}, in {frame.function}' for frame in reversed(shown)]
        if len(frames) > len(shown):
            lines.insert(0, f"  ({len(frames) - len(shown)} frames further out)")
        return "\n".join([title, *lines])


@dataclass(frozen=True, slots=True)
class Stacks:
    """Every thread of a process, the one that holds the interpreter lock first."""

    threads: tuple[ThreadStack, ...]

    @property
    def gil_owner(self) -> ThreadStack | None:
        """The thread that holds the interpreter lock, where that is known."""
        return next((thread for thread in self.threads if thread.owns_gil), None)

    @property
    def excuses_silence(self) -> bool:
        """Whether the threads that keep the others from running import modules or start CUDA."""
        if self.gil_owner is not None:
            return self.gil_owner.excuses_silence
        active = [thread for thread in self.threads if thread.is_active]
        return any(thread.excuses_silence for thread in active)

    def __str__(self) -> str:
        return "\n".join(map(str, self.threads))


def parse_py_spy(text: str) -> Stacks:
    """Read what ``py-spy dump --json`` printed.

    Raises:
        ValueError: It is something else.
    """
    try:
        threads = [
            ThreadStack(
                name=each["thread_name"] or str(each["os_thread_id"]),
                frames=tuple(Frame(frame["filename"], frame["line"], frame["name"]) for frame in each["frames"]),
                owns_gil=each["owns_gil"],
                is_active=each["active"],
            )
            for each in json.loads(text)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not what py-spy prints as JSON: {text[:80]!r}") from error
    if not threads:
        raise ValueError("py-spy has found no thread")
    return _ordered(threads)


def parse_faulthandler(text: str, names: Mapping[int, str]) -> Stacks:
    """Read what :mod:`faulthandler` printed; which thread holds the interpreter lock is not known there.

    Args:
        text: What it printed.
        names: Names of the threads that are known, by what ``threading.get_ident`` gives there.

    Raises:
        ValueError: It holds no stack.
    """
    threads: list[ThreadStack] = []
    frames: list[Frame] = []
    name = ""
    for line in [*text.splitlines(), ""]:
        thread, frame = _THREAD.match(line), _FRAME.match(line)
        if frame is not None:
            number = frame[2]
            frames.append(Frame(frame[1], int(number) if number.isdigit() else 0, frame[3]))
        elif name and (thread is not None or not line):
            threads.append(ThreadStack(name, tuple(frames), is_active=True))
            name, frames = "", []
        if thread is not None:
            name = names.get(int(thread[1], 16)) or thread[2] or f"0x{thread[1].lstrip('0')}"
    if not threads:
        raise ValueError(f"no stack in what faulthandler printed: {text[:80]!r}")
    return _ordered(threads)


def _ordered(threads: Sequence[ThreadStack]) -> Stacks:
    return Stacks(tuple(sorted(threads, key=lambda thread: (not thread.owns_gil, thread.name == "danaus-io"))))


# In the process that is looked at:


def stacks_file(socket_path: str) -> str:
    """Where the process with this socket prints its stacks."""
    return f"{socket_path}.stacks"


def arm(path: str, *, tracer: int) -> None:
    """Let this process print its stacks to ``path`` when it gets STACK_SIGNAL, and let ``tracer`` look at it.

    Args:
        path: A private file, made by this call and removed by whoever reads it.
        tracer: Process that may read this one's memory, as may its children, where Yama restricts that.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True)
    # Fails where there is no Yama, and nothing is restricted.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, tracer, 0, 0, 0)


# In the agent:


def is_armed(pid: int) -> bool:
    """Whether a process handles STACK_SIGNAL; else the signal would kill it."""
    return bool(int(read_status(pid).get("SigCgt", "0"), 16) >> (STACK_SIGNAL - 1) & 1)


def is_traced(pid: int) -> bool:
    """Whether a debugger is attached to a process."""
    return read_status(pid).get("TracerPid", "0") != "0"


def read_status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; empty where the process is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            pairs: list[Any] = [line.partition(":") for line in file]
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in pairs}


def read_state(pid: int) -> str:
    """The letter of a process's state; empty where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1].decode("ascii")
    except OSError:
        return ""


def signal_thread(pid: int, thread: int, signum: int) -> bool:
    """Send a signal to one thread; return whether it was there."""
    return ctypes.CDLL(None).tgkill(pid, thread, signum) == 0
