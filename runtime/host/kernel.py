"""The few Linux calls that Python does not offer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Container

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int | bytes) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` dies; exit now if that has happened already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def default_action(signum: int) -> None:
    """Undo whatever handler a signal has; from any thread, which ``signal.signal`` does not allow."""
    _libc.signal(signum, ctypes.c_void_p(0))


def end_children() -> None:
    """Kill every child of this process, and what it inherits from them, until none is left."""
    while True:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def end_children_named(names: Collection[str], *, but: Container[int]) -> None:
    """Kill the children that :func:`set_process_name` gave one of ``names``, and what is inherited from them."""
    known = {name.encode()[:15] for name in names}
    while True:
        found = [child for child in _children() if child not in but and _process_name(child) in known]
        for child in found:
            os.kill(child, signal.SIGKILL)
        for child in found:
            os.waitpid(child, 0)
        if not found:
            return


def _children() -> list[int]:
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        # A thread may have ended meanwhile.
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            found += map(int, file.read().split())
    return found


def _process_name(pid: int) -> bytes:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
        return file.read().removesuffix(b"\n")
    return b""


def set_process_name(name: str) -> None:
    """Set what ``ps`` and ``top`` show; 15 characters are kept."""
    # Not by prctl, which would name the calling thread.
    with open("/proc/self/comm", "wb") as file:
        file.write(name.encode()[:15])


def num_threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))
