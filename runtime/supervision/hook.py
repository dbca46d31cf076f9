"""The last resort: what happens to a script when a rank is lost and nobody has handled it."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from typing import TYPE_CHECKING

from ..interrupts import END_SIGNAL

if TYPE_CHECKING:
    from types import FrameType

    from ..failure import MeshFailure

_is_installed = False


def unhandled_fault_hook(failure: MeshFailure) -> None:
    """End the script with exit code 1, because a loss went up the whole tree and nobody has handled it.

    Called in the controller, on a thread of its own, once for each root cause, after its report was printed. Replace it
    by assignment, ``danaus.unhandled_fault_hook = function``; to return is to ignore the failure. It is not called
    where a call of the script itself failed by the loss: the exception says so then. An interactive session goes on.

    Args:
        failure: What was lost, how, and from what it followed.
    """
    advice = "declare restart=danaus.Restart(), define __supervise__ in the owner, or set danaus.unhandled_fault_hook"
    if hasattr(sys, "ps1"):
        sys.stderr.write(f"danaus: nobody handles the loss of {failure.who}; this session goes on ({advice})\n")
        return
    sys.stderr.write(f"danaus: nobody handles the loss of {failure.who}; the script ends with exit code 1 ({advice})\n")
    end_script()


def call_hook(failure: MeshFailure) -> None:
    """Call whatever ``danaus.unhandled_fault_hook`` is now."""
    package = sys.modules[__name__.partition(".")[0]]
    package.unhandled_fault_hook(failure)


def end_script() -> None:
    """Raise SystemExit(1) on the main thread."""
    main = threading.main_thread()
    if not main.is_alive() or main.ident is None:
        return
    if _is_installed:
        signal.pthread_kill(main.ident, END_SIGNAL)
    else:
        # Arrives with the next bytecode; what blocks in C does not see it.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main.ident), ctypes.py_object(SystemExit))


def install() -> None:
    """Prepare the main thread for :func:`end_script`; does nothing on other threads, or where the signal is taken."""
    global _is_installed
    if threading.current_thread() is threading.main_thread() and signal.getsignal(END_SIGNAL) is signal.SIG_DFL:
        signal.signal(END_SIGNAL, _raise_exit)
        _is_installed = True


def _raise_exit(_signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(1)
