"""Runs a file or a module as `__main__`, and ends it, as plain Python does.

The script's module stays in place after it has returned: threads and exit hooks find their globals.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import os
import runpy
import signal
import sys
import threading
import time
import types
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a file as `__main__`.

    Raises:
        SystemExit: It cannot be opened, or it has ended so.
    """
    sys.argv[:] = [path, *arguments]
    if os.path.isdir(path) or _is_zip(path):
        # runpy puts the folder or archive first on the path.
        del sys.path[:1]
        runpy.run_path(path, run_name="__main__")
        return
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise SystemExit(f"danaus run: cannot open {path!r}: {error.strerror}") from error
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__dict__["__builtins__"] = builtins
    module.__dict__["__cached__"] = None
    sys.modules["__main__"] = module
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102  the user's script


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module as `__main__`, found from the current directory as by `python -m`."""
    sys.argv[:] = [name, *arguments]
    sys.path[0] = os.getcwd()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def without_launcher(where: TracebackType | None) -> TracebackType | None:
    """Skip the frames of this file and of runpy at a traceback's start, which plain Python would not have."""
    while where is not None and where.tb_frame.f_code.co_filename in {__file__, runpy.__file__, "<frozen runpy>"}:
        where = where.tb_next
    return where


def exit_code_of(ended: SystemExit) -> int:
    """Return the code with which Python would exit; print what it would print."""
    if ended.code is None:
        return 0
    if isinstance(ended.code, int):
        return ended.code & 0xFF
    sys.stderr.write(f"{ended.code}\n")
    return 1


def run_to_the_end(run: Callable[[], object], *, follows_within_s: Callable[[BaseException], float]) -> None:
    """Run a script and all that Python does at its end; return where that is success, else exit this process.

    What it raises is printed as Python prints it. A process whose script is done goes on to serve the runtime, for
    which one that exits is lost, whatever its code.

    Args:
        run: Runs the script.
        follows_within_s: How long to wait with an error, which may only be what the loss of another rank has led to:
            that one ends this process meanwhile, so that what is shown is the cause.
    """
    with _SoftExit():
        try:
            code = _code_of(run, follows_within_s)
            _run_exit_hooks()
        except _HardExit:
            # Else they would be called at the end of the process.
            atexit._clear()
            code = 0
    _flush()
    if code:
        os._exit(code)


def _code_of(run: Callable[[], object], follows_within_s: Callable[[BaseException], float]) -> int:
    try:
        try:
            run()
        except Exception as error:
            time.sleep(follows_within_s(error))
            raise
    except SystemExit as ended:
        return exit_code_of(ended)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except _HardExit:
        raise
    except BaseException as error:  # noqa: BLE001  this is where a script's errors end
        own = without_launcher(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(own), own)
        return 1
    return 0


class _HardExit(BaseException):
    """The script has called ``os._exit(0)``."""


class _SoftExit:
    """Has ``os._exit(0)`` of this process's main thread raise _HardExit: scripts use it to be done at once."""

    def __enter__(self) -> None:
        self._exit, pid = os._exit, os.getpid()

        def leave(status: int) -> NoReturn:
            if status == 0 and os.getpid() == pid and threading.current_thread() is threading.main_thread():
                raise _HardExit
            self._exit(status)

        os._exit = leave

    def __exit__(self, *_error: object) -> None:
        os._exit = self._exit


def _run_exit_hooks() -> None:
    """Wait for the threads that Python would wait for at its end, then call what it would call."""
    # Private, and the only way to have the workers of executors end.
    hooks: list[Any] = getattr(threading, "_threading_atexits", [])
    for hook in reversed(hooks):
        hook()
    hooks.clear()
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    atexit._run_exitfuncs()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A script may have closed or replaced it.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _is_zip(path: str) -> bool:
    import zipfile

    return os.path.isfile(path) and zipfile.is_zipfile(path)
